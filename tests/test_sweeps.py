"""Sweeps: which settings are run, and how their histories come back together."""

import os
import shutil
import threading
import time

import pandas as pd
import pytest
from filelock import FileLock

from ntklib import Run, SupervisedSettings, distinct, gather, sweep, variants, with_quantity
from ntklib.runs import RunResult

BASE = SupervisedSettings(dataset="digits", model="mlp", width=4, lr=0.1, batch_size=8, epochs=1, num_probe=2, seed=5)
RATES = variants(BASE, {0.1: {"lr": 0.1}, 1.0: {"lr": 1.0}}, 2)
WIDTHS = variants(BASE, {"narrow": {}, "wide": {"width": 8}}, 2)


def result(settings, status="complete"):
    rows = [
        {"run": f"{settings.lr}-{settings.width}-{settings.seed}", "step": step, "epoch": float(step), "split": "train",
         "layer": "", "quantity": quantity, "value": value, "sem": 0.0}
        for step in (0, 1) for quantity, value in (("trace", settings.lr * 10 + step), ("time", settings.lr * step))
    ]  # fmt: skip
    return RunResult("key", "chapter", settings.model_dump(), status, pd.DataFrame(rows), [])


def test_variants_change_the_base_and_the_seed_alone():
    assert [s.seed for s in RATES[1.0]] == [0, 1]
    assert RATES[1.0][1] == BASE.but(lr=1.0, seed=1)
    assert WIDTHS["narrow"] == RATES[0.1]
    with pytest.raises(ValueError, match="lr must be greater than 0"):
        variants(BASE, {"bad": {"lr": -1.0}}, 1)


def test_what_sweeps_share_is_run_once_and_order_is_kept():
    assert distinct(RATES, WIDTHS) == [*RATES[0.1], *RATES[1.0], *WIDTHS["wide"]]


def test_gathered_histories_carry_value_seed_and_settings():
    found = {s: result(s) for s in distinct(RATES, WIDTHS)}
    frame = gather(RATES, found, "lr")
    assert (frame["lr"] == frame["variant"]).all()
    assert sorted(frame["seed"].unique()) == [0, 1]
    assert len(frame) == 2 * 2 * 4
    shared = gather(WIDTHS, found)
    assert set(shared.loc[shared["variant"] == "narrow", "run"]) == set(frame.loc[frame["variant"] == 0.1, "run"])


def test_a_quantity_becomes_the_abscissa_of_the_others_of_its_run_and_step():
    frame = with_quantity(gather(RATES, {s: result(s) for s in distinct(RATES)}), "time")
    rows = frame[frame["quantity"] == "trace"]
    assert (rows["time"] == rows["variant"] * rows["step"]).all()
    doubled = pd.concat([frame, frame.assign(split="test")]).drop(columns="time")
    with pytest.raises(ValueError, match="time must have one value per run and step"):
        with_quantity(doubled, "time")


def test_a_sweep_over_nothing_is_nothing():
    assert sweep(result, distinct(variants(BASE, {}, 3))) == []


def begin_elsewhere(monkeypatch, share: str) -> list[int]:
    monkeypatch.setenv("NTKLIB_SHARE", share)
    seen: list[int] = []
    assert sweep(lambda i: [seen.append(i), i * i][1], range(10), jobs=1) == [i * i for i in range(10)]
    return seen


def test_processes_that_share_a_sweep_begin_far_apart_and_have_all_results(monkeypatch):
    assert begin_elsewhere(monkeypatch, "1/4") == list(range(10))
    assert begin_elsewhere(monkeypatch, "2/4") == [*range(2, 10), 0, 1]
    assert begin_elsewhere(monkeypatch, "4/4") == [7, 8, 9, *range(7)]
    assert "NTKLIB_BUSY" not in os.environ  # set for the calls alone


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "1/0", "one/two", "-1/2", "1/2/3"])
def test_a_share_that_is_none_is_explained(share, monkeypatch):
    monkeypatch.setenv("NTKLIB_SHARE", share)
    with pytest.raises(ValueError, match="A share must be 'k/n' with whole numbers 1 <= k <= n"):
        sweep(abs, [1, 2], jobs=1)


def test_a_run_that_another_process_holds_is_left_for_later_only_where_the_sweep_is_shared(tmp_path, monkeypatch):
    order: list[int] = []

    def train(i):
        with Run("toy", {"i": i}, root=tmp_path) as run:
            order.append(i)
            for state in run.once():
                run.log(state, value=i)
        return run.result.history["value"].item()

    train(0)
    (folder,) = (tmp_path / "store" / "toy").iterdir()
    shutil.rmtree(folder)  # as if it had only been begun
    order.clear()
    monkeypatch.setenv("NTKLIB_SHARE", "1/1")
    held = threading.Event()

    def hold():
        with FileLock(folder / "lock"):
            held.set()
            time.sleep(2)

    other = threading.Thread(target=hold)
    folder.mkdir()
    other.start()
    held.wait()
    assert sweep(train, [0, 1, 2], jobs=1) == [0, 1, 2]
    other.join()
    assert order == [1, 2, 0]


def test_processes_that_are_used_again_see_the_variables_of_the_caller_as_they_are_now(monkeypatch):
    def seen(_):
        return {name: os.environ.get(name) for name in ("NTKLIB_DATA", "NTKLIB_WORKERS", "NTKLIB_SHARE")}, os.getpid()

    def values():
        found = sweep(seen, [0, 1, 2, 3], jobs=2)
        assert all(v == found[0][0] for v, _ in found)
        return found[0][0], {pid for _, pid in found}

    monkeypatch.setenv("NTKLIB_DATA", "first")
    monkeypatch.setenv("NTKLIB_WORKERS", "1")
    monkeypatch.delenv("NTKLIB_SHARE", raising=False)
    first, processes = values()
    monkeypatch.setenv("NTKLIB_DATA", "second")
    monkeypatch.delenv("NTKLIB_WORKERS")
    monkeypatch.setenv("NTKLIB_SHARE", "2/2")
    second, later = values()
    assert first == {"NTKLIB_DATA": "first", "NTKLIB_WORKERS": "1", "NTKLIB_SHARE": None}
    assert second == {"NTKLIB_DATA": "second", "NTKLIB_WORKERS": None, "NTKLIB_SHARE": "2/2"}
    assert os.getpid() not in processes | later
    assert processes & later, "no process was used again: the test has shown nothing"


def test_gathering_a_sweep_over_nothing_gives_a_frame_without_rows_that_can_be_worked_on_like_any_other():
    full = gather(RATES, {s: result(s) for s in distinct(RATES)}, "lr")
    empty = gather({}, {}, "lr")
    assert list(empty.columns) == list(full.columns)
    some = {s: result(s) for s in RATES[0.1]}
    assert set(gather({0.1: RATES[0.1], 1.0: []}, some)["variant"]) == {0.1}
    assert with_quantity(empty, "time").query("split == 'test' and quantity == 'accuracy'").groupby("run")["value"].max().empty
