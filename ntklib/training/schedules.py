"""Learning-rate schedules as functions of the step."""

import math

from ntklib.text import unknown

SCHEDULES = ("constant", "cosine")


def learning_rate(schedule: str, lr: float, step: int, total_steps: int) -> float:
    r"""Learning rate of step ``step`` (0-based): ``lr``, or the half cosine ``lr/2 (1 + cos(pi step/total_steps))``.

    The cosine is updated every step, falls from ``lr`` to nearly 0 and has no warm-up or restart (Loshchilov & Hutter 2017,
    arXiv:1608.03983v5, Eq. 5 with one period).

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(unknown("schedule", schedule, SCHEDULES))
    if schedule == "constant":
        return lr
    return 0.5 * lr * (1 + math.cos(math.pi * step / total_steps))
