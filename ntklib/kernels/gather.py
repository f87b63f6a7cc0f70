"""Whole factors from passes of a few examples at a time, where these keep the network's large tensors small.

A kernel needs a layer's factors of all examples at once, but not the tensors between the layers. Where the factors are few numbers
beside those, as in networks with few parameters on large images, the examples pass through the network in chunks and every factor
is kept in the form that takes the least memory.
"""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

from ntklib.kernels.blocks import inputs_last, may_be_rank_one, write_gradients
from ntklib.kernels.capture import CaptureError, Visit
from ntklib.kernels.contract import Accumulator
from ntklib.kernels.operations import Emission, Factor, Outer, Rows, inputs_of


def kept_numbers(factor: Factor) -> tuple[int, int]:
    """Numbers a factor of one example along one direction is kept in, beside and for every direction."""
    if isinstance(factor, Rows):
        return 0, factor.j[0].numel()
    t, groups, d = inputs_of(factor).shape[1:]
    o = factor.g.shape[-1]
    written, raw = groups * (d + factor.bias) * o, t * groups * o
    return (t * groups * d, raw) if t == 1 or written > raw else (0, written)


class Gathered:
    """Factors of ``n`` examples, put together from passes.

    Args:
        n: Number of examples.
        sums: The accumulator that a factor of these parameters will be added to.
    """

    def __init__(self, n: int, sums: Callable[[tuple[str, ...]], Accumulator]) -> None:
        self.n, self.sums = n, sums
        self.whole: list[Emission] = []

    def visitor(self, part: slice) -> Visit:
        """Takes the factors of the examples in ``part``, as ``Program.stream`` emits them."""
        places = count()

        def visit(emission: Emission) -> None:
            place, (names, factor) = next(places), emission
            if isinstance(factor, Outer):
                factor = Outer(inputs_of(factor), factor.g, factor.bias)
            if place == len(self.whole):
                self.whole.append((names, self._room(names, factor)))
            known, room = self.whole[place]
            if names != known:
                msg = f"The model's backward pass differs from call to call: {known} at first. Got {names}."
                raise CaptureError(msg)
            _put(room, part, factor)

        return visit

    def factors(self) -> Iterator[Emission]:
        """All factors; each is let go of when the next is asked for."""
        while self.whole:
            yield self.whole.pop(0)

    def _room(self, names: tuple[str, ...], factor: Factor) -> Factor:
        """Memory for a factor of all examples: of gradients where these will be written out anyway and are fewer numbers."""
        if isinstance(factor, Rows):
            return Rows(_like(factor.j, self.n, *factor.j.shape[1:]))
        u, g = factor.u, factor.g
        written = u.shape[2] * (u.shape[3] + factor.bias) * g.shape[4]
        if u.shape[1] > 1 and g.shape[1] * written < u[0].numel() + g[0].numel() and self._explicit(names, u, g):
            return Rows(_like(g, self.n, g.shape[1], written))
        return Outer(_like(u, self.n, *u.shape[1:]), _like(g, self.n, *g.shape[1:]), factor.bias)

    def _explicit(self, names: tuple[str, ...], u: Tensor, g: Tensor) -> bool:
        one_group = u.shape[2] == 1
        return self.sums(names).explicit(u, g) and not (one_group and may_be_rank_one(g[..., 0, :]))


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape)


def _put(room: Factor, part: slice, factor: Factor) -> None:
    if isinstance(factor, Rows):
        assert isinstance(room, Rows)
        room.j[part] = factor.j
    elif isinstance(room, Rows):
        write_whole(factor, room.j[part])
    else:
        room.u[part], room.g[part] = factor.u, factor.g


def write_whole(factor: Outer, j: Tensor) -> None:
    """Write gradients to ``j [n, k, p]``, those of the weight first and then those of the bias."""
    u, g = factor.u, factor.g
    groups, d, o = u.shape[2], u.shape[3], g.shape[4]
    weight = j[..., : groups * d * o]
    if groups > 1:
        weight.copy_(torch.einsum("nktgo,ntgd->nkgod", g, u).flatten(2))
    else:
        wide = inputs_last(o, d, g)
        write_gradients(u[:, :, 0], g[..., 0, :], weight.unflatten(2, (o, d) if wide else (d, o)), wide=wide)
    if factor.bias:
        j[..., groups * d * o :] = g.sum(2).flatten(2)
