"""Chapters with parameters pushed to unusual but legal values: they run to the end, or stop with a sentence that says why."""

import ast
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml
from test_repo import CHAPTERS, ROOT

from ntklib import chapters, claims, runner

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")]

TABLE = yaml.safe_load((ROOT / "tests" / "unusual.yml").read_text(encoding="utf-8"))
SETS = [pytest.param(chapter, name, id=f"{chapter}: {name}") for chapter, sets in TABLE.items() for name in sets]


def shown(value):
    """What a notebook would show of a value: rendering it must work, too."""
    render = getattr(value, "_repr_markdown_", lambda: repr(value))
    assert value is None or render()


def execute(chapter, values):
    """Execute a chapter's cells in this process, with the smoke preset and these values on top; its names at the end."""
    names = {"__name__": "__main__", "display": shown}
    parameters = runner.make_task(chapter, "smoke", values).parameters
    for i, cell in enumerate(nbformat.read(chapters.notebook_path(chapter), 4).cells):
        if cell.cell_type != "code":
            continue
        place = f"cell {i} of {chapter}"
        body = ast.parse(cell.source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), place, "exec"), names)
        if last:
            shown(eval(compile(ast.Expression(last.value), place, "eval"), names))
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()  # a figure may fail only when it is drawn
        assert bool(plt.get_fignums()) == ("plt.show()" in cell.source), place
        plt.close("all")
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters)
    return names


@pytest.fixture(autouse=True)
def no_figure_stays():
    mpl.use("Agg")
    yield
    plt.close("all")


def test_every_chapter_has_unusual_parameters():
    assert sorted(TABLE) == sorted(CHAPTERS)


@pytest.mark.parametrize(("chapter", "name"), SETS)
def test_a_chapter_runs_to_its_end_or_says_why_not(chapter, name, tmp_path, monkeypatch):
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path))
    monkeypatch.setenv("NTKLIB_JOBS", "1")
    monkeypatch.chdir(chapters.notebooks_folder())
    values = dict(TABLE[chapter][name])
    sentence = values.pop("stops", None)
    if sentence:
        with pytest.raises(ValueError, match="^" + re.escape(sentence)):
            execute(chapter, values)
        return
    names = execute(chapter, values)
    if "verdicts" in names:
        expected = {i for i, claim in claims.load_claims().items() if claim.chapter == chapter}
        judgements = names["verdicts"].judgements
        assert {j.verdict for j in judgements.values()} <= {claims.OTHER_PRESET}
        assert set(judgements) <= expected
        assert (tmp_path / "results" / "custom" / f"{chapter}.json").is_file()
