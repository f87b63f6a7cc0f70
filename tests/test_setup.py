"""Setting up the environment says what it does and why it cannot."""

import importlib.util
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "setup_venv.py"
Usage = namedtuple("Usage", "total used free")


def load_script():
    spec = importlib.util.spec_from_file_location("setup_venv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The script as a module, with a stand-in for pip that records its calls."""
    module = load_script()
    module.calls = []
    monkeypatch.setattr(module, "install", lambda _, extras: module.calls.append(extras))
    monkeypatch.setattr(module.venv, "create", lambda folder, **_: Path(folder).joinpath("bin").mkdir(parents=True))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(0, 0, 100 * 2**30))
    monkeypatch.setattr(sys, "argv", ["setup_venv.py", str(tmp_path / "venv"), "book", "dev"])
    return module


def test_an_old_python_is_told_so_before_anything_else():
    code = f"import sys; sys.version_info = (3, 8, 10, 'final', 0); exec(open({str(SCRIPT)!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer is required. Got Python 3.8" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_a_disk_that_is_too_small_is_told_with_numbers(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: Usage(0, 0, 3 * 2**30))
    with pytest.raises(SystemExit, match=r"needs about \d+ GiB of free disk. Got 3.0 GiB in .*make VENV="):
        setup.main()
    assert setup.calls == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "The disk is full"),
        ("WARNING: Retrying ... NewConnectionError ... Temporary failure in name resolution", "could not be reached. Connect"),
        ("ERROR: ResolutionImpossible", "pip could not install the packages"),
    ],
)
def test_a_failure_of_pip_is_explained_with_its_last_lines(setup, output, message):
    said = setup.explain(f"Collecting x\n{output}\n", "install.log")
    assert message in said
    assert output in said
    assert "Log: install.log" in said


def test_the_environment_is_installed_once_and_again_only_when_its_inputs_change(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "python_of", lambda _: Path(sys.executable))
    (tmp_path / "venv").mkdir()
    setup.main()
    setup.main()
    assert setup.calls == [["book", "dev"]]
    root = tmp_path / "project"
    root.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    monkeypatch.setattr(setup, "ROOT", root)
    setup.main()
    (root / "constraints.txt").write_text("x==1\n")
    setup.main()
    assert len(setup.calls) == 3


def test_without_a_network_pip_fails_with_a_clear_message(tmp_path, monkeypatch):
    """The real pip of this interpreter, against an address where nothing listens."""
    module = load_script()
    monkeypatch.setattr(module, "python_of", lambda _: Path(sys.executable))
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["nothing-is-called-this"]\n[project]\nname = "x"\nversion = "1"\n'
    )
    (project / "constraints.txt").write_text("")
    monkeypatch.setattr(module, "ROOT", project)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    (tmp_path / "venv").mkdir()
    with pytest.raises(SystemExit, match="The package index could not be reached. Connect to the network"):
        module.install(tmp_path / "venv", [])


def test_every_target_of_the_makefile_makes_the_environment_first():
    listed = subprocess.run(["make", "-n", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("book", "test", "check", "lab", "bench"):
        assert f"make {target}" in listed
        commands = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert commands.index("setup_venv.py") < commands.index("bin/python")
    assert "make clean" in listed
