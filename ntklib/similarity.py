"""How alike two kernels are, regardless of scale, and how well a kernel's directions fit the targets."""

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 2**18  # entries of a kernel that are held in float64 at a time, few enough for the processor's cache


def kernel_distance(k1: Tensor, k2: Tensor) -> float:
    r"""Return :math:`S = 1 - \langle K_1, K_2 \rangle / (\lVert K_1 \rVert_F \lVert K_2 \rVert_F)`.

    (Fort et al. 2020, arXiv:2010.15110v1, section 3; the main paper's section 4.) Uncentred; in [0, 1] for positive semidefinite
    kernels; 0 exactly when one is a positive multiple of the other, so S does not see the scale. Computed in float64 as
    :math:`\tfrac12 \lVert K_1/\lVert K_1 \rVert_F - K_2/\lVert K_2 \rVert_F \rVert_F^2`, which keeps small distances exact where 1 - cosine would round to 0. No function of this module
    copies a kernel: entries are converted to float64 a few at a time.

    Args:
        k1: First kernel, any shape.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: If shapes differ, or a kernel is zero or not finite (S is then undefined).
    """
    return 0.5 * _unit_sums(k1, k2)[0]


def kernel_angle(k1: Tensor, k2: Tensor) -> float:
    r"""Return the angle :math:`\arccos(1 - S)` between two kernels, in radians.

    Unlike S it obeys the triangle inequality, and along a smooth path it grows in proportion to time.

    Args:
        k1: First kernel, any shape.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: As in ``kernel_distance``.
    """
    minus, plus = _unit_sums(k1, k2)
    return 2 * math.atan2(math.sqrt(minus), math.sqrt(plus))  # accurate for small angles


def kernel_velocity(k1: Tensor, k2: Tensor, dt: float) -> float:
    r"""Return the mean angular velocity :math:`\arccos(1 - S(K_t, K_{t+dt})) / dt` of a kernel's direction, in radians per time.

    The papers divide the distance itself, v = S/dt (the main paper's section 4). Along a smooth path S = (angle)^2 / 2 to leading
    order, so S/dt vanishes with dt and says as much about the choice of dt as about the kernel; the angle over dt has a limit, the
    speed on the unit sphere of kernels. ``kernel_distance(k1, k2) / dt`` is the papers' number. Changes of scale do not count. The
    path of a network with ReLU is not smooth: its kernel jumps when a unit switches, and S is then of order dt on average.

    Args:
        k1: Kernel at time t, any shape.
        k2: Kernel at time t + dt, the same shape.
        dt: Time between them, positive. Its unit is the caller's (steps, epochs, or learning rate times steps) and the result's.

    Raises:
        ValueError: If ``dt`` is not positive and finite, or as in ``kernel_distance``.
    """
    if not (dt > 0 and math.isfinite(dt)):
        msg = f"dt must be positive and finite. Got {dt}."
        raise ValueError(msg)
    return kernel_angle(k1, k2) / dt


@dataclass(frozen=True)
class KernelChange:
    r"""The squared distance of two kernels and its two parts, one of scale and one of direction.

    .. math:: \lVert K_1 - K_2 \rVert_F^2
        = (\lVert K_1 \rVert_F - \lVert K_2 \rVert_F)^2 + 2\, S\, \lVert K_1 \rVert_F \lVert K_2 \rVert_F

    Attributes:
        total: The left side, summed entry by entry.
        scale: The first term on the right.
        direction: The second term.
    """

    total: float
    scale: float
    direction: float

    @property
    def error(self) -> float:
        """Relative difference of the two sides: rounding; 0 for equal kernels."""
        return abs(self.total - self.scale - self.direction) / self.total if self.total else self.scale + self.direction

    @property
    def scale_share(self) -> float:
        """Part of the change that is one of scale, in [0, 1]; nan for equal kernels."""
        both = self.scale + self.direction
        return self.scale / both if both else math.nan


@torch.no_grad()
def kernel_change(k1: Tensor, k2: Tensor) -> KernelChange:
    """Split the squared Frobenius distance of two kernels into scale and direction, see ``KernelChange``.

    Expand the square, and put <K_1, K_2> = (1 - S) ||K_1|| ||K_2||. Computed in float64; the three numbers are found separately.

    Args:
        k1: First kernel, any shape.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: As in ``kernel_distance``.
    """
    distance, n1, n2 = kernel_distance(k1, k2), _norm(k1), _norm(k2)
    total = sum(float((a - b).square().sum()) for a, b in _pairs(k1, k2))
    return KernelChange(total, (n1 - n2) ** 2, 2 * distance * n1 * n2)


@torch.no_grad()
def kernel_drift(k0: Tensor, k: Tensor) -> float:
    r"""Return :math:`\lVert K - K_0 \rVert_F / \lVert K_0 \rVert_F`, how far a kernel has moved from where it was, scale included.

    (The poster speaks of kernel drift without a formula; the relative Frobenius norm is the usual one.) Unlike S it sees a change
    of scale, and it is not symmetric: the first kernel is the unit.

    Args:
        k0: Kernel at the start, any shape.
        k: Kernel now, the same shape.

    Raises:
        ValueError: If shapes differ, a kernel is not finite, or the first one is zero.
    """
    _check_shapes(k0, k)
    norm = _norm(k0)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in _pairs(k0, k)))
    if not math.isfinite(moved):
        msg = f"Kernels must be finite. Got a difference of norm {moved}: leave diverged runs out."
        raise ValueError(msg)
    return moved / norm


def distances_to_earlier(memory: MutableMapping[str, Tensor], name: str, step: int, kernel: Tensor) -> dict[int, float]:
    """Return the distance S of a kernel to each one remembered under ``name``, by step, and remember it too.

    With ``Run.memory`` this gives all pairwise distances along a run, also of a run that was interrupted.

    Args:
        memory: Kernels by ``"<name>.<step>"``, on the CPU; extended by this one.
        name: Which of several kernels of the same run, without a dot.
        step: Step at which the kernel was measured; one that is remembered already is replaced, not compared.
        kernel: The kernel, of the shape of the remembered ones.

    Raises:
        ValueError: If the name has a dot, or as in ``kernel_distance``.
    """
    if "." in name:
        msg = f"name must have no dot, which separates it from the step. Got {name!r}."
        raise ValueError(msg)
    kernel = kernel.detach().cpu()
    earlier = {int(key.split(".")[1]): k for key, k in memory.items() if key.split(".")[0] == name}
    found = {s: kernel_distance(k, kernel) for s, k in sorted(earlier.items()) if s != step}
    memory[f"{name}.{step}"] = kernel
    return found


@torch.no_grad()
def kernel_alignment(k1: Tensor, k2: Tensor) -> float:
    r"""Return the cosine :math:`\langle K_1, K_2 \rangle / (\lVert K_1 \rVert_F \lVert K_2 \rVert_F)` = 1 - S.

    (Cristianini et al. 2001, "On kernel-target alignment".) Uncentred; in [0, 1] for positive semidefinite kernels. For kernels
    that are nearly parallel ``kernel_distance`` has the digits that are lost here behind the 1.

    Args:
        k1: First kernel, any shape.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: As in ``kernel_distance``.
    """
    _check_shapes(k1, k2)
    norms = _norm(k1) * _norm(k2)
    return _cosine(sum(float((a * b).sum()) for a, b in _pairs(k1, k2)), norms)


@torch.no_grad()
def centered_kernel_alignment(k1: Tensor, k2: Tensor) -> float:
    r"""Return the cosine of two kernels after centring over examples: centred kernel alignment, or CKA of the features.

    .. math:: \frac{\langle H K_1 H, H K_2 H \rangle}{\lVert H K_1 H \rVert_F \lVert H K_2 H \rVert_F}, \qquad
        H = I_n - \tfrac1n 1 1^\top

    (Cortes et al. 2012, "Algorithms for learning kernels based on centered alignment"; Kornblith et al. 2019, arXiv:1905.00414v4,
    section 3.) Centring subtracts the mean over examples from the features. The features of a kernel with outputs are the gradients
    of each output, from which the mean gradient *of the same output* is subtracted: H stands for H (x) I_c, and centring commutes
    with the sum over outputs. (Centring all n c rows at once would mix outputs.) No factor 1/n or 1/(n - 1) remains.

    Args:
        k1: First kernel of one set with itself, ``[n, n]`` or ``[n, n, c, c]``.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: As in ``kernel_distance``, if a kernel is not of these shapes, or if it is constant over examples, to rounding:
            its features then do not vary.
    """
    _check_shapes(k1, k2)
    means = [_means(k) for k in (k1, k2)]
    inner, squares = 0.0, [0.0, 0.0]
    row = 0
    for blocks in _pairs(k1, k2):
        a, b = (_centered(block, *mean, row) for block, mean in zip(blocks, means, strict=True))
        inner += float((a * b).sum())
        squares = [total + float(part.square().sum()) for total, part in zip(squares, (a, b), strict=True)]
        row += len(a)
    for k, square in zip((k1, k2), squares, strict=True):
        noise = 4 * torch.finfo(k.dtype if k.is_floating_point() else torch.float64).eps * _norm(k)
        if math.sqrt(square) <= noise:
            msg = f"A kernel must vary over examples for its centred direction to exist. Got a centred norm of {square**0.5:.1e}."
            raise ValueError(msg)
    return _cosine(inner, math.sqrt(squares[0]) * math.sqrt(squares[1]))


@torch.no_grad()
def kernel_target_alignment(kernel: Tensor, y: Tensor) -> float:
    r"""Return the uncentred cosine between a kernel and the targets' ideal kernel.

    .. math:: \mathrm{KTA} = \frac{\langle K, y y^\top \rangle}{\lVert K \rVert_F \lVert y \rVert^2}
        = \sum_i \frac{\lambda_i}{\lVert \lambda \rVert_2} a_i, \qquad a_i = \frac{(v_i^\top y)^2}{\lVert y \rVert^2}

    (Cristianini et al. 2001, "On kernel-target alignment".) The weights are the eigenvalues over the Frobenius norm, the a_i are
    those of ``target_alignment``. In [0, 1] for positive semidefinite kernels. Targets are used as given: subtract their mean
    first where that is meant.

    Args:
        kernel: ``[n, n, c, c]`` with targets ``[n, c]``, which together are one vector of n c numbers, example-major; or
            ``[n, n]`` with targets ``[n]``; or ``[n, n]``, for example summed over outputs, with ``[n, c]``: the ideal
            kernel is then Y Y^T, of norm ||Y^T Y||_F.
        y: Targets.

    Raises:
        ValueError: If shapes do not fit, or kernel or targets are zero or not finite.
    """
    columns = _target_columns(kernel, y)
    ideal = float((columns.T @ columns).norm())
    if not math.isfinite(ideal) or ideal == 0:
        msg = f"Targets must be finite and not zero. Got a norm of {float(y.double().norm())}."
        raise ValueError(msg)
    norm, inner, row = _norm(kernel), 0.0, 0
    for block in _matrix_blocks(kernel):
        inner += float((columns[row : row + len(block)] * (block @ columns)).sum())  # tr Y^T K Y
        row += len(block)
    return _cosine(inner, norm * ideal)


@torch.no_grad()
def target_alignment(eigvecs: Float[Tensor, "m k"], y: Tensor) -> Float[Tensor, " k"]:
    r"""Return :math:`a_i = (v_i^\top y)^2 / \lVert y \rVert^2`, the share of the targets along each eigenvector of a kernel.

    Over a full orthonormal basis the shares sum to 1. Within a repeated eigenvalue only their sum means anything.

    Args:
        eigvecs: Orthonormal vectors in columns, as ``top_eigenpairs`` returns them; m = n c is example-major.
        y: Targets, ``[n, c]`` or ``[m]``.

    Returns:
        The shares, in the order of the columns and the dtype of ``eigvecs``.

    Raises:
        ValueError: If lengths differ, a column is not of unit length, or the targets are zero or not finite.
    """
    if y.numel() != len(eigvecs):
        msg = f"y must have as many numbers as an eigenvector, {len(eigvecs)}. Got shape {tuple(y.shape)}."
        raise ValueError(msg)
    lengths = eigvecs.norm(dim=0)
    if not bool(((lengths - 1).abs() < math.sqrt(torch.finfo(eigvecs.dtype).eps)).all()):
        worst = float(lengths[(lengths - 1).abs().argmax()])
        msg = f"eigvecs must hold unit vectors in columns. Got a column of length {worst:.6g}."
        raise ValueError(msg)
    target = y.reshape(-1).double()
    norm = float(target.norm())
    if not math.isfinite(norm) or norm == 0:
        msg = f"Targets must be finite and not zero. Got a norm of {norm}."
        raise ValueError(msg)
    return ((target / norm) @ eigvecs.double()).square().to(eigvecs.dtype)


def _check_shapes(k1: Tensor, k2: Tensor) -> None:
    if k1.shape != k2.shape:
        msg = f"Two kernels must have the same shape. Got {tuple(k1.shape)} and {tuple(k2.shape)}."
        raise ValueError(msg)


def _blocks(kernel: Tensor) -> Iterator[Tensor]:
    """The kernel in float64, some rows at a time."""
    kernel = kernel.detach()
    kernel = kernel[None] if kernel.ndim == 0 else kernel
    rows = max(1, BLOCK * len(kernel) // max(1, kernel.numel()))
    for block in kernel.split(rows):
        yield block.double()


def _pairs(k1: Tensor, k2: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_blocks(k1), _blocks(k2), strict=True)


def _norm(kernel: Tensor) -> float:
    norm = math.sqrt(sum(float(block.square().sum()) for block in _blocks(kernel)))
    if not math.isfinite(norm) or norm == 0:
        msg = f"A kernel must be finite and not zero, for its direction to exist. Got Frobenius norm {norm}."
        raise ValueError(msg)
    return norm


@torch.no_grad()
def _unit_sums(k1: Tensor, k2: Tensor) -> tuple[float, float]:
    """||u - v||^2 and ||u + v||^2 of the two unit kernels."""
    _check_shapes(k1, k2)
    n1, n2 = _norm(k1), _norm(k2)
    minus = plus = 0.0
    for a, b in _pairs(k1, k2):
        u, v = a / n1, b / n2
        minus, plus = minus + float((u - v).square().sum()), plus + float((u + v).square().sum())
    return minus, plus


def _cosine(inner: float, norms: float) -> float:
    return min(1.0, max(-1.0, inner / norms))  # rounding


def _means(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the first examples and over the second ones, ``[n, ...]`` each, in float64."""
    shape = tuple(kernel.shape)
    if len(shape) not in (2, 4) or shape[0] != shape[1] or shape[2:3] != shape[3:] or kernel.numel() == 0:
        msg = f"A kernel to centre must be [n, n] or [n, n, c, c], of one set with itself. Got {shape}."
        raise ValueError(msg)
    over_first = torch.zeros(kernel.shape[1:], dtype=torch.float64, device=kernel.device)
    over_second = []
    for block in _blocks(kernel):
        over_first += block.sum(0) / len(kernel)
        over_second.append(block.mean(1))
    return over_first, torch.cat(over_second)


def _centered(block: Tensor, over_first: Tensor, over_second: Tensor, row: int) -> Tensor:
    """Rows of H K H from ``row`` on."""
    return block - over_first - over_second[row : row + len(block), None] + over_first.mean(0)


def _target_columns(kernel: Tensor, y: Tensor) -> Tensor:
    """Targets in float64 as columns that the kernel, as a matrix, multiplies."""
    shape, pairs = tuple(kernel.shape), (*y.shape[:1], *y.shape[:1])
    if y.ndim == 2 and shape == (*pairs, y.shape[1], y.shape[1]):
        return y.reshape(-1, 1).double()
    if y.ndim in (1, 2) and shape == pairs:
        return y.reshape(len(y), -1).double()
    msg = f"kernel and y must be [n, n, c, c] and [n, c], or [n, n] and [n] or [n, c]. Got {shape} and {tuple(y.shape)}."
    raise ValueError(msg)


def _matrix_blocks(kernel: Tensor) -> Iterator[Tensor]:
    """Rows of the kernel as a matrix, example-major, in float64."""
    for block in _blocks(kernel):
        yield block if block.ndim == 2 else block.transpose(1, 2).reshape(len(block) * block.shape[2], -1)
