"""Directions in parameter space: as vectors, at random, and the derivative along them."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from ntklib.functional import Model, Params


def flatten_params(params: Params) -> Float[Tensor, " p"]:
    """Concatenate parameters to one vector, in the order of the dict (p = number of scalars)."""
    return torch.cat([w.reshape(-1) for w in params.values()])


def unflatten_params(vector: Tensor, like: Params) -> Params:
    """Split ``[..., p]`` into parameters shaped like ``like``, keeping leading axes (inverse of ``flatten_params``)."""
    pieces = vector.split([w.numel() for w in like.values()], dim=-1)
    return {k: v.reshape(*v.shape[:-1], *w.shape) for (k, w), v in zip(like.items(), pieces, strict=True)}


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
