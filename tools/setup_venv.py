"""Make or update the project's virtual environment, with the standard library only.

    python3 tools/setup_venv.py .venv [extra ...]

Installs this package with the extras, at the versions of constraints.txt, unless that was done already. Says what it does and
why it cannot: an old Python, a full disk, no network. Plain syntax, so that old interpreters reach the first check.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "Python 3.11 or newer is required. Got Python %d.%d (%s). Install a newer one and name it: make PYTHON=python3.12 ..."
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import hashlib
import os
import shutil
import subprocess
import threading
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_GIB = 12  # installed 6.5, while pip unpacks about as much again
STAMP = ".installed"


def fingerprint(extras):
    """Hash of all that decides what is installed."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [repr(sorted(extras)).encode(), sys.version.encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def python_of(folder):
    """Interpreter inside a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check_disk(folder):
    """Stop early when the environment cannot fit."""
    free = shutil.disk_usage(folder.parent).free / 2**30
    if free < NEEDED_GIB:
        sys.exit(
            f"Setting up {folder.name} needs about {NEEDED_GIB} GiB of free disk. Got {free:.1f} GiB in {folder.parent}. "
            "Free some space, or put the environment elsewhere: make VENV=/path/to/venv ..."
        )


def install(folder, extras):
    """Run pip, showing one line per package; explain a failure."""
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command = [str(python_of(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off",
               "--constraint", str(ROOT / "constraints.txt"), "--editable", target]  # fmt: skip
    log = folder / "install.log"
    started, count, lines = time.monotonic(), 0, []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if line.startswith("Collecting "):
                count += 1
                show(f"  {count:3} packages found, at {line.split()[1]} ({time.monotonic() - started:.0f} s)")
            elif line.startswith("Installing collected"):
                show(f"  {count:3} packages downloaded, unpacking them ({time.monotonic() - started:.0f} s)", last=True)
                threading.Thread(target=heartbeat, args=(process, started), daemon=True).start()
    if process.wait():
        sys.exit(explain("".join(lines), log))
    print(f"  installed in {time.monotonic() - started:.0f} s", flush=True)


def heartbeat(process, started, every=20):
    """Tell every 20 s that pip is still at it: it says nothing while it unpacks several gigabytes."""
    while True:
        time.sleep(every)
        if process.poll() is not None:
            return
        print(f"      still unpacking ({time.monotonic() - started:.0f} s)", flush=True)


def show(text, last=False, width=100):
    """Progress: one line that is overwritten on a terminal, and every tenth one elsewhere."""
    if sys.stdout.isatty():
        print("\r" + text[:width].ljust(width), end="\n" if last else "", flush=True)
    elif last or text.split()[0].endswith("0"):
        print(text, flush=True)


def explain(output, log):
    """What went wrong, in words."""
    tail = "".join(line for line in output.splitlines(keepends=True)[-4:])
    if "No space left on device" in output:
        cause = "The disk is full. Free some space, or put the environment elsewhere: make VENV=/path/to/venv ..."
    elif any(sign in output for sign in ("NewConnectionError", "Temporary failure in name resolution", "ConnectTimeoutError",
                                         "ProxyError", "Network is unreachable", "Connection refused")):  # fmt: skip
        cause = "The package index could not be reached. Connect to the network (or set pip's index), then run the command again."
    else:
        cause = "pip could not install the packages."
    return f"{cause}\nThe last lines were:\n{tail}Log: {log}"


def main():
    """Bring the environment up to date."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, extras = Path(sys.argv[1]).absolute(), sys.argv[2:]
    stamp = folder / STAMP
    wanted = fingerprint(extras)
    if stamp.exists() and stamp.read_text() == wanted and python_of(folder).exists():
        return
    check_disk(folder)
    if not python_of(folder).exists():
        print(f"making the virtual environment {folder.name} with Python {sys.version.split()[0]}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
    print(
        f"installing ntklib[{','.join(extras)}] (about 3 GB to download the first time, see {folder.name}/install.log)", flush=True
    )
    stamp.unlink(missing_ok=True)
    install(folder, extras)
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
