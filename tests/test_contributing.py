"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the project, give what they promise."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("A chapter", "A claim", "A model", "A probe")

pytestmark = pytest.mark.slow


def recipe(title):
    """Code blocks of a section, as pairs of language and text."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def pieces(text):
    """Parts of a block: file, the text below which to insert (empty: at the end), and what to write."""
    heads = re.split(r"^# ([\w./]+\.\w+)(?:, below (.+))?\n", text, flags=re.MULTILINE)
    assert not heads[0], f"a block begins with the name of a file: {heads[0]}"
    return list(zip(heads[1::3], heads[2::3], heads[3::3], strict=True))


def write(path, below, content):
    """Put the content where a contributor would."""
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, 4)
        notebook.cells.insert(-1, nbformat.v4.new_code_cell(content.rstrip("\n"), id="toy-verdict"))
        nbformat.write(notebook, path)
    elif below:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if below in line]
        assert len(found) == 1, f"{below} must be in one line of {path}. Got {found}"
        path.write_text("".join([*lines[: found[0] + 1], content, *lines[found[0] + 1 :]]), encoding="utf-8")
    else:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(before + ("\n\n" if before and path.suffix == ".py" else "") + content, encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with all recipes followed."""
    folder = tmp_path_factory.mktemp("contributing") / "checkout"
    skip = shutil.ignore_patterns(".*", "runs", "_build", "executed", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip)
    for title in RECIPES:
        for language, text in recipe(title):
            if language == "sh":
                subprocess.run(text, shell=True, cwd=folder, check=True)
            else:
                for name, below, content in pieces(text):
                    write(folder / name, below, content)
    return folder


def python(folder, *words):
    environment = os.environ | {"NTKLIB_RUNS": str(folder / "runs"), "NTKLIB_JOBS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("title", RECIPES)
def test_each_recipe_has_fewer_than_ten_lines_of_prose_and_of_each_kind_of_code_block(title):
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    prose = [line for line in re.sub(r"```.*?```", "", section, flags=re.DOTALL).splitlines() if line]
    assert 0 < len(prose) < 10
    for _, text in recipe(title):
        assert sum(not line.startswith("# ") for line in text.splitlines()) <= 10


def test_the_toy_chapter_runs_and_its_claim_has_a_verdict(checkout):
    done = python(checkout, "ntklib", "run", "toy", "--preset", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = python(checkout, "ntklib", "claims", "--json")
    (entry,) = (e for e in json.loads(listed.stdout) if e["id"] == "N900")
    assert (entry["chapter"], entry["verdict"], entry["seeds"]) == ("toy", "holds", 2)
    assert 0 < entry["value"] < 1
    assert len(entry["run"]) == 2


def test_what_was_added_meets_the_rules_for_chapters_models_and_names(checkout):
    chosen = "toy or presets or home or docstring or claim or linear or growth"
    files = [f"tests/test_{name}.py" for name in ("repo", "claims", "models", "similarity")]
    done = python(checkout, "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout
    assert python(checkout, "ruff", "format", ".").returncode == 0  # as the blocks leave out empty lines
    lint = python(checkout, "ruff", "check", ".")
    assert lint.returncode == 0, lint.stdout


def test_the_toys_are_found_by_their_names(checkout):
    code = (
        "import ntklib, torch; from ntklib import book, models; "
        "assert 'toy' in book.contents(), book.contents(); "
        "net = models.build('linear', input_shape=(1, 2, 2), num_classes=3, width=1); "
        "k = ntklib.empirical_ntk(net, torch.eye(4).reshape(4, 1, 2, 2)); "
        "print(ntklib.kernel_growth(k, 2 * k))"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "2.0\n", done.stderr
