"""Where a number comes from: code, versions, machine, time."""

import ast
import dis
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ntklib.paths import project_root

# what the numbers depend on; the rest of the package (plots, runner, ledger) may change without recomputing a run
NUMERIC = (
    "alignment.py",
    "averaging.py",
    "checks.py",
    "curvature.py",
    "data",
    "directions.py",
    "edge.py",
    "estimators.py",
    "filters.py",
    "fourier.py",
    "fixmatch_probe.py",
    "functional.py",
    "infinite.py",
    "input_noise.py",
    "kernel_file.py",
    "kernels",
    "large.py",
    "large_job.py",
    "lazy.py",
    "linear_curvature.py",
    "linear_networks.py",
    "linearized.py",
    "margin.py",
    "models",
    "operator.py",
    "perturbation.py",
    "period_doubling.py",
    "probes.py",
    "random.py",
    "scenarios.py",
    "similarity.py",
    "sketch.py",
    "spectra.py",
    "svm.py",
    "training",
    "two_layer.py",
)
PACKAGES = ("ntklib", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "mlxtend", "pandas")


@cache
def code_fingerprint(*, numeric_only: bool = True) -> str:
    """Hash of the package's syntax trees without docstrings: comments, docstrings and layout do not count."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not numeric_only or relative.parts[0] in NUMERIC:
            digest.update(f"{relative.as_posix()}\n{syntax(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def syntax(source: str) -> str:
    """Syntax tree of source text as text, without docstrings and positions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body.pop(0)
    return ast.dump(tree)


def caller_fingerprint(code: CodeType, namespace: dict[str, Any]) -> str:
    """Hash of a piece of measuring code and of what it names in a notebook or script.

    The code object, the functions it calls that live in ``__main__`` (recursively), and the plain values it refers to there. A
    chapter's cell that logs another quantity is thereby another run, while edited comments are not.
    """
    digest = hashlib.sha256()
    for part in _parts(code, namespace, set()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _parts(code: CodeType, namespace: dict[str, Any], seen: set[str]) -> Iterator[str]:
    yield code.co_code.hex()
    docstring = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant, namespace, seen)
        elif constant is not docstring:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
    yield from code.co_names
    loaded = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}  # attributes do not count
    for name in sorted(loaded - seen):
        seen.add(name)
        value = namespace.get(name)
        if isinstance(value, FunctionType) and value.__module__ == "__main__":
            yield from _parts(value.__code__, value.__globals__, seen)
        elif isinstance(value, bool | int | float | str | tuple | list):
            yield repr(value)


@cache
def git_state() -> dict[str, Any]:
    """Commit hash and whether files differ from it; None where git or the checkout is absent."""
    run = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=project_root(), capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    try:
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that make the numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_memory_mib() -> float | None:
    """Largest resident memory of this process so far, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def utc_now() -> str:
    """Time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads in use and, on CUDA, the accelerator's name."""
    import torch

    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


@cache
def cpu_name() -> str:
    """Name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
