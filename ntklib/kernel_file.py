"""A kernel on disk, written block by block: whole or marked as unfinished, and continued by the call that finds it so."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ntklib import storage

FORMAT = 1
SUFFIX = ".npy"
PARTS = {
    "parameters": "other parameters or buffers", "model": "another model", "x1": "other inputs x1", "x2": "other inputs x2",
    "reduce": "another reduction", "params": "other params=", "output": "another output=", "tf32": "another tf32=",
    "shape": "another shape", "dtype": "another dtype", "format": "another format",
}  # fmt: skip


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers."""
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        found.update(memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore
    return found.hexdigest()


class KernelFile:
    """A matrix in a ``.npy`` file (or, without a path, in memory) with a record of what it is and which of it is finished.

    While the work lasts the matrix is in ``PATH.partial``; ``PATH`` exists only when it is whole. ``PATH.json`` holds the identity
    (checksums of parameters and inputs, options), the chunks, and the finished blocks: those that were on the disk when the record
    was written, at most ``save_every`` seconds ago.

    Attributes:
        array: The matrix.
        finished: Whether nothing is left to compute.
        notes: What the caller keeps beside it: chunks, the error that was measured.

    Args:
        path: Where the matrix goes; None for memory.
        shape: Shape of the matrix.
        dtype: Its dtype.
        identity: What distinguishes this kernel from others.
        save_every: Seconds between records.

    Raises:
        ValueError: If the path does not end in ``.npy``, holds something else, or another process is at work on it.
        OSError: If the disk has too little room.
    """

    def __init__(
        self, path: Path | None, shape: tuple[int, int], dtype: np.dtype, identity: dict[str, Any], save_every: float = 10.0
    ) -> None:
        if path is not None and path.suffix != SUFFIX:
            msg = f"path must end in {SUFFIX}. Got {path}."
            raise ValueError(msg)
        self.path, self.shape, self.dtype, self.save_every = path, shape, dtype, save_every
        self.identity = {"format": FORMAT, "shape": list(shape), "dtype": str(dtype), **identity}
        self.notes: dict[str, Any] = {}
        self.finished = False
        self._blocks: list[list[int]] = []  # rows from, to, columns from, to
        self._guard = threading.Lock()
        self._saved = time.monotonic()
        self._lock = None if path is None else FileLock(self._beside(".lock"))

    def __enter__(self) -> "KernelFile":
        if self.path is None or self._lock is None:
            self.array = np.empty(self.shape, self.dtype)
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0.5)
        except Timeout as error:
            msg = f"One process at a time may write {self.path}. Got another one at work on it."
            raise ValueError(msg) from error
        try:
            self._open(self.path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            try:
                if not self.finished:
                    self.save()
            finally:
                self._lock.release()

    def _beside(self, ending: str) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ending)

    def _open(self, path: Path) -> None:
        record, partial = storage.read_json(self._beside(".json")), self._beside(".partial")
        if record is not None:
            self._check(record["identity"])
        if record is None and path.exists():
            msg = f"path must be free, or hold a kernel with its record {path.name}.json. Got a file {path} without one."
            raise ValueError(msg)
        stored = partial if partial.exists() else path
        if record is None or not stored.exists():
            reserve(partial, self.shape, self.dtype)
            self.array = np.lib.format.open_memmap(partial, mode="r+")
            return
        self.notes, self._blocks = record["notes"], record["blocks"]
        self.finished = stored == path
        self.array = np.lib.format.open_memmap(stored, mode="r" if self.finished else "r+")

    def _check(self, stored: dict[str, Any]) -> None:
        other = [PARTS[key] for key, value in self.identity.items() if stored.get(key) != value]
        if other:
            got = ", ".join(other)
            msg = f"{self.path} must hold the kernel that is asked for. Got one of {got}: give another path or delete it."
            raise ValueError(msg)

    def missing(self, rows: slice, columns: slice) -> list[slice]:
        """Parts of ``columns`` that are not finished for all of ``rows``."""
        done = sorted([c, d] for a, b, c, d in self._blocks if a <= rows.start and rows.stop <= b)
        found, start = [], columns.start
        for c, d in done:
            if c > start:
                found.append(slice(start, min(c, columns.stop)))
            start = max(start, d)
            if start >= columns.stop:
                break
        if start < columns.stop:
            found.append(slice(start, columns.stop))
        return [part for part in found if part.start < part.stop]

    def write(self, block: np.ndarray, rows: slice, columns: slice, *, symmetric: bool) -> None:
        """Put a block where it belongs; of a symmetric matrix also its mirror image, and rows and columns that coincide agree."""
        met = slice(rows.start, rows.start + len(block))
        if symmetric:
            overlap = slice(max(met.start, columns.start), min(met.stop, columns.stop))
            if overlap.start < overlap.stop:
                i = slice(overlap.start - met.start, overlap.stop - met.start)
                j = slice(overlap.start - columns.start, overlap.stop - columns.start)
                block = block.copy()
                block[i, j] = np.triu(block[i, j]) + np.triu(block[i, j], 1).T
            self.array[columns, met] = block.T
        self.array[met, columns] = block
        with self._guard:
            self._blocks.append([rows.start, rows.stop, columns.start, columns.stop])
            if time.monotonic() - self._saved >= self.save_every:
                self._save()

    def save(self) -> None:
        """Write the record: what is finished is on the disk."""
        with self._guard:
            self._save()

    def _save(self) -> None:
        if self.path is None:
            return
        if isinstance(self.array, np.memmap) and not self.finished:
            self.array.flush()
        record = {"identity": self.identity, "notes": self.notes, "blocks": merged(self._blocks), "finished": self.finished}
        storage.write_json(self._beside(".json"), record)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give the matrix its name."""
        self.save()
        if self.path is not None:
            self._beside(".partial").replace(self.path)
            self.array = np.lib.format.open_memmap(self.path, mode="r")
        self.finished = True
        self.save()


def merged(blocks: list[list[int]]) -> list[list[int]]:
    """The same blocks, those that continue each other along the columns as one."""
    found: list[list[int]] = []
    for a, b, c, d in sorted(blocks):
        if found and found[-1][:2] == [a, b] and c <= found[-1][3]:
            found[-1][3] = max(found[-1][3], d)
        else:
            found.append([a, b, c, d])
    return found


def reserve(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Make a ``.npy`` file of zeros that has its room on the disk: a full disk is an error here and not a crash later.

    Raises:
        OSError: If the disk has too little room.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    del array
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            path.unlink()
            msg = f"The disk must have room for {path}, {size:,} bytes. Got a full disk: give another path, or free space."
            raise OSError(errno.ENOSPC, msg) from error  # elsewhere the file system cannot reserve; it may still have the room
