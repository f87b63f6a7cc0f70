"""Kernels of tens of thousands of examples, in blocks: rows held on the device, columns passed by them, the result on disk."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntklib.checks import check_inputs, check_pair
from ntklib.functional import unwrap
from ntklib.kernel_file import KernelFile, digest
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.reductions import Trace
from ntklib.large_job import Job, Worker, make_workers
from ntklib.random import stream


@dataclass(frozen=True)
class LargeKernel:
    """A kernel and what is known about it.

    Attributes:
        kernel: The matrix ``[n1, n2]``, read from disk as it is used where there is a path.
        path: Its file, or None.
        rows: Examples that were held at a time.
        columns: Examples of a pass.
        error: Relative Frobenius error against float64 on a block of random examples; nan where none was checked.
        checked: Rows and columns of that block.
        passes: Examples that went forward and backward through the network in this call.
        seconds: Wall time of this call.
    """

    kernel: np.ndarray
    path: Path | None
    rows: int
    columns: int
    error: float
    checked: tuple[int, int]
    passes: int
    seconds: float


def large_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    path: str | Path | None = None,
    reduce: str | int = "sum",
    output: str | None = None,
    params: Iterable[str] | None = None,
    devices: Sequence[str | torch.device] | None = None,
    rows: int | None = None,
    columns: int | None = None,
    max_memory: int | None = None,
    tf32: bool = False,
    check: int = 16,
    seed: int = 0,
    save_every: float = 10.0,
    progress: bool = True,
) -> LargeKernel:
    r"""Compute one number for every pair of many examples: the NTK of one output, of the sum of outputs, or its trace over outputs.

    .. math::
        K_{ij} = \Bigl\langle \nabla_\theta \sum_a v_a f_a(x_i), \nabla_\theta \sum_a v_a f_a(x_j) \Bigr\rangle = v^\top K_{ij} v,
        \qquad \text{or} \quad \operatorname{tr} K_{ij} = \sum_a K_{ij,aa}

    (the kernel of ``empirical_ntk``, Jacot et al. 2018, arXiv:1806.07572v4, Eq. 2, at finite width; no factor 1/c, 1/n or 1/width.)
    With v = (1, ..., 1) it is the class-summed kernel. Chunks of rows go through the network once and stay on the device, every
    layer as its gradients or as its inputs and output gradients, whichever are fewer numbers; columns pass by them in small chunks.
    With r chunks of rows that takes n + n (r + 1) / 2 passes; see the book's chapter on large kernels.

    With ``path`` the result is a ``.npy`` file, written as ``PATH.partial`` with a record ``PATH.json`` of checksums, chunks and
    finished blocks. The same call after an interruption computes what is missing, in the same chunks and hence to the same bits on
    the same device; a call whose kernel is finished reads it.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. It is left exactly as it was.
        x1: First inputs, ``[n1, *input]``; they may stay in host memory.
        x2: Second inputs, ``[n2, *input]``. Default: ``x1``, and the kernel is then exactly symmetric.
        path: Where the result goes, ending in ``.npy``. Default: host memory.
        reduce: ``"sum"`` for the kernel of the sum of outputs; the number of an output for its kernel; ``"trace"``.
        output: Name of an inner module whose output, flattened, stands for f. Default: the model's output.
        params: Names of the parameters that count. Default: all trainable ones.
        devices: Devices that share the columns; each holds all rows of a chunk. Default: the model's.
        rows: Examples held at a time. Default: what costs least in ``max_memory``.
        columns: Examples of a pass. Default: the same.
        max_memory: Bytes of each device that may be used. Default: half of what is free.
        tf32: Allow TensorFloat-32 products on a GPU: several times faster, relative errors near 1e-3.
        check: Random examples of each side whose block is computed in float64 as well; 0 for none.
        seed: Of these examples.
        save_every: Seconds between records of what is finished.
        progress: Show a bar when the work takes more than a few seconds.

    Raises:
        ValueError: If rows interact, inputs are not finite or of unlike shape, an option is unknown, the smallest chunks do not
            fit, or ``path`` holds another kernel.
        OSError: If the disk is full.
    """
    start = time.monotonic()
    check_inputs(x1, "x1")
    if x2 is not None:
        check_inputs(x2, "x2")
        check_pair(x1, x2)
    if check < 0:
        msg = f"check must be at least 0. Got {check}."
        raise ValueError(msg)
    shape = (len(x1), len(x1 if x2 is None else x2))
    options: dict[str, Any] = {"output": output, "params": None if params is None else list(params), "tf32": tf32}
    with ExitStack() as stack:
        workers = make_workers(stack, model, x1, reduce, devices, **options)
        dtype = torch.empty(0, dtype=workers[0].program.like.dtype).numpy().dtype
        identity = {} if path is None else _identity(model, x1, x2) | {"reduce": reduce, **options}
        file = stack.enter_context(KernelFile(None if path is None else Path(path), shape, dtype, identity, save_every))
        if not file.finished:
            Job(workers, file, x1, x2, rows, columns, max_memory).run(progress=progress)
            file.finish()
        if check and file.notes.get("check") != [check, seed]:
            file.notes |= {"check": [check, seed], "error": _error(workers[0], file, x1, x2, check, seed)}
            file.save()
        passes = sum(worker.passes for worker in workers)
    chunks, error = file.notes["chunks"], file.notes["error"] if check else float("nan")
    checked = (min(check, shape[0]), min(check, shape[1]))
    return LargeKernel(
        file.array, file.path, max(b - a for a, b in zip(chunks["rows"], chunks["rows"][1:], strict=False)), chunks["columns"],
        error, checked, passes, time.monotonic() - start,
    )  # fmt: skip


def _identity(model: nn.Module, x1: Tensor, x2: Tensor | None) -> dict[str, Any]:
    """What distinguishes a kernel from those of other models and inputs."""
    inner = unwrap(model)
    return {
        "model": digest([(f"{type(inner).__qualname__} {inner}", torch.empty(0))]),
        "parameters": digest([*inner.named_parameters(), *inner.named_buffers()]),
        "x1": digest([("", x1)]), "x2": None if x2 is None else digest([("", x2)]),
    }  # fmt: skip


def _error(worker: Worker, file: KernelFile, x1: Tensor, x2: Tensor | None, check: int, seed: int) -> float:
    """Relative Frobenius error of the block of ``check`` random rows and columns against the streaming engine in float64."""
    generator = stream(seed, "check")
    i, j = (torch.randperm(n, generator=generator)[:check].sort().values for n in file.shape)
    exact = exact_block(worker, x1[i.to(x1.device)], (x1 if x2 is None else x2)[j.to(x1.device)], file.notes["chunks"]["columns"])
    found = torch.from_numpy(file.array[np.ix_(i.numpy(), j.numpy())]).double()
    return float((found - exact).norm() / exact.norm())


def exact_block(worker: Worker, x1: Tensor, x2: Tensor, size: int) -> Tensor:
    """The kernel between two small sets in float64, by the engine of ``empirical_ntk``, at most ``size`` examples in a pass."""
    model, step = worker.model_in_float64(), max(1, size // 4)  # half a pass of twice the bytes
    x1, x2 = (x.to(worker.device, torch.float64 if x.is_floating_point() else x.dtype) for x in (x1, x2))
    v = worker.v.double()
    block = torch.zeros(len(x1), len(x2), dtype=torch.float64)
    request = Request(model, x1[:1], None, "trace", "auto", worker.output, worker.params)
    with prepared(request) as (program, _, _), torch.no_grad():
        for i in range(0, len(x1), step):
            for j in range(0, len(x2), step):
                x = torch.cat([x1[i : i + step], x2[j : j + step]])
                sums = Trace(len(x), len(v), len(x1[i : i + step]), program.like)
                program.stream(x, v[:, None].expand(-1, len(x), -1), lambda emission, sums=sums: sums.add(emission[1]))
                block[i : i + step, j : j + step] = sums.result().cpu()
    return block
