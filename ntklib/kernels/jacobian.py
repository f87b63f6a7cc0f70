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


def jacobian(f: Model, params: Params, x: Tensor) -> Float[Tensor, "n c p"]:
    """J[i, a] = gradient of output a at example i with respect to all parameters, flattened in the order of ``params``."""

    def one_example(x_i: Tensor) -> Params:
        return jacrev(lambda params: f(params, x_i[None])[0])(params)  # each [c, *w.shape]

    pieces = vmap(one_example)(x)
    return torch.cat([piece.flatten(2) for piece in pieces.values()], dim=2)


def gradient_square_norms(f: Model, params: Params, x: Tensor, v: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """||J_i^T v_i||^2 for every example i, by one vector-Jacobian product each."""

    def one_example(x_i: Tensor, v_i: Tensor) -> Tensor:
        _, pull = vjp(lambda params: f(params, x_i[None])[0], params)
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
