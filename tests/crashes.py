"""Runs that are interrupted on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest


class CrashError(Exception):
    """Stands for a crash between two writes."""


@contextmanager
def crash_at(write: int) -> Iterator[None]:
    """Within, the file written as number ``write`` (from 0) crashes before it gets its name; fails if there are fewer."""
    real, numbers = Path.replace, count()

    def replace(self, target):
        if next(numbers) == write:
            raise CrashError
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(CrashError):
            yield
