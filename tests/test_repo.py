"""The repository keeps its promises about environment, layout and notebooks."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from ntklib import chapters

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
TAGS = {"parameters", "hide-input", "hide-output", "remove-input", "remove-cell", "remove-output", "raises-exception"}
CHAPTERS = chapters.names()


def requirements(*extras):
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    return {r.name: r for r in (Requirement(text) for items in lists for text in items)}


def cells(chapter, kind="code"):
    notebook = nbformat.read(chapters.notebook_path(chapter), 4)
    return [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == kind]


def test_the_top_level_is_the_one_promised():
    for name in [
        "book",
        "notebooks",
        "ntklib",
        "tests",
        "_config.yml",
        "environment.yml",
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CHANGELOG.md",
    ]:
        assert (ROOT / name).exists(), name


def test_the_packages_of_the_project_card_are_dependencies():
    needed = {"jupyterlab", "jupyter-book", "papermill", "torch", "torchvision", "matplotlib", "seaborn"}
    assert needed <= requirements("book").keys()
    assert not requirements("book")["jupyter-book"].specifier.contains("2.0")
    assert not requirements()["torch"].specifier.contains("2.8")


def test_constraints_pin_every_direct_dependency_at_an_allowed_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    for name, requirement in requirements("book", "dev").items():
        assert requirement.specifier.contains(pins[re.sub(r"[-_.]+", "-", name).lower()]), name
    assert pins["torch"].split(".")[0] == "2"


def test_environment_yml_follows_pyproject():
    *names, pip = ENVIRONMENT["dependencies"]
    python = next(Requirement(n.replace("=", "==", 1)) for n in names if n.startswith("python"))
    version = Version(str(python.specifier).lstrip("="))
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(version)
    editable = next(line for line in pip["pip"] if line.startswith("-e"))
    extras = re.search(r"\[(.*)\]", editable).group(1).split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert "-c constraints.txt" in pip["pip"]
    assert "pip" in names


def test_importing_the_package_imports_no_torch():
    code = "import sys, ntklib; ntklib.__all__; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_has_one_home():
    import ntklib

    names = [name for home in ntklib._HOMES.values() for name in home]
    assert sorted(set(names)) == sorted(names)


def test_every_public_name_exists_and_has_a_docstring():
    import ntklib

    for name in ntklib.__all__:
        assert getattr(ntklib, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'empirical_nkt'"):
        _ = ntklib.empirical_nkt


def test_imports_point_one_way():
    forbidden = {
        "training": ("kernels", "estimators", "similarity", "linearized", "plots", "runs"),
        "models": ("kernels", "estimators", "training", "plots", "runs"),
        "data": ("kernels", "estimators", "training", "models", "plots", "runs"),
        "kernels": ("estimators", "training", "models", "data", "plots", "runs"),
        "plots": ("kernels", "estimators", "training", "models", "data", "runs", "functional"),
    }
    for room, others in forbidden.items():
        folder = ROOT / "ntklib" / room
        files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
                assert not module.startswith(tuple(f"ntklib.{o}" for o in others)), f"{path.name} imports {module}"


def test_the_path_that_the_readme_recommends_is_under_300_lines():
    section = (ROOT / "README.md").read_text().split("## The whole idea in 300 lines")[1].split("Then [")[0]
    files = re.findall(r"\]\((ntklib/\S+\.py)\)", section)
    assert len(files) == 3
    assert sum(len((ROOT / f).read_text().splitlines()) for f in files) < 300


def test_modules_stay_small():
    for path in (ROOT / "ntklib").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_pickle_is_loaded():
    for path in (ROOT / "ntklib").rglob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"pickle\.load|torch\.load\((?!.*weights_only=True)|joblib\.load|np\.load\(.*allow_pickle=True", text
        ), path


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_notebook_is_a_clean_source(chapter):
    notebook = nbformat.read(chapters.notebook_path(chapter), 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for i, cell in cells(chapter):
        assert not cell.outputs, f"cell {i} of {chapter} carries outputs: clear them (Edit > Clear Outputs of All Cells)"
        assert cell.execution_count is None, f"cell {i} of {chapter} carries an execution count"
    for i, cell in cells(chapter) + cells(chapter, "markdown"):
        assert set(cell.metadata.get("tags", [])) <= TAGS, f"cell {i} of {chapter}"
    headings = [line for _, c in cells(chapter, "markdown") for line in c.source.splitlines() if line.startswith("# ")]
    assert len(headings) == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_notebook_reads_well(chapter):
    words = sum(len(c.source.split()) for _, c in cells(chapter, "markdown"))
    assert words >= 40 * len(cells(chapter))
    for i, cell in cells(chapter):
        lines = cell.source.splitlines()
        assert max(map(len, lines)) <= 79, f"cell {i} of {chapter}"
        assert len(lines) <= 40, f"cell {i} of {chapter}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_figure_has_a_caption_and_alternative_text(chapter):
    names = []
    for i, cell in cells(chapter):
        if "plt.show()" in cell.source or "playground.show(" in cell.source:
            mystnb = cell.metadata.get("mystnb", {})
            assert mystnb.get("image", {}).get("alt"), f"cell {i} of {chapter} has no alternative text"
            assert len(mystnb["figure"]["caption"]) > 60, f"cell {i} of {chapter} has no caption"
            names.append(mystnb["figure"]["name"])
    assert len(names) == len(set(names))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_cell_defaults_equal_the_default_preset_and_are_commented(chapter):
    defaults = chapters.default_parameters(chapter)
    assert chapters.preset_parameters(chapter, "default") == defaults
    (cell,) = (c for _, c in cells(chapter) if "parameters" in c.metadata.get("tags", []))
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = .+  # .+", line), line


@pytest.mark.parametrize("preset", chapters.PRESETS)
def test_presets_name_real_chapters_and_parameters_of_the_right_type(preset):
    content = yaml.safe_load((ROOT / "notebooks" / "presets" / f"{preset}.yml").read_text())
    assert set(content) == set(CHAPTERS)
    for chapter, values in content.items():
        chapters.check_parameters(chapter, values)


def test_no_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yml", ".toml", ".ipynb", ".txt", ".cff", ".bib"} and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(home|Users|root)/\w|file:///", text), name
