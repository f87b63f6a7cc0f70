"""The path of a kernel's direction in training: phases, confinement, and the cone that late kernels lie in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real


def lag_steps(total: int, interval: int, starts: Sequence[int] = (), num_lags: int = 0, also: Sequence[int] = ()) -> list[int]:
    """Steps at which kernels are measured: equally spaced ones, and lags 1, 2, 4, ... from each start.

    Args:
        total: Last step, which is included.
        interval: Spacing of the equally spaced ones, from 0.
        starts: Steps from which lags are counted.
        num_lags: How many lags from each start.
        also: Further steps.

    Returns:
        Ascending steps, each once; none after ``total``.

    Raises:
        ValueError: If the interval is not positive.
    """
    if interval < 1:
        msg = f"interval must be at least 1. Got {interval}."
        raise ValueError(msg)
    lags = [start + lag for start in starts for lag in (0, *(2**k for k in range(num_lags)))]
    return sorted(step for step in {*range(0, total + 1, interval), total, *lags, *also} if step <= total)


def angles_from_distances(distance: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""Angles :math:`\arccos(1 - S)` of kernel distances S, in radians.

    Computed as 2 arcsin(sqrt(S/2)), which keeps small angles; S up to rounding below 0 counts as 0.
    """
    return 2 * np.arcsin(np.sqrt(np.clip(np.asarray(distance, dtype=float), 0, 2) / 2))


def angle_speed(time: Real[np.ndarray, " m"], angle: Float[np.ndarray, "m m"]) -> Float[np.ndarray, " m-1"]:
    """Angle between successive kernels over the time between them, in radians per unit of time.

    Where a path is not smooth the speed depends on the spacing: give equally spaced times.
    """
    _check(time, angle)
    return np.diagonal(angle, 1) / np.diff(time)


def mean_by_lag(
    time: Real[np.ndarray, " m"],
    distance: Float[np.ndarray, "m m"],
    lags: Sequence[int] | Sequence[float],
    first: int | float | np.number,
    last: int | float | np.number,
) -> Float[np.ndarray, " lags"]:
    r"""Mean distance of two kernels by the time between them, :math:`\langle S(K_t, K_{t + \ell}) \rangle_t`.

    The mean is over all measured t in [first, last] for which t + lag was measured too and is not after ``last``: the mean squared
    displacement of a path, as ||u - v||^2 = 2 S for unit kernels. nan for a lag without pairs.

    Args:
        time: Ascending times of the kernels.
        distance: Pairwise distances S.
        lags: Times between two kernels.
        first: First time that counts.
        last: Last time that counts.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check(time, distance)
    place = {float(t): i for i, t in enumerate(time)}
    means = []
    for lag in lags:
        pairs = [(i, place[t + lag]) for t, i in place.items() if first <= t and t + lag <= last and t + lag in place]
        means.append(np.mean([distance[i, j] for i, j in pairs]) if pairs else math.nan)
    return np.array(means, dtype=float)


def lag_exponent(lag: Sequence[int] | Sequence[float] | np.ndarray, distance: Sequence[float] | np.ndarray) -> float:
    r"""Exponent q of the power law :math:`S \propto \ell^{\,q}`: least-squares slope of log S against log lag.

    For unit kernels 2S is the squared chord, so q = 2 for straight (ballistic) motion, 1 for a random walk, 0 for a path that is
    confined to a region which it explores within the shortest lag. Pairs with S = 0 or nan are left out; nan for fewer than two.
    """
    x, y = np.asarray(lag, dtype=float), np.asarray(distance, dtype=float)
    kept = np.isfinite(y) & (y > 0)
    return float(np.polyfit(np.log(x[kept]), np.log(y[kept]), 1)[0]) if kept.sum() > 1 else math.nan


@dataclass(frozen=True)
class PathLengths:
    """Lengths of a path of directions on the sphere, in radians.

    Attributes:
        chord: Angle between its two ends.
        path: Sum of the angles between successive kernels.
        walk: Root of the sum of their squares: the expected chord of a random walk of these steps, while it is small.
    """

    chord: float
    path: float
    walk: float

    @property
    def straightness(self) -> float:
        """Chord over path: 1 on a great circle, near 0 for a path that turns back; nan for no motion."""
        return self.chord / self.path if self.path else math.nan

    @property
    def persistence(self) -> float:
        """Chord over that of a random walk: above 1 for steps that go on in one direction, below 1 for a confined path."""
        return self.chord / self.walk if self.walk else math.nan


def path_lengths(angle: Float[np.ndarray, "m m"]) -> PathLengths:
    """Measure a path from the pairwise angles of its kernels in order of time.

    Raises:
        ValueError: If the angles are not a square matrix of at least two kernels.
    """
    _check(np.arange(len(angle)), angle)
    steps = np.diagonal(angle, 1)
    return PathLengths(float(angle[0, -1]), float(steps.sum()), float(np.sqrt(np.square(steps).sum())))


def angles_to_axis(angle: Float[np.ndarray, "m m"], late: Sequence[int] | np.ndarray) -> Float[np.ndarray, " m"]:
    r"""Angles of all kernels to the axis of the late ones, the mean of their directions.

    .. math:: \cos \alpha_i = \frac{\langle u_i, M \rangle}{\lVert M \rVert}, \qquad M = \frac{1}{|L|} \sum_{j \in L} u_j ,
        \qquad u = K / \lVert K \rVert_F

    Both products follow from the pairwise angles, so no kernel is needed. The largest angle over L is the opening (half) angle.
    A mean lies nearer to its terms than any other direction: for N independent directions around a centre the opening angle is
    underestimated by a factor of about sqrt(1 - 1/N).

    Args:
        angle: Pairwise angles, in radians.
        late: Indices L of the late kernels.

    Raises:
        ValueError: If the matrix is not square, there is no late kernel, or their mean is zero.
    """
    _check(np.arange(len(angle)), angle)
    cosine, late = np.cos(angle), np.asarray(late, dtype=int)
    square = float(cosine[np.ix_(late, late)].mean()) if len(late) else 0.0
    if square <= 0:
        msg = f"late must name at least one kernel, and their mean must not be zero. Got {len(late)} kernels, |M|^2 = {square:g}."
        raise ValueError(msg)
    return np.arccos(np.clip(cosine[:, late].mean(1) / math.sqrt(square), -1, 1))


@dataclass(frozen=True)
class Boundary:
    """A change of level in a series.

    Attributes:
        time: Time of the first value on the second level.
        ratio: First level over second level (geometric means of the values).
        explained: Share of the variance of the logarithm that the two levels explain.
        sem: Standard error of ``time`` from resampling series (seeds); nan for one series.
    """

    time: float
    ratio: float
    explained: float
    sem: float = math.nan


def phase_boundary(
    time: Real[np.ndarray, " m"],
    speed: Float[np.ndarray, "series m"] | Sequence[Float[np.ndarray, " m"]],
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> Boundary:
    """Find the time that splits the logarithm of a speed best into two levels, with its uncertainty over seeds.

    Least squares over all splits with at least two values on either side, on the mean of the logarithms over the series; the
    standard error is the standard deviation over resampled sets of series. There is a best split of any series, also of one that
    falls steadily: ``explained`` says how much of a step it is (a straight line gives 3/4).

    Args:
        time: Ascending times, ``[m]``.
        speed: Positive speeds, one row per seed; zeros are raised to the smallest positive value.
        num_resamples: Resampled sets.
        seed: Seed of the resampling.

    Raises:
        ValueError: If shapes do not fit, there are fewer than four times, or a speed is negative, not finite, or zero throughout.
    """
    t, v = np.asarray(time, dtype=float), np.atleast_2d(np.asarray(speed, dtype=float))
    if v.shape[1] != len(t) or len(t) < 4 or not (np.isfinite(v).all() and (v >= 0).all() and (v > 0).any()):
        msg = f"speed must be [series, {len(t)}] with at least 4 times, finite, not negative and not all zero. Got {v.shape}."
        raise ValueError(msg)
    log = np.log(np.maximum(v, v[v > 0].min()))
    split, explained = _best_split(log.mean(0))
    ratio = math.exp(log[:, :split].mean() - log[:, split:].mean())
    rng = np.random.default_rng(seed)
    draws = [t[_best_split(log[rng.integers(len(v), size=len(v))].mean(0))[0]] for _ in range(num_resamples)]
    return Boundary(float(t[split]), ratio, explained, float(np.std(draws, ddof=1)) if len(v) > 1 else math.nan)


def power_law(time: Real[np.ndarray, " m"], speed: Float[np.ndarray, " m"]) -> tuple[float, float]:
    """Fit a power law of time to a speed: its exponent, and the share of the variance of the logarithm that it explains.

    The share compares with ``phase_boundary``'s: the larger one says whether the speed falls in a step or steadily.

    Args:
        time: Positive times.
        speed: Positive speeds; zeros are raised to the smallest positive value.

    Raises:
        ValueError: If there are fewer than three times, a time is not positive, or no speed is.
    """
    t, v = np.asarray(time, dtype=float), np.asarray(speed, dtype=float)
    if not (len(t) == len(v) >= 3 and (t > 0).all() and (v > 0).any()):
        msg = f"At least three positive times, and a speed that is positive, are required. Got {len(t)} times, {len(v)} speeds."
        raise ValueError(msg)
    x, y = np.log(t), np.log(np.maximum(v, v[v > 0].min()))
    slope, level = np.polyfit(x, y, 1)
    rest, total = np.square(y - slope * x - level).sum(), np.square(y - y.mean()).sum()
    return float(slope), float(1 - rest / total) if total else 1.0


def _best_split(y: np.ndarray) -> tuple[int, float]:
    """Index of the first value of the second level, and the share of the variance explained."""
    total = float(np.square(y - y.mean()).sum())
    rest = [sum(float(np.square(part - part.mean()).sum()) for part in (y[:k], y[k:])) for k in range(2, len(y) - 1)]
    best = int(np.argmin(rest))
    return best + 2, 1 - rest[best] / total if total else 0.0


def classical_scaling(angle: Float[np.ndarray, "m m"], dimensions: int = 2) -> tuple[Float[np.ndarray, "m dimensions"], float]:
    r"""Place unit kernels in a few dimensions so that their chords are kept as well as possible.

    Classical multidimensional scaling (Torgerson 1952) of the chords 2 sin(angle/2): the principal components of the unit kernels,
    from their pairwise angles alone. Signs are such that the last kernel has no negative coordinate.

    Args:
        angle: Pairwise angles, in radians.
        dimensions: Number of coordinates.

    Returns:
        Coordinates, ``[m, dimensions]``, and the share of the variance (squared chords to the centre) that they hold.

    Raises:
        ValueError: If the matrix is not square, or has fewer kernels than dimensions.
    """
    _check(np.arange(len(angle)), angle)
    if not 1 <= dimensions <= len(angle):
        msg = f"dimensions must be between 1 and the {len(angle)} kernels. Got {dimensions}."
        raise ValueError(msg)
    squares = np.square(2 * np.sin(np.asarray(angle, dtype=float) / 2))
    gram = -0.5 * (squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean())
    eigvals, eigvecs = np.linalg.eigh(gram)
    eigvals, eigvecs = np.maximum(eigvals[::-1], 0), eigvecs[:, ::-1]
    coordinates = eigvecs[:, :dimensions] * np.sqrt(eigvals[:dimensions])
    signs = np.where(coordinates[-1] < 0, -1, 1)
    return coordinates * signs, float(eigvals[:dimensions].sum() / eigvals.sum()) if eigvals.sum() else math.nan


def _check(time: Sequence[float] | np.ndarray, matrix: np.ndarray) -> None:
    if len(time) < 2 or np.shape(matrix) != (len(time), len(time)):
        msg = f"A path must have at least two kernels, one row and column per time. Got {len(time)} times, {np.shape(matrix)}."
        raise ValueError(msg)
