"""Shape checks on the package's annotations, and the built book for the tests that read it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("NTKLIB_OFFLINE", "1")  # no test downloads
torch.set_num_threads(1)  # tiny nets: threads that wait for each other cost far more than they give

# annotations like Float[Tensor, "n c"] are checked at every call, in tests only; kernels.capture, run at every operation, has none
NUMERIC = (
    "alignment",
    "averaging",
    "checks",
    "cone",
    "curvature",
    "data",
    "directions",
    "edge",
    "estimators",
    "filters",
    "fourier",
    "fixmatch_probe",
    "functional",
    "infinite",
    "input_noise",
    *(
        f"kernels.{part}"
        for part in (
            "blocks",
            "contract",
            "empirical",
            "evaluate",
            "held",
            "jacobian",
            "known",
            "loops",
            "operations",
            "plan",
            "shapes",
            "streaming",
            "uses",
        )
    ),
    "kernel_file",
    "large",
    "large_job",
    "lazy",
    "linear_curvature",
    "linear_networks",
    "linearized",
    "margin",
    "models",
    "operator",
    "perturbation",
    "period_doubling",
    "playground",
    "probes",
    "scenarios",
    "similarity",
    "sketch",
    "spectra",
    "svm",
    "training",
    "two_layer",
)
_hook = install_import_hook([f"ntklib.{name}" for name in NUMERIC], "beartype.beartype")


BOOK = "built book"  # the tests that read it run in one process


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Fast tests first, so that a mistake shows early, and a share of the tests for each process where there are several.

    A process keeps a file's fast tests together, for what they share. The book with all that reads it is the largest share and
    begins at once; slow tests come last, one by one, so that all processes end at about the same time.
    """
    for item in items:
        if "built_book" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group(BOOK))
        elif not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    several = hasattr(config, "workerinput")
    begin = {item: several and "built_book" in item.fixturenames for item in items}
    items.sort(key=lambda item: (not begin[item], item.get_closest_marker("slow") is not None))


@pytest.fixture(scope="session")
def built_book(tmp_path_factory):
    """The book, built from smoke runs in a folder of its own: the path of its first page's folder."""
    checkout = tmp_path_factory.mktemp("book") / "checkout"
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "_build", "executed", ".pytest_cache", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=skip)
    copy_smoke_runs(checkout / "runs")
    environment = os.environ | {"NTKLIB_RUNS": str(checkout / "runs"), "NTKLIB_JOBS": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "ntklib", "book", "--preset", "smoke"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "_build" / "html"


def copy_smoke_runs(target):
    """Copy the chapters that are up to date at smoke, with the runs they judge: what ``make book PRESET=smoke`` has computed."""
    from ntklib import book, paths, runner

    source = paths.runs_root()
    for chapter in book.contents():
        task = runner.make_task(chapter, "smoke")
        record = source / "results" / "smoke" / f"{chapter}.json"
        if not task.up_to_date():
            continue
        kept = [task.output]
        if record.is_file():
            runs = json.loads(record.read_text(encoding="utf-8"))["runs"]
            kept += [record, *(p for key in runs for p in (source / "store" / chapter / key).glob("*"))]
        for path in kept:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


@pytest.fixture
def calls_of(monkeypatch):
    """Replace a function of a module by itself, with its calls noted in the list that this returns."""

    def noted(module, name):
        calls, function = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(args) or function(*args))
        return calls

    return noted
