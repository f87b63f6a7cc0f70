"""The trace of the empirical NTK: exact, and estimated with standard errors."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from ntklib.functional import Model, Params, functional_model
from ntklib.kernels.jacobian import directional_derivative, examples_per_chunk, gradient_square_norms, jacobian, random_direction
from ntklib.text import unknown

DRAW_BUDGET = 2**24  # scalars of perturbed parameters held at a time


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its uncertainty.

    Attributes:
        mean: The exact trace, or the mean over draws.
        sem: Standard error of the mean over draws: 0 for the exact trace, nan for a single draw.
        num_samples: Number of draws; 0 for the exact trace.
    """

    mean: float
    sem: float
    num_samples: int

    @property
    def variance(self) -> float:
        """Sample variance of one draw (with n - 1)."""
        return self.sem**2 * self.num_samples


def ntk_trace(
    model: nn.Module,
    x: Tensor,
    *,
    method: str = "exact",
    num_samples: int = 1,
    epsilon: float | None = None,
    normalize: bool = True,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> TraceEstimate:
    r"""Compute or estimate the trace of the empirical NTK of ``model`` on ``x``.

    .. math:: \operatorname{Tr} K = \sum_{i,a} \lVert \nabla_\theta f_a(x_i) \rVert^2 = \lVert J \rVert_F^2

    divided by n c when ``normalize`` (the number the main paper plots). Methods:

    ================ ============================================================ =================================
    method           one draw                                                     mean; variance of one draw
    ================ ============================================================ =================================
    exact            :math:`\lVert J \rVert_F^2`, by c backward passes            Tr K; 0
    perturbation     :math:`\lVert f(x;w+\Delta)-f(x;w)\rVert_F^2/\epsilon^2`,    Tr K + O(epsilon^2); 2 ||K||_F^2 + O(epsilon^2)
                     Delta ~ N(0, epsilon^2 I) (main paper, Theorem 4.1)
    jvp              :math:`\lVert J z \rVert^2`, z ~ N(0, I): its limit epsilon -> 0   Tr K; 2 ||K||_F^2
    output           :math:`\sum_i \lVert J_i^T v_i \rVert^2`, v_ia = +-1 with    Tr K; 2 sum_i (||K_ii||_F^2 - sum_a K_ii,aa^2)
                     probability 1/2 (Hutchinson in output space)
    ================ ============================================================ =================================

    (variances of the unnormalised trace; K_ii is the c x c block of example i). The O(epsilon^2) term of ``perturbation`` is
    epsilon^2 sum_a [(tr H_a)^2/4 + ||H_a||_F^2/2 + <J_a, grad tr H_a>] over all outputs a with Hessian H_a: the estimate means
    something only where it does not depend on epsilon.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``; left exactly as it was.
        x: Inputs, ``[n, *input]``.
        method: See the table.
        num_samples: Independent draws, averaged; not used by ``exact``.
        epsilon: Standard deviation of each parameter's perturbation, for ``perturbation`` only, which requires it.
        normalize: Divide by n c.
        generator: Source of randomness. The same state at two checkpoints gives common random numbers. Default: torch's global.
        chunk_size: Examples whose gradients are held at a time. Default: as many as fit in 512 MiB.

    Raises:
        ValueError: If rows interact, a name is unknown, or an option does not fit the method.
    """
    _check_options(method, num_samples, epsilon)
    f, params = functional_model(model)
    with torch.no_grad():
        base = f(params, x)
        scale = 1 / base.numel() if normalize else 1.0
        if method == "exact":
            size = examples_per_chunk(params, base.shape[1], chunk_size)
            total = sum(float(j.square().sum(dtype=torch.float64)) for part in x.split(size) for j in jacobian(f, params, part))
            return TraceEstimate(scale * total, 0.0, 0)
        generator = generator if generator is not None else torch.default_generator
        problem = _Problem(f, params, x, base, num_samples, generator, epsilon, chunk_size)
        draws = scale * torch.cat(list(_SAMPLERS[method](problem))).double()
    sem = float(draws.std() / math.sqrt(num_samples)) if num_samples > 1 else math.nan
    return TraceEstimate(float(draws.mean()), sem, num_samples)


def _check_options(method: str, num_samples: int, epsilon: float | None) -> None:
    known = ("exact", *_SAMPLERS)
    if method not in known:
        raise ValueError(unknown("method", method, known))
    if method == "perturbation" and not (epsilon is not None and epsilon > 0):
        msg = f"method='perturbation' requires epsilon > 0 (the main paper uses 0.01). Got epsilon={epsilon}."
        raise ValueError(msg)
    if method != "perturbation" and epsilon is not None:
        msg = f"epsilon belongs to method='perturbation' only. Got epsilon={epsilon} with method={method!r}."
        raise ValueError(msg)
    if num_samples < 1:
        msg = f"num_samples must be at least 1. Got {num_samples}."
        raise ValueError(msg)


@dataclass(frozen=True)
class _Problem:
    """What every estimator needs: the function, where it is differentiated, and how to draw."""

    f: Model
    params: Params
    x: Tensor
    outputs: Tensor  # f(params, x), [n, c]
    num_samples: int
    generator: torch.Generator
    epsilon: float | None
    chunk_size: int | None


def _per_draw(q: _Problem, measure: Callable[[Params], Tensor]) -> Iterator[Tensor]:
    """Apply ``measure`` to standard normal directions, as many at a time as fit: ``measure(direction) -> scalar``."""
    p = sum(w.numel() for w in q.params.values())
    size = max(1, min(q.num_samples, DRAW_BUDGET // (8 * p)))
    for start in range(0, q.num_samples, size):
        directions = random_direction(q.params, min(size, q.num_samples - start), q.generator)
        if size == 1:  # a large net: convolutions with one set of weights are faster unbatched
            yield measure({k: d[0] for k, d in directions.items()})[None]
        else:
            yield vmap(measure)(directions)


def _perturbation(q: _Problem) -> Iterator[Tensor]:
    assert q.epsilon is not None
    epsilon = q.epsilon

    def measure(direction: Params) -> Tensor:
        moved = q.f({k: w + epsilon * direction[k] for k, w in q.params.items()}, q.x)
        return (moved - q.outputs).square().sum() / epsilon**2

    return _per_draw(q, measure)


def _jvp(q: _Problem) -> Iterator[Tensor]:
    return _per_draw(q, lambda direction: directional_derivative(q.f, q.params, q.x, direction).square().sum())


def _output(q: _Problem) -> Iterator[Tensor]:
    size = examples_per_chunk(q.params, 1, q.chunk_size)
    for _ in range(q.num_samples):
        coin = torch.randint(2, q.outputs.shape, generator=q.generator, device=q.generator.device).to(q.outputs)
        signs = 2 * coin - 1  # [n, c], Rademacher
        parts = zip(q.x.split(size), signs.split(size), strict=True)
        yield torch.stack([gradient_square_norms(q.f, q.params, a, v).sum() for a, v in parts]).sum()[None]


_SAMPLERS: dict[str, Callable[[_Problem], Iterator[Tensor]]] = {"perturbation": _perturbation, "jvp": _jvp, "output": _output}
