"""What to do about a run that another process is computing."""

import os

BUSY = "NTKLIB_BUSY"  # environment variable: "wait" for its result, or "skip" it for now


class RunBusyError(RuntimeError):
    """Another process is computing this run, and the caller wants to do something else meanwhile."""


def skip_busy() -> bool:
    """Whether a run that another process holds raises ``RunBusyError`` in place of a wait."""
    return os.environ.get(BUSY) == "skip"
