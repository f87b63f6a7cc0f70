"""Child processes on one thread each, which answer jobs one at a time."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from typing import Any

from benchmarks.worker import Job
from benchmarks.workloads import ROOT, nt_python

THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")


class Worker:
    """A child process that answers jobs one at a time."""

    def __init__(self, module: str) -> None:
        python = str(nt_python()) if module == "benchmarks.jax_worker" else sys.executable
        environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in THREADS} | {"NTKLIB_OFFLINE": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 closed with the process
        self.process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.versions: Job = {}

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def ready(self) -> str:
        """Wait for the imports; the reason if they fail."""
        answer = self._answer(120)
        self.versions = answer.get("versions", {})
        return answer.get("error", "")

    def ask(self, job: Job, timeout: float) -> Job:
        """Send a job, wait for its answer; a death or a missed deadline is an answer with ``error``."""
        assert self.process.stdin
        if self.process.poll() is not None:
            return {"error": self._death()}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Job:
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.process.kill()
            return {"error": f"over {timeout:.0f} s"}
        return json.loads(line) if line else {"error": self._death()}

    def _death(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return "out of memory (killed)" if code == -9 else f"exit status {code}: {lines[-1][:160] if lines else ''}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Workers:
    """One worker per key, started on first use and all at once where several are named."""

    def __init__(self) -> None:
        self.running: dict[Any, Worker] = {}

    def start(self, wanted: dict[Any, str]) -> dict[Any, str]:
        """Start one worker per key and module; return the reasons of those that fail."""
        new = {key: Worker(module) for key, module in wanted.items() if key not in self.running}
        self.running |= new
        return {key: reason for key, worker in new.items() if (reason := worker.ready())}

    def ask(self, key: Any, job: Job, timeout: float) -> Job:
        """Answer of one of them."""
        return self.running[key].ask(job, timeout)

    def versions(self) -> Job:
        """Versions that all of them reported."""
        return {name: v for worker in self.running.values() for name, v in worker.versions.items()}

    def close(self) -> None:
        """End all."""
        for worker in self.running.values():
            worker.close()
        self.running.clear()
