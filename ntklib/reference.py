"""Results of larger runs that come with the book: small histories with their provenance, in ``book/reference/``."""

import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ntklib import claims, provenance, runs, storage, text
from ntklib.paths import project_root, runs_root


@dataclass(frozen=True)
class Reference:
    """A stored result.

    Attributes:
        name: Its name.
        history: Tidy frame of all its runs, with the settings ``seed`` and ``status`` as columns.
        about: Chapter, parameters, command, hardware, wall time, commit, versions, date.
    """

    name: str
    history: pd.DataFrame
    about: dict[str, Any]

    def __str__(self) -> str:
        a = self.about
        made = f"{a['wall_seconds'] / 60:.0f} minutes of computing on {a['hardware']}, {a['written'][:10]}"
        code = f"torch {a['versions']['torch']}, commit {str(a['git']['commit'])[:8]}"
        return f"reference run {self.name}: {a['command']}\n({made}, {code})"


def folder() -> Path:
    """Folder of the committed results."""
    return project_root() / "book" / "reference"


def names() -> list[str]:
    """Names of the committed results; other measurements are kept in the same folder."""
    found = {path.stem: storage.read_json(path) for path in sorted(folder().glob("*.json"))}
    return [name for name, about in found.items() if about is not None and "history_sha256" in about]


def load_reference(name: str) -> Reference:
    """Load a committed result.

    Raises:
        FileNotFoundError: If there is none of this name, or a file is damaged.
    """
    about = storage.read_json(folder() / f"{name}.json") if name in names() else None
    if about is None:
        raise FileNotFoundError(text.unknown("reference result", name, names()))
    content = storage.read_checked(folder() / f"{name}.parquet", about["history_sha256"])
    if content is None:
        msg = f"{name}.parquet in {folder()} is missing or damaged. Restore it from the repository."
        raise FileNotFoundError(msg)
    return Reference(name, pd.read_parquet(io.BytesIO(content)), about)


@dataclass(frozen=True)
class Planned:
    """A run that is worth keeping with the book, as ``workflow/references.yml`` describes it.

    Attributes:
        name: Its name.
        chapter: Chapter that computes it.
        preset: Preset that its parameters start from.
        parameters: Parameters that differ.
    """

    name: str
    chapter: str
    preset: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What computes and keeps it, from anywhere, without the list of plans."""
        return command(self.name, self.chapter, self.preset, self.parameters)


def planned() -> list[Planned]:
    """The runs of ``workflow/references.yml``, in its order."""
    content = yaml.safe_load((project_root() / "workflow" / "references.yml").read_text(encoding="utf-8"))
    return [Planned(name, **entry) for name, entry in content.items()]


def find_planned(name: str) -> Planned:
    """Return the planned run of this name.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = {plan.name: plan for plan in planned()}
    if name not in found:
        raise FileNotFoundError(text.unknown("planned reference run", name, found))
    return found[name]


def command(name: str, chapter: str, preset: str, parameters: Mapping[str, Any]) -> str:
    """The command line that computes a chapter and keeps its histories as ``name``."""
    changed = [word for key, value in parameters.items() for word in ("-p", key, _word(value))]
    return shlex.join(["python", "-m", "ntklib", "reference", name, chapter, "--preset", preset, *changed])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def save_reference(name: str, chapter: str, preset: str, command: str) -> Path:
    """Write the training runs of the last execution of a chapter as a reference result; return the path of its description.

    Args:
        name: Name of the result.
        chapter: Chapter whose results are kept.
        preset: Preset it was executed at (``"custom"`` for changed parameters).
        command: The command that computes it, for the reader.

    Raises:
        FileNotFoundError: If the chapter was not executed at this preset, or runs are gone from the store.
    """
    record = storage.read_json(runs_root() / "results" / preset / f"{chapter}.json")
    if record is None:
        msg = f"{chapter} has no results at preset {preset}. Execute it first: {command}"
        raise FileNotFoundError(msg)
    results = [runs.load_result(chapter, key) for key in record["runs"]]
    trained = [r for r in results if int(r.history["step"].to_numpy().max()) > 0]
    buffer = io.BytesIO()
    runs.combine(trained, "seed").to_parquet(buffer, index=False, compression="zstd")
    sessions = [s for r in trained for s in r.sessions]
    about = {
        "name": name, "chapter": chapter, "parameters": record["parameters"], "command": command,
        "hardware": claims.hardware(sessions), "wall_seconds": round(sum(s["wall_seconds"] for s in sessions), 1),
        "git": sessions[0]["git"], "versions": sessions[0]["versions"], "written": provenance.utc_now(),
        "history_sha256": storage.sha256(buffer.getvalue()),
    }  # fmt: skip
    storage.write_atomic(folder() / f"{name}.parquet", buffer.getvalue())
    storage.write_json(folder() / f"{name}.json", about)
    return folder() / f"{name}.json"
