r"""Deep matrix factorization by gradient descent: the aligned recursion, full matrices, curvature, balancing gaps.

The loss is :math:`f = \tfrac12 \lVert W_L \cdots W_1 - M \rVert_F^2`, with a factor 1/2 and no mean. Layers are counted from the
input. While every :math:`W_l` is diagonal in the singular bases of the target M (the aligned set), gradient descent keeps it so,
and each mode i is a recursion of L numbers :math:`\sigma_{l,i}` with target :math:`s_i`. Arrays of them are ``[L, *batch, r]``,
in float64.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from scipy.integrate import solve_ivp

from ntklib.curvature import sharpness
from ntklib.linear_curvature import aligned_hessian_eigenvalues, check_target
from ntklib.models.mlp import MLP
from ntklib.period_doubling import mode_sharpness
from ntklib.random import stream


def aligned_start(
    target: Float64[ndarray, " r"], depth: int, init_scale: float, batch: tuple[int, ...] = ()
) -> Float64[ndarray, "L *batch r"]:
    r"""Start of the source: the last layer zero, all others a multiple of the identity.

    .. math:: \sigma_{L} = 0, \qquad \sigma_l = \alpha \ (l < L), \qquad \alpha^{L-1} = \text{init\_scale}

    (Ghosh et al. 2025, arXiv:2502.20531v1, by the authors' figure code, whose alpha is ours.) The scale is that of the product of
    the L - 1 layers, so that the time to leave the plateau at zero depends little on the depth.

    Args:
        target: Singular values of the target.
        depth: Number of layers L.
        init_scale: Product of the layers below the last.
        batch: Shape of the axes in between, one entry per learning rate for example.

    Raises:
        ValueError: If the depth, the scale or a target does not fit.
    """
    check_target(target, depth)
    if not init_scale > 0:
        msg = f"init_scale must be positive, for zero layers never move. Got {init_scale}."
        raise ValueError(msg)
    layers = np.full((depth, *batch, len(target)), init_scale ** (1 / (depth - 1)))
    layers[-1] = 0
    return layers


def padded(target: Iterable[float], dim: int) -> Float64[ndarray, " dim"]:
    """The singular values of a target in descending order, with zeros up to ``dim`` of them."""
    s = np.sort(np.asarray(list(target), float))[::-1]
    if len(s) > dim:
        msg = f"dim must be at least {len(s)}, the number of singular values given. Got {dim}."
        raise ValueError(msg)
    return np.pad(s, (0, dim - len(s)))


def product_of_others(layers: Float64[ndarray, "L *batch"]) -> Float64[ndarray, "L *batch"]:
    r"""For every layer the product of all others, :math:`\prod_{k \ne l} \sigma_k`, without a division (a layer may be zero)."""
    below, above = np.ones_like(layers), np.ones_like(layers)
    np.cumprod(layers[:-1], axis=0, out=below[1:])
    np.cumprod(layers[:0:-1], axis=0, out=above[-2::-1])
    return below * above


def aligned_descent(
    layers: Float64[ndarray, "L *batch r"], target: Float64[ndarray, " r"], lr: Float64[ndarray, "*#batch"] | float, steps: int
) -> Iterator[Float64[ndarray, "L *batch r"]]:
    r"""Gradient descent inside the aligned set, for a batch of learning rates at once.

    .. math:: \sigma_l \leftarrow \sigma_l - \eta \, \bigl(\textstyle\prod_k \sigma_k - s\bigr) \prod_{k \ne l} \sigma_k

    in every mode, independently of the others. Where a learning rate is too large the numbers overflow and end as nan: divergence
    is a result, not an error.

    Args:
        layers: Singular values per layer at the start.
        target: Singular values of M.
        lr: Learning rates, of the shape of the batch.
        steps: Number of steps.

    Yields:
        The layers before each step and after the last one; a new array each time.
    """
    rate = np.asarray(lr, float)[..., None]
    for step in range(steps + 1):
        yield layers
        if step < steps:
            with np.errstate(over="ignore", invalid="ignore"):
                others = product_of_others(layers)
                layers = layers - rate * (others[0] * layers[0] - target) * others


def matrix_descent(
    weights: Float64[ndarray, "L *batch d d"], target: Float64[ndarray, "d d"], lr: Float64[ndarray, "*#batch"] | float, steps: int
) -> Iterator[Float64[ndarray, "L *batch d d"]]:
    r"""Gradient descent on full matrices, for a batch of learning rates at once.

    .. math:: W_l \leftarrow W_l - \eta \, W_{L:l+1}^\top (W_{L:1} - M) \, W_{l-1:1}^\top

    Args:
        weights: All layers, the first one first.
        target: The matrix M.
        lr: Learning rates, of the shape of the batch.
        steps: Number of steps.

    Yields:
        The weights before each step and after the last one; nan where they diverged.
    """
    rate, depth = np.asarray(lr, float)[..., None, None], len(weights)
    for step in range(steps + 1):
        yield weights
        if step < steps:
            with np.errstate(over="ignore", invalid="ignore"):
                below, above = [np.eye(len(target))], [np.eye(len(target))]
                for m in range(depth - 1):
                    below.append(weights[m] @ below[-1])  # W_m ... W_1
                    above.append(above[-1] @ weights[depth - 1 - m])  # W_L ... W_{L-m}
                residual = weights[-1] @ below[-1] - target
                turn = lambda w: np.swapaxes(w, -1, -2)  # noqa: E731
                gradients = [turn(above[depth - 1 - m]) @ residual @ turn(below[m]) for m in range(depth)]
                weights = weights - rate * np.stack(gradients)


def last(trajectory: Iterator[ndarray], keep: int) -> Float64[ndarray, "keep ..."]:
    """Run a trajectory to its end and stack its last ``keep`` points, in order of time."""
    kept: list[ndarray] = []
    for point in trajectory:
        kept = [*kept[-keep + 1 :], point] if keep > 1 else [point]
    return np.stack(kept)


def oscillation_range(values: Float64[ndarray, "keep *batch"]) -> Float64[ndarray, "*batch"]:
    """Largest minus smallest of the kept values; nan where the run diverged."""
    return values.max(0) - values.min(0)


def factorization_network(weights: Float64[ndarray, "L d d"]) -> MLP:
    """The network x -> W_L ... W_1 x in float64, for ``empirical_ntk`` and ``sharpness`` at the inputs ``torch.eye(d)``."""
    d = weights.shape[-1]
    net = MLP(d, [d] * (len(weights) - 1), d, activation="identity", bias=False).double()
    with torch.no_grad():
        for w, values in zip(net.parameters(), weights, strict=True):
            w.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return net.eval()


def one_mode_sharpness(layers: Float64[ndarray, " L"], s: float) -> float:
    """Largest eigenvalue of the automatic Hessian of a network of one unit per layer with the target s."""
    net = factorization_network(layers.reshape(-1, 1, 1))
    one = torch.ones(1, 1, dtype=torch.float64)
    return float(sharpness(net, lambda f, y: 0.5 * (f - y).square().sum(), (one, s * one))[0])


def balancing_gap(layers: Float64[ndarray, "L *batch"], i: int, j: int) -> Float64[ndarray, "*batch"]:
    r"""Balancing gap of two layers, :math:`b_{ij} = \sigma_i^2 - \sigma_j^2`, counted from 0; gradient flow conserves it."""
    return layers[i] ** 2 - layers[j] ** 2


def gap_factor(
    layers: Float64[ndarray, "L *batch"],
    target: Float64[ndarray, "*#batch"] | float,
    lr: Float64[ndarray, "*#batch"] | float,
    i: int,
    j: int,
) -> Float64[ndarray, "*batch"]:
    r"""Factor by which one step of gradient descent multiplies the balancing gap of layers i and j.

    .. math:: b_{ij}(t+1) = b_{ij}(t) \Bigl[1 - \eta^2 (\pi - s)^2 \frac{\pi^2}{\sigma_i^2 \sigma_j^2}\Bigr] , \quad
        \pi = \textstyle\prod_k \sigma_k

    (Ghosh et al. 2025, arXiv:2502.20531v1, Proposition 2 as known from a digest; an identity, verified here.) The ratio is
    formed as a product of the other layers, so a zero layer does no harm.
    """
    rest = np.prod([w for k, w in enumerate(layers) if k not in (i, j)], axis=0)
    return 1 - (lr * (layers.prod(0) - target) * rest) ** 2


def aligned_flow(
    layers: Float64[ndarray, "L r"], target: Float64[ndarray, " r"], t: Float64[ndarray, " times"]
) -> Float64[ndarray, "times L r"]:
    r"""Gradient flow inside the aligned set, :math:`\dot\sigma_l = -(\prod_k \sigma_k - s) \prod_{k \ne l} \sigma_k`.

    Integrated by an explicit Runge-Kutta method of order 8 with relative tolerance 1e-13.

    Args:
        layers: Singular values per layer at time 0.
        target: Singular values of M.
        t: Ascending times, lr times steps, from 0 on.
    """

    def velocity(_: float, flat: ndarray) -> ndarray:
        now = flat.reshape(layers.shape)
        others = product_of_others(now)
        return ((target - others[0] * now[0]) * others).ravel()

    span = (0.0, float(t[-1]))
    found = solve_ivp(velocity, span, layers.ravel(), method="DOP853", t_eval=t, rtol=1e-13, atol=1e-14)
    return found.y.T.reshape(len(t), *layers.shape)


def sweep_learning_rates(
    layers: Float64[ndarray, "L n r"], target: Float64[ndarray, " r"], lrs: Float64[ndarray, " n"], steps: int, keep: int
) -> tuple[Float64[ndarray, "keep n r"], Float64[ndarray, "keep n"]]:
    """End-to-end singular values and sharpness at the last ``keep`` steps of aligned gradient descent, for every learning rate.

    The start is ``layers``; nan where a run diverged. The sharpness is over r x r weights, mixing of singular vectors included.
    """
    tail = last(aligned_descent(layers, target, lrs, steps), keep)
    sharp = np.stack([aligned_hessian_eigenvalues(point, target)[:, 0] for point in tail])
    with np.errstate(over="ignore", invalid="ignore"):
        values = tail.prod(1)
    return np.where(np.isfinite(values), values, np.nan), sharp


def threshold_by_simulation(s: float, depth: int, init_scale: float, steps: int = 20_000, resolution: int = 401) -> float:
    """Smallest learning rate at which one simulated mode still oscillates after ``steps``, on a grid around 2/S of half a per cent.

    Below the threshold by a relative distance delta the oscillation dies like exp(-2 delta steps), so the answer is good to a few
    times 1/steps. nan if no learning rate of the grid oscillates.
    """
    lrs = 2 / mode_sharpness(s, depth) * np.linspace(0.995, 1.005, resolution)
    target = np.array([s])
    tail = last(aligned_descent(aligned_start(target, depth, init_scale, (resolution,)), target, lrs, steps), 2)
    moving = oscillation_range(tail.prod(1)[..., 0]) > 1e-4 * s
    return float(lrs[moving].min(initial=np.inf)) if moving.any() else float("nan")


def perturbed_sweep(
    target: Float64[ndarray, " d"],
    lrs: Float64[ndarray, " n"],
    *,
    depth: int,
    init_scale: float,
    perturbation: float,
    steps: int,
    keep: int,
    seed: int = 0,
) -> tuple[Float64[ndarray, "keep n d"], Float64[ndarray, " n"]]:
    """Full-matrix gradient descent from the aligned start plus Gaussian noise in every entry of every layer.

    Args:
        target: Singular values of M, which is diagonal.
        lrs: Learning rates; all runs share the noise.
        depth: Number of layers.
        init_scale: See ``aligned_start``.
        perturbation: Standard deviation of the noise.
        steps: Gradient steps.
        keep: Last steps that are kept.
        seed: The noise is drawn from ``stream(seed, "perturbation")``.

    Returns:
        Diagonal of the end-to-end matrix at the kept steps, and the largest size of an off-diagonal entry among them; nan where a
        run diverged.
    """
    d = len(target)
    weights = np.zeros((depth, len(lrs), d, d))
    weights[..., np.arange(d), np.arange(d)] = aligned_start(target, depth, init_scale, (len(lrs),))
    noise = torch.randn(depth, 1, d, d, generator=stream(seed, "perturbation"), dtype=torch.float64).numpy()
    tail = last(matrix_descent(weights + perturbation * noise, np.diag(target), lrs, steps), keep)
    with np.errstate(over="ignore", invalid="ignore"):
        product = tail[:, 0]
        for m in range(1, depth):
            product = tail[:, m] @ product
    product = np.where(np.isfinite(product).all((0, 2, 3))[:, None, None], product, np.nan)
    diagonal = np.diagonal(product, axis1=-2, axis2=-1)
    return diagonal, np.abs(product - diagonal[..., None] * np.eye(d)).max((0, 2, 3))


def diagonal_descent(
    u: Float64[ndarray, " d"],
    v: Float64[ndarray, " d"],
    x: Float64[ndarray, "n d"],
    y: Float64[ndarray, " n"],
    lr: float,
    steps: int,
) -> Iterator[tuple[Float64[ndarray, " d"], Float64[ndarray, " d"]]]:
    r"""Gradient descent on a diagonal linear network; yields (u, v) before each step and after the last.

    .. math:: \tfrac{1}{2n} \lVert X (u \circ v) - y \rVert^2

    With fewer examples than inputs it has a continuum of minima of loss zero, of different sharpness.
    """
    for step in range(steps + 1):
        yield u, v
        if step < steps:
            with np.errstate(over="ignore", invalid="ignore"):
                gradient = x.T @ (x @ (u * v) - y) / len(y)
                u, v = u - lr * gradient * v, v - lr * gradient * u


def diagonal_sharpness(
    u: Float64[ndarray, " d"], v: Float64[ndarray, " d"], x: Float64[ndarray, "n d"], y: Float64[ndarray, " n"]
) -> float:
    """Largest Hessian eigenvalue of the loss of ``diagonal_descent``."""
    gram, cross = x.T @ x / len(y), np.diag(x.T @ (x @ (u * v) - y) / len(y))
    block = lambda a, b: gram * np.outer(a, b)  # noqa: E731
    hessian = np.block([[block(v, v), block(v, u) + cross], [block(u, v) + cross, block(u, u)]])
    return float(np.linalg.eigvalsh(hessian)[-1])
