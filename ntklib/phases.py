"""When a curve rises, when it has come to rest, and windows in which one quantity rests while another moves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ntklib.text import unknown


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
        """Size of the slope after over the size of the slope before: near 0 for a plateau."""
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
    _log(v)
    star = int(np.argmax(a >= a.max() - slack))
    before, after = slice(0, star + 1), slice(star, None)
    spearman = float(pd.Series(t[before]).corr(pd.Series(v[before]), method="spearman")) if star >= 2 else math.nan
    rise = float(np.log(v[star] / v[0]) / (t[star] - t[0])) if star else math.nan
    rest = float(np.polyfit(t[after], np.log(v[after]), 1)[0]) if len(t) - star >= 3 else math.nan
    return RiseAndPlateau(float(t[star]), spearman, rise, rest)


def smallest_rank_correlation(curves: Sequence[Sequence[float]]) -> float:
    """Smallest Spearman rank correlation between any two curves sampled at the same times: 1 when all order the times alike.

    A constant curve has no order: the result is nan.

    Raises:
        ValueError: If there are fewer than two curves, their lengths differ, or a value is not finite.
    """
    lengths = {len(c) for c in curves}
    if len(curves) < 2 or len(lengths) != 1:
        msg = f"At least two curves of one length are required. Got {len(curves)} of lengths {sorted(lengths)}."
        raise ValueError(msg)
    if not all(np.isfinite(c).all() for c in curves):
        msg = "Curves must be finite. Got one that is not: leave diverged runs out."
        raise ValueError(msg)
    if any(len(set(c)) == 1 for c in curves):
        return math.nan
    return min(float(pd.Series(a).corr(pd.Series(b), method="spearman")) for a, b in combinations(map(list, curves), 2))


def settling_time(epoch: Sequence[float], value: Sequence[float], *, tolerance: float = 0.1, measure: str = "log") -> float:
    """Return the first time from which on a quantity stays within ``tolerance`` of its final value.

    Args:
        epoch: Ascending times.
        value: The quantity at these times; positive for ``"log"``.
        tolerance: Largest deviation, exclusive: of the logarithm, or as a fraction of the range (largest minus smallest value).
        measure: ``"log"`` or ``"range"``.

    Raises:
        ValueError: If lengths differ, a value is not finite (and positive for ``"log"``), or the measure is unknown.
    """
    t, v = np.asarray(epoch, dtype=float), np.asarray(value, dtype=float)
    if not len(t) == len(v) >= 1:
        msg = f"epoch and value must have the same length, at least 1. Got {len(t)} and {len(v)}."
        raise ValueError(msg)
    if measure not in ("log", "range"):
        raise ValueError(unknown("measure", measure, ("log", "range")))
    if not np.isfinite(v).all():
        msg = f"value must be finite. Got {v[~np.isfinite(v)][0]}."
        raise ValueError(msg)
    scaled, unit = (_log(v), 1.0) if measure == "log" else (v, float(np.ptp(v)) or 1.0)
    away = np.abs(scaled - scaled[-1]) / unit
    outside = np.flatnonzero(away >= tolerance)
    return float(t[outside[-1] + 1]) if len(outside) else float(t[0])


@dataclass(frozen=True)
class SignTest:
    """A paired comparison by sign.

    Attributes:
        smaller: Pairs whose first number is the smaller one.
        larger: Pairs whose first number is the larger one.
        ties: Pairs of equal numbers, which the test leaves out.
    """

    smaller: int
    larger: int
    ties: int

    @property
    def p_value(self) -> float:
        """One-sided p-value of "the first is not smaller", by the binomial distribution over untied pairs; 1 when all are tied."""
        decided = self.smaller + self.larger
        return float(binomtest(self.smaller, decided, 0.5, alternative="greater").pvalue) if decided else 1.0

    @property
    def share(self) -> tuple[float, float]:
        """Share of untied pairs whose first number is smaller, and its standard error, by the rule of "plus four".

        Two pairs of either kind are added before counting (Agresti & Coull 1998), so that two standard errors on either side are
        about a 95 % interval even for a handful of pairs that all agree.
        """
        n = self.smaller + self.larger + 4
        share = (self.smaller + 2) / n
        return share, math.sqrt(share * (1 - share) / n)


def sign_test(first: Sequence[float], second: Sequence[float]) -> SignTest:
    """Compare paired numbers by sign; small p-values say that the first ones are smaller.

    Raises:
        ValueError: If lengths differ.
    """
    if len(first) != len(second):
        msg = f"Pairs are needed, so both must have the same length. Got {len(first)} and {len(second)}."
        raise ValueError(msg)
    signs = [(a > b) - (a < b) for a, b in zip(first, second, strict=True)]
    return SignTest(signs.count(-1), signs.count(1), signs.count(0))


@dataclass(frozen=True)
class Window:
    """A stretch of training, and the largest value of what was looked for in it.

    Attributes:
        start: First time.
        end: Last time; equal to ``start`` when no longer stretch meets the condition.
        value: What was maximised; 0 for a stretch of one time.
    """

    start: float
    end: float
    value: float


def complementary_windows(
    epoch: Sequence[float],
    trace: Sequence[float],
    distance: np.ndarray,
    *,
    max_distance: float = 0.01,
    max_log_trace: float = 0.05,
) -> tuple[Window, Window]:
    """Find where the direction of a kernel is frozen while its trace moves, and where it is the other way round.

    A window is a run of successive times. In the first kind all pairwise distances within it are below ``max_distance``, and the
    value is the change of log trace from start to end, as a size. In the second kind the largest and the smallest log trace within
    it differ by less than ``max_log_trace``, and the value is the distance of the kernels at start and end. Of each kind the window
    of largest value is returned, the earliest one of equals.

    Args:
        epoch: Ascending times.
        trace: Positive trace at these times.
        distance: Pairwise kernel distances S, symmetric, ``[len(epoch), len(epoch)]``.
        max_distance: Bound below which the direction counts as frozen.
        max_log_trace: Bound below which the trace counts as at rest.

    Returns:
        The window with frozen direction and the window with resting trace.

    Raises:
        ValueError: If shapes do not fit, or a trace is not positive and finite.
    """
    t, v, s = (np.asarray(a, dtype=float) for a in (epoch, trace, distance))
    if not (len(t) == len(v) >= 1 and s.shape == (len(t), len(t))):
        msg = f"distance must be square, with one row per epoch and trace. Got {len(t)} epochs, {len(v)} traces, {s.shape}."
        raise ValueError(msg)
    log = _log(v)
    frozen = turning = Window(float(t[0]), float(t[0]), 0.0)
    for i in range(len(t)):
        for j in range(i + 1, len(t)):
            part = slice(i, j + 1)
            moved, turned = abs(float(log[j] - log[i])), float(s[i, j])
            if s[part, part].max() < max_distance and moved > frozen.value:
                frozen = Window(float(t[i]), float(t[j]), moved)
            if np.ptp(log[part]) < max_log_trace and turned > turning.value:
                turning = Window(float(t[i]), float(t[j]), turned)
    return frozen, turning


def _log(value: np.ndarray) -> np.ndarray:
    """Logarithm of positive, finite values."""
    good = np.isfinite(value) & (value > 0)
    if not good.all():
        msg = f"value must be positive and finite. Got {value[~good][0]}."
        raise ValueError(msg)
    return np.log(value)


def pairwise_distances(history: pd.DataFrame, split: str, steps: Sequence[int]) -> np.ndarray:
    """Return the symmetric matrix of logged kernel distances of one run between the given steps, 0 on the diagonal.

    Args:
        history: Tidy frame of one run, with rows of the quantity ``distance`` whose ``layer`` is the earlier step as text.
        split: Which rows.
        steps: Steps, in the order of rows and columns.

    Raises:
        ValueError: If a pair was not logged.
    """
    rows = pd.DataFrame(history[(history["quantity"] == "distance") & (history["split"] == split)])
    found = {(int(a), int(b)): float(v) for a, b, v in zip(rows["layer"], rows["step"], rows["value"], strict=True)}
    matrix = np.zeros((len(steps), len(steps)))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps[:i]):
            pair = (min(a, b), max(a, b))
            if pair not in found:
                msg = f"The distance of every two steps must have been logged. Got none for steps {pair[0]} and {pair[1]}."
                raise ValueError(msg)
            matrix[i, j] = matrix[j, i] = found[pair]
    return matrix


def first_time(time: Sequence[float], value: Sequence[float], threshold: float) -> float:
    """Return the first time at which a quantity is at least ``threshold``; nan if it never is.

    Raises:
        ValueError: If lengths differ.
    """
    t, v = np.asarray(time, dtype=float), np.asarray(value, dtype=float)
    if len(t) != len(v):
        msg = f"time and value must have the same length. Got {len(t)} and {len(v)}."
        raise ValueError(msg)
    reached = np.flatnonzero(v >= threshold)
    return float(t[reached[0]]) if len(reached) else math.nan


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of the pairs of which both are finite; nan for fewer than three or without variation.

    Args:
        first: Numbers.
        second: As many others.
    """
    pairs = np.array([(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return math.nan
    ranks = pd.DataFrame(pairs).rank().to_numpy()
    return float(np.corrcoef(ranks.T)[0, 1])


def partial_rank_correlation(a: Sequence[float], b: Sequence[float], given: Sequence[float]) -> float:
    r"""Return the rank correlation of two quantities at given third one.

    .. math:: \rho_{ab \cdot c} = \frac{\rho_{ab} - \rho_{ac} \rho_{bc}}{\sqrt{(1 - \rho_{ac}^2)(1 - \rho_{bc}^2)}}

    with Spearman's correlations: that of the residuals of the ranks of a and b after linear regression on the ranks of c. Nan where
    a quantity is constant or a perfect function of c.

    Raises:
        ValueError: If lengths differ or a value is not finite.
    """
    columns = [np.asarray(c, dtype=float) for c in (a, b, given)]
    if len({len(c) for c in columns}) != 1 or not all(np.isfinite(c).all() for c in columns):
        msg = f"Three finite sequences of one length are required. Got lengths {[len(c) for c in columns]}."
        raise ValueError(msg)
    rho = pd.DataFrame(dict(enumerate(columns))).corr(method="spearman").to_numpy()
    rest = (1 - rho[0, 2] ** 2) * (1 - rho[1, 2] ** 2)
    return float((rho[0, 1] - rho[0, 2] * rho[1, 2]) / math.sqrt(rest)) if rest > 1e-12 else math.nan


@dataclass(frozen=True)
class FallAndRise:
    """How far a positive quantity falls to its minimum and rises from there.

    Attributes:
        minimum_at: Time of the minimum as a fraction of the last time; the first of equals.
        fall: Logarithm of the first value over the minimum, at least 0.
        rise: Logarithm of the last value over the minimum, at least 0.
    """

    minimum_at: float
    fall: float
    rise: float


def fall_and_rise(step: Sequence[float], value: Sequence[float], last: float) -> FallAndRise:
    """Measure the fall and the rise of a positive quantity.

    Args:
        step: Ascending times.
        value: Positive quantity at these times.
        last: Duration of the whole run, in the unit of ``step``.

    Raises:
        ValueError: If lengths differ, there is no value, or one is not positive and finite.
    """
    t, v = np.asarray(step, dtype=float), np.asarray(value, dtype=float)
    if not len(t) == len(v) >= 1:
        msg = f"step and value must have the same length, at least 1. Got {len(t)} and {len(v)}."
        raise ValueError(msg)
    log, low = _log(v), int(np.argmin(v))
    return FallAndRise(float(t[low] / last), float(log[0] - log[low]), float(log[-1] - log[low]))


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of the power law y ~ x^p, the least-squares slope of log y on log x; nan with fewer than two different x.

    Raises:
        ValueError: If lengths differ or a value is not positive and finite.
    """
    a, b = _log(np.asarray(x, dtype=float)), _log(np.asarray(y, dtype=float))
    if len(a) != len(b):
        msg = f"x and y must have the same length. Got {len(a)} and {len(b)}."
        raise ValueError(msg)
    if len(a) < 2 or np.ptp(a) == 0:
        return math.nan
    away = a - a.mean()
    return float(away @ b / (away @ away))


def residual_rank_correlation(a: Sequence[float], b: Sequence[float], given: Sequence[float]) -> float:
    r"""Return Spearman's correlation of what is left of log a and log b after linear regression of each on log c.

    .. math:: \rho ( \log a - \alpha_0 - \alpha_1 \log c , \; \log b - \beta_0 - \beta_1 \log c )

    It does not change when a or b is multiplied by a power of c. Unlike ``partial_rank_correlation``, it sees a common deviation
    from a power law also where all three quantities order the times alike, as when everything falls. Nan with fewer than four
    times, where c is constant, and where a or b is a power of c up to rounding.

    Raises:
        ValueError: If lengths differ or a value is not positive and finite.
    """
    columns = [np.asarray(c, dtype=float) for c in (a, b, given)]
    if len({len(c) for c in columns}) != 1:
        msg = f"Three sequences of one length are required. Got lengths {[len(c) for c in columns]}."
        raise ValueError(msg)
    u, v, c = map(_log, columns)
    if len(c) < 4 or np.ptp(c) == 0:
        return math.nan
    design = np.stack([np.ones_like(c), c - c.mean()], axis=1)
    left, right = (w - design @ np.linalg.lstsq(design, w, rcond=None)[0] for w in (u, v))
    if any(np.ptp(r) <= 1e-12 * (1 + np.abs(w).max()) for r, w in ((left, u), (right, v))):
        return math.nan
    return float(pd.Series(left).corr(pd.Series(right), method="spearman"))
