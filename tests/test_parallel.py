"""Several processes that train together take the steps of one; started by torchrun, on the CPU, through gloo."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from parallel_run import CASES, images, network, train
from torch import nn

from ntklib import runner, settings, torchrun
from ntklib.__main__ import main
from ntklib.chapters import _machine
from ntklib.data import load
from ntklib.data.augment import AUGMENTATIONS, augment_by_name
from ntklib.training import parallel
from ntklib.training.batches import BatchOrder, batches, epoch_batches
from ntklib.training.parallel import ALONE, JointBatchNorm, Processes, joint_twin, processes

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("parallel_run.py")
LAWS = {"rtol": 1e-10, "atol": 1e-10}  # the same float64 sums in another order, amplified by a few steps of training


def job_test(test):
    """Mark a test that starts torchrun: slow, and in one process of a parallel test run with the others, for what they share."""
    installed = importlib.util.find_spec("accelerate") is not None
    for mark in (
        pytest.mark.skipif(not installed, reason="the extra 'cluster' is not installed"), pytest.mark.slow,
        pytest.mark.xdist_group("several processes"),
    ):  # fmt: skip
        test = mark(test)
    return test


def start(folder: Path, *arguments: str, count: int = 2, program: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.Popen:
    """Start ``count`` processes of a program, through torchrun if they are several."""
    torchrun_ = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)) if count > 1 else ()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NTKLIB_RUNS": str(folder)}
    return subprocess.Popen(
        [sys.executable, *torchrun_, *program, *arguments], env=environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said
    return said


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    """All cases in two processes: what each of them found."""
    folder = tmp_path_factory.mktemp("laws")
    finish(start(folder, str(folder), "laws"))
    return [torch.load(folder / f"process-{rank}.pt") for rank in range(2)]


@job_test
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(laws, case):
    alone = train(case)
    for together in laws:
        ours, theirs = alone["states"], together[case]["states"]
        assert [(step, diverged) for step, _, diverged in ours] == [(step, diverged) for step, _, diverged in theirs]
        losses = [torch.tensor([loss for _, loss, _ in states]) for states in (ours, theirs)]
        torch.testing.assert_close(*losses, **LAWS, equal_nan=True)
        if case != "wild":
            torch.testing.assert_close(together[case]["tensors"], alone["tensors"], **LAWS)
    assert len(alone["states"]) == (7 if case != "wild" else 3)


@job_test
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_take_the_steps_of_one(tmp_path):
    finish(start(tmp_path, str(tmp_path), "laws", "cuda"))
    for rank in range(2):
        together = torch.load(tmp_path / f"process-{rank}.pt")
        for case in set(CASES) - {"wild"}:
            torch.testing.assert_close(together[case]["tensors"], train(case, device="cuda")["tensors"], rtol=1e-8, atol=1e-8)


@job_test
@pytest.mark.parametrize("case", CASES)
def test_processes_stay_equal_to_the_last_bit(laws, case):
    first, second = (found[case]["tensors"] for found in laws)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Runs of a job in one store: the folder, and what each of two processes saw."""
    folder = tmp_path_factory.mktemp("store")
    finish(start(folder, str(folder), "store"))
    return folder, [torch.load(folder / f"process-{rank}.pt", weights_only=False) for rank in range(2)]


@job_test
def test_a_run_of_two_processes_is_in_the_store_once_under_the_key_and_with_the_history_of_one(store, tmp_path):
    folder, (first, _) = store
    said = finish(start(tmp_path, str(tmp_path), "stored", "0", count=1))
    assert said.splitlines()[-1] == f"complete {first['key']} {first['steps']}"
    assert [p.name for p in (folder / "store" / "parallel").iterdir()] == [first["key"]]
    assert sorted(p.suffix for p in (folder / "store" / "parallel" / first["key"]).glob("*-*")) == [".parquet", ".safetensors"]
    alone = pd.read_parquet(next(tmp_path.rglob("history-*.parquet")))
    pd.testing.assert_frame_equal(alone, first["histories"][0], rtol=1e-10)
    assert [s["processes"] for s in first["sessions"]] == [2]
    assert _machine(first["sessions"][0]).endswith(" with 2 processes of 1 thread per run")


@job_test
def test_process_0_alone_measures_and_the_others_see_its_result(store):
    _, (first, second) = store
    assert first["steps"] == [0, 3, 6, 9, 12, 15, 18]
    assert second["steps"] == first["none"] == second["none"] == []
    assert first["key"] == second["key"]
    assert first["status"] == second["status"] == ["complete", "complete", "running", "complete", "complete"]
    for ours, theirs in zip(first["histories"], second["histories"], strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert first["histories"][2]["step"].tolist() == [0, 3], "left early, by both"
    assert set(first["histories"][3]["value"]) == {0.0}, "measured by process 0"
    assert set(first["histories"][4].query("quantity == 'rank'")["value"]) == {0.0}


@job_test
def test_no_process_waits_for_a_run_of_another_job_where_process_0_does_not(store):
    _, (first, second) = store
    assert first["busy"] == second["busy"]
    assert "another process is computing this run" in first["busy"]


@job_test
def test_a_killed_job_is_resumed_by_any_number_of_processes(store, tmp_path):
    whole, (first, _) = store
    process = start(tmp_path / "killed", str(tmp_path / "killed"), "stored", "0.3")
    while process.stdout.readline() != "step 6\n":
        assert process.poll() is None
    for p in family(process):
        p.kill()
    process.communicate()
    histories = [pd.read_parquet(next((whole / "store" / "parallel").rglob("history-*.parquet")))]
    for count in (1, 2):
        again = tmp_path / f"again-{count}"
        shutil.copytree(tmp_path / "killed" / "store", again / "store")
        said = finish(start(again, str(again), "stored", "0", count=count))
        assert "step 0\n" not in said
        assert f"complete {first['key']}" in said
        histories.append(pd.read_parquet(next(again.rglob("history-*.parquet"))))
    pd.testing.assert_frame_equal(histories[0], histories[1], rtol=1e-10)
    pd.testing.assert_frame_equal(histories[0], histories[2], check_exact=True)


@job_test
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_process_that_ends_badly_ends_the_job(how, tmp_path):
    process = start(tmp_path, str(tmp_path), how)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert ("ArithmeticError: no luck" if how == "raises" else "Signal 9 (SIGKILL)") in said


@job_test
def test_what_cannot_be_trained_together_is_refused(laws):
    for found in laws:
        said = found["refusals"]
        assert "Every batch needs an example for each process. Got a batch of 1 for 2 processes" in said["batch"]
        assert "Networks with dropout train in one process" in said["dropout"]


@job_test
def test_a_chapter_whose_kernel_dies_in_one_process_ends_the_job_and_leaves_no_process_behind(tmp_path):
    chapter = ("-m", "ntklib", "run", "trace_evolution", "--preset", "smoke")
    process = start(tmp_path, program=chapter)
    kernels, seen = [], set()
    while len(kernels) < 2 or not list((tmp_path / "store").rglob("run.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
        for p in family(process):
            seen.add(p)
            if p not in kernels and "ipykernel_launcher" in " ".join(command(p)):
                kernels.append(p)
    kernels[-1].kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "DeadKernelError" in said
    _, alive = psutil.wait_procs(list(seen), timeout=10)
    assert not alive


@pytest.mark.slow
def test_a_chapter_that_is_told_to_end_ends_with_its_kernel(tmp_path):
    process = start(tmp_path, count=1, program=("-m", "ntklib", "run", "quickstart", "--preset", "smoke", "-p", "steps", "1000000"))
    while not any("ipykernel_launcher" in " ".join(command(p)) for p in family(process)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    seen = family(process)
    process.terminate()  # what torchrun does to the others when one process has failed
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(seen, timeout=5)
    assert not alive


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_without_torchrun_there_is_one_process_and_no_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # some other launcher's
    monkeypatch.setenv("RANK", "3")
    assert (torchrun.size(), torchrun.rank(), torchrun.local_size(), torchrun.local_rank()) == (1, 0, 1, 0)
    assert processes() is ALONE
    with pytest.raises(ValueError, match="needs processes that torchrun has started. Got one process without torchrun. Start"):
        Processes()


def job(monkeypatch, rank: int, size: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")


def test_a_missing_accelerate_is_said_with_what_installs_it(monkeypatch):
    job(monkeypatch, 0, 2)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package accelerate: pip install .* '.\[cluster\]'"):
        Processes()


def test_torchrun_starts_one_chapter_alone(monkeypatch, capsys):
    job(monkeypatch, 0, 2)
    monkeypatch.setattr(sys, "argv", ["ntklib", "run-all"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Of ntklib's commands torchrun starts run alone, for one chapter. Got 'run-all'." in capsys.readouterr().err


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("storage", ["float32", "uint8", "stream"])
def test_shares_of_the_augmented_images_are_rows_of_the_batch(storage, augment, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "0")
    data, order, transform = (
        load("digits", num_train=23, num_test=10, storage=storage),
        BatchOrder(23, 8, 3),
        augment_by_name(augment),
    )
    shares = [list(batches(data, order, transform, range(4), member(rank, 3))) for rank in range(3)]
    for whole, parts in zip(batches(data, order, transform, range(4)), zip(*shares, strict=True), strict=True):
        for joint, cut in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(cut), joint, rtol=1e-6, atol=1e-6)


def member(rank: int, size: int) -> Processes:
    """A process of a job that it has not joined."""
    one = object.__new__(Processes)
    one.rank, one.size = rank, size
    return one


@pytest.mark.parametrize(("n", "size"), [(23, 4), (8, 8), (5, 2), (4, 3)])
def test_shares_cover_a_batch_in_order_and_differ_by_one_at_most(n, size):
    shares = [list(range(n))[member(rank, size).share(n)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n))
    assert {len(s) for s in shares} <= {n // size, -(-n // size)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_a_loss_have_the_mean_of_the_batch(size):
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    loss = nn.functional.mse_loss
    ranks = [member(rank, size) for rank in range(size)]
    parts = [one.part(loss, 7)(x[one.share(7)], y[one.share(7)]) for one in ranks]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(x, y), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("n", "batch_size"), [(23, 8), (24, 8), (9, 4), (5, 8), (1, 4), (1281, 256)])
def test_the_smallest_batch_is_that_of_the_epoch(n, batch_size):
    order = BatchOrder(n, batch_size, 0)
    assert order.smallest == min(map(len, epoch_batches(n, batch_size, 0, 0)))
    member(0, order.smallest).check(order.smallest)
    with pytest.raises(ValueError, match=f"Got a batch of {order.smallest} for {order.smallest + 1} processes"):
        member(0, order.smallest + 1).check(order.smallest)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_twin_shares_parameters_and_buffers_and_leaves_the_model_as_it_was(on_gpu, monkeypatch):
    monkeypatch.setattr(parallel, "total_over_processes", lambda value: value)  # one process
    model = network("normed").eval()
    kinds, before = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    twin = joint_twin(model, on_gpu)
    assert [type(m) for m in model.modules()] == kinds
    assert not model.training
    for ours, theirs in ((model.named_parameters(), twin.named_parameters()), (model.named_buffers(), twin.named_buffers())):
        assert all(a == b and v is w for (a, v), (b, w) in zip(ours, theirs, strict=True))
    assert sum(isinstance(m, nn.SyncBatchNorm if on_gpu else JointBatchNorm) for m in twin.modules()) == 4
    x = images().x_train
    out = twin(x)
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
    model.load_state_dict(before)
    torch.testing.assert_close(out, model.train()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_normalisation_sums_in_float32_at_least(dtype, monkeypatch):
    monkeypatch.setattr(parallel, "total_over_processes", lambda value: value)
    norm = nn.BatchNorm1d(4)
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = nn.BatchNorm1d(4)(x.float()).to(dtype)
    got = joint_twin(norm, on_gpu=False)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_processes_of_a_job_write_notebooks_of_their_own_and_follow_that_of_process_0(monkeypatch):
    first = runner.make_task("quickstart", "smoke")
    job(monkeypatch, 3, 8)
    task = runner.make_task("quickstart", "smoke", share="1/2")
    assert task.name == "quickstart.1-of-2.process-3"
    other = runner.make_task("quickstart", "smoke")
    assert other.output.parts[-3:] == ("shares", "smoke", "quickstart.process-3.ipynb")
    assert other.log != first.log
    assert (other.stamp, other.up_to_date()) == (first.stamp, first.up_to_date())


def test_a_process_of_a_job_may_not_name_a_gpu(monkeypatch):
    job(monkeypatch, 1, 2)
    with pytest.raises(
        ValueError, match="device must be 'auto', 'cpu' or 'cuda' where torchrun has started several .* Got 'cuda:1'"
    ):
        settings.resolve_device("cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_process_of_a_job_has_a_gpu_of_its_own(monkeypatch):
    job(monkeypatch, 1, 2)
    assert settings.resolve_device("auto") == "cuda"
    assert torch.cuda.current_device() == 1
