"""The environment of neural-tangents: an old JAX that nothing else should have to live with."""

import subprocess
import sys

from benchmarks.workloads import NT_FOLDER, nt_python

PINS = ("jax==0.4.23", "jaxlib==0.4.23", "numpy==1.26.4", "scipy==1.12.0", "ml_dtypes<0.6", "frozendict")
PACKAGE = "neural-tangents==0.6.5"  # without its dependencies: it asks for TensorFlow's bridge, which the worker replaces by a stub


def install_neural_tangents(python: str = sys.executable) -> None:
    """Make ``.venv-nt`` and install neural-tangents with the JAX that it was written for.

    Raises:
        subprocess.CalledProcessError: If the interpreter or a package is not available.
    """
    subprocess.run([python, "-m", "venv", "--clear", str(NT_FOLDER)], check=True)
    (NT_FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
    pip = [str(nt_python()), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, *PINS], check=True)
    subprocess.run([*pip, "--no-deps", PACKAGE], check=True)
    subprocess.run([str(nt_python()), "-c", "import jax, numpy, frozendict; jax.numpy.ones(1)"], check=True)
