"""Jacobians by torch.func: the general method, and the memory it needs."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from ntklib.functional import Model, Params, flatten_params, unflatten_params

BUDGET = 512 * 2**20  # bytes of Jacobian held at a time, unless the caller sets chunk_size


def examples_per_chunk(params: Params, c: int, chunk_size: int | None, budget: int = BUDGET) -> int:
    """How many examples' Jacobians, c x p numbers each, fit in ``budget`` bytes; ``chunk_size`` overrides it."""
    if chunk_size is not None:
        if chunk_size < 1:
            msg = f"chunk_size must be at least 1. Got {chunk_size}."
            raise ValueError(msg)
        return chunk_size
    per_example = c * sum(w.numel() * w.element_size() for w in params.values())
    return max(1, budget // per_example)


def jacobian(f: Model, params: Params, x: Tensor) -> list[Float[Tensor, "n c _"]]:
    """Gradients of output a at example i, ``[n, c, p_k]`` for each parameter k in the order of ``params``.

    Kept apart by parameter, as contractions add up over them: a concatenated copy would double the memory.
    """

    def one_example(x_i: Tensor) -> Params:
        return jacrev(lambda params: f(params, x_i[None])[0])(params)  # each [c, *w.shape]

    return [piece.reshape(*piece.shape[:2], -1) for piece in vmap(one_example)(x).values()]


def gradient_square_norms(f: Model, params: Params, x: Tensor, v: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """||J_i^T v_i||^2 for every example i, by one vector-Jacobian product each."""

    def one_example(x_i: Tensor, v_i: Tensor) -> Tensor:
        pull = vjp(lambda params: f(params, x_i[None])[0], params)[1]
        return torch.stack([g.square().sum() for g in pull(v_i)[0].values()]).sum()

    return vmap(one_example)(x, v)


def directional_derivative(f: Model, params: Params, x: Tensor, direction: Params) -> Float[Tensor, "n c"]:
    """J_i d for every example i: the derivative of the outputs along a direction in parameter space."""
    with warnings.catch_warnings():  # on its first use torch's forward mode calls torch's own deprecated torch.jit.script
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        return jvp(lambda params: f(params, x), (params,), (direction,))[1]


def random_direction(params: Params, num: int, generator: torch.Generator) -> Params:
    """Standard normal parameters with a leading axis of ``num`` draws, in the parameters' dtype and device."""
    like = flatten_params(params)
    draw = torch.randn(num, like.numel(), generator=generator, dtype=like.dtype, device=generator.device)
    return unflatten_params(draw.to(like.device), params)
