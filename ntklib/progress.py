"""Progress of long work: to the runner's file in batch, to a text bar when a person watches."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "NTKLIB_PROGRESS"  # environment variable: file to which events are appended, one JSON object a line


def report(label: str, step: int, total: int) -> None:
    """Tell how far the work named ``label`` is."""
    _append({"label": label, "step": step, "total": total})


def expect(runs: int) -> None:
    """Tell that this many more runs are coming."""
    _append({"expected": runs})


def say(message: str) -> None:
    """Tell the person who waits something."""
    if os.environ.get(FILE):
        _append({"message": message})
    else:
        print(message, file=sys.stderr)


def _append(event: dict[str, Any]) -> None:
    path = os.environ.get(FILE)
    if path:
        line = json.dumps({**event, "time": time.time()}) + "\n"
        with Path(path).open("a", encoding="utf-8") as file:  # one short write: lines of several processes do not mix
            file.write(line)


def read_events(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Events appended after ``offset`` bytes, and the new offset; an unfinished last line is left for the next call."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], offset
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole) + len(newline)


@contextmanager
def bar(description: str, total_runs: int, folder: Path) -> Iterator[None]:
    """Show a text bar over the steps of all runs reported inside, unless a runner already collects them."""
    if os.environ.get(FILE):
        yield
        return
    from tqdm.std import tqdm  # text, not a widget: a widget's output would make a built page load scripts from outside

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"progress-{os.getpid()}-{time.time_ns()}.jsonl"
    done = threading.Event()
    fractions: dict[str, float] = {}

    def watch() -> None:
        offset = 0
        shape = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}"
        with tqdm(total=total_runs, desc=description, bar_format=shape) as line:
            while True:
                last = done.wait(0.5)
                events, offset = read_events(path, offset)
                fractions.update({e["label"]: e["step"] / max(1, e["total"]) for e in events if "label" in e})
                line.n = total_runs if last else round(sum(fractions.values()), 3)
                line.refresh()
                if last:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    os.environ[FILE] = str(path)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        del os.environ[FILE]
        path.unlink(missing_ok=True)
