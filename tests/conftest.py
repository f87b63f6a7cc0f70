"""Shape checks on the package's annotations, and the built book for the tests that read it."""

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
            "jacobian",
            "known",
            "loops",
            "operations",
            "plan",
            "streaming",
            "uses",
        )
    ),
    "lazy",
    "linear_curvature",
    "linear_networks",
    "linearized",
    "margin",
    "models",
    "operator",
    "perturbation",
    "period_doubling",
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


def pytest_collection_modifyitems(items):
    """Fast tests first, so that a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def built_book(tmp_path_factory):
    """The book, built from smoke runs in a folder of its own: the path of its first page's folder."""
    checkout = tmp_path_factory.mktemp("book") / "checkout"
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "_build", "executed", ".pytest_cache", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=skip)
    environment = os.environ | {"NTKLIB_RUNS": str(checkout / "runs"), "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "ntklib", "book", "--preset", "smoke"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "_build" / "html"
