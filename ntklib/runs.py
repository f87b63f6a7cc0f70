"""Runs that survive: found again by their settings, resumed after a kill, never half written."""

import inspect
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ntklib import progress, provenance, storage
from ntklib.locks import RunBusyError, skip_busy
from ntklib.paths import runs_root
from ntklib.training.parallel import ALONE, Alone, processes
from ntklib.training.state import State

FORMAT = 1
MEMORY = "memory."  # prefix in a checkpoint
COLUMNS = {
    "run": "string", "step": "int64", "epoch": "float64", "split": "string", "layer": "string", "quantity": "string",
    "value": "float64", "sem": "float64",
}  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What is left of a run: everything a figure or a verdict needs.

    Attributes:
        key: Hash that names the run.
        chapter: Chapter that computed it.
        settings: Its settings.
        status: ``"complete"``, ``"diverged"`` or ``"running"`` (interrupted).
        history: Tidy frame, one row per step, split, layer and quantity: run, step, epoch, split, layer, quantity, value, sem.
        sessions: Provenance of each process that worked on it.
    """

    key: str
    chapter: str
    settings: dict[str, Any]
    status: str
    history: pd.DataFrame
    sessions: list[dict[str, Any]]

    @property
    def diverged(self) -> bool:
        """Whether the run ended because a loss or parameter was not finite."""
        return self.status == "diverged"


class Run:
    """A context in which a run is loaded, resumed or computed.

    The run is named by a hash of the settings, the numeric code of the package, the measuring code that uses the run (the calling
    cell or function, with the functions and plain values of the notebook it names) and torch's version. A lock file keeps two
    processes from computing it twice: the second waits, then reads the result.

    Measured states are saved with the training state: history (Parquet), checkpoint (safetensors) and a manifest that names both
    with their checksums and is replaced last, atomically. After a kill the run goes on from the last manifest, and its history
    equals that of an uninterrupted run bit for bit (same machine and number of threads).

    In a job that ``torchrun`` has started every process runs the same code and so meets the same runs. Process 0 alone loads,
    measures and writes; to the others a run is one that is found: ``states`` and ``once`` yield nothing, and the result is that of
    process 0. What they do meanwhile is take their share of every training step, where the loop has the argument ``processes``
    (see ``ntklib.training.parallel``), or else wait. The number of processes is no part of the run's name: it changes the numbers
    by rounding alone, and a run may be resumed with another one.

    Attributes:
        memory: Tensors by name that later measurements of the same run need, for example kernels to compare with. They are saved
            with each checkpoint, so that a resumed run still has them, and dropped when the run ends.

    Args:
        chapter: Name of the chapter.
        settings: A mapping or a pydantic model; every value that the numbers depend on.
        save_every: Seconds between checkpoints, at measured states.
        root: Folder of runs. Default: ``NTKLIB_RUNS`` or ``runs``.
    """

    def __init__(
        self, chapter: str, settings: Mapping[str, Any] | Any, *, save_every: float = 10.0, root: Path | None = None
    ) -> None:
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        self.chapter = chapter
        self.settings = dict(settings if isinstance(settings, Mapping) else settings.model_dump())
        self.numerics = {
            "format": FORMAT,
            "package": provenance.code_fingerprint(),
            "caller": provenance.caller_fingerprint(caller.f_code, caller.f_globals) if caller else "",
            "torch": ".".join(torch.__version__.split(".")[:2]),
        }
        identity = {"chapter": chapter, "settings": self.settings, "numerics": self.numerics}
        self.key = storage.sha256(storage.canonical(identity))[:16]
        self.folder = (root or runs_root()) / "store" / chapter / self.key
        self.status = "running"
        self.memory: dict[str, Tensor] = {}
        self._save_every = save_every
        self._rows: list[dict[str, Any]] = []
        self._sessions: list[dict[str, Any]] = []
        self._checkpoint: tuple[int, dict[str, Tensor]] | None = None
        self._lock = FileLock(self.folder / "lock")
        self._processes: Alone = ALONE

    # -- life of the context ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._processes = processes()
        busy = self._open() if self._processes.rank == 0 else None
        self._hear(busy)
        self._checkpoint = self._processes.broadcast(self._checkpoint)
        self._started = time.monotonic()
        self._saved = self._started
        return self

    def _open(self) -> RunBusyError | None:
        """Take the lock and load what is stored; the error if another process has the lock and the caller does not want to wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0.5)
        except Timeout:
            if skip_busy():
                return RunBusyError(f"{self.label}: another process is computing this run")
            progress.say(f"{self.label}: another process is computing this run; waiting for its result")
            self._lock.acquire()
        try:
            self._load()
        except BaseException:
            self._lock.release()
            raise
        return None

    def _hear(self, busy: RunBusyError | None = None) -> None:
        """Take over from process 0 what the run has come to."""
        mine = self.key
        known = (busy, mine, self.status, self._rows, self._sessions)
        busy, key, self.status, self._rows, self._sessions = self._processes.broadcast(known)
        if busy is not None:
            raise busy
        if key != mine:
            rank = self._processes.rank
            msg = f"All processes of a job must come to the same run. Got {key} in process 0 and {mine} in process {rank}."
            raise RuntimeError(msg)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute."""
        return self.status in ("complete", "diverged")

    @property
    def label(self) -> str:
        """Chapter, seed and key, for messages."""
        seed = f" seed {self.settings['seed']}" if "seed" in self.settings else ""
        return f"{self.chapter}{seed} [{self.key[:6]}]"

    @property
    def history(self) -> pd.DataFrame:
        """Tidy frame of all that was logged, see ``RunResult``."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS)).astype(COLUMNS)

    @property
    def result(self) -> RunResult:
        """The run as plain data, which can leave the process."""
        return RunResult(self.key, self.chapter, self.settings, self.status, self.history, self._sessions)

    # -- computing -------------------------------------------------------------------------------------------------------------

    def states(self, loop: Callable[..., Iterator[State]], *arguments: Any, **more: Any) -> Iterator[State]:
        """Yield the states of a training loop that are not measured yet; nothing when the run is complete.

        Args:
            loop: A generator of states with a ``resume`` argument. Its keyword arguments are taken from the settings by name.
            arguments: Its positional arguments, usually the model and the data, freshly built.
            more: Keyword arguments that are not settings but follow from them.
        """
        if self.finished:
            return
        names = [p.name for p in inspect.signature(loop).parameters.values() if p.kind is p.KEYWORD_ONLY]
        keywords = {name: self.settings[name] for name in names if name in self.settings} | more
        together = "processes" in names
        if together:
            keywords["processes"] = self._processes
        if self._processes.rank == 0:
            go_on = self._processes.broadcast if together else lambda answer: answer
            yield from self._lead(loop(*arguments, **keywords, resume=self._checkpoint), go_on)
        elif together:
            for _ in loop(*arguments, **keywords, resume=self._checkpoint):
                if not self._processes.broadcast(True):  # waits here while process 0 measures
                    break
        self._hear()

    def _lead(self, states: Iterator[State], go_on: Callable[[bool], bool]) -> Iterator[State]:
        """Yield the states to who measures, save them, and tell the other processes after each whether it goes on."""
        self._begin_session()
        for state in states:
            progress.report(self.label, state.step, state.total_steps)
            try:
                yield state
            except GeneratorExit:  # who measures has seen enough
                go_on(False)
                self._hear()
                raise
            ends = state.diverged or state.step == state.total_steps
            if ends:
                self.status = "diverged" if state.diverged else "complete"
            if ends or time.monotonic() - self._saved >= self._save_every:
                self._save(state)
            go_on(True)

    def once(self) -> Iterator[State]:
        """Yield one empty state, unless the run is complete: for measurements without training.

        Arrays that are no rows of a history can be registered as buffers of the state's model; ``load_tensors_of`` returns them.
        """
        if self.finished:
            return
        if self._processes.rank == 0:
            self._begin_session()
            progress.report(self.label, 0, 1)
            state = State(0, 0.0, torch.nn.Identity(), math.nan, 0.0)
            yield state
            self.status = "complete"
            self._save(state if state.tensors() else None)
            progress.report(self.label, 1, 1)
        self._hear()

    def log(self, state: State, *, split: str = "", layer: str = "", **quantities: Any) -> None:
        """Append one row per quantity: a number, a pair (value, sem), or an estimate with ``mean`` and ``sem``."""
        for quantity, value in quantities.items():
            mean, sem = value, math.nan
            if isinstance(value, tuple):
                mean, sem = value
            elif hasattr(value, "num_samples"):  # an estimate
                mean, sem = value.mean, value.sem
            place = {"run": self.key[:8], "step": state.step, "epoch": state.epoch, "split": split, "layer": layer}
            self._rows.append({**place, "quantity": quantity, "value": float(mean), "sem": float(sem)})

    # -- files -----------------------------------------------------------------------------------------------------------------

    def _begin_session(self) -> None:
        device, size = str(self.settings.get("device", "cpu")), self._processes.size
        machine = provenance.machine(device)
        if size > 1:
            machine |= {"processes": size} | ({"gpu": f"{size} x {machine['gpu']}"} if "gpu" in machine else {})
        self._sessions.append({
            "started": provenance.utc_now(), "git": provenance.git_state(), "versions": provenance.versions(),
            "device": device, **machine, "wall_seconds": 0.0,
        })  # fmt: skip

    def _save(self, state: State | None) -> None:
        """Write history and checkpoint under new names, then the manifest that points at them, then drop what it replaced."""
        self._saved = time.monotonic()
        self._sessions[-1] |= {
            "wall_seconds": round(self._saved - self._started, 2), "peak_memory_mib": provenance.peak_memory_mib(),
            "ended": provenance.utc_now(),
        }  # fmt: skip
        files = {"history": self._write("history", ".parquet", _to_parquet(self.history))}
        if state is not None:
            kept = {} if self.finished else {f"{MEMORY}{k}": v for k, v in self.memory.items()}
            tensors = {k: v.detach().cpu().contiguous() for k, v in (state.tensors() | kept).items()}
            files["checkpoint"] = {**self._write("checkpoint", ".safetensors", save_tensors(tensors)), "step": state.step}
        manifest = {"chapter": self.chapter, "key": self.key, "settings": self.settings, "numerics": self.numerics}
        manifest |= {"status": self.status, "sessions": self._sessions, "files": files}
        storage.write_json(self.folder / "run.json", manifest)
        current = {entry["name"] for entry in files.values()}
        for pattern in ("history-*.parquet", "checkpoint-*.safetensors"):
            for path in self.folder.glob(pattern):
                if path.name not in current:
                    path.unlink()

    def _write(self, stem: str, suffix: str, content: bytes) -> dict[str, Any]:
        checksum = storage.sha256(content)
        name = f"{stem}-{checksum[:12]}{suffix}"
        storage.write_atomic(self.folder / name, content)
        return {"name": name, "sha256": checksum}

    def _load(self) -> None:
        self._rows, self._sessions, self._checkpoint, self.status = [], [], None, "running"
        self.memory = {}
        manifest = storage.read_json(self.folder / "run.json")
        if manifest is None:
            return
        files = manifest["files"]
        history = storage.read_checked(self.folder / files["history"]["name"], files["history"]["sha256"])
        if history is None:
            return
        if manifest["status"] == "running":
            checkpoint = storage.read_checked(self.folder / files["checkpoint"]["name"], files["checkpoint"]["sha256"])
            if checkpoint is None:
                return
            tensors = load_tensors(checkpoint)
            self.memory = {k.removeprefix(MEMORY): tensors.pop(k) for k in sorted(tensors) if k.startswith(MEMORY)}
            self._checkpoint = (files["checkpoint"]["step"], tensors)
        self.status, self._sessions = manifest["status"], manifest["sessions"]
        self._rows = pd.read_parquet(io.BytesIO(history)).to_dict("records")


def load_result(chapter: str, key: str, root: Path | None = None) -> RunResult:
    """Return a stored run by its key.

    Raises:
        FileNotFoundError: If it is not in the store, or damaged.
    """
    folder = (root or runs_root()) / "store" / chapter / key
    manifest = _manifest(folder)
    frame = pd.read_parquet(io.BytesIO(_content(folder, manifest, "history")))
    return RunResult(key, chapter, manifest["settings"], manifest["status"], frame, manifest["sessions"])


def load_tensors_of(result: RunResult, root: Path | None = None) -> dict[str, Tensor]:
    """Return the last checkpoint of a run: ``model.*`` and ``optimizer.*`` tensors.

    Raises:
        FileNotFoundError: If the run has no checkpoint, or it is damaged.
    """
    folder = (root or runs_root()) / "store" / result.chapter / result.key
    return load_tensors(_content(folder, _manifest(folder), "checkpoint"))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = storage.read_json(folder / "run.json")
    if manifest is None:
        msg = f"There is no whole run in {folder}. Compute it again."
        raise FileNotFoundError(msg)
    return manifest


def _content(folder: Path, manifest: dict[str, Any], kind: str) -> bytes:
    entry = manifest["files"].get(kind)
    content = storage.read_checked(folder / entry["name"], entry["sha256"]) if entry else None
    if content is None:
        msg = f"The run in {folder} has no whole {kind}. Delete the folder and compute it again."
        raise FileNotFoundError(msg)
    return content


def combine(results: Iterable[RunResult], *columns: str) -> pd.DataFrame:
    """Stack histories of several runs, with the named settings and the status as further columns.

    Raises:
        ValueError: If there is no run: often all that were asked for have diverged and were left out.
    """
    frames = [r.history.assign(**{c: r.settings[c] for c in columns}, status=r.status) for r in results]
    if not frames:
        msg = "At least one run is needed, for its history. Got none. Where every run diverged, choose a smaller learning rate."
        raise ValueError(msg)
    return pd.concat(frames, ignore_index=True)


def with_quantity(history: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return the frame with one quantity as a column of its name, as an abscissa for the others of the same run and step.

    Raises:
        ValueError: If a run logged it more than once a step.
    """
    rows = pd.DataFrame(history[history["quantity"] == quantity]).drop_duplicates(["run", "step", "split", "layer"])
    column = rows.set_index(["run", "step"])[["value"]].set_axis([quantity], axis=1)
    if column.index.has_duplicates:
        msg = f"{quantity} must have one value per run and step. Got several: keep one split and layer first."
        raise ValueError(msg)
    return history.join(column, on=["run", "step"])


def _to_parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
