"""What ``torchrun`` tells a process about the job it belongs to; without it, a process is alone. Nothing here imports torch."""

import os


def size() -> int:
    """Number of processes of the job; 1 for a process that ``torchrun`` has not started."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Number of this process in the job, from 0; process 0 measures and writes."""
    return _number("RANK", 0)


def local_size() -> int:
    """Number of processes of the job on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those on this machine, from 0; also of the GPU it uses."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, alone: int) -> int:
    """A variable of ``torchrun``; other launchers set some of the same names, and do not count."""
    return int(os.environ.get(name, alone)) if "TORCHELASTIC_RUN_ID" in os.environ else alone
