"""Where things are: the project's folder and the folder of runs."""

import os
from pathlib import Path


def project_root() -> Path:
    """Folder of the checkout, which holds ``pyproject.toml``; the working folder when the package is installed without one."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def runs_root() -> Path:
    """Folder of cached runs, executed chapters and logs: ``NTKLIB_RUNS``, by default ``runs`` in the project's folder."""
    return Path(os.environ.get("NTKLIB_RUNS") or project_root() / "runs").expanduser().resolve()
