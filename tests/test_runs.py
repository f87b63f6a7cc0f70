"""Runs are found again, resume to the same numbers, and are never half written."""

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from crashes import crash_at

from ntklib import Run, combine, data, models, sgd, storage, sweep
from ntklib.runs import load_tensors_of

SCRIPT = Path(__file__).with_name("killed_run.py")
SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 16, "epochs": 3, "schedule": "cosine", "seed": 1}


def images():
    return data.load("digits", num_train=40, num_test=10)


def compute(root, **changes):
    """One run of a small MLP that is saved at every measured state."""
    settings = {**SETTINGS, **changes}
    torch.set_num_threads(1)
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, width=8, seed=settings["seed"])
    steps = []
    with Run("test", settings, save_every=0, root=root) as run:
        for state in run.states(sgd, model, images()):
            steps.append(state.step)
            run.log(state, split="train", loss=state.loss, norm=sum(float(w.detach().square().sum()) for w in model.parameters()))
    return run.result, steps


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_a_finished_run_is_loaded_and_not_computed_again(tmp_path):
    first, steps = compute(tmp_path)
    again, none = compute(tmp_path)
    assert steps == [0, 3, 6, 9]
    assert none == []
    assert again.status == "complete"
    same(first.history, again.history)


def test_changed_settings_are_another_run(tmp_path):
    first, _ = compute(tmp_path)
    other, steps = compute(tmp_path, lr=0.06)
    assert other.key != first.key
    assert steps


def test_changed_measuring_code_is_another_run(tmp_path):
    def measure(quantity):
        with Run("test", SETTINGS, root=tmp_path) as run:
            return run.key, quantity

    def measure_more(quantity):
        with Run("test", SETTINGS, root=tmp_path) as run:
            return run.key, quantity, "another quantity"

    assert measure("a")[0] == measure("b")[0]
    assert measure("a")[0] != measure_more("a")[0]


NOTEBOOK = """
scale, model = 2.0, "an attribute's name, not a value that is used"
def helper(x):
    return scale * x
def train(settings):
    with Run("test", settings, root=root) as run:
        return run.key, helper(1), settings.model
"""


def keys_of(source, root, jobs):
    """Keys of two runs whose code lives in a notebook (the module __main__), in this process or in workers."""
    from types import SimpleNamespace

    class Mapped(SimpleNamespace):
        def model_dump(self):
            return vars(self)

    namespace = {"Run": Run, "root": root, "__name__": "__main__"}
    exec(source, namespace)  # what a notebook's kernel does
    settings = [Mapped(seed=seed, model="mlp") for seed in range(2)]
    return [key for key, *_ in sweep(namespace["train"], settings, jobs=jobs)]


def test_a_run_is_the_same_in_a_worker_process_and_follows_the_helpers_of_its_notebook(tmp_path):
    keys = keys_of(NOTEBOOK, tmp_path, 1)
    assert keys == keys_of(NOTEBOOK, tmp_path, 2)
    assert keys == keys_of(NOTEBOOK.replace("an attribute's", "the attribute's"), tmp_path, 1)
    assert keys != keys_of(NOTEBOOK.replace("2.0", "3.0"), tmp_path, 1)
    assert keys != keys_of(NOTEBOOK.replace("scale * x", "scale + x"), tmp_path, 1)


@pytest.mark.parametrize("write", range(9))
def test_a_crash_at_any_write_leaves_a_run_that_resumes_to_the_same_history(tmp_path, write):
    whole, _ = compute(tmp_path / "whole")
    with crash_at(write):
        compute(tmp_path / "crashed")
    resumed, steps = compute(tmp_path / "crashed")
    assert resumed.status == "complete"
    assert steps == [s for s in (0, 3, 6, 9) if s >= 3 * (write // 3)]  # three files per save: history, checkpoint, manifest
    same(whole.history.drop(columns="run"), resumed.history.drop(columns="run"))


@pytest.mark.parametrize("pattern", ["run.json", "history-*.parquet", "checkpoint-*.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_is_named_set_aside_and_recomputed(tmp_path, pattern, damage):
    whole, _ = compute(tmp_path / "whole")
    with crash_at(6):
        compute(tmp_path / "damaged")
    (path,) = (p for p in (tmp_path / "damaged").rglob(pattern))
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] if damage == "truncated" else content[:middle] + b"\x07" + content[middle + 1 :])
    with pytest.warns(storage.DamagedFileWarning, match=path.name):
        resumed, steps = compute(tmp_path / "damaged")
    assert steps[0] == 0
    same(whole.history, resumed.history)
    assert list(path.parent.glob(f"{path.name}.damaged-*"))


def test_a_missing_file_of_a_finished_run_is_said_and_recomputed(tmp_path):
    whole, _ = compute(tmp_path)
    next(tmp_path.rglob("history-*.parquet")).unlink()
    with pytest.warns(storage.DamagedFileWarning, match="is missing"):
        again, steps = compute(tmp_path)
    assert steps[0] == 0
    same(whole.history, again.history)


def test_a_diverged_run_keeps_its_history_and_is_not_trained_again(tmp_path):
    first, steps = compute(tmp_path, lr=1e12, momentum=0.0, schedule="constant", epochs=40)
    again, none = compute(tmp_path, lr=1e12, momentum=0.0, schedule="constant", epochs=40)
    assert first.status == again.status == "diverged"
    assert first.diverged
    assert none == []
    assert steps[-1] < 120
    same(first.history, again.history)
    frame = combine([first, compute(tmp_path)[0]], "lr")
    assert set(frame["status"]) == {"diverged", "complete"}
    assert set(frame["lr"]) == {1e12, 0.05}


def test_a_run_carries_its_provenance(tmp_path):
    result, _ = compute(tmp_path)
    (session,) = result.sessions
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] or session["versions"]["torch"] == torch.__version__
    assert session["threads"] == 1
    assert session["wall_seconds"] > 0
    assert session["peak_memory_mib"] > 50
    assert {"git", "device", "cpu", "started", "ended"} <= session.keys()
    assert result.settings == SETTINGS


def test_the_last_checkpoint_holds_the_trained_parameters(tmp_path):
    result, _ = compute(tmp_path)
    tensors = load_tensors_of(result, tmp_path)
    norm = sum(float(v.square().sum()) for k, v in tensors.items() if k.startswith("model."))
    assert norm == pytest.approx(result.history.query("quantity == 'norm'")["value"].iloc[-1], rel=1e-6)


def test_a_measurement_without_training_is_kept_too(tmp_path):
    def measure():
        done = []
        with Run("test", {"seed": 0}, root=tmp_path) as run:
            for state in run.once():
                done.append(state.step)
                run.log(state, ratio=(1.5, 0.1))
        return run.result, done

    first, done = measure()
    again, none = measure()
    assert (done, none) == ([0], [])
    for result in (first, again):
        assert result.history[["value", "sem"]].to_numpy().tolist() == [[1.5, 0.1]]


def test_arrays_of_a_measurement_are_kept_as_buffers(tmp_path):
    values = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], dtype=torch.float64)
    for _ in range(2):
        with Run("test", {"seed": 1}, root=tmp_path) as run:
            for state in run.once():
                state.model.register_buffer("values", values)
    kept = load_tensors_of(run.result, root=tmp_path)["model.values"]
    torch.testing.assert_close(kept, values, rtol=0, atol=0, equal_nan=True)


def test_a_full_disk_is_said_with_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"Could not write .*x\.json.*No space left on device.*NTKLIB_RUNS"):
        storage.write_atomic(tmp_path / "x.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def start(root, pause=0.0):
    command = [sys.executable, str(SCRIPT), str(root), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines(), err


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_history_of_an_uninterrupted_one(tmp_path):
    whole, _ = lines_of(start(tmp_path / "whole"))
    chance = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "killed", pause=0.3)
        for _ in range(2):
            process.stdout.readline()  # at the second step the first one is saved
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.wait()
    rest, _ = lines_of(start(tmp_path / "killed"))
    assert rest[-1] == whole[-1]  # complete, same key
    assert 1 < len(rest) < len(whole)  # it went on, and not from the start
    histories = [pd.read_parquet(next((tmp_path / name).rglob("history-*.parquet"))) for name in ("whole", "killed")]
    same(*histories)


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_reads_its_result(tmp_path):
    first = start(tmp_path)
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)  # however long the second takes to start, the first is at work
    second = start(tmp_path)
    go_on = threading.Timer(120, first.send_signal, [signal.SIGCONT])  # even if the second never says a word
    go_on.start()
    said = second.stderr.readline()
    go_on.cancel()
    first.send_signal(signal.SIGCONT)
    lines_of(first)
    found, _ = lines_of(second)
    assert len(found) == 1
    assert found[0].startswith("complete")
    assert "another process is computing this run" in said
