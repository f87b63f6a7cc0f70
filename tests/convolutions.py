"""Weights, operations and factors of small convolutions with fixed draws."""

import torch

from ntklib.kernels.operations import Convolution, Outer, convolution
from ntklib.random import stream


def weights(o: int, i: int, kernel: tuple[int, ...] = (3, 3)) -> torch.Tensor:
    return torch.randn(o, i, *kernel, generator=stream(0, "convolution weights"), dtype=torch.float64)


def operation(c: int, o: int, padding: int | str, kernel: tuple[int, ...] = (3, 3), dilation: int = 1) -> Convolution:
    """A convolution whose weight and bias are wanted."""
    bias = torch.zeros(o, dtype=torch.float64)
    return convolution(weights(o, c, kernel), bias, ("layer.weight", "layer.bias"), 1, padding, dilation, 1)


def factor_of(
    n: int,
    k: int,
    c: int,
    o: int,
    size: tuple[int, ...],
    padding: int | str = 1,
    images: int = 1,
    *,
    kernel: tuple[int, ...] = (3, 3),
    dilation: int = 1,
    dtype: torch.dtype = torch.float64,
    rank_one: bool = False,
) -> Outer:
    """The factor of random inputs and output gradients."""
    generator = stream(0, "convolution factor")
    op = operation(c, o, padding, kernel, dilation)
    op.saved = torch.randn(n, images, c, *size, generator=generator, dtype=torch.float64).to(dtype)
    added = [sum(pair) for pair in op.padding]
    positions = [length + more - dilation * (taps - 1) for length, more, taps in zip(size, added, kernel, strict=True)]
    shape = (1, n, images, o, *positions) if rank_one else (k, n, images, o, *positions)
    g = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if rank_one:
        g = g * torch.randn(k, 1, 1, o, *[1] * len(size), generator=generator, dtype=torch.float64).to(dtype)
    [(_, factor)] = op.factors(g)
    assert isinstance(factor, Outer)
    return factor
