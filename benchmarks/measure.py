"""Methods in turn, each in a process of its own: a slow phase of the machine hits all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.children import Workers
from benchmarks.worker import Job
from benchmarks.workloads import METHODS, Workload

LONG = 20.0  # seconds; the first call at full size counts as a measurement when it takes longer, and is a warm-up otherwise
HELPER = "helper"  # the process that computes references, exports inputs and measures the rate of matrix products


@dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
        peers: Packages to measure.
        quick: Tiny sizes.
        repeats: Measured rounds.
        budget: Wall seconds after which a method gets no further round.
        timeout: Wall seconds that one call may take.
        device: ``"cpu"`` or ``"cuda"``.
    """

    peers: tuple[str, ...]
    quick: bool = False
    repeats: int = 5
    budget: float = 150.0
    timeout: float = 900.0
    device: str = "cpu"


@dataclass
class Contestant:
    """One method at one size, and what was found so far; ``status`` says why there is no more."""

    method: str
    n: int
    status: str = ""
    calls: list[Job] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def timed(self) -> list[Job]:
        """The calls that count: not the first, unless it was long or the only one."""
        return self.calls if self.calls and self.calls[0]["wall_seconds"] > LONG else self.calls[1:] or self.calls

    def row(self) -> Job:
        """Entry of the table."""
        timed = self.timed()
        return {
            "method": self.method, "label": METHODS[self.method].label, "n": self.n, "status": self.status, "repeats": len(timed),
            "cpu_seconds": median(c["cpu_seconds"] for c in timed) if timed else None,
            "wall_seconds": median(c["wall_seconds"] for c in timed) if timed else None,
            "all_cpu_seconds": [c["cpu_seconds"] for c in timed],
            "peak_mib": self.calls[0]["peak_mib"] if self.calls else None,  # later calls reuse what the process already holds
            "error_float32": self.errors.get("float32"), "error_float64": self.errors.get("float64"),
        }  # fmt: skip


class Race:
    """The measurement of one workload.

    Args:
        workload: What is computed.
        options: How.
        workers: Running processes, which may serve other workloads too.
        folder: Where blocks of results are exchanged.
        show: Told what is being done.
    """

    def __init__(self, workload: Workload, options: Options, workers: Workers, folder: Path, show: Callable[[str], None]) -> None:
        self.workload, self.options, self.workers, self.folder, self.show = workload, options, workers, folder, show
        self.contestants = [Contestant(name, n, METHODS[name].missing) for name, n in workload.sizes(options.peers)]
        self.sizes = sorted({c.n for c in self.contestants})
        self.job = {
            "workload": workload.name, "network": workload.network, "kind": workload.kind, "quick": options.quick,
            "device": options.device, "compared": workload.compared, "inputs": str(folder / f"{workload.name}.npz"),
        }  # fmt: skip

    def run(self) -> Job:
        """Rounds over all methods, then agreement in float64."""
        self._start()
        expected, floors = self._reference(), []
        for round_ in range(self.options.repeats + 1):
            floors.append(self.workers.ask(HELPER, self.job | {"do": "count", "sizes": self.sizes}, self.options.timeout))
            for c in self._able():
                if sum(call["wall_seconds"] for call in c.timed()) < self.options.budget:
                    self.show(
                        f"{self.workload.name}: round {round_} of {self.options.repeats}, {METHODS[c.method].label}, n = {c.n}"
                    )
                    self._call(c, expected)
        self._agree(expected)
        w = self.workload
        about = {"name": w.name, "title": w.title, "n": w.n, "compared": w.compared, "kind": w.kind, "held_out": w.held_out}
        rows = [c.row() for c in self.contestants]
        return about | {"device": self.options.device} | _floor(floors) | {"methods": rows, "versions": self.workers.versions()}

    def _key(self, c: Contestant) -> Any:
        """A quick run keeps one process per package; otherwise memory starts clean, in one per method and size."""
        return METHODS[c.method].peer if self.options.quick else (c.method, c.n)

    def _able(self) -> list[Contestant]:
        return [c for c in self.contestants if not c.status]

    def _start(self) -> None:
        modules = {self._key(c): METHODS[c.method].worker for c in self._able()}
        failed = self.workers.start({HELPER: "benchmarks.torch_worker"} | modules)
        for c in self._able():
            c.status = failed.get(self._key(c), "")
        self._helped({"do": "export", "path": self.job["inputs"], "n": self.workload.n})

    def _reference(self) -> np.ndarray:
        """Float64 values of the compared examples."""
        path = self.folder / "reference.npy"
        self._helped({"do": "reference", "path": str(path)})
        return np.load(path)

    def _helped(self, job: Job) -> Job:
        answer = self.workers.ask(HELPER, self.job | job, self.options.timeout)
        if "error" in answer:
            msg = f"{job['do']} failed on {self.workload.name}: {answer['error']}"
            raise RuntimeError(msg)
        return answer

    def _call(self, c: Contestant, expected: np.ndarray) -> None:
        """One timed call at full size."""
        answer = self._asked(c, c.n, "float32")
        if answer is not None:
            c.calls.append(answer)
            if self.workload.kind == "kernel":
                c.errors["float32"] = relative_error(self._result(), expected)

    def _agree(self, expected: np.ndarray) -> None:
        """The compared examples alone: in float64, and in float32 where the timed result is a sum over all examples."""
        for c in self.contestants:
            for dtype in ("float64",) if self.workload.kind == "kernel" else ("float32", "float64"):
                if not c.status and self._asked(c, min(c.n, self.workload.compared), dtype) is not None:
                    c.errors[dtype] = relative_error(self._result(), expected)

    def _asked(self, c: Contestant, n: int, dtype: str) -> Job | None:
        """Answer of a run, or None with the reason in the contestant's status."""
        job = self.job | {"do": "run", "method": c.method, "n": n, "dtype": dtype, "path": str(self.folder / "result.npy")}
        answer = self.workers.ask(self._key(c), job, self.options.timeout)
        if "error" not in answer:
            return answer
        c.status = answer["error"] if dtype == "float32" else f"{dtype}: {answer['error']}"
        return None

    def _result(self) -> np.ndarray:
        return np.load(self.folder / "result.npy")


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference, on the examples that both have."""
    both = expected[: len(found), : len(found)] if expected.ndim == 4 else expected
    return float(np.linalg.norm(found - both) / np.linalg.norm(both))


def _floor(answers: list[Job]) -> Job:
    """FLOPs by size, and the median rate over rounds."""
    good = [a for a in answers if "error" not in a]
    if not good:
        return {"flops": {}, "gemm_flops_per_second": None, "floor_error": answers[0]["error"]}
    return good[0] | {"gemm_flops_per_second": median(a["gemm_flops_per_second"] for a in good)}
