"""Functions of the step: learning rates, the time that steps cover, and the steps at which to measure."""

import math

import numpy as np

from ntklib.text import check_known

SCHEDULES = ("constant", "cosine", "cosine_7_16", "step")


def learning_rate(schedule: str, lr: float, step: int, total_steps: int) -> float:
    r"""Learning rate of step ``step`` (0-based) of ``total_steps``.

    ============== =======================================================================================================
    constant       ``lr``
    cosine         ``lr/2 (1 + cos(pi step/total_steps))``: falls to nearly 0; one period without restart (Loshchilov &
                   Hutter 2017, arXiv:1608.03983v5, Eq. 5)
    cosine_7_16    ``lr cos(7 pi step/(16 total_steps))``: falls to nearly 0.195 lr (Sohn et al. 2020, arXiv:2001.07685v2,
                   section 2.4)
    step           ``lr``, a tenth of it after half and a hundredth after three quarters of the steps, as at epochs 80 and 120 of
                   160 (He et al. 2016, arXiv:1512.03385v1, section 4.2, at 32k and 48k of 64k steps)
    ============== =======================================================================================================

    All are updated every step and have no warm-up.

    Raises:
        ValueError: If the schedule is unknown.
    """
    check_known("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return lr
    if schedule == "cosine_7_16":
        return lr * math.cos(7 * math.pi * step / (16 * total_steps))
    if schedule == "step":
        return lr / 10 ** ((2 * step >= total_steps) + (4 * step >= 3 * total_steps))
    return 0.5 * lr * (1 + math.cos(math.pi * step / total_steps))


def gradient_flow_time(schedule: str, lr: float, momentum: float, total_steps: int) -> np.ndarray:
    r"""Time of the gradient flow that as many steps of SGD with momentum cover, ``[total_steps + 1]``, from 0.

    .. math:: t_s = \sum_{j < s} \eta_j \sum_{i \le j} \mu^{j - i}
              = \sum_{j < s} \eta_j \, \frac{1 - \mu^{j + 1}}{1 - \mu}

    Under a constant gradient g the parameters have moved by exactly -t_s g after s steps. With a constant rate and many steps it
    is lr s / (1 - momentum); the first 1/(1 - momentum) steps, in which the velocity builds up, cover less.

    Args:
        schedule: See ``learning_rate``.
        lr: Learning rate at step 0.
        momentum: mu in [0, 1), undamped as in ``sgd``.
        total_steps: Steps of the whole run.

    Raises:
        ValueError: If the schedule is unknown or the momentum is not in [0, 1).
    """
    if not 0 <= momentum < 1:
        msg = f"momentum must be in [0, 1). Got {momentum}."
        raise ValueError(msg)
    steps = np.arange(total_steps)
    rates = np.array([learning_rate(schedule, lr, int(s), total_steps) for s in steps])
    return np.concatenate([[0.0], np.cumsum(rates * (1 - momentum ** (steps + 1)) / (1 - momentum))])


def measured_steps(steps: int, every: int, early: int = 0) -> list[int]:
    """Return steps at which to measure: 0, the multiples of ``every``, the last one, and ``early`` between 0 and ``every``.

    The early ones are spaced evenly on a logarithmic axis and rounded down; those that coincide count once.

    Raises:
        ValueError: If ``steps`` or ``every`` is below 1, or ``early`` below 0.
    """
    if steps < 1 or every < 1 or early < 0:
        msg = f"steps and every must be at least 1, early at least 0. Got {steps}, {every} and {early}."
        raise ValueError(msg)
    first = {int(every ** (k / early)) for k in range(early)}
    return sorted(s for s in {0, steps, *range(0, steps, every), *first} if s <= steps)


def log_steps(steps: int, num: int, first: int = 1) -> list[int]:
    """Steps 0 and ``first`` to ``steps``, evenly spaced on a logarithmic axis and at most ``num`` after step 0.

    Steps that would coincide after rounding are left out.

    Raises:
        ValueError: If a number is below 1, or ``first`` beyond ``steps``.
    """
    if num < 1 or not 1 <= first <= steps:
        msg = f"num must be at least 1, and first between 1 and steps = {steps}. Got {num} and {first}."
        raise ValueError(msg)
    return [0, *sorted({round(float(s)) for s in np.geomspace(first, steps, num)} | {steps})]
