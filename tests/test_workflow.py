"""The workflow for clusters, on this machine: chapters side by side, killed, and gone on with."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="the extra 'cluster' is not installed")


SHARED = {"quickstart": {"shares": 2}}


def snakemake(folder: Path, *arguments: str, chapter: dict = SHARED, **options) -> subprocess.Popen:
    """Start the workflow at smoke with its runs in ``folder``; two jobs share the runs of ``quickstart``."""
    more = folder / "config.yml"
    more.parent.mkdir(parents=True, exist_ok=True)
    more.write_text(yaml.safe_dump({"chapter": chapter}))
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow/Snakefile"), "--directory", str(folder),
        "--profile", str(ROOT / "workflow/profiles/local"), "--cores", "2", "--configfile", str(more),
    ]  # fmt: skip
    environment = os.environ | {"NTKLIB_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("preset=smok", "Unknown preset 'smok'. Did you mean 'smoke'?"),
        ("chapters=quickstrat", "Unknown chapter of the book 'quickstrat'. Did you mean 'quickstart'?"),
    ],
)
def test_a_wrong_setting_is_explained_before_any_job(setting, message, tmp_path):
    process = snakemake(tmp_path, "--config", setting, "-n")
    said, _ = process.communicate(timeout=60)
    assert process.returncode
    assert message in said


def test_shares_come_before_their_chapter_and_what_is_done_is_not_done_again(tmp_path):
    said, _ = snakemake(tmp_path, "-n", "--config", "preset=smoke", "chapters=quickstart,kernel_svm").communicate(timeout=60)
    assert [line.split() for line in said.splitlines() if line.startswith(("chapter ", "share ", "total "))][:3] == [
        ["chapter", "2"],
        ["share", "2"],
        ["total", "5"],
    ]


def test_a_job_of_several_processes_is_started_by_torchrun_and_asks_for_a_gpu_for_each(tmp_path):
    arguments = ("-n", "-p", "--resources", "gpu=8", "--config", "preset=smoke", "chapters=trace_evolution,kernel_svm")
    chapter = {"trace_evolution": {"processes": 8, "gpu": 1, "cores": 2}}
    said, _ = snakemake(tmp_path, *arguments, chapter=chapter).communicate(timeout=60)
    together = "-m torch.distributed.run --standalone --nproc-per-node 8 -m ntklib run trace_evolution --preset smoke"
    assert f"export NTKLIB_JOBS=2 && cd {ROOT} && {sys.executable} {together}" in said
    assert f"export NTKLIB_JOBS=1 && cd {ROOT} && {sys.executable} -m ntklib run kernel_svm --preset smoke" in said
    assert "gpu=8, slurm_extra=--gres=gpu:8" in said


def wait_for(found, process: subprocess.Popen, seconds: float = 120):
    """Wait until ``found()`` is true while the process lives."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_workflow_killed_with_all_its_jobs_goes_on_and_keeps_what_was_done(tmp_path):
    store = tmp_path / "runs" / "store"
    arguments = ("--config", "preset=smoke", "chapters=quickstart,two_layer_linear")
    process = snakemake(tmp_path, *arguments)
    wait_for(lambda: list(store.rglob("run.json")), process)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    names = {p.pid: " ".join(p.cmdline()) for p in family if p.is_running()}
    assert sum("ntklib.execute" in name for name in names.values()) == 2, "two jobs side by side"
    for p in reversed(family):  # the workflow first: it is not to see its jobs die
        if p.is_running():
            p.kill()
    process.communicate(timeout=30)
    early = {path: path.stat().st_mtime_ns for path in store.rglob("run.json") if '"complete"' in path.read_text()}

    again = snakemake(tmp_path, *arguments)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    for chapter in ("quickstart", "two_layer_linear"):
        notebook = nbformat.read(tmp_path / "runs" / "executed" / "smoke" / f"{chapter}.ipynb", as_version=4)
        assert notebook.metadata["ntklib"]["preset"] == "smoke"
    assert {path: path.stat().st_mtime_ns for path in early} == early
    assert len(list((tmp_path / "runs" / "shares" / "smoke").glob("quickstart.*-of-2.ipynb"))) == 2

    third = snakemake(tmp_path, *arguments)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert "Nothing to be done" in said


@pytest.mark.slow
def test_a_job_of_two_processes_leaves_a_chapter_and_its_runs_as_one_process_does(tmp_path):
    arguments, chapter = ("--config", "preset=smoke", "chapters=trace_evolution"), {"trace_evolution": {"processes": 2, "cores": 2}}
    said, _ = (process := snakemake(tmp_path, *arguments, chapter=chapter)).communicate(timeout=300)
    assert process.returncode == 0, said
    notebook = nbformat.read(tmp_path / "runs" / "executed" / "smoke" / "trace_evolution.ipynb", as_version=4)
    assert notebook.metadata["ntklib"]["preset"] == "smoke"
    assert (tmp_path / "runs" / "results" / "smoke" / "trace_evolution.json").exists()
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "store" / "trace_evolution").glob("*/run.json")]
    assert manifests
    assert all(m["status"] == "complete" and [s["processes"] for s in m["sessions"]] == [2] for m in manifests)
    assert "Nothing to be done" in snakemake(tmp_path, *arguments, chapter=chapter).communicate(timeout=60)[0]
