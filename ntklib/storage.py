"""Files that are either whole or not there: atomic writes, checksums, and quarantine for what is damaged."""

import hashlib
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any


class DamagedFileWarning(UserWarning):
    """A stored file was truncated or altered; it was set aside and its content will be computed again."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, even after a crash, either the old or the whole new content is there.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        OSError: With the path and the free space when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        Path(name).chmod(0o644)  # temporary files are private; results are not
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        remedy = "Free space there, or set NTKLIB_RUNS to another folder."
        msg = f"Could not write {path} ({len(content)} bytes): {error.strerror}. {remedy}"
        raise OSError(error.errno, msg) from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a checksum of itself under ``sha256``."""
    body = {k: v for k, v in value.items() if k != "sha256"}
    write_atomic(path, json.dumps({**body, "sha256": sha256(canonical(body))}, indent=1, default=str).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read what ``write_json`` wrote; a missing file is None, a damaged one is set aside with a warning and is None."""
    try:
        value = json.loads(path.read_bytes())
        checksum = value.pop("sha256")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError):
        return set_aside(path)
    return value if checksum == sha256(canonical(value)) else set_aside(path)


def read_checked(path: Path, checksum: str) -> bytes | None:
    """Read a file whose checksum is known; missing or damaged gives None, with a warning."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        warnings.warn(f"{path} is missing; what it held will be computed again.", DamagedFileWarning, stacklevel=3)
        return None
    return content if sha256(content) == checksum else set_aside(path)


def set_aside(path: Path) -> None:
    """Rename a damaged file so that it can be looked at, and say so."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.rename(aside)
    warnings.warn(f"{path} is damaged; set aside as {aside.name}, to be computed again.", DamagedFileWarning, stacklevel=3)
