"""Random features of the empirical NTK, for sets too large for the kernel itself."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ntklib.directions import flatten_params, unflatten_params
from ntklib.functional import Params
from ntklib.operator import JacobianProducts, restricted_model
from ntklib.random import stream

ROWS = 2**15  # rows of a sketch that are converted to float64 at a time


@dataclass(frozen=True)
class SketchEstimate:
    """A property of a kernel, estimated from a sketch.

    Attributes:
        mean: The estimate.
        sem: Its standard error, by the jackknife over draws.
        num_samples: Number of draws q.
    """

    mean: float
    sem: float
    num_samples: int


def ntk_sketch(
    model: nn.Module,
    x: Shaped[Tensor, "n *input"],
    *,
    num_samples: int,
    seed: int = 0,
    output: str | None = None,
    params: Iterable[str] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "m q"]:
    r"""Compute q random features of the empirical NTK of ``model`` on ``x``, :math:`\Phi = J Z`.

    .. math:: \Phi_j = J z_j, \quad z_j \sim \mathcal{N}(0, I_p), \qquad \mathbb{E}\, \tfrac1q \Phi \Phi^\top = J J^\top = K

    Each feature is one forward derivative of all outputs; K, (n c)^2 numbers, is never formed. K has no factor 1/n, 1/c or 1/width,
    and 1/q is not part of Phi. An entry of Phi Phi^T / q has an error of order 1/sqrt(q); for norms and distances of kernels take
    ``sketched_frobenius_norm`` and ``sketched_kernel_distance``, which are not those of Phi Phi^T / q.

    Draw j depends on ``seed``, j and p alone (and on dtype and kind of device). Two checkpoints of one network with the same seed
    are hence measured with the same draws (common random numbers), which makes the error of their distance proportional to the
    distance; other seeds give independent sketches.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``; left exactly as it was.
        x: Inputs, ``[n, *input]``.
        num_samples: Number of draws q.
        seed: Seed of the draws.
        output: Name of an inner module whose output, flattened, stands for f. Default: the model's output.
        params: Names of the parameters that count. Default: all trainable ones.
        chunk_size: Examples differentiated at a time. Default: as many as have their activations fit in 512 MiB.

    Returns:
        ``Phi``, ``[n c, q]``, example-major: row i c + a is output a of example i.

    Raises:
        ValueError: If rows interact, ``x`` is empty, or ``num_samples`` or ``chunk_size`` is not positive.
    """
    if num_samples < 1:
        msg = f"num_samples must be at least 1. Got {num_samples}."
        raise ValueError(msg)
    f, theta = restricted_model(model, output, params)
    jacobian = JacobianProducts(f, theta, x, chunk_size)
    generator = stream(seed, "sketch", device=jacobian.device)
    size = jacobian.columns_at_a_time
    features = torch.empty(len(x) * jacobian.c, num_samples, dtype=jacobian.dtype, device=jacobian.device)
    for start in range(0, num_samples, size):
        count = min(size, num_samples - start)
        features[:, start : start + count] = jacobian.push(_directions(theta, count, generator)).flatten(1).T  # [count, n c]
    return features


def sketched_inner_product(phi1: Tensor, phi2: Tensor) -> SketchEstimate:
    r"""Estimate :math:`\langle K_1, K_2 \rangle_F` from sketches, without bias; with ``phi2 = phi1``, :math:`\lVert K \rVert_F^2`.

    .. math:: U_{12} = \frac{1}{q(q-1)} \sum_{j \ne l} (\Phi_{1,j} \cdot \Phi_{2,l})^2

    For j != l the draws z_j and z_l are independent, and so are Phi_1j = J_1 z_j and Phi_2l = J_2 z_l, even where the two sketches
    share their draws. Hence

    .. math:: \mathbb{E}(\Phi_{1,j} \cdot \Phi_{2,l})^2 = \mathbb{E} \operatorname{tr} (\Phi_{1,j} \Phi_{1,j}^\top)(\Phi_{2,l}
        \Phi_{2,l}^\top) = \operatorname{tr} K_1 K_2.

    The pairs j = l must be left out: with shared draws their mean is (tr M)^2 + ||M||_F^2 + tr M^2 with M = J_1^T J_2, of which
    only the middle term, tr K_1 K_2, is wanted. Nor does the product (Phi_1j . Phi_1l)(Phi_2j . Phi_2l) of two Gram matrices do:
    its mean is tr J_1^T J_1 J_2^T J_2, an inner product of p x p matrices, equal for J_1 = J_2 but not in general.

    For one kernel the variance is (4 (q - 2) zeta_1 + 2 zeta_2) / (q (q - 1)) with zeta_1 = 2 tr K^4, the variance of the mean of a
    pair given one of its draws, and zeta_2 = 2 ||K||_F^4 + 6 tr K^4, the variance of a pair (Hoeffding 1948, for a U-statistic of
    order 2). The jackknife counts the part of zeta_2 about twice: its error is conservative for few draws.

    Args:
        phi1: Sketch of the first kernel, ``[n c, q]``.
        phi2: Sketch of the second kernel, on the same examples.

    Raises:
        ValueError: If the shapes differ, there are fewer than 3 draws, or a sketch is not finite.
    """
    return _jackknife(lambda u: u, _Pairs(phi1, phi2))


def sketched_frobenius_norm(phi: Tensor) -> SketchEstimate:
    r"""Estimate :math:`\lVert K \rVert_F`: the root of ``sketched_inner_product(phi, phi)``, less its bias of order 1/q.

    The square is estimated without bias; the root of an estimate has a bias of order 1/q, which the jackknife removes.

    Args:
        phi: Sketch of the kernel, ``[n c, q]``.

    Raises:
        ValueError: As in ``sketched_inner_product``.
    """
    return _jackknife(torch.sqrt, _Pairs(phi, phi))


def sketched_kernel_distance(phi1: Tensor, phi2: Tensor) -> SketchEstimate:
    r"""Estimate :math:`S = 1 - \langle K_1, K_2 \rangle_F / (\lVert K_1 \rVert_F \lVert K_2 \rVert_F)`, as ``kernel_distance``.

    .. math:: \hat S = 1 - U_{12} / \sqrt{U_{11} U_{22}}

    with the unbiased U of ``sketched_inner_product``; the jackknife removes the bias of order 1/q of their ratio. Use the same
    seed for both sketches. For K_2 = K_1 the estimate is then 0 whatever the draws, and for J_2 = J_1 + delta D the terms of order
    delta of U_12, U_11 and U_22 cancel draw by draw: the error is of order delta^2 / sqrt(q), as S is of order delta^2. With
    different seeds the error is of order 1/sqrt(q) however near the kernels are. A small S can be estimated slightly negative.

    Args:
        phi1: Sketch of the first kernel, ``[n c, q]``.
        phi2: Sketch of the second kernel, on the same examples, with the same seed.

    Raises:
        ValueError: As in ``sketched_inner_product``, or if a kernel is zero.
    """
    cross, first, second = _Pairs(phi1, phi2), _Pairs(phi1, phi1), _Pairs(phi2, phi2)
    if first.mean == 0 or second.mean == 0:
        msg = f"A kernel must not be zero, for its direction to exist. Got squared norms {first.mean:.3g} and {second.mean:.3g}."
        raise ValueError(msg)
    return _jackknife(lambda u12, u11, u22: 1 - u12 / torch.sqrt(u11 * u22), cross, first, second)


class _Pairs:
    """U_12 of two sketches, from all draws and with each draw left out."""

    def __init__(self, phi1: Tensor, phi2: Tensor):
        _check(phi1, phi2)
        q = phi1.shape[1]
        products = torch.zeros(q, q, dtype=torch.float64, device=phi1.device)
        for a, b in zip(phi1.split(ROWS), phi2.split(ROWS), strict=True):
            products += a.double().T @ b.double()
        squares = products.square().fill_diagonal_(0)  # (Phi_1j . Phi_2l)^2 for j != l
        total = squares.sum()
        self.mean = total / (q * (q - 1))
        self.without = (total - squares.sum(0) - squares.sum(1)) / ((q - 1) * (q - 2))  # [q]


def _jackknife(statistic: Callable[..., Tensor], *pairs: _Pairs) -> SketchEstimate:
    """Return q s - (q - 1) mean of s_(j), with s_(j) the statistic without draw j, and the standard error from their spread."""
    whole, without = statistic(*(u.mean for u in pairs)), statistic(*(u.without for u in pairs))
    q = len(without)
    mean = q * whole - (q - 1) * without.mean()
    sem = math.sqrt((q - 1) / q * float((without - without.mean()).square().sum()))
    return SketchEstimate(float(mean), sem, q)


def _check(phi1: Tensor, phi2: Tensor) -> None:
    if phi1.ndim != 2 or phi1.shape != phi2.shape:
        msg = f"Sketches must be [n c, q] of the same shape. Got {tuple(phi1.shape)} and {tuple(phi2.shape)}."
        raise ValueError(msg)
    if phi1.shape[1] < 3:
        msg = f"An estimate with its error needs at least 3 draws. Got num_samples = {phi1.shape[1]}."
        raise ValueError(msg)
    if not (phi1.isfinite().all() and phi2.isfinite().all()):
        msg = "Sketches must be finite. Got nan or infinity."
        raise ValueError(msg)


def _directions(theta: Params, count: int, generator: torch.Generator) -> Params:
    """The next draws, one call each, so that a draw does not depend on how many are made together."""
    like = flatten_params(theta)
    draws = [torch.randn(len(like), generator=generator, dtype=like.dtype, device=generator.device) for _ in range(count)]
    return unflatten_params(torch.stack(draws).to(like.device), theta)
