"""Gradients written out a block at a time, their rank-one structure, and the blocks of a symmetric matrix."""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

BUDGET = 24 * 2**20  # bytes of written-out gradients held at a time


class Scratch:
    """Memory that blocks are written to one after the other: to enter new memory takes longer than to compute what it is for."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


def alike(f: Callable[[Tensor], Result], first: Tensor, second: Tensor) -> tuple[Result, Result]:
    """``f`` of both, computed once where they are the same tensor."""
    one = f(first)
    return one, one if second is first else f(second)


def write_out(u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, scratch: Scratch) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of two sets in blocks of inputs and output channels, ``[n, k, block]``.

    From ``u [n, t, d]`` and ``g [n, k, t, o]``. Every block is written over the one before it. Where the sets are the same tensors,
    so are the blocks.
    """
    d, k, o = u1.shape[2], g1.shape[1], g1.shape[3]
    n1, n2 = len(u1), 0 if g2 is g1 else len(u2)
    channels, inputs = _block_shape(o, d, BUDGET // ((n1 + n2) * k * u1.element_size()))
    for i in range(0, o, channels):
        for first in range(0, d, inputs):
            rows, columns = min(channels, o - i), min(inputs, d - first)
            wide = inputs_last(rows, columns, g1)
            j = scratch(n1 + n2, k, *((rows, columns) if wide else (columns, rows)))
            sets = [(u1, g1, j[:n1])] + [(u2, g2, j[n1:])] * (n2 > 0)
            for u, g, out in sets:
                write_gradients(u[..., first : first + inputs], g[..., i : i + channels], out, wide=wide)
            j = j.flatten(2)
            yield j[:n1], j[n1:] if n2 else j


def _block_shape(o: int, d: int, room: int) -> tuple[int, int]:
    """Output channels and inputs of a block of at most ``room`` numbers (of 64 channels at least), parts as even as can be.

    Inputs in multiples of 16, where a block does not have them all: products run up to half as fast again that way.
    """
    channels = min(o, max(64, math.isqrt(room) // 64 * 64))
    most = max(1, room // channels)
    if most >= d:
        return channels, d
    unit = 16 if most >= 16 else 1
    parts = -(-d // (most // unit * unit))
    return channels, -(-d // (parts * unit)) * unit


def inputs_last(o: int, d: int, g: Tensor) -> bool:
    """Whether gradients of ``o`` channels and ``d`` inputs are written with the inputs last, where products are faster that way.

    The longer axis last; but of float32 on a CPU whole vectors of 16 rather than others, up to three times as fast.
    """
    whole_vectors = g.device.type == "cpu" and g.element_size() == 4 and o % 16 == 0 and d % 16 > 0
    return d > o and not whole_vectors


def write_gradients(u: Tensor, g: Tensor, out: Tensor, *, wide: bool) -> None:
    """Write J[n,k] = sum_t G[n,k,t,:] U[n,t,:]^T, from ``u [n, t, d]`` and ``g [n, k, t, o]``.

    Args:
        u: Inputs.
        g: Output gradients.
        out: Where to, ``[n, k, o, d]``, or with d before o.
        wide: Whether ``out`` has inputs last.
    """
    if u.device.type == "cpu":  # one example after the other: its inputs stay in cache for all output directions
        k = g.shape[1]
        for u_i, g_i, out_i in zip(u, g, out, strict=True):
            inputs = u_i.expand(k, -1, -1)
            torch.bmm(*((g_i.mT, inputs) if wide else (inputs.mT, g_i)), out=out_i)
        return
    for a in range(g.shape[1]):  # few large launches
        torch.bmm(*((g[:, a].mT, u) if wide else (u.mT, g[:, a])), out=out[:, a])


def channel_blocks(
    w1: Tensor, m1: Tensor, u1: Tensor, w2: Tensor, m2: Tensor, u2: Tensor, scratch: Scratch
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of channels, w[k,o] and s[o,n,:] = sum_t m[n,t,o] u[n,t,:], of rank-one factors of two sets.

    Every block is written over the one before it.
    """
    d, o = u1.shape[2], w1.shape[1]
    n1, n2 = len(u1), 0 if u2 is u1 else len(u2)
    step = max(16, BUDGET // ((n1 + n2) * d * u1.element_size()))
    for i in range(0, o, step):
        s = scratch(n1 + n2, min(step, o - i), d)
        torch.bmm(m1[..., i : i + step].mT, u1, out=s[:n1])
        if n2:
            torch.bmm(m2[..., i : i + step].mT, u2, out=s[n1:])
        s = s.transpose(0, 1)
        yield w1[:, i : i + step], s[:, :n1], w2[:, i : i + step], s[:, n1:] if n2 else s


def write_out_groups(u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As ``write_out`` for blocks of groups, from ``u [n, t, groups, d]`` and ``g [n, k, t, groups, o]``."""
    (n, _, groups, d), k, o = u1.shape, g1.shape[1], g1.shape[4]
    n = n if g2 is g1 else n + len(u2)
    step = max(1, BUDGET // (n * k * d * o * u1.element_size()))

    def written(u: Tensor, g: Tensor, i: int) -> Tensor:
        return torch.einsum("nktgo,ntgd->nkgod", g[..., i : i + step, :], u[:, :, i : i + step]).flatten(2)

    for i in range(0, groups, step):
        j = written(u1, g1, i)
        yield j, j if g2 is g1 else written(u2, g2, i)


def used_positions(*gradients: Tensor) -> Tensor | None:
    """Positions t of some ``g [n, k, t, ...]`` that are not 0 throughout, such as that of a class token; None if these are all."""
    if any(_everywhere(g[0, 0]) or _everywhere(g[0].movedim(0, -1)) for g in gradients):
        return None
    each = [(g != 0).any(0).any(0).flatten(1).any(1) for g in gradients]
    used = torch.stack(each).any(0)
    used[0] |= not bool(used.any())  # one at least
    return used.nonzero()[:, 0]


def _everywhere(g: Tensor) -> bool:
    """Whether ``g [t, ...]`` is not 0 throughout at any t."""
    return bool((g != 0).flatten(1).any(1).all())


def rank_one(g: Tensor) -> tuple[Tensor, Tensor] | None:
    """Split G[n,k,t,o] = W[k,o] M[n,t,o] to rounding: ``w [k, o]`` and ``m [n, t, o]``, or None if it does not."""
    return _split(g) if may_be_rank_one(g) else None


def may_be_rank_one(g: Tensor) -> bool:
    """Whether it is worth a look: three directions at least, and the first example's gradients are it, two of them first."""
    return g.shape[1] >= 3 and _proportional(g[0, 0], g[0, 1]) and _split(g[:1]) is not None


def _proportional(a: Tensor, b: Tensor) -> bool:
    """Whether ``b [t, o]`` is ``a [t, o]``, up to a factor for every channel: a quick look, with some tolerance."""
    where = a.abs().argmax(0)[None]
    top, beside = a.gather(0, where), b.gather(0, where)
    return bool(((b * top - a * beside).abs() <= 1e-3 * top.abs() * b.abs().amax(0)).all())


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
