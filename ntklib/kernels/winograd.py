r"""Convolutions of 3 x 3 taps with a quarter of the multiplications, by tiles (Winograd's minimal filtering).

Along one axis four sums :math:`y_i = \sum_a d_{i+a} g_a` over three taps, or three over four, take 6 products in place of 12:
polynomials are multiplied by their values at 6 points,

.. math:: y = A^\top \left( (G g) \odot (B^\top d) \right),

and along two axes 36 in place of 144 (Lavin and Gray 2016, arXiv:1509.09308v2). Here the transforms of all tiles are matrix
products with the Kronecker squares of A, G and B, so that the points may be any. At 0, 2/3, -2/3, 3/2, -3/2 and infinity the
rounding error is about twice that of the library's own convolution; at the customary 0, 1, -1, 2, -2 and infinity it is four times
as large.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntklib.kernels.blocks import BUDGET, Scratch
from ntklib.kernels.positions import Windows

_POINTS = np.array([0, 2 / 3, -2 / 3, 3 / 2, -3 / 2])  # beside infinity
_SUMS, _TAPS = 4, 3  # positions of a tile, and taps, of an axis
TAPS = _TAPS**2
_SIZE = _SUMS + _TAPS - 1  # positions that a tile sees of an axis
_PRODUCTS = _SIZE**2
_CACHE = 8192  # numbers of a product of tiles that are worked on at a time
# times, in those of a multiply-add of a matrix product
_MOVE, _MOVE_FAR = 32, 64  # to move a number of a tile, and one of a large image or by several threads
_PREPARE = 100  # to prepare a number of the taps
_LIBRARY = {torch.float32: 0.85, torch.float64: 1.6}  # of a multiply-add in the library's convolution


@lru_cache
def transforms(outputs: int, taps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    r"""Kronecker squares of :math:`A^\top`, G and :math:`B^\top`: ``[outputs^2, 36]``, ``[36, taps^2]`` and ``[36, 36]``.

    Args:
        outputs: Sums along an axis.
        taps: Entries of each, 7 - outputs.
        dtype: Of the result.
    """
    scale = np.array([np.prod([p - q for q in _POINTS if q != p]) for p in _POINTS] + [1.0])[:, None]

    def values(count: int) -> NDArray[np.float64]:
        """Powers 0 to count - 1 of the points; at infinity the last one counts."""
        return np.vstack([np.vander(_POINTS, count, increasing=True), np.eye(count)[-1:]])

    each = values(outputs).T, values(taps) / scale, np.linalg.inv(values(_SIZE)).T * scale
    a, g, b = (torch.from_numpy(np.kron(m, m)).to(dtype) for m in each)
    return a, g, b


def fits(windows: Windows) -> bool:
    """Whether a convolution goes by tiles, ``transposed`` and ``write_out``."""
    return windows.taps == (_TAPS, _TAPS) and windows.dilation == (1, 1) and max(windows.before) < _TAPS


def worthwhile(g: Tensor, weight: Tensor, space: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Whether ``transposed`` is expected to be faster than the library.

    On a CPU only: a GPU's library has such ways of its own.
    """
    if g.device.type != "cpu" or g.dtype not in _LIBRARY:
        return False
    o, i = weight.shape[:2]
    reached = prod(_reached(h, t, p) for h, t, p in zip(space, g.shape[2:], before, strict=True))
    tiles = prod(-(-h // _SUMS) for h in space)
    move = _move(near=tiles * max(o, i) <= _CACHE)
    each = _PRODUCTS * o + o * i + _SUMS**2 * i + move * (o + i)  # for one of the products of a tile
    ours = _PRODUCTS * (len(g) * tiles * each + _PREPARE * o * i)
    return 1.1 * ours < _LIBRARY[g.dtype] * len(g) * reached * o * i


def _move(*, near: bool) -> int:
    return _MOVE if near and torch.get_num_threads() == 1 else _MOVE_FAR


def _reached(inputs: int, outputs: int, before: int) -> int:
    """Pairs of a position and a tap of one axis that do not fall on the padding."""
    return sum(max(0, min(inputs, outputs + a - before) - max(0, a - before)) for a in range(_TAPS))


def transposed(g: Tensor, weight: Tensor, space: tuple[int, ...], before: tuple[int, ...]) -> Tensor:
    r"""Gradient with respect to the input of a convolution of 3 x 3 taps without stride, dilation and groups.

    .. math:: h_{b,i,y} = \sum_a \sum_o g_{b,o,y+p-a} \, w_{o,i,a}

    Args:
        g: Gradient with respect to the output, ``[b, o, *positions]``.
        weight: Weight, ``[o, i, 3, 3]``.
        space: Shape of the input's positions y.
        before: Padding p before the first position of each axis, at most 2.

    Returns:
        ``[b, i, *space]``, channels innermost in memory.
    """
    (b, o), i = g.shape[:2], weight.shape[1]
    _, to_values, _ = transforms(_SUMS, _TAPS, g.dtype)
    taps = (to_values @ weight.flip(2, 3).permute(2, 3, 0, 1).reshape(TAPS, -1)).view(-1, o, i)
    down, across = (-(-h // _SUMS) for h in space)
    most = max(_CACHE // max(o, i), i // 3)  # tiles that stay in cache, and are worth reading the taps
    size = -(-b // min(b, -(-b * down * across // most)))  # images of a block
    high = -(-down // min(down, -(-down * across // (2 * most))))  # rows of tiles of a large image
    padded = g.new_zeros(size, _SUMS * down + _TAPS - 1, _SUMS * across + _TAPS - 1, o)
    out, scratch = g.new_empty(b, *space, i), (Scratch(g), Scratch(g))
    for start in range(0, b, size):
        part = g[start : start + size].movedim(1, -1)
        _place(padded[: len(part)], part, tuple(_TAPS - 1 - p for p in before))
        for top in range(0, down, high):
            tiles = _tiles(padded[: len(part)], down, across)[:, :, :, top : top + high]
            _put(out[start : start + size, _SUMS * top : _SUMS * (top + high)], _sums(tiles, taps, *scratch))
    return out.movedim(-1, 1)


def _sums(tiles: Tensor, taps: Tensor, one: Scratch, two: Scratch) -> Tensor:
    """Sums over taps ``[36, o, i]`` for the positions of tiles ``[6, 6, b, down, across, o]``: ``[4, 4, b, down, across, i]``."""
    to_sums, _, to_products = transforms(_SUMS, _TAPS, tiles.dtype)
    counts, (o, i) = tiles.shape[2:5], taps.shape[1:]
    area = prod(counts)
    gathered = one(*tiles.shape).copy_(tiles).view(_PRODUCTS, -1)
    values = torch.mm(to_products, gathered, out=two(_PRODUCTS, area * o)).view(_PRODUCTS, area, o)
    products = torch.bmm(values, taps, out=one(_PRODUCTS, area, i)).view(_PRODUCTS, -1)
    return torch.mm(to_sums, products, out=two(_SUMS**2, area * i)).view(_SUMS, _SUMS, *counts, i)


def _put(out: Tensor, sums: Tensor) -> None:
    """Copy the positions of tiles to images ``[b, rows, columns, i]``, as far as these go."""
    images = sums.permute(2, 3, 0, 4, 1, 5)  # [b, down, 4, across, 4, i]
    b, down, _, across, _, i = images.shape
    if out.shape[1:3] == (_SUMS * down, _SUMS * across):
        out.unflatten(2, (across, _SUMS)).unflatten(1, (down, _SUMS)).copy_(images)
    else:
        out.copy_(images.reshape(b, _SUMS * down, _SUMS * across, i)[:, : out.shape[1], : out.shape[2]])


def _place(padded: Tensor, g: Tensor, before: tuple[int, ...]) -> None:
    """Copy ``[b, *positions, o]`` behind zeros, as far as there is room."""
    room = padded[:, before[0] : before[0] + g.shape[1], before[1] : before[1] + g.shape[2]]
    room.copy_(g[:, : room.shape[1], : room.shape[2]])


def _tiles(padded: Tensor, down: int, across: int) -> Tensor:
    """Overlapping tiles of ``[b, rows, columns, o]``, without copying: ``[6, 6, b, down, across, o]``."""
    batch, row, column, channel = padded.stride()
    shape = (_SIZE, _SIZE, len(padded), down, across, padded.shape[-1])
    return padded.as_strided(shape, (row, column, batch, _SUMS * row, _SUMS * column, channel), padded.storage_offset())


def gradients_worthwhile(x: Tensor, g: Tensor, windows: Windows) -> bool:
    """Whether ``write_out`` can be used, is expected to be faster than plain products, and a block of it has its place."""
    if g.device.type != "cpu" or g.dtype not in _LIBRARY or not fits(windows) or not _channels(x, g):
        return False
    (k, t, o), c = g.shape[1:], x.shape[-3]
    tiles = t // prod(windows.positions) * prod(-(-h // _SUMS) for h in windows.positions)
    inputs = tiles * c * _PRODUCTS  # for one of the products of a tile
    each = o * (tiles * (_SUMS**2 + c) + TAPS * c + _move(near=True) * (tiles + c))  # and an output direction
    return 1.1 * (inputs + k * each) * _PRODUCTS < k * t * TAPS * o * c


def _channels(x: Tensor, g: Tensor) -> int:
    """Output channels of a block: what they are made from stays in cache, and their gradients within ``BUDGET``."""
    (n, k, t, o), c = g.shape, x.shape[-3]
    cached = 20480 // (k * max(t // _SUMS**2, c))
    room = BUDGET // (n * k * TAPS * c * g.element_size())
    return min(o, max(16, cached) // 8 * 8, room // 8 * 8) if cached >= 8 else 0


def write_out(x: Tensor, g: Tensor, windows: Windows, scratch: Scratch) -> Iterator[Tensor]:
    r"""Gradients of the weight in blocks of output channels, ``[n, k, 9, block * c]``, each written over the one before it.

    .. math:: J_{ik,aoc} = \sum_{l,\tau} g_{ikl\tau o} \, x_{ilc,\tau+a-p}

    Args:
        x: Inputs, ``[n, l, c, *space]``.
        g: Gradients with respect to the output, ``[n, k, l * positions, o]``.
        windows: Padding p, and positions tau, of a convolution that ``fits``.
        scratch: Memory for the blocks.
    """
    n, k, _, o = g.shape
    step, c = _channels(x, g), x.shape[2]
    for i in range(0, o, step):
        part = g[..., i : i + step].unflatten(2, (x.shape[1], *windows.positions))
        j = scratch(n, k, TAPS, part.shape[-1] * c)
        _write(x.movedim(2, -1), part, j, windows.before)
        yield j


def _write(x: Tensor, g: Tensor, out: Tensor, before: tuple[int, ...]) -> None:
    """A block, from ``x [n, l, *space, c]`` and ``g [n, k, l, *positions, o]``, one example after the other."""
    (k, count, rows, columns, o), c = g.shape[1:], x.shape[-1]
    to_sums, to_values, to_products = transforms(_TAPS, _SUMS, g.dtype)
    down, across = -(-rows // _SUMS), -(-columns // _SUMS)
    area, one, two, three = count * down * across, Scratch(g), Scratch(g), Scratch(g)
    padded = x.new_zeros(count, _SUMS * down + _TAPS - 1, _SUMS * across + _TAPS - 1, c)
    whole = g.new_zeros(k, count, _SUMS * down, _SUMS * across, o) if rows % _SUMS or columns % _SUMS else None
    tiles = _tiles(padded, down, across)
    for x_i, g_i, out_i in zip(x, g, out, strict=True):
        _place(padded, x_i, before)
        gathered = one(*tiles.shape).copy_(tiles).view(_PRODUCTS, -1)
        inputs = torch.mm(to_products, gathered, out=three(_PRODUCTS, area * c)).view(_PRODUCTS, area, c)
        if whole is not None:
            whole[:, :, :rows, :columns] = g_i
        parts = (g_i if whole is None else whole).unflatten(3, (across, _SUMS)).unflatten(2, (down, _SUMS))
        parts = parts.permute(3, 5, 1, 2, 4, 0, 6)  # [4, 4, l, down, across, k, o]
        gathered = one(*parts.shape).copy_(parts).view(_SUMS**2, -1)
        values = torch.mm(to_values, gathered, out=two(_PRODUCTS, area * k * o)).view(_PRODUCTS, area, k * o)
        products = torch.bmm(values.mT, inputs, out=one(_PRODUCTS, k * o, c)).view(_PRODUCTS, k, o * c)
        torch.bmm(to_sums.expand(k, -1, -1), products.transpose(0, 1), out=out_i)
