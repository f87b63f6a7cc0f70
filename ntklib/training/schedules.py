"""Learning-rate schedules as functions of the step."""

import math

import numpy as np

from ntklib.text import unknown

SCHEDULES = ("constant", "cosine", "step")


def learning_rate(schedule: str, lr: float, step: int, total_steps: int) -> float:
    r"""Learning rate of step ``step`` (0-based): ``lr``, or ``lr/2 (1 + cos(pi step/total_steps))``, or a staircase.

    ``"step"`` divides ``lr`` by 10 after half and again after three quarters of the steps, as at epochs 80 and 120 of 160 (He et
    al. 2016, arXiv:1512.03385v1, section 4.2, at 32k and 48k of 64k steps). The cosine is updated every step, falls from ``lr`` to
    nearly 0 and has no warm-up or restart (Loshchilov & Hutter 2017, arXiv:1608.03983v5, Eq. 5 with one period).

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(unknown("schedule", schedule, SCHEDULES))
    if schedule == "constant":
        return lr
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
