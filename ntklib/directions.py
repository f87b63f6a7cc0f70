"""Directions in parameter space: as vectors, at random, and the derivative along them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntklib.functional import Model, Params


def flatten_params(params: Params) -> Float[Tensor, " p"]:
    """Concatenate parameters to one vector, in the order of the dict (p = number of scalars)."""
    return torch.cat([w.reshape(-1) for w in params.values()])


def unflatten_params(vector: Tensor, like: Params) -> Params:
    """Split ``[..., p]`` into parameters shaped like ``like``, keeping leading axes (inverse of ``flatten_params``)."""
    pieces = vector.split([w.numel() for w in like.values()], dim=-1)
    return {k: v.reshape(*v.shape[:-1], *w.shape) for (k, w), v in zip(like.items(), pieces, strict=True)}


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention in plain operations, as its fused kernels know neither forward mode nor ``vmap``; no warnings about that."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)  # which forward mode calls on its first use
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def directional_derivative(f: Model, params: Params, x: Tensor, direction: Params) -> Float[Tensor, "n c"]:
    """J_i d for every example i: the derivative of the outputs along a direction in parameter space."""
    with plain_attention():
        return jvp(lambda params: f(params, x), (params,), (direction,))[1]


def random_direction(params: Params, num: int, generator: torch.Generator) -> Params:
    """Standard normal parameters with a leading axis of ``num`` draws, in the parameters' dtype and device."""
    like = flatten_params(params)
    draw = torch.randn(num, like.numel(), generator=generator, dtype=like.dtype, device=generator.device)
    return unflatten_params(draw.to(like.device), params)
