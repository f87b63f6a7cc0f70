"""The work of ``large_ntk``: who computes, in which chunks, and what happens when memory does not suffice."""

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntklib.kernel_file import KernelFile
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.held import HeldRows
from ntklib.kernels.plan import SHARE, free_memory
from ntklib.kernels.shapes import LargePlan, LayerShape, large_plan, survey
from ntklib.kernels.streaming import Program
from ntklib.progress import FILE, report, say
from ntklib.settings import resolve_device
from ntklib.text import unknown

REDUCTIONS = ("sum", "trace", "the number of an output")
WORK = {"cpu": 32 * 2**20, "cuda": 2**30}  # bytes for gradients written out, at most a 32nd of the memory that may be used
CACHE = {"cpu": 2 * 2**20, "cuda": 2**30}  # bytes for products between positions


class RowsTooLargeError(Exception):
    """The held rows leave too little memory."""


def output_directions(reduce: str | int, like: Tensor) -> Tensor:
    """Output directions ``[k, c]`` of a reduction, for outputs ``like [n, c]``.

    Raises:
        ValueError: If the reduction is unknown, or there is no such output.
    """
    c = like.shape[1]
    if reduce == "sum":
        return like.new_ones(1, c)
    if reduce == "trace":
        return torch.eye(c, dtype=like.dtype, device=like.device)
    if isinstance(reduce, bool) or not isinstance(reduce, int):
        raise ValueError(unknown("reduction", reduce, REDUCTIONS))
    if not 0 <= reduce < c:
        msg = f"reduce must name one of the outputs 0 to {c - 1}. Got {reduce}."
        raise ValueError(msg)
    return torch.eye(c, dtype=like.dtype, device=like.device)[reduce : reduce + 1]


@dataclass
class Worker:
    """A device with its copy of the model.

    Attributes:
        device: The device.
        model: The model on it; no two workers share one.
        output: Name of the inner module whose output is f, or None.
        params: Names of the parameters that count, or None.
        program: How its gradients are streamed.
        v: Output directions, ``[k, c]``.
        layers: Shapes of its factors.
        held: Rows that it holds.
        passes: Examples that it has passed through the network.
    """

    device: torch.device
    model: nn.Module
    output: str | None
    params: list[str] | None
    program: Program
    v: Tensor
    layers: list[LayerShape]
    held: HeldRows | None = None
    passes: int = 0

    def model_in_float64(self) -> nn.Module:
        """A copy of the model in float64."""
        return copy.deepcopy(self.model).double()

    def hold(self, x: Tensor, work: int, columns: int) -> None:
        """Hold the factors of some rows."""
        self.release()
        self.held = HeldRows(self.program, self.layers, work, min(work, CACHE[self.device.type]))
        self.held.hold(x, self.v, self.device, columns)
        self.passes += len(x)

    def block(self, x: Tensor, rows: int) -> Tensor:
        """The kernel of the first rows held with ``x``, in host memory."""
        assert self.held is not None
        found = self.held.block(x, self.v, self.device, rows).cpu()
        self.passes += len(x)
        return found

    def release(self) -> None:
        """Let the held rows go."""
        self.held = None
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.empty_cache()


def make_workers(
    stack: ExitStack,
    model: nn.Module,
    x: Tensor,
    reduce: str | int,
    devices: Sequence[str | torch.device] | None,
    *,
    output: str | None,
    params: list[str] | None,
    tf32: bool,
) -> list[Worker]:
    """Workers on ``devices``, whose settings last as long as ``stack``.

    Raises:
        ValueError: As ``large_ntk``.
    """
    own = next((w.device for w in model.parameters()), torch.device("cpu"))
    chosen = [own] if devices is None else [torch.device(resolve_device(str(device))) for device in devices]
    if not chosen:
        msg = "devices must name at least one device. Got none."
        raise ValueError(msg)
    found: list[Worker] = []
    for device in chosen:
        mine = model if not found and device == own else copy.deepcopy(model).to(device)
        request = Request(mine, x[:2].to(device), None, "trace", "auto", output, params, tf32=tf32)
        program, some, _ = stack.enter_context(prepared(request))
        v = output_directions(reduce, program.like)
        layers = survey(program, some[:1], v[:, None])
        found.append(Worker(device, mine, output, params, program, v, layers))
    return found


@dataclass
class Job:
    """Computes the blocks that a file does not have.

    Attributes:
        workers: Who computes.
        file: Where the blocks go; its notes hold the chunks, so that a later call takes the same ones.
        x1: Inputs of the rows.
        x2: Inputs of the columns; None for a symmetric kernel.
        rows: Examples held at a time, if the caller wants to choose.
        columns: Examples of a pass, if the caller wants to choose.
        max_memory: Bytes of each device.
    """

    workers: list[Worker]
    file: KernelFile
    x1: Tensor
    x2: Tensor | None
    rows: int | None = None
    columns: int | None = None
    max_memory: int | None = None
    todo: list[slice] = field(default_factory=list)  # columns that have still to pass by the held rows
    guard: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def plan(self) -> LargePlan:
        """Chunks that fit on every device.

        Raises:
            ValueError: If even the smallest do not.
        """
        n2, plans = None if self.x2 is None else len(self.x2), list[LargePlan]()
        for worker in self.workers:
            sharing = sum(other.device == worker.device for other in self.workers)
            memory = self.max_memory or int(SHARE * free_memory(worker.device) / sharing)
            if self.file.path is None and worker.device.type == "cpu":
                memory -= self.file.array.nbytes
            work = max(2**20, min(WORK[worker.device.type], memory // 32))
            options = {"rows": self.rows, "columns": self.columns}
            plans.append(large_plan(worker.program, worker.layers, len(self.x1), n2, memory=memory, work=work, **options))
        least = min(plans, key=lambda plan: plan.rows)
        return LargePlan(least.rows, min(plan.columns for plan in plans), min(plan.work for plan in plans), least.needed)

    def run(self, *, progress: bool) -> None:
        """Compute all blocks, write them, and keep a record.

        Raises:
            ValueError: If memory does not suffice for one example of the rows and one of the columns.
        """
        if "chunks" not in self.file.notes:
            plan = self.plan()
            edges = [*range(0, len(self.x1), plan.rows), len(self.x1)]
            self.file.notes["chunks"] = {"rows": edges, "columns": plan.columns, "work": plan.work}
            self.file.save()
        chunks = self.file.notes["chunks"]
        with _bar(self._pairs(), enabled=progress) as tick:
            i = 0
            while i + 1 < len(chunks["rows"]):
                held = slice(*chunks["rows"][i : i + 2])
                self.todo = self.file.missing(held, self._columns(held))
                try:
                    if self.todo:
                        self._chunk(held, tick)
                    i += 1
                except RowsTooLargeError:
                    self._halve_rows(held)
            for worker in self.workers:
                worker.release()

    def _columns(self, held: slice) -> slice:
        return slice(held.start, len(self.x1)) if self.x2 is None else slice(0, len(self.x2))

    def _pairs(self) -> int:
        """Entries that are not computed yet, those above the diagonal of a symmetric kernel."""
        edges, total = self.file.notes["chunks"]["rows"], 0
        for held in map(slice, edges, edges[1:]):
            for part in self.file.missing(held, self._columns(held)):
                total += (held.stop - held.start) * (part.stop - part.start)
        return total

    def _chunk(self, held: slice, tick: Callable[[int], None]) -> None:
        """All columns that have not passed by these rows."""
        self.stop.clear()
        if len(self.workers) == 1:
            self._work(self.workers[0], held, tick)
            return
        with ThreadPoolExecutor(len(self.workers)) as pool:
            futures = [pool.submit(self._work, worker, held, tick) for worker in self.workers]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop.set()
                raise

    def _work(self, worker: Worker, held: slice, tick: Callable[[int], None]) -> None:
        """Hold the rows on one device and pass columns by them until none is left."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                if not self._hold(worker, held):
                    raise RowsTooLargeError
                while (part := self._take()) is not None:
                    if self._pass(worker, held, part):
                        tick((held.stop - held.start) * (part.stop - part.start))
        except BaseException:
            self.stop.set()  # the others need not go on
            worker.release()
            raise

    def _hold(self, worker: Worker, held: slice) -> bool:
        chunks = self.file.notes["chunks"]
        try:
            worker.hold(self.x1[held], chunks["work"], chunks["columns"])
        except torch.OutOfMemoryError:
            return False
        return True

    def _take(self) -> slice | None:
        """The next columns to pass, for whoever asks."""
        with self.guard:
            if self.stop.is_set() or not self.todo:
                return None
            part = self.todo.pop(0)
            middle = min(part.stop, part.start + self.file.notes["chunks"]["columns"])
            if middle < part.stop:
                self.todo.insert(0, slice(middle, part.stop))
            return slice(part.start, middle)

    def _pass(self, worker: Worker, held: slice, part: slice) -> bool:
        """Compute and write one block; False if memory did not suffice and the columns wait for a second attempt, half as many."""
        met = held.stop if self.x2 is not None else min(held.stop, part.stop)
        x = (self.x1 if self.x2 is None else self.x2)[part]
        try:
            block = worker.block(x, met - held.start)
        except torch.OutOfMemoryError:
            block = None  # leave the handler, whose traceback keeps tensors alive
        if block is None:
            self._halve_columns(worker, part)
            return False
        self.file.write(block.numpy(), held, part, symmetric=self.x2 is None)
        return True

    def _halve_columns(self, worker: Worker, part: slice) -> None:
        size = part.stop - part.start
        with self.guard:
            self.todo.insert(0, part)
            if size > 1:
                half = min(self.file.notes["chunks"]["columns"], (size + 1) // 2)
                self.file.notes["chunks"]["columns"] = half
        if size == 1:
            raise RowsTooLargeError
        if worker.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"kernel: out of memory with {size} columns at a time; going on with {(size + 1) // 2}")

    def _halve_rows(self, held: slice) -> None:
        size, chunks = held.stop - held.start, self.file.notes["chunks"]
        if size == 1:
            msg = (
                "Memory must hold one example of the rows and one of the columns. Got out of memory. Take params= to restrict the "
                "parameters, one output in place of reduce='trace', or a device with more memory."
            )
            raise ValueError(msg)
        middle = held.start + (size + 1) // 2
        chunks["rows"].insert(chunks["rows"].index(held.stop), middle)
        say(f"kernel: out of memory with {size} rows held; going on with {(size + 1) // 2}")


@contextmanager
def _bar(total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, or events for a runner; calls may come from several threads."""
    done, guard = 0, threading.Lock()
    if not enabled or os.environ.get(FILE):

        def note(pairs: int) -> None:
            nonlocal done
            with guard:
                done += pairs
                if enabled:
                    report("kernel", done, total)

        yield note
        return
    from tqdm.std import tqdm  # text, not a widget

    with tqdm(total=total, desc="kernel", unit=" entries", unit_scale=True, delay=5, leave=False) as bar:

        def tick(pairs: int) -> None:
            with guard:
                bar.update(pairs)

        yield tick
