r"""One mode of a balanced deep linear network: a map of one number, its 2-period orbit, its doublings.

With all L layers equal to rho, gradient descent on :math:`\tfrac12(\rho^L - s)^2` in the layers is
:math:`\rho \leftarrow F(\rho) = \rho + \eta (s - \rho^L) \rho^{L-1}`, whose fixed point is :math:`\rho^L = s`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

FEIGENBAUM = 4.669201609102990  # limit of the ratios of doubling intervals of maps with a quadratic maximum


def mode_sharpness(s: float, depth: int) -> float:
    r"""Sharpness of the balanced minimum in one mode, :math:`S = L s^{2 - 2/L}`; gradient descent is stable below 2/S."""
    _check(s, depth)
    return depth * s ** (2 - 2 / depth)


def scalar_step(rho: ndarray | float, s: float, lr: ndarray | float, depth: int) -> ndarray | float:
    """One step of the map F."""
    return rho + lr * (s - rho**depth) * rho ** (depth - 1)


def scalar_multiplier(rho: ndarray | float, s: float, lr: ndarray | float, depth: int) -> ndarray | float:
    r"""Derivative of the map, :math:`F' = 1 + \eta [(L-1) s \rho^{L-2} - (2L-1) \rho^{2L-2}]`."""
    return 1 + lr * ((depth - 1) * s * rho ** (depth - 2) - (2 * depth - 1) * rho ** (2 * depth - 2))


def threshold_of_fixed_point(s: float, depth: int) -> float:
    """Learning rate at which the multiplier of the fixed point is -1, by bisection: 2/S, found without the formula for S."""
    _check(s, depth)
    rho = s ** (1 / depth)
    high = 1.0
    while scalar_multiplier(rho, s, high, depth) > -1:
        high *= 2
    return _bisect(lambda lr: float(scalar_multiplier(rho, s, lr, depth)) + 1, 0.0, high)


def orbit_of_ratio(z: Float64[ndarray, "*batch"] | float, s: float, depth: int) -> tuple[ndarray, ndarray, ndarray]:
    r"""The 2-period orbit in closed form, parametrised by the ratio z > 1 of its values.

    .. math:: \rho_1^L = s \frac{1 + z^{L-1}}{1 + z^{2L-1}} , \quad \rho_2 = z \rho_1 , \quad
        \eta = \frac{z - 1}{(s - \rho_1^L) \rho_1^{L-2}} = \frac{1 + z^{2L-1}}{s \, z^{L-1} \rho_1^{L-2} \sum_{k<L} z^k}

    The first step multiplies rho_1 by :math:`z = 1 + \eta (s - \rho_1^L) \rho_1^{L-2}`, and the second must undo it. (The orbit of
    Ghosh et al. 2025, arXiv:2502.20531v1, Theorem 1, known from a digest that has a factor L in z, with which it is no orbit.)

    Returns:
        rho_1, rho_2 and the learning rate, of the shape of z.
    """
    _check(s, depth)
    z = np.asarray(z, float)
    if not (z >= 1).all():
        msg = f"z = rho_2 / rho_1 must be at least 1. Got {z.min()}."
        raise ValueError(msg)
    low = (s * (1 + z ** (depth - 1)) / (1 + z ** (2 * depth - 1))) ** (1 / depth)
    powers = sum(z**k for k in range(depth))  # (z^L - 1) / (z - 1)
    lr = (1 + z ** (2 * depth - 1)) / (s * z ** (depth - 1) * low ** (depth - 2) * powers)
    return np.asarray(low), np.asarray(z * low), np.asarray(lr)


def two_period_orbit(lr: float, s: float, depth: int) -> tuple[float, float]:
    """The two values (rho_1 < rho_2) of the 2-period orbit at a learning rate beyond 2/S.

    Raises:
        ValueError: If the learning rate is not above the threshold.
    """
    edge = 2 / mode_sharpness(s, depth)
    if not lr > edge:
        msg = f"A 2-period orbit exists only above the threshold lr = {edge:.10g}. Got {lr:.10g}."
        raise ValueError(msg)
    high = 1.5
    while orbit_of_ratio(high, s, depth)[2] < lr:
        high *= 1.5
    z = _bisect(lambda z: lr - float(orbit_of_ratio(z, s, depth)[2]), 1.0, high)
    low, up, _ = orbit_of_ratio(z, s, depth)
    return float(low), float(up)


def orbit_residual(rho: ndarray | float, s: float, lr: float, depth: int, *, factor: float = 1.0) -> ndarray | float:
    r"""Residual of the orbit equation, relative to s.

    .. math:: \frac{\rho^L}{s} \frac{1 + z^{2L-1}}{1 + z^{L-1}} - 1 , \qquad z = 1 + c\, \eta (s - \rho^L) \rho^{L-2}

    with c = ``factor``: 1 is right, L is the digest's.
    """
    z = 1 + factor * lr * (s - rho**depth) * rho ** (depth - 2)
    return rho**depth / s * (1 + z ** (2 * depth - 1)) / (1 + z ** (depth - 1)) - 1


def orbit_gap_factor(lr: float, s: float, depth: int) -> float:
    r"""Factor of a small balancing gap over the two steps of the orbit.

    .. math:: \prod_{\rho_1, \rho_2} \bigl(1 - \eta^2 (\rho^L - s)^2 \rho^{2L-4}\bigr) , \qquad L = 2: \ 3 - 2 \eta s
    """
    rho = np.array(two_period_orbit(lr, s, depth))
    return float(np.prod(1 - (lr * (rho**depth - s) * rho ** (depth - 2)) ** 2))


def second_doubling(s: float, depth: int) -> float:
    """Learning rate at which the 2-period orbit loses stability, from the closed form: the multiplier of the orbit is -1."""

    def excess(z: float) -> float:
        low, up, lr = orbit_of_ratio(z, s, depth)
        return float(scalar_multiplier(low, s, lr, depth) * scalar_multiplier(up, s, lr, depth) + 1)

    high = 1.1
    while excess(high) > 0:
        high += 0.1
    return float(orbit_of_ratio(_bisect(excess, 1.0, high), s, depth)[2])


@dataclass(frozen=True)
class Doubling:
    """A point where an orbit loses stability to one of twice the period.

    Attributes:
        period: Period of the orbit that loses stability.
        lr: Learning rate, at which the orbit's multiplier is -1.
        rho: A point of the orbit.
        residual: Largest of the relative errors of closing the orbit and of the multiplier.
    """

    period: int
    lr: float
    rho: float
    residual: float


def doublings(s: float, depth: int, count: int) -> list[Doubling]:
    r"""The first period doublings of the map, each located by the multiplier.

    The k-th is the solution of :math:`F^p(\rho) = \rho`, :math:`(F^p)'(\rho) = -1` with :math:`p = 2^{k-1}`, by Newton's method in
    rho and the learning rate with exact derivatives. The start is a point of the simulated orbit at four fifths of the predicted
    interval.

    Args:
        s: Target.
        depth: Number of layers.
        count: Number of doublings, 1 to 8 in double precision.

    Raises:
        ValueError: If ``count`` is out of range.
        RuntimeError: If Newton's method does not converge.
    """
    if not 1 <= count <= 8:
        msg = f"count must be between 1 and 8, the doublings that double precision resolves. Got {count}."
        raise ValueError(msg)
    first = threshold_of_fixed_point(s, depth)
    found = [Doubling(1, first, s ** (1 / depth), 0.0)]
    width = 0.22 * first  # of the first interval; shrinks by about Feigenbaum's constant
    for k in range(1, count):
        rho, lr = found[-1].rho * 0.99, found[-1].lr + 0.8 * width
        for _ in range(20_000):
            rho = scalar_step(rho, s, lr, depth)
        found.append(_newton(float(rho), lr, s, depth, 2**k))
        width = (found[-1].lr - found[-2].lr) / FEIGENBAUM
    return found


def interval_ratios(cascade: list[Doubling]) -> list[float]:
    r"""Ratios of successive doubling intervals, :math:`(\eta_k - \eta_{k-1}) / (\eta_{k+1} - \eta_k)`; they tend to 4.669."""
    steps = np.diff([d.lr for d in cascade])
    return (steps[:-1] / steps[1:]).tolist()


def _newton(rho: float, lr: float, s: float, depth: int, period: int) -> Doubling:
    for _ in range(60):
        x, dx, dl, dxx, dxl = _iterate(rho, lr, s, depth, period)
        closing, multiplier = x - rho, dx + 1
        move = np.linalg.solve([[dx - 1, dl], [dxx, dxl]], [closing, multiplier])
        rho, lr = rho - move[0], lr - move[1]
        if abs(move[0]) < 1e-13 * rho and abs(move[1]) < 1e-14 * lr:
            x, dx, *_ = _iterate(rho, lr, s, depth, period)
            return Doubling(period, float(lr), float(rho), max(abs(x / rho - 1), abs(dx + 1)))
    msg = f"Newton's method for the doubling of period {period} did not converge. Last lr: {lr:.12g}."
    raise RuntimeError(msg)


def _iterate(rho: float, lr: float, s: float, depth: int, period: int) -> tuple[float, float, float, float, float]:
    """F^p and its derivatives: in rho, in lr, twice in rho, in rho and lr."""
    x, dx, dl, dxx, dxl = rho, 1.0, 0.0, 0.0, 0.0
    n = depth - 1
    for _ in range(period):
        g = s * x**n - x ** (2 * n + 1)
        g1 = n * s * x ** (n - 1) - (2 * n + 1) * x ** (2 * n)
        g2 = (n * (n - 1) * s * x ** (n - 2) if n > 1 else 0.0) - (2 * n + 1) * 2 * n * x ** (2 * n - 1)
        f1, f2 = 1 + lr * g1, lr * g2
        dxl = f2 * dx * dl + f1 * dxl + g1 * dx
        dxx = f2 * dx * dx + f1 * dxx
        x, dx, dl = x + lr * g, f1 * dx, f1 * dl + g
    return x, dx, dl, dxx, dxl


def _bisect(excess: Callable[[float], float], low: float, high: float) -> float:
    """Zero of a function that is positive at ``low`` and not at ``high``, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _check(s: float, depth: int) -> None:
    if depth < 2 or not (np.isfinite(s) and s > 0):
        msg = f"A mode needs at least 2 layers and a finite positive target. Got depth {depth} and s = {s}."
        raise ValueError(msg)
