"""How much memory a kernel needs, and the tiles it is computed in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from ntklib.kernels.blocks import BUDGET
from ntklib.kernels.streaming import Program
from ntklib.progress import say

Result = TypeVar("Result")

SHARE = 0.5  # of free memory, that a kernel may take unless max_memory is given
# bytes of gradients beyond which larger chunks of single examples gain no speed; on a CPU smaller ones stay in memory that was
# entered before
_ENOUGH = {"cpu": 128 * 2**20}
_ENOUGH_ELSEWHERE = 4 * 2**30


@dataclass(frozen=True)
class Tile:
    """A block of a kernel: examples and outputs of its rows and of its columns.

    On the diagonal, rows and columns are the same and ``symmetric`` is set.
    """

    rows: slice
    row_outputs: slice
    columns: slice
    column_outputs: slice
    symmetric: bool


@dataclass(frozen=True)
class Plan:
    """Chunk sizes, and the bytes that they need.

    Attributes:
        examples: Examples of the rows (and of the columns) of a tile.
        outputs: Outputs of a tile.
        needed: Bytes of the result and of the largest tile, estimated.
    """

    examples: int
    outputs: int
    needed: int


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on ``device`` can still get."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def make_plan(
    program: Program, n1: int, n2: int | None, kind: str | None, *, layers: int, chunk_size: int | None, max_memory: int | None
) -> Plan:
    """Choose the largest chunks that fit.

    Args:
        program: How gradients are streamed.
        n1: Examples of the rows.
        n2: Examples of the columns; None for a symmetric kernel.
        kind: Which reduction, a key of ``reductions.ACCUMULATORS``.
        layers: Number of kernels kept at the same time.
        chunk_size: Examples per chunk, if the caller wants to choose.
        max_memory: Bytes that may be used, result included. Default: half of what is free.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If a number is not positive, or the kernel does not fit.
    """
    for name, value in (("chunk_size", chunk_size), ("max_memory", max_memory)):
        if value is not None and not isinstance(value, int):
            msg = f"{name} must be a whole number. Got {value!r}."
            raise TypeError(msg)
        if value is not None and value < 1:
            msg = f"{name} must be at least 1. Got {value}."
            raise ValueError(msg)
    c, width = program.c, program.like.element_size()
    pairs = kind not in ("norms", "blocks")
    columns = n1 if n2 is None else n2
    values = {
        None: n1 * columns * c * c,
        "trace": n1 * columns,
        "diagonal": n1 * columns * c,
        "blocks": n1 * c * c,
        "norms": n1 * c,
    }
    result = layers * values[kind] * width
    fixed = result + width * sum(w.numel() for w in program.params.values())  # and one gradient, to check against
    free = free_memory(program.like.device)
    limit = max_memory if max_memory is not None else int(SHARE * free)
    if result > (limit if max_memory is not None else 0.9 * free):
        raise ValueError(_too_large("the result alone", result, limit if max_memory is not None else free))
    working = limit - fixed
    if not pairs:
        enough = _ENOUGH.get(program.like.device.type, _ENOUGH_ELSEWHERE)
        working = min(working, enough + enough * program.size // max(1, c * program.size_k))

    def size(rows: int, k: int) -> int:
        written = min(BUDGET, rows * k * program.largest * width)
        return rows * (program.size + k * program.size_k) * width + written

    everything = n1 + (0 if n2 is None else n2)
    sets = 2 if pairs else 1  # a tile off the diagonal holds two chunks
    if chunk_size is None and size(everything, c) <= working:
        return Plan(max(n1, columns), c, fixed + size(everything, c))
    k = c
    if kind in ("trace", "diagonal"):  # a pass over some outputs costs no more than its share: large chunks of examples pay
        k = max(1, min(c, program.size // max(1, program.size_k)))
    m = chunk_size or 1
    while k > 1 and size(sets * m, k) > working:
        k = (k + 1) // 2
    if chunk_size is None:
        m = max(1, working // (sets * (program.size + k * program.size_k) * width))
    while chunk_size is None and m > 1 and size(sets * m, k) > working:
        m -= (m + 3) // 4
    needed = fixed + size(sets * min(m, max(n1, columns)), k)
    if needed > limit and fixed + size(sets, 1) > limit:
        raise ValueError(_too_large("the kernel, in its smallest pieces,", needed, limit))
    return Plan(m, k, needed)


def pass_size(program: Program, rows: int, k: int) -> int:
    """Examples that go through the network at a time, of the ``rows`` of a tile and along ``k`` directions.

    Fewer than all where that keeps the network's tensors in memory that was entered before, and the factors of all examples take at
    most half of what these tensors would. On a CPU only: a GPU's memory costs nothing to enter.
    """
    enough = _ENOUGH.get(program.like.device.type)
    if enough is None or 2 * (program.kept + k * program.kept_k) > program.size + k * program.size_k:
        return rows
    most = max(1, enough // max(1, k * program.size_k * program.like.element_size()))
    return -(-rows // -(-rows // most))  # as even as can be


def _too_large(what: str, needed: int, available: int | None) -> str:
    got = "out of memory" if available is None else f"{available:,} bytes available"
    return (
        f"Memory must hold {what}: {needed:,} bytes. Got {got}. Take fewer examples, reduce='trace' or "
        "'diagonal', params= to restrict the parameters, a larger max_memory, or ntklib.NTKOperator, which stores no kernel."
    )


def smaller(plan: Plan, largest: int) -> Plan | None:
    """The plan with half the examples, of one example half the outputs; None where a tile has one of each.

    Where one tile was all, of ``largest`` examples, a quarter: a tile off the diagonal holds two chunks.
    """
    if plan.examples > 1:
        examples = min(plan.examples, largest)
        return replace(plan, examples=(examples + 3) // 4 if examples == largest else (examples + 1) // 2)
    return replace(plan, outputs=(plan.outputs + 1) // 2) if plan.outputs > 1 else None


def with_smaller_chunks(attempt: Callable[[Plan], Result], plan: Plan, largest: int, device: torch.device) -> Result:
    """Carry out a plan; where the device turns out to have too little memory, say so and go on with smaller chunks.

    Args:
        attempt: Does the work by a plan.
        plan: The first plan.
        largest: Examples of the larger set.
        device: The device.

    Raises:
        ValueError: If memory does not suffice for one example and one output.
    """
    while True:
        try:
            return attempt(plan)
        except torch.OutOfMemoryError as error:
            less = smaller(plan, largest)
            if less is None:
                raise ValueError(_too_large("the kernel, in its smallest pieces,", plan.needed, None)) from error
        if device.type == "cuda":  # after the handler, whose traceback keeps tensors alive
            torch.cuda.empty_cache()
        say(
            f"kernel: out of memory with {plan.examples} examples and {plan.outputs} outputs at a time; "
            f"going on with {less.examples} and {less.outputs}"
        )
        plan = less


def tiles(plan: Plan, n1: int, n2: int | None, c: int, kind: str | None) -> Iterator[Tile]:
    """Tiles that cover the kernel; of a symmetric one, those on and above the diagonal."""
    outputs = _slices(c, plan.outputs)
    if kind == "norms":
        for rows in _slices(n1, plan.examples):
            yield from (Tile(rows, a, rows, a, symmetric=True) for a in outputs)
        return
    pairs_of_outputs = [(a, b) for a in outputs for b in (outputs if kind in (None, "blocks") else [a])]
    for rows in _slices(n1, plan.examples):
        for columns in [rows] if kind == "blocks" else _slices(n1 if n2 is None else n2, plan.examples):
            if n2 is None and columns.start < rows.start:
                continue
            same = n2 is None and columns == rows
            for a, b in pairs_of_outputs:
                if not same or b.start >= a.start:
                    yield Tile(rows, a, columns, b, symmetric=same and a == b)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, min(total, i + size)) for i in range(0, total, size)]


def directions(tile: Tile, c: int, like: Tensor) -> Tensor:
    """Output directions of a tile, ``[k, examples of rows (then of columns), c]``; shorter sets of outputs end with zeros."""
    a, b = tile.row_outputs, tile.column_outputs
    k = max(a.stop - a.start, b.stop - b.start)
    sets = [(tile.rows, a)] if tile.symmetric else [(tile.rows, a), (tile.columns, b)]
    v = like.new_zeros(k, sum(rows.stop - rows.start for rows, _ in sets), c)
    start = 0
    for rows, outputs in sets:
        stop = start + rows.stop - rows.start
        count = outputs.stop - outputs.start
        v[range(count), start:stop, range(outputs.start, outputs.stop)] = 1
        start = stop
    return v
