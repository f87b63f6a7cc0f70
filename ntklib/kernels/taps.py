"""The transpose of a convolution as one matrix product for every tap of its kernel.

On few positions with many channels the CPU's convolution library spends a good part of its time on taps that fall on the padding,
and on preparing its layouts. A product over just the positions that a tap reaches is up to six times as fast there.
"""

import math
from itertools import product

from torch import Tensor

FEW, MANY = 25, 256  # positions of the output, and channels on either side, up to and from which this is the faster way


def worthwhile(g: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether ``transposed`` is expected to be faster than the library."""
    positions, kernel = math.prod(g.shape[2:]), math.prod(weight.shape[2:])
    return g.device.type == "cpu" and groups == 1 and kernel > 1 and positions <= FEW and min(weight.shape[:2]) >= MANY


def transposed(
    g: Tensor, weight: Tensor, space: tuple[int, ...], stride: tuple[int, ...], before: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    r"""Gradient with respect to the input of a convolution without groups.

    .. math:: h_{b,i,y} = \sum_a \sum_{q:\, s q + d a - p = y} \sum_o g_{b,o,q} \, w_{o,i,a}

    Args:
        g: Gradient with respect to the output, ``[b, o, *positions]``.
        weight: Weight, ``[o, i, *kernel]``.
        space: Shape of the input's positions y.
        stride: s, for every axis.
        before: Padding p before the first position, for every axis.
        dilation: d, for every axis.

    Returns:
        ``[b, i, *space]``, channels innermost in memory.
    """
    rows = g.movedim(1, -1)
    out = g.new_zeros(len(g), *space, weight.shape[1])
    for tap in product(*map(range, weight.shape[2:])):
        axes = zip(tap, g.shape[2:], space, stride, before, dilation, strict=True)
        reached = [_reached(d * a - p, count, size, s) for a, count, size, s, p, d in axes]
        if any(source.start >= source.stop for source, _ in reached):
            continue
        part = rows[(slice(None), *(source for source, _ in reached))]
        found = part.reshape(-1, part.shape[-1]) @ weight[(..., *tap)]
        out[(slice(None), *(target for _, target in reached))] += found.view(*part.shape[:-1], -1)
    return out.movedim(-1, 1)


def _reached(offset: int, count: int, size: int, stride: int) -> tuple[slice, slice]:
    """Output positions q < count for which stride q + offset is one of ``size`` input positions, and these."""
    first, last = max(0, -(offset // stride)), min(count - 1, (size - 1 - offset) // stride)
    start = stride * first + offset
    return slice(first, last + 1), slice(start, start + stride * (last - first) + 1, stride)
