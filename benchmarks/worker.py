"""The loop of a child process: reads jobs, one JSON object a line, measures, answers on the same terms.

Needs NumPy alone, as it also runs in the environment of neural-tangents. Whatever a library prints goes to the error stream.
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Call = Callable[[], Any]


class Memory:
    """Growth of resident memory between ``start`` and ``grown``, in MiB; None where the system does not tell its peak."""

    def start(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        with contextlib.suppress(OSError):  # where this fails, an earlier, larger peak hides a smaller one
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self.before = _status("VmRSS")

    def grown(self) -> float | None:
        """Peak since ``start`` minus what was resident at ``start``."""
        after = _status("VmHWM")
        return None if self.before is None or after is None else max(0.0, (after - self.before) / 1024)


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), None)


def measured(call: Call, memory: Any, finish: Callable[[], None] = lambda: None) -> tuple[Any, Job]:
    """Result of a call with its CPU seconds (of all threads), wall seconds and peak memory."""
    memory.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    finish()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return result, {"cpu_seconds": cpu, "wall_seconds": wall, "peak_mib": memory.grown()}


def corner(result: np.ndarray, compared: int) -> np.ndarray:
    """Block of the first examples of a kernel; a trace as it is."""
    return np.asarray(result[:compared, :compared] if result.ndim == 4 else result, dtype=np.float64)


def serve(handlers: dict[str, Callable[[Job], Job]], versions: Callable[[], Job]) -> None:
    """Answer jobs until the input ends. A failed job is an answer too."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Job) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    answer({"versions": versions()})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer(handlers[job["do"]](job))
        except Exception as error:  # any failure of a peer is a result
            text = " ".join(str(error).split())[:200]
            short = "out of memory" if "memory" in text.lower() and "alloc" in text.lower() else f"{type(error).__name__}: {text}"
            answer({"error": short})
