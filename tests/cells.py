"""Cells of a chapter, executed on made-up histories: what is judged can then be told by hand."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import nbformat
import pandas as pd

from ntklib import chapters
from ntklib.runs import COLUMNS, RunResult

Curve = Mapping[float, float]  # step -> value


class Recorder:
    """Takes the place of a chapter's ``Verdicts``: ``measured[claim]`` has the values that a cell hands over."""

    def __init__(self) -> None:
        self.measured: dict[str, list[float]] = {}

    def judge(self, claim: str, measured: Iterable[Any], **_: Any) -> str:
        self.measured[claim] = [m.value for m in measured]
        return claim


def made_up(
    curves: Mapping[tuple[str, str, str] | tuple[str, str], Curve], *, diverged: bool = False, **settings: Any
) -> RunResult:
    """A finished run whose history has these curves, by (quantity, split) or (quantity, split, layer)."""
    key = "-".join(map(str, settings.values())) or "run"
    rows = [
        {"run": key, "step": t, "epoch": float(t), "split": split, "layer": "".join(layer), "quantity": quantity, "value": value,
         "sem": 0.0}
        for (quantity, split, *layer), curve in curves.items() for t, value in curve.items()
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return RunResult(key, "chapter", settings, "diverged" if diverged else "complete", frame, [])


class Cells:
    """The namespace of a chapter: its imports, its parameters and what a test puts in, and its cells to be executed there."""

    def __init__(self, chapter: str, **given: Any) -> None:
        self.sources = [c.source for c in nbformat.read(chapters.notebook_path(chapter), 4).cells if c.cell_type == "code"]
        self.names: dict[str, Any] = {**chapters.default_parameters(chapter), "verdicts": Recorder(), "display": lambda _: None}
        for source in self.sources:
            imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), chapter, "exec"), self.names)
        self.names.update(given)

    def run(self, *marks: str) -> dict[str, list[float]]:
        """Execute, in their order, the cells that hold one of the marks (each in exactly one cell); what has been judged so far."""
        found = {mark: [i for i, source in enumerate(self.sources) if mark in source] for mark in marks}
        assert all(len(places) == 1 for places in found.values()), found
        for i in sorted({places[0] for places in found.values()}):
            exec(self.sources[i], self.names)
        return self.names["verdicts"].measured
