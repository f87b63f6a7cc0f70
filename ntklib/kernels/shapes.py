r"""Arithmetic and memory of a large kernel, counted from the shapes of its layers' factors, and the chunks that cost least.

A large kernel is computed by holding the factors of a chunk of rows and passing columns by them, a chunk at a time. A layer is
held as its gradients J or as its inputs and output gradients, whichever are fewer numbers; see ``LayerShape``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ntklib.kernels.operations import Emission, Factor, Outer, inputs_of
from ntklib.kernels.streaming import Program

MOVE = 24  # multiply-adds in whose time a number goes to memory or comes from there, on processors and cards alike to a factor of 2
PASSES = tuple(2**i for i in range(10, 3, -1))  # examples in a pass: more gain no speed, fewer are for want of memory only


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one factor of the Jacobian, for one example; see ``operations.Outer`` and ``operations.Rows``.

    Attributes:
        names: Parameters that the factor accounts for.
        k: Output directions.
        rows: Numbers per direction that come written out: of normalisation, and of parameters without a rule.
        t: Positions; 0 where all gradients come written out.
        groups: Groups of a convolution.
        d: Inputs of one output unit.
        o: Output channels of a group.
        source: Numbers from which the inputs of all positions can be made.
        bias: Whether a bias counts, as one more input that is 1.
        remake: Makes the inputs ``[n, t, groups, d]`` from ``source``.
    """

    names: tuple[str, ...]
    k: int
    rows: int = 0
    t: int = 0
    groups: int = 0
    d: int = 0
    o: int = 0
    source: int = 0
    bias: bool = False
    remake: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def jacobian(self) -> int:
        """Numbers of the gradients J, written out."""
        return self.k * self.groups * (self.d + self.bias) * self.o

    @property
    def inputs(self) -> int:
        """Numbers of the inputs, or of what they can be made from."""
        return min(self.source, self.t * self.groups * self.d)

    @property
    def remade(self) -> bool:
        """Whether inputs are made again, whenever they are needed, from fewer numbers that are held."""
        return self.remake is not None and self.source < self.t * self.groups * self.d

    @property
    def raw(self) -> int:
        """Numbers of inputs and output gradients."""
        return self.inputs + self.k * self.t * self.groups * self.o

    @property
    def written(self) -> bool:
        """Whether gradients are held rather than inputs and output gradients."""
        return self.jacobian <= self.raw

    @property
    def held(self) -> int:
        """Numbers that one example of the rows is held in."""
        return self.k * self.rows + min(self.jacobian, self.raw)

    @property
    def forward(self) -> int:
        """Multiply-adds of the layer's forward pass, and of its backward pass along one direction."""
        return self.t * self.groups * self.d * self.o

    def explicit(self, rows: int, columns: int) -> bool:
        """Whether a block of held rows and passing columns is formed from gradients written out (else by ``ghost``)."""
        if self.written:
            return True
        return self._weighed(*self._by_gradients(rows, columns)) < self._weighed(*self._by_ghost(rows, columns))

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Multiply-adds for a block of the kernel, and numbers moved to or from memory, in the order that is chosen."""
        if self.t == 0:
            return self.k * self.rows * rows * columns, 0
        return self._by_gradients(rows, columns) if self.explicit(rows, columns) else self._by_ghost(rows, columns)

    def _by_gradients(self, rows: int, columns: int) -> tuple[int, int]:
        written = columns + (0 if self.written else rows)
        patches = 2 * rows * self.t * self.groups * self.d if self.remade and not self.written else 0
        return written * self.k * self.forward + rows * columns * self.jacobian, patches + 2 * written * self.jacobian

    def _by_ghost(self, rows: int, columns: int) -> tuple[int, int]:
        pairs, places = rows * columns * self.groups * self.t**2, rows * self.t * self.groups * self.d
        return pairs * (self.d + self.k * self.o), 3 * pairs + (2 * places if self.remade else 0)

    def fits(self, names: tuple[str, ...], factor: Factor) -> bool:
        """Whether a factor is this layer's."""
        if isinstance(factor, Outer):
            return names == self.names and tuple(factor.g.shape[1:]) == (self.k, self.t, self.groups, self.o)
        return names == self.names and self.t == 0 and tuple(factor.j.shape[1:]) == (self.k, self.rows)

    @staticmethod
    def _weighed(products: int, moved: int) -> int:
        return products + MOVE * moved


def layer_shape(names: tuple[str, ...], factor: Factor) -> LayerShape:
    """Sizes of a factor of one example."""
    if not isinstance(factor, Outer):
        return LayerShape(names, factor.j.shape[1], rows=factor.j.shape[2])
    _, t, groups, d = inputs_of(factor).shape
    k, o = factor.g.shape[1], factor.g.shape[4]
    source = t * groups * d if factor.source is None else factor.source[0].numel()
    return LayerShape(names, k, 0, t, groups, d, o, source, factor.bias, factor.remake)


def survey(program: Program, x: Tensor, v: Tensor) -> list[LayerShape]:
    """Shapes of all factors, in the order in which they are streamed.

    Args:
        program: How gradients are streamed.
        x: One input, ``[1, *input]``.
        v: Output directions, ``[k, 1, c]``.
    """
    found: list[LayerShape] = []

    def visit(emission: Emission) -> None:
        found.append(layer_shape(*emission))

    with torch.no_grad():
        program.stream(x, v, visit)
    return found


@dataclass(frozen=True)
class LargeCost:
    """What a large kernel takes.

    Attributes:
        passes: Examples that go forward and backward through the network.
        products: Multiply-adds of all contractions.
        backprop: Multiply-adds of the passes: forward, and backward along every direction, to the inputs of all layers.
        moved: Numbers that contractions move to or from memory, other than operands and results of large products.
        result: Numbers of the kernel.
    """

    passes: int
    products: int
    backprop: int
    moved: int
    result: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * (self.products + self.backprop)


def block_counts(n1: int, n2: int | None, rows: int, columns: int) -> tuple[dict[tuple[int, int], int], int]:
    """How many blocks there are of every size (rows, columns), and how many examples pass.

    Of a symmetric kernel (``n2`` None) the columns begin with the held rows, and each chunk meets the rows up to its own end.
    """
    starts = np.arange(0, n1, rows)
    counts, passes = dict[tuple[int, int], int](), n1
    for chunks in (starts[:-1], starts[-1:]):
        if len(chunks) == 0:
            continue
        held = min(rows, n1 - int(chunks[0]))
        total = n1 - chunks if n2 is None else np.full(len(chunks), n2)
        before = -(-held // columns) - 1 if n2 is None else 0  # blocks that end before the held rows do
        last = -(-total // columns) - 1
        found = {((j + 1) * columns, columns): len(chunks) for j in range(before)}
        found[held, columns] = found.get((held, columns), 0) + int((last - before).sum())
        sizes, times = np.unique(total - last * columns, return_counts=True)
        for size, count in zip(sizes.tolist(), times.tolist(), strict=True):
            found[held, size] = found.get((held, size), 0) + count
        for key, count in found.items():
            counts[key] = counts.get(key, 0) + count
        passes += int(total.sum())
    return counts, passes


def large_cost(layers: Sequence[LayerShape], n1: int, n2: int | None, rows: int, columns: int) -> LargeCost:
    r"""Count what the kernel of ``n1`` (by ``n2``) examples takes with chunks of these sizes.

    With r chunks of rows, a symmetric kernel takes n + n (r + 1) / 2 passes, one between two sets n_1 + r n_2; plain tiles of m
    examples take n^2 / m.

    Args:
        layers: From ``survey``.
        n1: Examples of the rows.
        n2: Examples of the columns; None for a symmetric kernel.
        rows: Examples held at a time.
        columns: Examples of a pass.
    """
    counts, passes = block_counts(n1, n2, rows, columns)
    products = moved = 0
    for layer, times in Counter(replace(layer, names=()) for layer in layers).items():  # many are alike
        products += times * n1 * layer.k * layer.forward if layer.written else 0  # gradients of the held rows
        for (met, size), count in counts.items():
            more, numbers = layer.block(met, size)
            products, moved = products + times * count * more, moved + times * count * numbers
    k = max((layer.k for layer in layers), default=1)
    backprop = passes * (1 + k) * sum(layer.forward for layer in layers)
    return LargeCost(passes, products, backprop, moved, n1 * (n1 if n2 is None else n2))


@dataclass(frozen=True)
class LargePlan:
    """Chunks of a large kernel.

    Attributes:
        rows: Examples held at a time.
        columns: Examples of a pass.
        work: Bytes for gradients and products of some rows.
        needed: Bytes on the device, estimated.
    """

    rows: int
    columns: int
    work: int
    needed: int


def device_bytes(
    program: Program, layers: Sequence[LayerShape], rows: int, columns: int, work: int, itemsize: int | None = None
) -> int:
    """Bytes on a device: parameters, held rows, one block of the kernel, one pass, and three times ``work``.

    Args:
        program: How gradients are streamed.
        layers: From ``survey``.
        rows: Examples held at a time.
        columns: Examples of a pass.
        work: Bytes for gradients and products of some rows.
        itemsize: Bytes of a number. Default: those of the outputs' dtype.
    """
    k = max((layer.k for layer in layers), default=1)
    written = max((layer.jacobian for layer in layers if layer.t and layer.written), default=0)
    a_pass = columns * (program.size + k * program.size_k + written)
    numbers = rows * (sum(layer.held for layer in layers) + columns) + a_pass + sum(w.numel() for w in program.params.values())
    return numbers * (itemsize or program.like.element_size()) + 3 * work


def large_plan(
    program: Program,
    layers: Sequence[LayerShape],
    n1: int,
    n2: int | None,
    *,
    memory: int,
    work: int,
    rows: int | None = None,
    columns: int | None = None,
) -> LargePlan:
    """Choose the chunks that fit into ``memory`` bytes of a device and take the least arithmetic and movement.

    Args:
        program: How gradients are streamed.
        layers: From ``survey``.
        n1: Examples of the rows.
        n2: Examples of the columns; None for a symmetric kernel.
        memory: Bytes of the device that may be used.
        work: Bytes for gradients and products of some rows.
        rows: Examples held at a time, if the caller wants to choose.
        columns: Examples of a pass, if the caller wants to choose.

    Raises:
        ValueError: If a chunk is not positive, or one example of the rows and one of the columns do not fit.
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1. Got {value}."
            raise ValueError(msg)
    last = n1 if n2 is None else n2
    sizes = [columns] if columns else [*dict.fromkeys(min(last, size) for size in (*PASSES, 8, 4, 2, 1))]
    found: list[tuple[int, int, LargePlan]] = []
    for size in sizes:
        if found and size < PASSES[-1]:
            break
        fixed = device_bytes(program, layers, 0, size, work)
        each = device_bytes(program, layers, 1, size, work) - fixed
        fitting = rows or min(n1, (memory - fixed) // each)
        if fitting < 1:
            continue
        even = rows or -(-n1 // -(-n1 // fitting))
        cost = large_cost(layers, n1, n2, even, size)
        weight = cost.products + cost.backprop + MOVE * cost.moved
        found.append((weight, -size, LargePlan(even, size, work, fixed + even * each)))
    if not found:
        needed = device_bytes(program, layers, 1, sizes[-1], work)
        msg = (
            f"Memory must hold one example of the rows and {sizes[-1]} of the columns: {needed:,} bytes. Got {memory:,} bytes "
            "available. Take params= to restrict the parameters, a larger max_memory, or one output in place of reduce='trace'."
        )
        raise ValueError(msg)
    return min(found, key=lambda entry: entry[:2])[2]
