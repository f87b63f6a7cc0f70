"""A chapter: its notebook, its parameters, its presets, and what it hands on."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import nbformat
import yaml

from ntklib import provenance, text
from ntklib.paths import project_root
from ntklib.settings import Settings

if TYPE_CHECKING:
    from ntklib.runs import RunResult

PRESETS = ("smoke", "default", "paper")
FOLDED = 12  # a longer table of runs is folded
CUSTOM = "custom"  # parameters that are no preset's
AnySettings = TypeVar("AnySettings", bound=Settings)


class ParameterError(ValueError):
    """An unknown or ill-typed parameter, chapter or preset."""


def notebooks_folder() -> Path:
    """Folder of the chapters' sources."""
    return project_root() / "notebooks"


def names() -> list[str]:
    """Names of all chapters."""
    return sorted(path.stem for path in notebooks_folder().glob("*.ipynb"))


def notebook_path(chapter: str) -> Path:
    """Path of a chapter's source.

    Raises:
        ParameterError: If there is no such chapter.
    """
    if chapter not in names():
        raise ParameterError(text.unknown("chapter", chapter, names()))
    return notebooks_folder() / f"{chapter}.ipynb"


def default_parameters(chapter: str) -> dict[str, Any]:
    """Names and values in the cell tagged ``parameters``, which holds literal assignments only."""
    notebook = nbformat.read(notebook_path(chapter), as_version=4)
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        msg = f"{chapter} must have exactly one cell tagged 'parameters'. Got {len(cells)}."
        raise ParameterError(msg)
    found: dict[str, Any] = {}
    for node in ast.parse(cells[0].source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name) or not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            msg = f"The parameters cell of {chapter} may hold only lines 'name: type = literal'. Got {ast.unparse(node)!r}."
            raise ParameterError(msg)
        found[target.id] = ast.literal_eval(node.value)
    return found


def preset_parameters(chapter: str, preset: str) -> dict[str, Any]:
    """Values that a preset sets for a chapter; what it does not name keeps the cell's value.

    Raises:
        ParameterError: If the preset is unknown.
    """
    if preset not in PRESETS:
        raise ParameterError(text.unknown("preset", preset, PRESETS))
    content = yaml.safe_load((notebooks_folder() / "presets" / f"{preset}.yml").read_text(encoding="utf-8")) or {}
    return content.get(chapter, {})


def complete_preset(chapter: str, preset: str) -> dict[str, Any]:
    """All parameters of a chapter at a preset; independent of edits to the notebook's cell."""
    return preset_parameters(chapter, "default") | preset_parameters(chapter, preset)


def same_experiment(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two sets of parameters differ at most in the device they run on."""
    return {k: v for k, v in a.items() if k != "device"} == {k: v for k, v in b.items() if k != "device"}


def check_parameters(chapter: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` in the types of the chapter's parameters.

    Raises:
        ParameterError: For an unknown name (with the nearest one) or a wrong type (with an example).
    """
    defaults = default_parameters(chapter)
    checked = {}
    for name, value in values.items():
        if name not in defaults:
            raise ParameterError(text.unknown(f"parameter of {chapter}", name, defaults))
        checked[name] = _typed(name, value, defaults[name])
    return checked


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        wanted, got = type(default).__name__, type(value).__name__
        msg = f"Parameter {name} must be of type {wanted}, for example {default!r}. Got {value!r} of type {got}."
        raise ParameterError(msg)
    if isinstance(default, list) and isinstance(value, list) and default:
        return [_typed(f"{name}[{i}]", item, default[0]) for i, item in enumerate(value)]
    return value


class Chapter:
    """What a chapter's notebook knows of itself; made in its first cell after the parameters.

    Args:
        name: Name of the notebook.
        namespace: ``globals()`` of the notebook, which holds the parameters.

    Raises:
        ParameterError: If a parameter has been given a value of another type.
    """

    def __init__(self, name: str, namespace: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = check_parameters(name, {k: namespace[k] for k in default_parameters(name) if k in namespace})

    @cached_property
    def preset(self) -> str:
        """The preset whose values all parameters but the device have, or ``"custom"``."""
        return next((p for p in PRESETS if same_experiment(self.parameters, complete_preset(self.name, p))), CUSTOM)

    def settings(self, kind: type[AnySettings], **values: Any) -> AnySettings:
        """Make settings of ``kind`` from the parameters of the same names, and from ``values``, which win."""
        return kind(**{**{k: v for k, v in self.parameters.items() if k in kind.model_fields}, **values})


@dataclass(frozen=True)
class Provenance:
    """Where a chapter's numbers come from; displays itself at its foot as sentences and one row per run.

    Attributes:
        chapter: The chapter.
        results: Its runs.
    """

    chapter: Chapter
    results: "Sequence[RunResult]"

    def __repr__(self) -> str:
        return f"{len(self.results)} runs of {self.chapter.name}, preset {self.chapter.preset}"

    def _repr_markdown_(self) -> str:
        if not self.results:
            return f"Preset {self.chapter.preset}; no stored runs. {self._machines()}"
        rows = ["| run | seed | status | wall time (s) | peak memory (MiB) |", "|---|---|---|---|---|"]
        for r in self.results:
            seconds = sum(s["wall_seconds"] for s in r.sessions)
            memory = max(s["peak_memory_mib"] or 0 for s in r.sessions)
            rows.append(f"| `{r.key[:8]}` | {r.settings.get('seed', '')} | {r.status} | {seconds:.0f} | {memory:.0f} |")
        if len(self.results) > FOLDED:
            rows = [f"<details><summary>{len(self.results)} runs</summary>", "", *rows, "", "</details>"]
        return "\n".join([f"Preset {self.chapter.preset}; {len(self.results)} runs. {self._machines()}", "", *rows])

    def _machines(self) -> str:
        """Machines, versions, commits and dates of all sessions, each once."""
        sessions = [s for r in self.results for s in r.sessions] or [_present()]
        once = lambda values: "; ".join(dict.fromkeys(map(str, values)))  # noqa: E731
        versions = [s["versions"] for s in sessions]
        return (
            f"Computed on {once(map(_machine, sessions))}, "
            f"{once(s['ended'][:10] for s in sessions)} (UTC), with Python {once(v['python'] for v in versions)}, "
            f"torch {once(v['torch'] for v in versions)}, ntklib {once(v['ntklib'] for v in versions)}, "
            f"commit {once(_commit(s['git']) for s in sessions)}."
        )


def _present() -> dict[str, Any]:
    """A session that is the present process, for a chapter that stores no runs."""
    now = {"ended": provenance.utc_now(), "versions": provenance.versions(), "git": provenance.git_state()}
    return now | provenance.machine("cpu")


def _machine(session: Mapping[str, Any]) -> str:
    threads = f"{session['threads']} thread{'s' if session['threads'] > 1 else ''}"
    together = f"{session['processes']} processes of " if "processes" in session else ""
    return session.get("gpu") or f"{session['cpu']} with {together}{threads} per run"


def _commit(git: Mapping[str, Any]) -> str:
    return "unknown" if not git["commit"] else git["commit"][:8] + (" with local changes" if git["dirty"] else "")
