"""The rows of a large kernel: their factors held on a device, and contracted with those of the columns that pass by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ntklib.kernels.capture import CaptureError
from ntklib.kernels.operations import Emission, Factor, Outer, inputs_of
from ntklib.kernels.shapes import LayerShape
from ntklib.kernels.streaming import Program


def gradients(u: Tensor, g: Tensor, *, bias: bool) -> Tensor:
    """J[n, (groups, d, k, o)] = sum_t U[n,t,groups,d] G[n,k,t,groups,o], written out, and those of a ``bias`` after them."""
    n, t, groups, d = u.shape
    left = u.permute(0, 2, 3, 1).reshape(n * groups, d, t)
    right = g.permute(0, 3, 2, 1, 4).reshape(n * groups, t, -1)
    found = torch.bmm(left, right).view(n, -1)
    return torch.cat([found, g.sum(2).flatten(1)], 1) if bias else found


def ghost(total: Tensor, u1: Tensor, g1: Tensor, u2: Tensor, g2: Tensor, *, bias: bool) -> None:
    """Add sum over positions t, t' of (U U'^T, plus 1 for a ``bias``)(G G'^T), for ``u [n, t, d]`` and ``g [n, t, p]``."""
    t = u1.shape[1]
    product = u1.flatten(0, 1) @ u2.flatten(0, 1).T
    if bias:
        product += 1
    product *= g1.flatten(0, 1) @ g2.flatten(0, 1).T
    total += product if t == 1 else product.view(len(u1), t, len(u2), t).sum((1, 3))


@dataclass
class HeldLayer:
    """One layer's factors of the rows, ``m`` examples.

    Attributes:
        layer: Sizes.
        m: Examples.
        work: Bytes for gradients written out, and as much for products, of some rows at a time.
        cache: Bytes for the products of ``ghost``.
        kept: Tensors by name, ``[m, ...]``: ``jacobian``, or ``inputs`` and ``gradients``.
    """

    layer: LayerShape
    m: int
    work: int
    cache: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    def put(self, part: slice, factor: Factor, dtype: torch.dtype) -> None:
        """Keep the factor of some of the examples."""
        for name, value in self._parts(factor, dtype):
            if name not in self.kept:
                self.kept[name] = value.new_empty(self.m, *value.shape[1:])
            self.kept[name][part] = value

    def _parts(self, factor: Factor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        if not isinstance(factor, Outer):
            yield "jacobian", factor.j.to(dtype).flatten(1)
            return
        if self.layer.written:
            yield "jacobian", gradients(inputs_of(factor).to(dtype), factor.g.to(dtype), bias=self.layer.bias)
            return
        if self.layer.remade and factor.source is not None:
            yield "inputs", factor.source
        else:
            yield "inputs", inputs_of(factor).to(dtype)
        yield "gradients", factor.g.to(dtype)

    def numbers(self) -> int:
        """Numbers that are held."""
        return sum(tensor.numel() for tensor in self.kept.values())

    def add(self, total: Tensor, factor: Factor) -> None:
        """Add the layer's part of the kernel between the first rows and the columns of ``factor`` to ``total``."""
        r, dtype = len(total), total.dtype
        if not isinstance(factor, Outer):
            total.addmm_(self.kept["jacobian"][:r], factor.j.to(dtype).flatten(1).T)
            return
        u, g = inputs_of(factor).to(dtype), factor.g.to(dtype)
        if self.layer.written:
            total.addmm_(self.kept["jacobian"][:r], gradients(u, g, bias=self.layer.bias).T)
        elif self.layer.explicit(r, len(u)):
            self._explicit(total, u, g)
        else:
            self._ghost(total, u, g)

    def _inputs(self, part: slice, dtype: torch.dtype) -> Tensor:
        kept, remake = self.kept["inputs"][part], self.layer.remake
        return remake(kept).to(dtype) if self.layer.remade and remake is not None else kept

    def _explicit(self, total: Tensor, u: Tensor, g: Tensor) -> None:
        """Gradients of some output channels at a time, of all columns and of some rows at a time."""
        layer, size = self.layer, total.element_size()
        each = layer.jacobian // layer.o  # numbers of one example and output channel
        channels = max(1, min(layer.o, self.work // (size * len(u) * each)))
        step = max(1, self.work // (size * (each * channels + layer.t * layer.groups * layer.d)))
        for o in range(0, layer.o, channels):
            columns = gradients(u, g[..., o : o + channels], bias=layer.bias).T
            for i in range(0, len(total), step):
                part = slice(i, min(len(total), i + step))
                mine = self.kept["gradients"][part, ..., o : o + channels]
                total[part].addmm_(gradients(self._inputs(part, total.dtype), mine, bias=layer.bias), columns)

    def _ghost(self, total: Tensor, u: Tensor, g: Tensor) -> None:
        """Products between positions, of some rows at a time."""
        layer, size = self.layer, total.element_size()
        step = max(1, min(self.cache // (2 * size * layer.t**2 * len(u)), self.work // (size * layer.t * layer.groups * layer.d)))
        right = g.permute(0, 2, 3, 1, 4).flatten(3)  # [n, t, groups, k o]
        for i in range(0, len(total), step):
            part = slice(i, min(len(total), i + step))
            mine = self._inputs(part, total.dtype)
            left = self.kept["gradients"][part].permute(0, 2, 3, 1, 4).flatten(3)
            for group in range(layer.groups):
                at = (slice(None), slice(None), group)
                ghost(total[part], mine[at], left[at], u[at], right[at], bias=layer.bias)


class HeldRows:
    """The factors of a chunk of rows, of all layers.

    Args:
        program: How gradients are streamed.
        layers: From ``survey``.
        work: Bytes for gradients written out, of some rows at a time, and as much for products.
        cache: Bytes for products between positions.
    """

    def __init__(self, program: Program, layers: Sequence[LayerShape], work: int, cache: int) -> None:
        self.program, self.layers, self.work, self.cache = program, layers, work, cache
        self.held: list[HeldLayer] = []

    def hold(self, x: Tensor, v: Tensor, device: torch.device, size: int) -> None:
        """Hold the factors of ``x [m, *input]`` along ``v [k, c]``, passing ``size`` examples at a time through the network."""
        self.held = []  # make room first
        self.held = [HeldLayer(layer, len(x), self.work, self.cache) for layer in self.layers]
        for i in range(0, len(x), size):
            part = slice(i, min(len(x), i + size))
            self._stream(x[part].to(device), v, partial(HeldLayer.put, part=part, dtype=self.program.like.dtype))

    def block(self, x: Tensor, v: Tensor, device: torch.device, rows: int) -> Tensor:
        """The kernel between the first ``rows`` held examples and ``x [q, *input]``, along ``v [k, c]``: ``[rows, q]``."""
        total = self.program.like.new_zeros(rows, len(x))
        self._stream(x.to(device), v, partial(HeldLayer.add, total=total))
        return total

    def numbers(self) -> int:
        """Numbers that are held."""
        return sum(held.numbers() for held in self.held)

    def _stream(self, x: Tensor, v: Tensor, action: Callable[..., None]) -> None:
        count = 0

        def visit(emission: Emission) -> None:
            nonlocal count
            names, factor = emission
            held = self.held[count] if count < len(self.held) else None
            if held is None or not held.layer.fits(names, factor):
                msg = f"The model's forward pass differs from call to call, at {names}."
                raise CaptureError(msg)
            action(held, factor=factor)
            count += 1

        with torch.no_grad():
            self.program.stream(x, v[:, None].expand(-1, len(x), -1), visit)
        if count < len(self.held):
            msg = f"The model's forward pass differs from call to call: {len(self.held)} layers at first. Got {count}."
            raise CaptureError(msg)
