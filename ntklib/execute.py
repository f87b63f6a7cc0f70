"""The process that executes one chapter through papermill; started by the runner."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from ntklib import progress, storage


class ReportingEngine(NBClientEngine):
    """Papermill's engine, telling the runner which cell is at work."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **options: Any) -> Any:
        start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int = 0, **more: Any) -> None:
            progress._append({"cell": cell_index + 1, "cells": len(nb_man.nb.cells)})
            start(cell, cell_index, **more)

        nb_man.cell_start = cell_start  # type: ignore[method-assign]
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def execute(specification: dict[str, Any]) -> None:
    """Execute a chapter into ``<output>.partial.ipynb`` and rename it on success.

    Exit codes alone tell success: papermill marks a cell whose kernel died as completed. The failing cell and its error are left
    in ``<output>.failure.txt``.
    """
    output = Path(specification["output"])
    partial, failure = output.with_suffix(".partial.ipynb"), output.with_suffix(".failure.txt")
    failure.unlink(missing_ok=True)
    papermill_engines.register("reporting", ReportingEngine)
    try:
        notebook = papermill.execute_notebook(
            specification["source"], partial, parameters=specification["parameters"], engine_name="reporting",
            kernel_name="python3", progress_bar=False, log_output=True, cwd=Path(specification["source"]).parent,
        )  # fmt: skip
    except PapermillExecutionError as error:
        first = str(error.source).strip().splitlines()[0] if str(error.source).strip() else ""
        failure.write_text(f"{error.ename}: {error.evalue}\n  at: {first}\n  notebook so far: {partial}", encoding="utf-8")
        raise
    except Exception as error:
        failure.write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}", encoding="utf-8")
        raise
    finish(notebook, specification)
    storage.write_atomic(output, nbformat.writes(notebook).encode())
    partial.unlink(missing_ok=True)


def finish(notebook: Any, specification: dict[str, Any]) -> None:
    """Stamp the notebook, fold away the defaults that injected parameters replaced, and fill values into captions."""
    keep = {k: specification[k] for k in ("stamp", "preset", "chapter", "parameters")}
    notebook.metadata["ntklib"] = keep
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags and "hide-input" not in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
        for part in cell.metadata.get("mystnb", {}).values():
            for field in ("caption", "alt"):
                if isinstance(part, dict) and field in part:
                    part[field] = fill(part[field], specification["parameters"])


def fill(text: str, parameters: dict[str, Any]) -> str:
    """Replace ``{name}`` by the value of the parameter ``name``, a list by its items; other braces are left alone."""
    word = lambda value: f"{value:g}" if isinstance(value, float) else str(value)  # noqa: E731
    for name, value in parameters.items():
        text = text.replace(f"{{{name}}}", ", ".join(map(word, value)) if isinstance(value, list) else word(value))
    return text


def main() -> None:
    """Execute the specification given as JSON in the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    execute(json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
