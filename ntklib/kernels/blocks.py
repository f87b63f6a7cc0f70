"""Gradients written out a block at a time, their rank-one structure, and the blocks of a symmetric matrix."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BUDGET = 32 * 2**20  # bytes of written-out gradients held at a time


class Scratch:
    """Memory that blocks are written to one after the other: to enter new memory takes longer than to compute what it is for."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


def write_out(u: Tensor, g: Tensor, scratch: Scratch) -> Iterator[Tensor]:
    """Gradients in blocks of inputs and output channels, ``[n, k, block]``, from ``u [n, t, d]`` and ``g [n, k, t, o]``.

    Every block is written over the one before it.
    """
    (n, _, d), k, o = u.shape, g.shape[1], g.shape[3]
    room = BUDGET // (n * k * u.element_size())  # numbers of one example and output
    channels = min(o, max(64, math.isqrt(room)))
    inputs = max(1, min(d, room // channels))
    for i in range(0, o, channels):
        for first in range(0, d, inputs):
            part, seen = g[..., i : i + channels], u[..., first : first + inputs].mT
            j = scratch(n, k, seen.shape[1], part.shape[3])
            for a in range(k):
                torch.bmm(seen, part[:, a], out=j[:, a])
            yield j.flatten(2)


def channel_blocks(w: Tensor, m: Tensor, u: Tensor, scratch: Scratch) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of channels (w[k,o], s[o,n,:] = sum_t m[n,t,o] u[n,t,:]) of a rank-one factor, each over the one before it."""
    (n, _, d), o = u.shape, w.shape[1]
    step = max(16, BUDGET // (n * d * u.element_size()))
    for i in range(0, o, step):
        part = m[..., i : i + step]
        s = scratch(n, part.shape[2], d)
        yield w[:, i : i + step], torch.bmm(part.mT, u, out=s).transpose(0, 1)


def write_out_groups(u: Tensor, g: Tensor) -> Iterator[Tensor]:
    """As ``write_out`` for blocks of groups, from ``u [n, t, groups, d]`` and ``g [n, k, t, groups, o]``."""
    (n, _, groups, d), k, o = u.shape, g.shape[1], g.shape[4]
    step = max(1, BUDGET // (n * k * d * o * u.element_size()))
    for i in range(0, groups, step):
        yield torch.einsum("nktgo,ntgd->nkgod", g[..., i : i + step, :], u[:, :, i : i + step]).flatten(2)


def used_positions(g: Tensor) -> Tensor | None:
    """Positions t of ``g [n, k, t, ...]`` that are not 0 throughout, such as that of a class token; None if these are all."""
    if bool((g[0] != 0).any(0).flatten(1).any(1).all()):
        return None
    used = (g != 0).any(0).any(0).flatten(1).any(1)
    used[0] |= not bool(used.any())  # one at least
    return used.nonzero()[:, 0]


def rank_one(g: Tensor) -> tuple[Tensor, Tensor] | None:
    """Split G[n,k,t,o] = W[k,o] M[n,t,o] to rounding: ``w [k, o]`` and ``m [n, t, o]``, or None if it does not."""
    if g.shape[1] < 3 or _split(g[:1]) is None:
        return None
    return _split(g)


def _split(g: Tensor) -> tuple[Tensor, Tensor] | None:
    n, k, t, o = g.shape
    size = torch.zeros_like(g[:, 0])
    for a in range(k):
        size.addcmul_(g[:, a], g[:, a])
    where = size.reshape(n * t, o).argmax(0)  # for every channel, the place where its gradient is largest
    w = torch.stack([g[:, a].reshape(n * t, o).gather(0, where[None])[0] for a in range(k)])
    square = w.square().sum(0)
    m = torch.zeros_like(size)
    for a in range(k):
        m.addcmul_(g[:, a], (w[a] / torch.where(square > 0, square, 1.0)))
    tolerance = 32 * torch.finfo(g.dtype).eps
    for a in range(k):
        error = torch.addcmul(g[:, a], m, w[a], value=-1).abs_().amax((0, 1))
        if not bool((error <= tolerance * square.sqrt()).all()):
            return None
    return w, m


def block_slices(rows: int, columns: int, step: int, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of a matrix, near square and at most 8 steps long; of a symmetric one those on and above its diagonal.

    Halves of halves: large products run at full speed, and only blocks of one step on the diagonal are formed in full.
    """
    if not symmetric:
        for i in range(0, rows, 8 * step):
            for j in range(0, columns, 8 * step):
                yield slice(i, min(rows, i + 8 * step)), slice(j, min(columns, j + 8 * step))
        return
    todo = [(0, rows)]
    while todo:
        start, stop = todo.pop()
        if stop - start <= step:
            yield slice(start, stop), slice(start, stop)
            continue
        middle = start + step * -(-(stop - start) // (2 * step))
        for i, j in block_slices(middle - start, stop - middle, step, symmetric=False):
            yield slice(start + i.start, start + i.stop), slice(middle + j.start, middle + j.stop)
        todo += [(start, middle), (middle, stop)]


def mirror(matrix: Tensor, step: int = 256) -> None:
    """Copy what stands above the diagonal below it."""
    for i in range(0, len(matrix), step):
        block = matrix[i : i + step, i : i + step]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[i + step :, i : i + step] = matrix[i : i + step, i + step :].T
