"""The numbers behind the playground: four small experiments, pure functions of what a slider can set, quick enough to follow it.

Nothing here is cached on disk or judged: the chapters measure, this is for looking.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from ntklib import data, models, two_layer
from ntklib.data import Dataset
from ntklib.estimators import ntk_trace
from ntklib.infinite import ACTIVATIONS as WITH_LIMIT
from ntklib.infinite import infinite_ntk
from ntklib.kernels import empirical_ntk, flatten_kernel
from ntklib.models import NTKMLP
from ntklib.models.initialization import scale_parameters
from ntklib.period_doubling import mode_sharpness, scalar_step
from ntklib.random import stream
from ntklib.spectra import effective_rank, participation_ratio, stable_rank
from ntklib.training import accuracy, gradient_descent, log_steps, sgd

MOMENTUM = 0.9  # of the training run whose trace is followed
MEASURED = 7  # steps at which the trace is measured, beside the first
LARGE = 1e9  # parameters beyond this have diverged


@dataclass(frozen=True)
class TraceCurve:
    """The NTK trace of one network along training; a run that diverged ends at its last finite state."""

    step: Int[ndarray, " times"]
    trace: Float64[ndarray, " times"]
    train: Float64[ndarray, " times"]
    test: Float64[ndarray, " times"]
    diverged: bool


@lru_cache(maxsize=8)
def _images(dataset: str, num_train: int, num_test: int) -> Dataset:
    return data.load(dataset, num_train=num_train, num_test=num_test)


def trace_along_training(
    width: int,
    lr: float,
    weight_decay: float,
    init_scale: float,
    seed: int,
    *,
    dataset: str = "digits",
    num_train: int = 100,
    num_probe: int = 20,
    steps: int = 60,
) -> TraceCurve:
    """Train a perceptron on images and measure Tr K / (n c) exactly on a few of them, with both accuracies.

    Full-batch descent on the cross-entropy with momentum 0.9 (``sgd`` with all images in a batch).

    Args:
        width: Units in each of the two hidden ReLU layers.
        lr: Learning rate.
        weight_decay: Added to the gradient, times the parameter.
        init_scale: Factor on all parameters of the standard initialization.
        seed: Seed of the initialization.
        dataset: Name in ``ntklib.data``.
        num_train: Training images, class-balanced; as many for the test accuracy.
        num_probe: The first training images, on which the kernel lives.
        steps: Gradient steps.
    """
    images = _images(dataset, num_train, num_train)
    model = models.build("mlp", input_shape=images.input_shape, num_classes=images.num_classes, width=width, seed=seed)
    scale_parameters(model, init_scale)
    loop = sgd(
        model, images, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay, batch_size=num_train, epochs=steps, seed=seed,
        measure_at=log_steps(steps, MEASURED),
    )  # fmt: skip
    rows, diverged = [], False
    for state in loop:
        diverged = state.diverged or _too_large(model)
        if diverged:
            break
        trace = ntk_trace(model, images.x_train[:num_probe]).mean
        rows.append(
            (state.step, trace, accuracy(model, images.x_train, images.y_train), accuracy(model, images.x_test, images.y_test))
        )
    table = np.array(rows)
    return TraceCurve(table[:, 0].astype(int), table[:, 1], table[:, 2], table[:, 3], diverged)


def _too_large(model: torch.nn.Module) -> bool:
    return not all(float(w.detach().abs().max()) < LARGE for w in model.parameters())


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a kernel of one output, descending, three numbers about them, and the same at infinite width.

    Attributes:
        eigvals: Of the network's kernel, ``[n]``.
        ranks: Effective rank, participation ratio and stable rank.
        limit: Eigenvalues of the infinitely wide network at initialization; nan for an activation without a closed form.
        limit_ranks: Its three numbers.
        limit_distance: Relative Frobenius distance of the kernel from its limit.
        step: Gradient steps taken: fewer than asked for if the run diverged.
    """

    eigvals: Float64[ndarray, " n"]
    ranks: Float64[ndarray, "3"]
    limit: Float64[ndarray, " n"]
    limit_ranks: Float64[ndarray, "3"]
    limit_distance: float
    step: int


def kernel_spectrum(
    width: int, depth: int, activation: str, steps: int, seed: int, *, dataset: str = "digits", num_train: int = 60
) -> Spectrum:
    """Spectrum of the NTK of a perceptron in NTK parameterization with one output, after ``steps`` steps of descent.

    The targets are +1 for even and -1 for odd labels, the loss is ``half_mse``, and the learning rate is half the largest stable
    one of the kernel at initialization, n / lambda_1. Kernel and spectrum are in double precision.

    Args:
        width: Units per hidden layer.
        depth: Hidden layers.
        activation: A name in ``ntklib.models.ACTIVATIONS``.
        steps: Gradient steps before the kernel is taken; 0 for the initialization.
        seed: Seed of the initialization.
        dataset: Name in ``ntklib.data``.
        num_train: Images n, class-balanced.
    """
    images = _images(dataset, num_train, num_train)
    x, y = images.x_train[:].double(), 1.0 - 2.0 * (images.y_train % 2)[:, None].double()
    d = x[0].numel()
    net = NTKMLP(d, [width] * depth, 1, activation=activation, generator=stream(seed, "init"), dtype=torch.float64)
    kernel, step = flatten_kernel(empirical_ntk(net.eval(), x)), 0
    if steps:
        lr = len(x) / float(torch.linalg.eigvalsh(kernel)[-1])
        for state in gradient_descent(net, x, y, lr=lr, steps=steps, measure_at=[steps]):
            if not state.diverged:
                step = state.step
        kernel = flatten_kernel(empirical_ntk(net, x)) if step else kernel
    limit = infinite_ntk(x, depth=depth, activation=activation) if activation in WITH_LIMIT else torch.full_like(kernel, torch.nan)
    distance = float((kernel - limit).norm() / limit.norm())
    return Spectrum(_descending(kernel), _ranks(kernel), _descending(limit), _ranks(limit), distance, step)


def _descending(kernel: Float[Tensor, "n n"]) -> Float64[ndarray, " n"]:
    if not bool(kernel.isfinite().all()):
        return np.full(len(kernel), np.nan)
    return torch.linalg.eigvalsh(kernel.double()).flip(0).clamp(min=0).numpy()


def _ranks(kernel: Float[Tensor, "n n"]) -> Float64[ndarray, "3"]:
    if not bool(kernel.isfinite().all()):
        return np.full(3, np.nan)
    eigvals = torch.linalg.eigvalsh(kernel.double()).clamp(min=0)
    return np.array([measure(eigvals) for measure in (effective_rank, participation_ratio, stable_rank)])


@dataclass(frozen=True)
class EdgePath:
    """Gradient descent of a two-layer linear network, step by step; it ends early where it diverges.

    Attributes:
        sharpness: Largest Hessian eigenvalue of the loss, ``[times]``.
        loss: Half the sum of squares.
        alignment: Kernel target alignment.
        edge: 2 / learning rate.
        least: Sharpness of the flattest minimum.
        flow: Sharpness at which gradient flow from the same start would end.
        diverged: Whether the path ends early.
    """

    sharpness: Float64[ndarray, " times"]
    loss: Float64[ndarray, " times"]
    alignment: Float64[ndarray, " times"]
    edge: float
    least: float
    flow: float
    diverged: bool


def edge_path(
    lr: float, readout: float, top: float, seed: int = 0, *, share: float = 0.7, num_inputs: int = 8, dim: int = 10,
    steps: int = 300, start: float = 0.1,
) -> EdgePath:  # fmt: skip
    r"""Descend with a two-layer linear network of one hidden unit, :math:`f(x) = q\, w^\top x`, from a small start.

    The loss is half the sum of squares. The start is along the interpolator of least norm theta, with the balance
    :math:`q^2 - \lVert w \rVert^2` that leads gradient flow to the wanted readout (``flow_readout``).

    Args:
        lr: Learning rate in units of the largest one at which any minimum is stable.
        readout: Readout q^2 at which gradient flow would end, in units of that of the flattest minimum.
        top: Singular value of the dominant direction of the inputs; the others are near 1.
        seed: Seed of the inputs.
        share: Cosine of the targets and the dominant direction.
        num_inputs: Examples n.
        dim: Input dimension d, at least n.
        steps: Gradient steps.
        start: Size of the smaller layer at the start, in units of that of a balanced minimum.
    """
    x, y = two_layer.dominant_inputs(num_inputs, dim, top, share, seed)
    theta, best = two_layer.interpolator(x, y), two_layer.flattest_readout(x, y)
    size, end = float(np.linalg.norm(theta)), readout * best
    balance, small = end - size**2 / end, start**2 * size
    q = np.sqrt(small + max(balance, 0.0))
    w = np.sqrt(small + max(-balance, 0.0)) * theta / size
    least = two_layer.minimum_sharpness(x, y, best)
    rate = 2 * lr / least
    path = list(two_layer.rank_one_descent(np.array([q]), w[None], x, y, np.array([rate]), steps))
    q, w = np.array([p[0][0] for p in path]), np.stack([p[1][0] for p in path])
    with np.errstate(invalid="ignore", over="ignore"):
        fine = np.logical_and.accumulate((np.abs(q) < LARGE) & (np.abs(w).max(1) < LARGE))
    q, w = q[fine], w[fine]
    residual = q[:, None] * (w @ x.T) - y
    return EdgePath(
        one_unit_sharpness(q, w, x, y), 0.5 * np.square(residual).sum(1), _alignments(q, w, x, y), 2 / rate, least,
        two_layer.minimum_sharpness(x, y, end), not bool(fine.all()),
    )  # fmt: skip


def one_unit_sharpness(
    q: Float64[ndarray, " m"], w: Float64[ndarray, "m d"], x: Float64[ndarray, "n d"], y: Float64[ndarray, " n"]
) -> Float64[ndarray, " m"]:
    r"""Largest Hessian eigenvalue of :math:`\tfrac12 \lVert q X w - y \rVert^2` in (q, w), for a batch of them.

    .. math:: H_{qq} = \lVert X w \rVert^2, \qquad H_{qw} = q X^\top X w + X^\top r, \qquad H_{ww} = q^2 X^\top X
    """
    out = w @ x.T
    hessian = np.empty((len(q), w.shape[1] + 1, w.shape[1] + 1))
    hessian[:, 0, 0] = np.square(out).sum(1)
    hessian[:, 0, 1:] = hessian[:, 1:, 0] = (2 * q[:, None] * out - y) @ x  # q X^T X w + X^T (q X w - y)
    hessian[:, 1:, 1:] = np.square(q)[:, None, None] * (x.T @ x)
    return np.linalg.eigvalsh(hessian)[:, -1]


def _alignments(q: ndarray, w: ndarray, x: ndarray, y: ndarray) -> Float64[ndarray, " m"]:
    """Kernel target alignment of every (q, w), by ``kernel`` of the two-layer theory."""
    kernels = np.stack([two_layer.kernel(float(a), b, x) for a, b in zip(q, w, strict=True)])
    return np.einsum("i,mij,j->m", y, kernels, y) / np.linalg.norm(kernels, axis=(1, 2)) / (y @ y)


@dataclass(frozen=True)
class MapOrbit:
    """One mode of a balanced deep linear network at a learning rate.

    Attributes:
        path: Singular value of one layer, in units of that of the minimum, step by step; nan once it diverged.
        curve: Points (rho, F(rho)) of the map, ``[2, points]``.
        period: Period of the orbit at the end, up to 32; 0 for none found, -1 for divergence.
    """

    path: Float64[ndarray, " times"]
    curve: Float64[ndarray, "2 points"]
    period: int


def map_orbit(lr: float, depth: int, start: float, *, steps: int = 100, settle: int = 4000) -> MapOrbit:
    r"""Iterate the map :math:`u \leftarrow u + \eta (1 - u^L) u^{L-1}` of a mode with target 1.

    A target s changes nothing but units: with :math:`\rho = s^{1/L} u` its map is this one at the learning rate
    :math:`\eta s^{2 - 2/L}`, which is a fixed multiple of the edge :math:`2/S`.

    Args:
        lr: Learning rate in units of the edge 2 / S = 2 / L.
        depth: Layers L, from 2 on.
        start: First value u, positive.
        steps: Steps that are kept.
        settle: Steps before the period is read off.
    """
    rate = lr * 2 / mode_sharpness(1.0, depth)
    u, path = start, []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps + 1):
            path.append(u)
            u = _bounded(float(scalar_step(u, 1.0, rate, depth)))
        for _ in range(settle):
            u = float(scalar_step(u, 1.0, rate, depth)) if np.isfinite(u) else u
        tail = []
        for _ in range(65):
            tail.append(u)
            u = _bounded(float(scalar_step(u, 1.0, rate, depth)))
    grid = np.linspace(0.0, 1.6, 161)
    return MapOrbit(np.array(path), np.stack([grid, scalar_step(grid, 1.0, rate, depth)]), _period(np.array(tail)))


def _bounded(u: float) -> float:
    """The value, or nan where it has left every orbit: beyond 10 the map only grows."""
    return u if abs(u) < 10 else float("nan")


def _period(tail: Float64[ndarray, " times"], tol: float = 1e-6) -> int:
    if not np.isfinite(tail).all():
        return -1
    return next((p for p in (1, 2, 4, 8, 16, 32) if np.abs(tail[p:] - tail[:-p]).max() < tol), 0)


@lru_cache(maxsize=16)
def bifurcation(
    depth: int, low: float = 0.9, high: float = 1.6, *, num_lr: int = 500, steps: int = 1000, keep: int = 32
) -> tuple[Float64[ndarray, " num_lr"], Float64[ndarray, "keep num_lr"]]:
    """Learning rates in units of the edge, and the last values of one layer at each of them (nan where it diverged).

    The start is 0.9 of the minimum. Units as in ``map_orbit``.
    """
    unit = np.linspace(low, high, num_lr)
    rate, u, kept = unit * 2 / mode_sharpness(1.0, depth), np.full(num_lr, 0.9), []
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            u = np.asarray(scalar_step(u, 1.0, rate, depth))
            u = np.where(np.abs(u) < 10, u, np.nan)
            if step >= steps - keep:
                kept.append(u)
    return unit, np.stack(kept)
