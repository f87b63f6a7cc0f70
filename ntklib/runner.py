"""Execute chapters: strict parameters, atomic output, true exit codes, progress and a log."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ntklib import chapters, needs, progress, provenance, storage, torchrun
from ntklib.paths import project_root, runs_root
from ntklib.sweeps import JOBS, SHARE, read_share

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}  # print as it is
PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal


@dataclass
class Task:
    """One chapter to execute with its parameters.

    Attributes:
        chapter: Name of the notebook.
        preset: Preset the parameters start from, ``"custom"`` once one was changed.
        parameters: All parameters, checked.
        stamp: Hash of all the output depends on; an output with the same stamp is up to date.
        base: Preset that the parameters started from.
        share: ``"k/n"`` for the k-th of n processes that work on the runs of this chapter; the notebook it leaves is its own.
        rank: Number of this process in a job of ``torchrun``, whose processes all execute the chapter and train its runs together;
            what process 0 leaves is the chapter's, that of the others is of no use but to see what they did.
    """

    chapter: str
    preset: str
    parameters: dict[str, Any]
    stamp: str
    base: str = "default"
    share: str = ""
    rank: int = 0
    process: subprocess.Popen | None = None
    started: float = 0.0
    offset: int = 0
    cell: tuple[int, int] = (0, 0)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)  # label of a run -> steps done and in all
    expected: int = 0  # runs announced
    training_since: float = 0.0
    spoken: float = 0.0  # when a line was last printed
    message: str = ""

    @property
    def output(self) -> Path:
        """Path of the executed notebook."""
        return runs_root() / ("shares" if self.share or self.rank else "executed") / self.preset / f"{self.name}.ipynb"

    @property
    def name(self) -> str:
        """Name of the chapter, of the share if it is one, and of a process other than the first."""
        share = f".{self.share.replace('/', '-of-')}" if self.share else ""
        return f"{self.chapter}{share}" + (f".process-{self.rank}" if self.rank else "")

    @property
    def log(self) -> Path:
        """Path of the log."""
        return runs_root() / "logs" / self.preset / f"{self.name}.log"

    @property
    def events(self) -> Path:
        """Path of the progress events."""
        return self.log.with_suffix(".progress")

    def up_to_date(self) -> bool:
        """Whether the output, in a job that of process 0, was made from the same source, parameters, code and versions."""
        try:
            metadata = json.loads(replace(self, rank=0).output.read_text(encoding="utf-8"))["metadata"]
        except (OSError, ValueError, KeyError):
            return False
        return metadata.get("ntklib", {}).get("stamp") == self.stamp


def make_task(chapter: str, preset: str = "default", overrides: Mapping[str, Any] | None = None, share: str = "") -> Task:
    """Check chapter, preset and parameters, before anything is started.

    The default preset is what the notebook's parameters cell says, so that an edited cell counts (the chapter itself compares its
    values with the preset's and does not judge claims when they differ); the other presets replace the values they name.

    Raises:
        ParameterError: With the nearest name, or an example of the type.
    """
    try:
        read_share(share or "1/1")
    except ValueError as error:
        raise chapters.ParameterError(str(error)) from error
    path = chapters.notebook_path(chapter)
    values = chapters.default_parameters(chapter)
    named = chapters.preset_parameters(chapter, preset)
    values |= {} if preset == "default" else chapters.check_parameters(chapter, named)
    changed = chapters.check_parameters(chapter, overrides or {})
    name = preset if chapters.same_experiment(values, values | changed) else chapters.CUSTOM
    values |= changed
    source = [[c.cell_type, c.source, c.metadata] for c in nbformat.read(path, as_version=4).cells]
    claims = (project_root() / "book" / "claims.yml").read_text(encoding="utf-8")
    parts = [source, values, provenance.code_fingerprint(numeric_only=False), claims, provenance.versions()]
    return Task(chapter, name, values, storage.sha256(storage.canonical(parts))[:16], preset, share, torchrun.rank())


def run(tasks: Sequence[Task], *, jobs: int = 1, force: bool = False, console: Console | None = None) -> list[Task]:
    """Execute tasks, ``jobs`` at a time, showing progress; return those that failed.

    Outputs that are up to date are left alone unless ``force``. On an interrupt all processes are ended first.

    Raises:
        DatasetNotFoundError: If a dataset is neither there nor to be had, before any task is started.
    """
    console = console or Console(stderr=True)
    waiting = [task for task in tasks if force or not _is_done(task, console)]
    for task in waiting if torchrun.rank() == 0 else ():
        for sentence in needs.missing(task.parameters, task.base):
            console.print(f"{task.name}: {sentence}", **PLAIN)
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(waiting))) // torchrun.local_size())
    running: list[Task] = []
    failed: list[Task] = []
    try:
        with Live(console=console, transient=True, refresh_per_second=4) as live:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), threads))
                time.sleep(0.2)
                ended = [task for task in running if task.process is not None and task.process.poll() is not None]
                for task in running:
                    _follow(task, console)
                running = [task for task in running if task not in ended]
                failed += [task for task in ended if not _finish(task, console)]
                _show(running, console, live)
    except BaseException:
        for task in running:
            _kill(task)
        raise
    return failed


def _is_done(task: Task, console: Console) -> bool:
    done = task.up_to_date()
    if done:
        console.print(f"{task.name}: up to date ({_short(task.output)})", **PLAIN)
    return done


def _show(running: Sequence[Task], console: Console, live: Live) -> None:
    """One line per running chapter: redrawn on a terminal, repeated now and then elsewhere."""
    if console.is_terminal:
        live.update(_table(running))
        return
    for task in running:
        if task.rank == 0 and time.monotonic() - task.spoken > PLAIN_EVERY:
            task.spoken = time.monotonic()
            console.print("  ".join(_columns(task)), **PLAIN)


def _start(task: Task, threads: int) -> Task:
    for path in (task.output, task.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    task.events.unlink(missing_ok=True)
    environment = os.environ | {
        progress.FILE: str(task.events), "OMP_NUM_THREADS": str(threads), JOBS: os.environ.get(JOBS, str(os.cpu_count() or 1)),
        "PYTHONUNBUFFERED": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **({SHARE: task.share} if task.share else {}),
    }  # fmt: skip
    specification = {
        "source": str(chapters.notebook_path(task.chapter)), "output": str(task.output), "parameters": task.parameters,
        "stamp": task.stamp, "preset": task.preset, "chapter": task.chapter,
    }  # fmt: skip
    task.started = task.spoken = time.monotonic()
    with task.log.open("wb") as log:
        log.write(f"{provenance.utc_now()} {task.chapter} preset={task.preset} {json.dumps(task.parameters)}\n".encode())
        log.flush()
        task.process = subprocess.Popen(
            [sys.executable, "-m", "ntklib.execute", json.dumps(specification)],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            cwd=project_root(), start_new_session=True,
        )  # fmt: skip
    return task


def _follow(task: Task, console: Console) -> None:
    events, task.offset = progress.read_events(task.events, task.offset)
    for event in events:
        if "cell" in event:
            task.cell = (event["cell"], event["cells"])
        elif "label" in event:
            task.training_since = task.training_since or event["time"]
            task.steps[event["label"]] = (event["step"], event["total"])
        elif "expected" in event:
            task.expected += event["expected"]
        elif "message" in event:
            console.print(f"{task.name}: {event['message']}", **PLAIN)


def _finish(task: Task, console: Console) -> bool:
    code = task.process.returncode if task.process else 1
    if code == 0:
        took = _time(time.monotonic() - task.started)
        console.print(f"{task.name}: done in {took} -> {_short(task.output)}", **PLAIN)
        return True
    failure = task.output.with_suffix(".failure.txt")
    reason = failure.read_text(encoding="utf-8") if failure.exists() else f"the process ended with status {code}"
    where = f"cell {task.cell[0]} of {task.cell[1]}"
    console.print(f"{task.name}: FAILED in {where}: {reason}\n  log: {task.log}", style="red", **PLAIN)
    return False


def _kill(task: Task) -> None:
    """End the child with its kernel and its workers."""
    if task.process is None:
        return
    try:
        family = psutil.Process(task.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in [task.process, *family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    task.process.wait()


def _table(running: Sequence[Task]) -> Table:
    table = Table.grid(padding=(0, 2))
    for task in running:
        table.add_row(*_columns(task))
    return table


def _columns(task: Task) -> tuple[str, str, str, str, str]:
    """Chapter, cell, steps of the runs announced so far, elapsed time and the estimate of what is left of them."""
    done, total = (sum(column) for column in zip(*task.steps.values(), strict=True)) if task.steps else (0, 0)
    if task.steps:
        total = round(total * max(1.0, task.expected / len(task.steps)))  # runs not begun yet count like the others
    rate = (time.time() - task.training_since) / done if done else 0.0
    steps = f"step {done} of {total}" if total else "starting" if not task.cell[1] else ""
    left = f"about {_time(rate * (total - done))} left of these steps" if 0 < done < total else ""
    return task.name, f"cell {task.cell[0]}/{task.cell[1]}", steps, _time(time.monotonic() - task.started), left


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
