"""When a curve rises and when it has come to rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class RiseAndPlateau:
    """How a positive quantity behaves before and after the training accuracy has reached its maximum.

    Attributes:
        t_star: First epoch whose accuracy is within ``slack`` of the maximum.
        spearman: Rank correlation of quantity and epoch up to and including ``t_star``; nan with fewer than three points.
        slope_before: Mean slope of the logarithm from the first epoch to ``t_star``, per epoch.
        slope_after: Least-squares slope of the logarithm from ``t_star`` on, per epoch; nan with fewer than three points.
    """

    t_star: float
    spearman: float
    slope_before: float
    slope_after: float

    @property
    def slope_ratio(self) -> float:
        """|slope after| / |slope before|: near 0 for a plateau."""
        return abs(self.slope_after) / abs(self.slope_before) if self.slope_before else math.nan


def rise_and_plateau(
    epoch: Sequence[float], value: Sequence[float], accuracy: Sequence[float], slack: float = 0.005
) -> RiseAndPlateau:
    """Measure rise and plateau of ``value`` around the first epoch whose ``accuracy`` is within ``slack`` of its maximum.

    Args:
        epoch: Ascending times.
        value: Positive quantity at these times.
        accuracy: Training accuracy at these times, a fraction.
        slack: Fraction below the maximum that counts as the maximum.

    Raises:
        ValueError: If lengths differ or a value is not positive and finite.
    """
    t, v, a = (np.asarray(s, dtype=float) for s in (epoch, value, accuracy))
    if not len(t) == len(v) == len(a) > 1:
        msg = f"epoch, value and accuracy must have the same length, at least 2. Got {len(t)}, {len(v)} and {len(a)}."
        raise ValueError(msg)
    if not (np.isfinite(v) & (v > 0)).all():
        msg = f"value must be positive and finite. Got {v[~(np.isfinite(v) & (v > 0))][0]}."
        raise ValueError(msg)
    star = int(np.argmax(a >= a.max() - slack))
    before, after = slice(0, star + 1), slice(star, None)
    spearman = float(pd.Series(t[before]).corr(pd.Series(v[before]), method="spearman")) if star >= 2 else math.nan
    rise = float(np.log(v[star] / v[0]) / (t[star] - t[0])) if star else math.nan
    rest = float(np.polyfit(t[after], np.log(v[after]), 1)[0]) if len(t) - star >= 3 else math.nan
    return RiseAndPlateau(float(t[star]), spearman, rise, rest)


def smallest_rank_correlation(curves: Sequence[Sequence[float]]) -> float:
    """Smallest Spearman rank correlation between any two curves sampled at the same times: 1 when all order the times alike.

    Raises:
        ValueError: If there are fewer than two curves, their lengths differ, or a curve is constant or not finite.
    """
    lengths = {len(c) for c in curves}
    if len(curves) < 2 or len(lengths) != 1:
        msg = f"At least two curves of one length are required. Got {len(curves)} of lengths {sorted(lengths)}."
        raise ValueError(msg)
    for curve in curves:
        if not np.isfinite(curve).all() or len(set(curve)) == 1:
            msg = f"A curve must be finite and not constant. Got one from {min(curve)} to {max(curve)}."
            raise ValueError(msg)
    return min(float(pd.Series(a).corr(pd.Series(b), method="spearman")) for a, b in combinations(map(list, curves), 2))
