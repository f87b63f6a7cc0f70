"""The trace of the empirical NTK: exact, and estimated with standard errors."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from ntklib.checks import check_draws
from ntklib.directions import directional_derivative, random_direction
from ntklib.functional import Params
from ntklib.kernels.evaluate import Request, prepared, square_norms_along
from ntklib.kernels.streaming import Program
from ntklib.text import check_known

DRAW_BUDGET = 2**24  # scalars of perturbed parameters held at a time


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its uncertainty.

    Attributes:
        mean: The exact trace, or the mean over draws.
        sem: Standard error of the mean over draws: 0 for the exact trace, nan for a single draw.
        num_samples: Number of draws; 0 for the exact trace.
        cost: Multiply-adds spent, in units of one forward pass on all examples (counted, not timed).
    """

    mean: float
    sem: float
    num_samples: int
    cost: float = math.nan

    @property
    def variance(self) -> float:
        """Sample variance of one draw (with n - 1), for independent draws."""
        return self.sem**2 * self.num_samples


def ntk_trace(
    model: nn.Module,
    x: Tensor,
    *,
    method: str = "exact",
    num_samples: int = 1,
    epsilon: float | None = None,
    probes: str = "rademacher",
    normalize: bool = True,
    generator: torch.Generator | None = None,
    output: str | None = None,
    params: Iterable[str] | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
) -> TraceEstimate:
    r"""Compute or estimate the trace of the empirical NTK of ``model`` on ``x``.

    .. math:: \operatorname{Tr} K = \sum_{i,a} \lVert \nabla_\theta f_a(x_i) \rVert^2 = \lVert J \rVert_F^2

    divided by n c when ``normalize`` (the number the main paper plots). Methods:

    ============ =============================================================== ==========================================
    method       one draw                                                        mean; variance of one draw
    ============ =============================================================== ==========================================
    exact        :math:`\lVert J \rVert_F^2`, by c backward passes               Tr K; 0
    perturbation :math:`\lVert f(x;w+\Delta)-f(x;w)\rVert_F^2/\epsilon^2`,       :math:`\operatorname{Tr} K + O(\epsilon^2)`;
                 Delta ~ N(0, epsilon^2 I) (main paper, Theorem 4.1)             :math:`2 \lVert K \rVert_F^2 + O(\epsilon^2)`
    jvp          :math:`\lVert J z \rVert^2`, z ~ N(0, I), the limit of a         Tr K; :math:`2 \lVert K \rVert_F^2`
                 perturbation for epsilon -> 0
    output       :math:`\sum_i \lVert J_i^\top v_i \rVert^2`, v_ia = +-1 with     Tr K; :math:`2 \sum_i \sum_{a \ne b} K_{ii,ab}^2`
                 probability 1/2 (Hutchinson in output space)
    ============ =============================================================== ==========================================

    (variances of the unnormalised trace; K_ii is the c x c block of example i). With ``probes="orthogonal"`` the directions of one
    example are rows of sqrt(c) times a random orthogonal matrix: the error falls faster with the number of draws and is 0 at c; the
    standard error then carries the factor sqrt(1 - num_samples / c), which is exact for draws without replacement from a frame. The
    O(epsilon^2) term of ``perturbation`` is epsilon^2 sum_a [(tr H_a)^2/4 + ||H_a||_F^2/2 + <J_a, grad tr H_a>] over all outputs a
    with Hessian H_a: the estimate means something only where it does not depend on epsilon.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``; left exactly as it was.
        x: Inputs, ``[n, *input]``.
        method: See the table.
        num_samples: Draws, averaged; not used by ``exact``.
        epsilon: Standard deviation of each parameter's perturbation, for ``perturbation`` only, which requires it.
        probes: ``"rademacher"`` or ``"orthogonal"`` (at most c draws), for ``output``.
        normalize: Divide by n c.
        generator: Source of randomness. The same state at two checkpoints gives common random numbers, so that differences of
            estimates are far more certain than the estimates. Default: torch's global.
        output: Name of an inner module whose output, flattened, is f in place of the model's.
        params: Names of the trainable parameters that count. Default: all.
        chunk_size: Examples worked on at a time. Default: as many as fit in ``max_memory``; all, for ``perturbation`` and ``jvp``.
        max_memory: Bytes that ``exact`` and ``output`` may take. Default: half of the free memory.

    Raises:
        ValueError: If rows interact, a name is unknown, an option does not fit the method, or inputs are empty or not finite.
    """
    _check_options(method, num_samples, epsilon, probes)
    request = Request(model, x, None, "norms", "auto", output, params, chunk_size, max_memory, progress=False)
    if method == "exact":
        return _exact(request, normalize)
    generator = generator if generator is not None else torch.default_generator
    with prepared(request) as (program, x, _), torch.no_grad():
        problem = _Problem(program, x, num_samples, generator, epsilon, probes, chunk_size, max_memory)
        draws, cost = _SAMPLERS[method](problem)
        state = generator.get_state()
        draws = draws.double() / (len(x) * program.c if normalize else 1)
        share = 1 - num_samples / program.c if method == "output" and probes == "orthogonal" else 1.0
    generator.set_state(state)  # the global one, too, moves on: the next call draws afresh
    sem = float(draws.std() * math.sqrt(share / num_samples)) if num_samples > 1 else math.nan
    return TraceEstimate(float(draws.mean()), 0.0 if share == 0 else sem, num_samples, cost)


def _exact(request: Request, normalize: bool) -> TraceEstimate:
    with prepared(request) as (program, x, _):
        v = torch.eye(program.c).to(program.like).expand(len(x), -1, -1)
        norms = square_norms_along(program, x, v, chunk_size=request.chunk_size, max_memory=request.max_memory)
        total = float(norms.sum(dtype=torch.float64))
        return TraceEstimate(total / (norms.numel() if normalize else 1), 0.0, 0, 1 + program.c * program.cost_k)


def _check_options(method: str, num_samples: int, epsilon: float | None, probes: str) -> None:
    check_draws(method, ("exact", *_SAMPLERS), epsilon, num_samples)
    check_known("kind of probes", probes, PROBES)
    if method != "output" and probes != "rademacher":
        msg = f"probes belongs to method='output' only. Got probes={probes!r} with method={method!r}."
        raise ValueError(msg)


@dataclass(frozen=True)
class _Problem:
    """What every estimator needs: the function, where it is differentiated, and how to draw."""

    program: Program
    x: Tensor
    num_samples: int
    generator: torch.Generator
    epsilon: float | None
    probes: str
    chunk_size: int | None
    max_memory: int | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.x.split(self.chunk_size or len(self.x))

    def f(self, params: Params) -> Tensor:
        return torch.cat([self.program.f(params, part) for part in self.parts])

    @property
    def params(self) -> Params:
        return self.program.params


Drawn = tuple[Tensor, float]  # draws [num_samples], cost


def per_draw(params: Params, num_samples: int, generator: torch.Generator, measure: Callable[[Params], Tensor]) -> Tensor:
    """Apply ``measure`` to standard normal directions, as many at a time as fit; ``[draws, ...]`` of what it returns for one."""
    p = sum(w.numel() for w in params.values())
    size = max(1, min(num_samples, DRAW_BUDGET // (8 * p)))
    draws: list[Tensor] = []
    for start in range(0, num_samples, size):
        directions = random_direction(params, min(size, num_samples - start), generator)
        if size == 1:  # a large net: convolutions with one set of weights are faster unbatched
            draws.append(measure({k: d[0] for k, d in directions.items()})[None])
        else:
            draws.append(vmap(measure)(directions))
    return torch.cat(draws)


def _perturbation(q: _Problem) -> Drawn:
    assert q.epsilon is not None
    epsilon, base = q.epsilon, q.f(q.params)

    def measure(direction: Params) -> Tensor:
        moved = q.f({k: w + epsilon * direction[k] for k, w in q.params.items()})
        return (moved - base).square().sum() / epsilon**2

    return per_draw(q.params, q.num_samples, q.generator, measure), 1.0 + q.num_samples


def _jvp(q: _Problem) -> Drawn:
    def measure(direction: Params) -> Tensor:
        parts = [directional_derivative(q.program.f, q.params, part, direction) for part in q.parts]
        return torch.cat(parts).square().sum()

    return per_draw(
        q.params, q.num_samples, q.generator, measure
    ), 3.0 * q.num_samples  # outputs, and two products per layer for their derivative


def _output(q: _Problem) -> Drawn:
    n, c = len(q.x), q.program.c
    v = PROBES[q.probes](n, q.num_samples, c, q.generator).to(q.program.like)
    norms = square_norms_along(q.program, q.x, v, chunk_size=q.chunk_size, max_memory=q.max_memory)
    return norms.sum(0), 1.0 + q.num_samples * q.program.cost_k


def _rademacher(n: int, q: int, c: int, generator: torch.Generator) -> Tensor:
    coin = torch.randint(2, (q, n, c), generator=generator, device=generator.device)
    return (2 * coin - 1).transpose(0, 1)


def _orthogonal(n: int, q: int, c: int, generator: torch.Generator) -> Tensor:
    """Rows of sqrt(c) times a Haar-distributed orthogonal matrix, by QR with the signs of R taken out (Mezzadri 2007)."""
    if q > c:
        msg = f"Orthogonal probes must be at most as many as outputs, {c}, where the trace is exact. Got num_samples={q}."
        raise ValueError(msg)
    draw = torch.randn(n, c, q, generator=generator, dtype=torch.float64, device=generator.device)
    frame, r = torch.linalg.qr(draw)
    return math.sqrt(c) * (frame * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT


PROBES: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {"rademacher": _rademacher, "orthogonal": _orthogonal}
_SAMPLERS: dict[str, Callable[[_Problem], Drawn]] = {"perturbation": _perturbation, "jvp": _jvp, "output": _output}
