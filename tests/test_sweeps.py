"""Sweeps: which settings are run, and how their histories come back together."""

import pandas as pd
import pytest

from ntklib import SupervisedSettings, distinct, gather, sweep, variants, with_quantity
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
