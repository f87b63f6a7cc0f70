r"""Curvature of deep matrix factorization inside the aligned set: Hessian blocks, minima, stability across the set.

At a point where every layer is diagonal in the singular bases of the target, the Hessian of
:math:`f = \tfrac12 \lVert W_L \cdots W_1 - M \rVert_F^2` falls into blocks of at most 2 L rows. Arrays of singular values per layer
are ``[L, *batch, r]``, as in ``linear_networks``.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from ntklib.period_doubling import mode_sharpness, second_doubling, two_period_orbit

MARGIN = 1e-6  # by which a multiplier must exceed 1 to count as unstable: neutral ones are 1 up to rounding


def check_target(target: Iterable[float], depth: int) -> None:
    """Raise ``ValueError`` unless there are at least two layers and every singular value is finite and not negative."""
    if depth < 2:
        msg = f"depth must be at least 2 layers. Got {depth}."
        raise ValueError(msg)
    s = np.asarray(list(target), float)
    if s.ndim != 1 or len(s) == 0 or not np.isfinite(s).all() or (s < 0).any():
        msg = f"Singular values must be finite and not negative, at least one. Got {s.tolist()}."
        raise ValueError(msg)


def balanced(target: Float64[ndarray, " r"], depth: int) -> Float64[ndarray, "L r"]:
    """The balanced minimum, ``s^(1/L)`` in every layer: of all minima the one of least sharpness."""
    check_target(target, depth)
    return np.repeat(np.asarray(target, float)[None] ** (1 / depth), depth, axis=0)


def hessian_block(layers: Float64[ndarray, "L *batch r"], target: Float64[ndarray, " r"], i: int, j: int) -> ndarray:
    r"""Block of the Hessian that couples the entries (i, j) and (j, i) of all layers, at a point of the aligned set.

    With :math:`\sigma_{a:b} = \sigma_a \cdots \sigma_b`, residuals :math:`r_i` and perturbations x_l of entry (i, j) and y_l of
    entry (j, i) of layer l, the second-order change of the loss is

    .. math:: \tfrac12 \bigl(\textstyle\sum_l \sigma^i_{L:l+1} \sigma^j_{l-1:1} x_l\bigr)^2
        + r_i \sum_{l>k} \sigma^i_{L:l+1} \sigma^j_{l-1:k+1} \sigma^i_{k-1:1} x_l y_k + (i \leftrightarrow j, x \leftrightarrow y) .

    Away from such blocks the Hessian is zero, so its eigenvalues are those of the blocks.

    Returns:
        ``[*batch, L, L]`` for ``i == j``, and ``[*batch, 2 L, 2 L]`` otherwise, ordered x then y.
    """
    depth = len(layers)
    a, b = (np.moveaxis(layers[..., k], 0, -1) for k in (i, j))  # [*batch, L]
    part = lambda w, low, high: w[..., low:high].prod(-1)  # noqa: E731  # product of the layers low .. high-1, from 0
    along = lambda p, q: np.stack([part(p, m + 1, depth) * part(q, 0, m) for m in range(depth)], -1)  # noqa: E731
    x, y = along(a, b), along(b, a)
    r_i, r_j = a.prod(-1) - target[i], b.prod(-1) - target[j]
    mixed = np.zeros((*x.shape, depth))  # coefficient of x_l y_k
    for m in range(depth):
        for k in range(m):
            mixed[..., m, k] = r_i * part(a, m + 1, depth) * part(b, k + 1, m) * part(a, 0, k)
            mixed[..., k, m] = r_j * part(b, m + 1, depth) * part(a, k + 1, m) * part(b, 0, k)
    square = lambda v: v[..., :, None] * v[..., None, :]  # noqa: E731
    if i == j:  # x and y are the same perturbation
        return square(x) + mixed
    return np.concatenate([np.concatenate([square(x), mixed], -1), np.concatenate([np.swapaxes(mixed, -1, -2), square(y)], -1)], -2)


def aligned_hessian_eigenvalues(
    layers: Float64[ndarray, "L *batch r"], target: Float64[ndarray, " r"]
) -> Float64[ndarray, "*batch L*r*r"]:
    """All eigenvalues of the Hessian over r x r weights at a point of the aligned set, descending; the first is the sharpness.

    Blocks of ``hessian_block`` are diagonalised, at most 2 L wide; nan where a run diverged.
    """
    r = layers.shape[-1]
    found = []
    for i in range(r):
        for j in range(i, r):
            with np.errstate(over="ignore", invalid="ignore"):
                block = hessian_block(layers, target, i, j)
            fine = np.isfinite(block).all((-1, -2))
            values = np.linalg.eigvalsh(np.where(fine[..., None, None], block, 0.0))
            found.append(np.where(fine[..., None], values, np.nan))
    return -np.sort(-np.concatenate(found, -1), axis=-1)


def transverse_multiplier(
    orbit: Float64[ndarray, "period L *batch r"],
    target: Float64[ndarray, " r"],
    lr: Float64[ndarray, "*#batch"] | float,
    i: int,
    j: int,
) -> Float64[ndarray, "*batch"]:
    r"""Growth of a mixing of the singular vectors i and j over one period of an aligned orbit.

    .. math:: \max \lvert \mathrm{eig} \rvert \ \text{of} \ \prod_t \bigl(I - \eta H_{ij}(t)\bigr)

    with the blocks of ``hessian_block``, t in order of time. Rotations between layers leave the loss as it is and give multipliers
    of exactly 1, so the aligned set attracts, up to rotations, where this is 1, and repels where it is larger.
    """
    blocks = [hessian_block(layers, target, i, j) for layers in orbit]
    step = np.eye(blocks[0].shape[-1])
    for block in blocks:
        step = step - np.asarray(lr, float)[..., None, None] * block @ step
    return np.asarray(np.abs(np.linalg.eigvals(step)).max(-1))


def transverse_threshold(target: Float64[ndarray, " r"], depth: int, i: int = 0, j: int = 1) -> float:
    """Learning rate beyond which the 2-period orbit of mode i repels along the mixing with mode j, which rests at its minimum.

    By bisection on ``transverse_multiplier`` along the closed-form orbit, between the threshold of mode i and the first of: the
    threshold of mode j, the second doubling of mode i. nan if the orbit attracts all the way.
    """
    rest = balanced(target, depth)
    edge = 2 / mode_sharpness(target[i], depth)
    other = 2 / mode_sharpness(target[j], depth) if target[j] > 0 else np.inf

    def repels(lr: float) -> bool:
        orbit = np.stack([rest, rest])
        orbit[:, :, i] = np.array(two_period_orbit(lr, target[i], depth))[:, None]
        return bool(transverse_multiplier(orbit, target, lr, i, j) > 1 + MARGIN)

    low, high = edge * (1 + 1e-9), min(other, second_doubling(target[i], depth))
    if high <= low or not repels(high):
        return float("nan")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if repels(middle) else (middle, high)
    return high


def minimum_curvature(target: Float64[ndarray, " r"], depth: int) -> Float64[ndarray, "r r"]:
    r"""Non-zero eigenvalues of the Hessian, and of the NTK, at the balanced minimum, one per pair (i, j).

    .. math:: \mu_{ij} = \sum_{l=1}^{L} s_i^{2(L-l)/L} s_j^{2(l-1)/L} =
        \frac{s_i^2 - s_j^2}{s_i^{2/L} - s_j^{2/L}} , \qquad \mu_{ii} = L s_i^{2 - 2/L} = S_i

    (Ghosh et al. 2025, arXiv:2502.20531v1, Lemma 1 as known from a digest; derived here.) The loss carries the factor 1/2.
    """
    check_target(target, depth)
    powers = np.asarray(target, float)[:, None] ** (2 * np.arange(depth) / depth)  # [r, L]
    return powers[:, ::-1] @ powers.T
