"""Margins of homogeneous networks and the support vector machine whose kernel is the NTK."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.functional import functional_model
from ntklib.kernels.jacobian import jacobian
from ntklib.svm import svm_dual


@dataclass(frozen=True)
class Homogeneity:
    """How far a network is homogeneous in its parameters, see ``homogeneity``.

    Attributes:
        degree: The degree L that fits best.
        residual: Norm of what the fit leaves, over the norm of <w, grad f>; 0 for a homogeneous network.
    """

    degree: float
    residual: float


def tangent_features(model: nn.Module, x: Tensor) -> tuple[Float[Tensor, "n p"], Float[Tensor, " p"]]:
    r"""Return the features :math:`\phi_i = \nabla_w f(x_i; w)` of the NTK of a network with one output, and w itself.

    Both in float64 on the CPU, parameters in the order of the module: K = phi phi^T, without normalisation.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, 1]``.
        x: Inputs, ``[n, *input]``.

    Raises:
        ValueError: If the network has more than one output, or as in ``functional_model``.
    """
    f, params = functional_model(model)
    gradients = jacobian(f, params, x)
    c = next(iter(gradients.values())).shape[1]
    if c != 1:
        msg = f"The network must have one output, whose sign is the class. Got {c} outputs."
        raise ValueError(msg)
    features = torch.cat([gradients[name][:, 0] for name in params], 1)
    return features.cpu().double(), torch.cat([w.flatten() for w in params.values()]).cpu().double()


@torch.no_grad()
def homogeneity(model: nn.Module, x: Tensor) -> Homogeneity:
    r"""Test Euler's identity for homogeneous functions, :math:`\langle w, \nabla_w f(x_i; w) \rangle = L f(x_i; w)` for all i.

    It holds with L the number of weight layers for a multilayer perceptron without biases whose activation is ReLU or the identity
    (Lyu & Li 2019, arXiv:1906.05890); biases, batch normalisation and other activations break it. L is fitted by least squares.

    Args:
        model: Network with one output, in eval mode.
        x: Inputs, ``[n, *input]``.

    Raises:
        ValueError: As in ``tangent_features``.
    """
    features, w = tangent_features(model, x)
    euler, f = features @ w, model(x)[:, 0].cpu().double()
    degree = float(euler @ f / (f @ f))
    return Homogeneity(degree, float((euler - degree * f).norm() / euler.norm()))


def block_means(kernel: Float[Tensor, "n n"], y: Float[Tensor, " n"]) -> tuple[float, float]:
    """Return the mean kernel of two different examples of the same class, and of different classes, both over the mean diagonal.

    (1, 0) under the main paper's simplification, a kernel that is constant within classes and zero between them.

    Args:
        kernel: Symmetric, ``[n, n]``.
        y: Labels +1 and -1, each at least once, one of them at least twice.

    Raises:
        ValueError: If there is no pair of one of the two kinds.
    """
    same = y[:, None] == y
    others = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    if bool(same.all()) or not bool(others.any()):
        msg = f"Both labels must occur, one of them twice. Got {int((y > 0).sum())} of +1 and {int((y < 0).sum())} of -1."
        raise ValueError(msg)
    diagonal = kernel.diagonal().mean()
    return float(kernel[others].mean() / diagonal), float(kernel[~same].mean() / diagonal)


@dataclass(frozen=True)
class TangentMargin:
    r"""A binary classifier as a vector in the feature space of its own NTK, see ``tangent_margin``.

    Attributes:
        norm: ||w||, all trainable parameters.
        trace: Tr K/n.
        scale_free_trace: T = Tr K / (n ||w||^(2(L-1))), unchanged when w is multiplied by a number.
        normalized_margin: min_i y_i f(x_i) / ||w||^L (Lyu & Li 2019); negative if an example is on the wrong side.
        optimum: D*, see ``SVMSolution``.
        optimum_ratio: D* Tr K/n; 1 if D* = n/Tr K, and 1/2 or more for every kernel.
        mean_bound: A lower bound on ``optimum_ratio``, n Tr K/(2 y^T K y), from equal dual variables; 1 for a block kernel with as
            many examples in both classes.
        svm_margin: 1/sqrt(2 D*), the largest margin in feature space.
        radius_margin: The same over the feature radius sqrt(Tr K/n): (2 optimum_ratio)^(-1/2), at most 1.
        attained: The share L min_i y_i f(x_i) / (||w|| svm_margin) of the largest margin that w itself attains in feature space; 1
            exactly if w is along the solution.
        cosine: cos of the angle between w and the solution u = sum_i alpha_i y_i phi_i; not below ``attained`` (if homogeneous).
        within: Mean kernel within classes, see ``block_means``.
        across: Mean kernel across classes, see ``block_means``.
        num_support: Examples with alpha > 0.
        kkt_residual: See ``SVMSolution``.
    """

    norm: float
    trace: float
    scale_free_trace: float
    normalized_margin: float
    optimum: float
    optimum_ratio: float
    mean_bound: float
    svm_margin: float
    radius_margin: float
    attained: float
    cosine: float
    within: float
    across: float
    num_support: int
    kkt_residual: float


@torch.no_grad()
def tangent_margin(model: nn.Module, x: Tensor, y: Float[Tensor, " n"], *, degree: int) -> TangentMargin:
    r"""Compare a network's parameters with the support vector machine in the feature space of its NTK at these parameters.

    By homogeneity :math:`\langle w, \phi_i \rangle = L f(x_i)`, so w is a linear classifier of its own tangent features with margin
    :math:`L \min_i y_i f(x_i) / \lVert w \rVert`. The main paper's Theorem 4.2 (Lyu & Li 2019, arXiv:1906.05890) says that at the
    limit of training this is the largest possible one. For any w with positive margin the definitions give the identity

    .. math:: L^2 \bar\gamma^2 = \frac{\rho^2\, T}{2\, D^* \operatorname{Tr} K / n}

    between the normalized margin, the attained share rho, the scale-free trace T and the ratio D* Tr K/n.

    Args:
        model: Network with one output, in eval mode, ``[n, *input] -> [n, 1]``; use float64.
        x: Inputs, ``[n, *input]``.
        y: Labels +1 and -1.
        degree: Degree of homogeneity L, the number of weight layers.

    Raises:
        ValueError: As in ``tangent_features``, ``svm_dual`` and ``block_means``.
    """
    features, w = tangent_features(model, x)
    signs, n = y.cpu().double(), len(x)
    kernel = features @ features.T
    solution = svm_dual(kernel, signs)
    smallest = float((signs * model(x)[:, 0].cpu().double()).min())
    norm, trace = float(w.norm()), float(kernel.trace()) / n
    ratio = solution.optimum * trace
    u, square = features.T @ (solution.alpha * signs), float(signs @ kernel @ signs)
    within, across = block_means(kernel, signs)
    found = solution.separable
    return TangentMargin(
        norm=norm, trace=trace, scale_free_trace=trace / norm ** (2 * (degree - 1)),
        normalized_margin=smallest / norm**degree, optimum=solution.optimum, optimum_ratio=ratio,
        mean_bound=n**2 * trace / (2 * square) if square > 0 else math.inf,
        svm_margin=solution.margin, radius_margin=(2 * ratio) ** -0.5,
        attained=degree * smallest / (norm * solution.margin) if found else math.nan,
        cosine=float(u @ w / (u.norm() * norm)) if found else math.nan,
        within=within, across=across, num_support=solution.num_support, kkt_residual=solution.kkt_residual,
    )  # fmt: skip


@dataclass(frozen=True)
class MarginGrowth:
    r"""Where the growth of the trace and of the normalized margin between two states comes from, as differences of logarithms.

    Attributes:
        trace: log of the ratio of Tr K; ``scale_free_trace + norm``.
        norm: Its part from the parameters' norm, 2 (L - 1) log of the ratio of ||w||.
        scale_free_trace: Its remaining part, log of the ratio of T.
        margin: log of the ratio of normalized margins; ``attained + trace_part + geometry``.
        attained: Its part from w coming closer to the solution of the support vector machine, log of the ratio of rho.
        trace_part: Its part from the scale-free trace, half of ``scale_free_trace``.
        geometry: Its part from the shape of the kernel, minus half the log of the ratio of D* Tr K/n.
    """

    trace: float
    norm: float
    scale_free_trace: float
    margin: float
    attained: float
    trace_part: float
    geometry: float


def margin_growth(start: Mapping[str, float], end: Mapping[str, float], *, degree: int) -> MarginGrowth:
    r"""Split the growth of trace and normalized margin between two states of a homogeneous network.

    .. math::
        \Delta \log \operatorname{Tr} K = \Delta \log T + 2 (L - 1)\, \Delta \log \lVert w \rVert , \qquad
        \Delta \log \bar\gamma = \Delta \log \rho + \tfrac12 \Delta \log T
        - \tfrac12 \Delta \log (D^* \operatorname{Tr} K / n)

    the second from the identity in ``tangent_margin``. Both are exact.

    Args:
        start: Fields of ``TangentMargin`` by name at the first state.
        end: The same at the second.
        degree: Degree of homogeneity L.

    Raises:
        ValueError: If a normalized margin is not positive: its logarithm has no growth.
    """
    if min(start["normalized_margin"], end["normalized_margin"]) <= 0:
        got = f"{start['normalized_margin']:.3g} and {end['normalized_margin']:.3g}"
        msg = f"Both normalized margins must be positive, all examples on their right side. Got {got}."
        raise ValueError(msg)
    growth = {name: math.log(end[name] / start[name]) for name in (
        "trace", "norm", "scale_free_trace", "normalized_margin", "attained", "optimum_ratio")}  # fmt: skip
    return MarginGrowth(
        growth["trace"], 2 * (degree - 1) * growth["norm"], growth["scale_free_trace"], growth["normalized_margin"],
        growth["attained"], growth["scale_free_trace"] / 2, -growth["optimum_ratio"] / 2,
    )  # fmt: skip


@torch.no_grad()
def rescale_layers(model: nn.Module, factors: Sequence[float]) -> nn.Module:
    """Return a copy of a network without biases whose l-th weight is multiplied by the l-th factor.

    With ReLU or no activation the function is multiplied by the product of the factors. It stays the same where that is 1.

    Args:
        model: Network whose parameters are its weights, first layer first.
        factors: Positive, one per weight.

    Raises:
        ValueError: If the number of factors is not that of parameters, or one is not positive.
    """
    other = copy.deepcopy(model)
    weights = list(other.parameters())
    if len(weights) != len(factors) or min(factors) <= 0:
        msg = f"factors must be {len(weights)} positive numbers, one per parameter of the model. Got {list(factors)}."
        raise ValueError(msg)
    for w, c in zip(weights, factors, strict=True):
        w.mul_(c)
    return other


@torch.no_grad()
def kink_share(weight: Float[Tensor, "m d"], x: Tensor, *, tolerance: float = 1e-3) -> float:
    r"""Return the share of pairs of a unit j and an example i with :math:`|\cos \angle(w_j, x_i)| <` ``tolerance``.

    There a ReLU unit is about to switch on or off, the gradient jumps, and so does the kernel. Units whose norm is below a tenth of
    the largest are left out. Weights of random direction have a share near tolerance sqrt(2 d/pi).

    Args:
        weight: Weights of a first layer without bias, ``[m, d]``.
        x: Inputs, ``[n, *input]``, flattened to ``[n, d]``.
        tolerance: Cosine that counts as a kink.
    """
    norms = weight.norm(dim=1)
    strong = norms >= 0.1 * norms.max()
    flat = x.flatten(1)
    cosines = (flat @ weight[strong].T) / (flat.norm(dim=1)[:, None] * norms[strong])
    return float((cosines.abs() < tolerance).double().mean())
