"""What a large kernel takes before anyone computes it: bytes, floating-point operations, and the time at a given rate."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.shapes import LargeCost, LargePlan, LayerShape, large_cost, large_plan, survey
from ntklib.large_job import output_directions


@dataclass(frozen=True)
class LargeEstimate:
    """A large kernel on paper.

    Attributes:
        plan: Chunks, and the bytes of one device.
        cost: Passes, multiply-adds and numbers.
        layers: Shapes of all factors.
        itemsize: Bytes of a number.
    """

    plan: LargePlan
    cost: LargeCost
    layers: list[LayerShape]
    itemsize: int

    @property
    def result_bytes(self) -> int:
        """Bytes of the kernel, both halves."""
        return self.cost.result * self.itemsize

    @property
    def held_bytes(self) -> int:
        """Bytes in which one example of the rows is held."""
        return self.itemsize * sum(layer.held for layer in self.layers)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one example's gradients, written out."""
        return self.itemsize * sum(layer.jacobian + layer.k * layer.rows for layer in self.layers)

    def hours(self, rate: float, devices: int = 1) -> float:
        """Hours at ``rate`` floating-point operations a second on each of ``devices``."""
        return self.cost.flops / rate / devices / 3600


def large_ntk_estimate(
    model: nn.Module,
    x: Tensor,
    n1: int,
    n2: int | None = None,
    *,
    reduce: str | int = "sum",
    memory: int,
    params: Iterable[str] | None = None,
    rows: int | None = None,
    columns: int | None = None,
) -> LargeEstimate:
    """Count what ``large_ntk`` would take, from one pass of one example.

    The factors of that pass tell the sizes; the rest is arithmetic (see the book's chapter on large kernels). For ``"trace"`` the
    pass is along one output and the counts are those of all outputs.

    Args:
        model: Network in eval mode.
        x: Inputs of the same shape as those in question, ``[n, *input]``; one suffices.
        n1: Examples of the rows.
        n2: Examples of the columns; None for a symmetric kernel.
        reduce: As in ``large_ntk``.
        memory: Bytes of a device that may be used.
        params: Names of the parameters that count. Default: all trainable ones.
        rows: Examples held at a time. Default: what costs least in ``memory``.
        columns: Examples of a pass. Default: the same.

    Raises:
        ValueError: As ``large_ntk``, and if not even the smallest chunks fit into ``memory``.
    """
    request = Request(model, x[:1], None, "trace", params=None if params is None else list(params))
    with prepared(request) as (program, some, _):
        v = output_directions("sum" if reduce == "trace" else reduce, program.like)
        layers = survey(program, some, v[:, None])
    if reduce == "trace":
        layers = [replace(layer, k=program.c) for layer in layers]
    work = max(2**20, min(2**30, memory // 32))
    plan = large_plan(program, layers, n1, n2, memory=memory, work=work, rows=rows, columns=columns)
    return LargeEstimate(plan, large_cost(layers, n1, n2, plan.rows, plan.columns), layers, program.like.element_size())


def gemm_rate(device: str | torch.device = "cpu", *, size: int = 1024, seconds: float = 0.3, tf32: bool = False) -> float:
    """Measure the floating-point operations a second of a square float32 matrix product.

    Of the process's time on a processor, which other processes do not lengthen; of the wall clock on a GPU.

    Args:
        device: Where.
        size: Rows of the matrices.
        seconds: Time to spend, at least.
        tf32: Allow TensorFloat-32 on a GPU.
    """
    a, b = (torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(i)) for i in range(2))
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    place = torch.backends.cuda.matmul
    before = place.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    try:
        place.fp32_precision = "tf32" if tf32 else "ieee"  # pyright: ignore[reportAttributeAccessIssue]
        out, count = a @ b, 0
        start = clock()
        while (used := clock() - start) < seconds or count == 0:
            torch.mm(a, b, out=out)
            if cuda:
                torch.cuda.synchronize()
            count += 1
    finally:
        place.fp32_precision = before  # pyright: ignore[reportAttributeAccessIssue]
    return 2 * size**3 * count / used
