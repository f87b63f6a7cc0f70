r"""Products :math:`C = U U'^\top` between what the positions of two examples see of the inputs.

The windows of neighbouring positions of a convolution overlap. With the products of pixels, :math:`P = X X'^\top`,

.. math:: C_{\tau \tau'} = \sum_a P_{\tau + a - p,\ \tau' + a - p}

over the taps a: for c channels c multiplications in place of c for every tap, and additions, one axis after the other.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_PASS, _PASS_FAR = 30, 100  # to add a number from cache and, by other devices, from memory; in times of a multiply-add of a product
_BEGIN = 2**21  # multiply-adds in whose time the additions are begun


@dataclass(frozen=True)
class Windows:
    """What the positions of a convolution without stride and groups see, along each axis of its inputs.

    Attributes:
        taps: Entries of its kernel.
        dilation: Distance between them.
        before: Padding with zeros before the first position.
        positions: Positions of its outputs.
    """

    taps: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    positions: tuple[int, ...]


class Products:
    """Products between positions, from U itself."""

    def between(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Of all pairs of examples, ``[n, t, m, t']`` from ``[n, t, d]`` and ``[m, t', d]``."""
        return (v1.flatten(0, 1) @ v2.flatten(0, 1).T).view(*v1.shape[:2], *v2.shape[:2])

    def paired(self, v1: Tensor, v2: Tensor) -> Tensor:
        """Of an example of the one set with that of the other, ``[n, t, t']`` from ``[n, t, d]`` and ``[n, t', d]``."""
        return v1 @ v2.mT


@dataclass(frozen=True)
class PixelProducts(Products):
    """Products between positions, from pixels ``[n, l * pixels, c]``, l images for each example.

    Attributes:
        windows: What the positions see.
        space: Shape of an image.
    """

    windows: Windows
    space: tuple[int, ...]

    def between(self, v1: Tensor, v2: Tensor) -> Tensor:
        per_example = v2.shape[1] // prod(self.space)
        c = self._over_taps(super().between(v1, v2), len(v2) * per_example)
        return c.reshape(len(v1), -1, len(v2), per_example * prod(self.windows.positions))

    def paired(self, v1: Tensor, v2: Tensor) -> Tensor:
        per_example = v2.shape[1] // prod(self.space)
        c = self._over_taps(super().paired(v1, v2), per_example)
        return c.reshape(len(v1), -1, per_example * prod(self.windows.positions))

    def _over_taps(self, p: Tensor, images: int) -> Tensor:
        """Sums over taps of products of pixels: ``[images, *positions, images', *positions]``."""
        p, w = p.reshape(-1, *self.space, images, *self.space), self.windows
        for i, of_axis in enumerate(zip(w.taps, w.dilation, w.before, w.positions, strict=True), start=1):
            p = _along(p, (i, i + len(self.space) + 1), *of_axis)
        return p


def _along(p: Tensor, axes: tuple[int, int], taps: int, dilation: int, before: int, positions: int) -> Tensor:
    """Sums over the taps of one axis of an image, which lies at ``axes`` of p."""
    i, j = axes
    shape = list(p.shape)
    shape[i] = shape[j] = positions
    offsets = [dilation * a - before for a in range(taps)]
    out = None
    if 0 in offsets and positions <= p.shape[i]:  # every position sees its own pixel
        offsets.remove(0)
        out = p.narrow(i, 0, positions).narrow(j, 0, positions).clone(memory_format=torch.contiguous_format)
    out = p.new_zeros(shape) if out is None else out
    for offset in offsets:
        first, last = max(0, -offset), min(positions, p.shape[i] - offset)
        if first < last:
            size = last - first
            seen = p.narrow(i, first + offset, size).narrow(j, first + offset, size)
            out.narrow(i, first, size).narrow(j, first, size).add_(seen)
    return out


def multiply_adds(windows: Windows, channels: int, like: Tensor) -> float:
    """What a product between positions takes from pixels; beyond ``prod(taps) * channels`` it is not worth it.

    Args:
        windows: What the positions see.
        channels: Of the inputs.
        like: Output gradients ``[n, k, t, o]``, on the same device.
    """
    each = _PASS if like.device.type == "cpu" else _PASS_FAR
    return channels + each * sum(windows.taps) + _BEGIN / (len(like) * like.shape[2] ** 2)
