"""What chapters judge follows from the histories they stored, by plain loops."""

import json
import math
import re
from collections import namedtuple

import nbformat
import numpy as np
import pandas as pd
import pytest
from cells import Cells, made_up

from ntklib import claims

pytestmark = pytest.mark.slow


def record_of(built_book, chapter):
    """What a chapter measured at smoke, and a reader of values in its stored histories by key."""
    runs = built_book.parent.parent / "runs"
    record = json.loads((runs / "results" / "smoke" / f"{chapter}.json").read_text())
    store = runs / "store" / chapter

    def values(key, quantity, column="value", **where):
        rows = pd.read_parquet(next((store / key).glob("history-*.parquet")))
        for name, wanted in {"quantity": quantity, **where}.items():
            rows = rows[rows[name] == wanted]
        return rows[column].to_numpy()

    return record, values


LARGER = {"N161": 2, "N171": 0}  # criteria from this one on are about sizes that only the default has


def test_identities_hold_in_every_chapter_at_any_preset(built_book):
    """A wrong formula in a chapter shows here, at sizes that take no time."""
    listed, seen = claims.load_claims(), set()
    for path in (built_book.parent.parent / "runs" / "results" / "smoke").glob("*.json"):
        record, _ = record_of(built_book, path.stem)
        for i in (i for i in record["claims"] if listed[i].kind == "identity"):
            measured = [claims.Measured(**m) for m in record["claims"][i]["measured"]]
            parts = claims.Judgement(listed[i], measured, 1, listed[i].preset).parts[: LARGER.get(i)]
            assert parts == [claims.HOLDS] * len(parts), (i, measured)
            seen.add(i)
    assert seen == {i for i, claim in listed.items() if claim.kind == "identity"}


def test_the_variance_of_the_network_farthest_from_the_law_is_judged(built_book):
    record, _ = record_of(built_book, "trace_estimators")
    executed = nbformat.read(built_book.parent.parent / "runs" / "executed" / "smoke" / "trace_estimators.ipynb", 4)
    printed = re.findall(r"variance / 2\|K\|\^2 = ([\d.]+)", str(executed))
    assert len(printed) == 3
    assert means_of(record, "A1v") == pytest.approx([max(map(float, printed), key=lambda v: abs(v - 1))], abs=6e-4)


def test_exponents_of_the_distance_over_steps_leave_out_the_start(built_book):
    record, values = record_of(built_book, "kernel_distance")
    runs = []
    for key in record["claims"]["N31"]["runs"]:
        per_epoch, slopes = values(key, "accuracy", column="step", split="train", epoch=1.0)[0], []
        for first in (e * per_epoch for e in record["parameters"]["velocity_epochs"] if e > 0):
            steps = values(key, "distance", column="step", split="full", layer=str(first)) - first
            distances = values(key, "distance", split="full", layer=str(first))
            points = [(math.log(t), math.log(s)) for t, s in zip(steps, distances, strict=True) if 1 <= t <= min(4, per_epoch)]
            slopes.append(slope(points))
        runs.append(average(slopes))
    assert means_of(record, "N31") == pytest.approx([average(runs)], rel=1e-9)


def test_shares_of_the_growth_of_the_margin_follow_from_the_stored_histories(built_book):
    record, values = record_of(built_book, "kernel_svm")
    turned, attained = [], []
    for key in record["claims"]["N21"]["runs"]:
        n = settings_of(built_book, "kernel_svm", key)["num_train"]
        first = next(i for i, v in enumerate(values(key, "log_inverse_loss", layer="")) if v > math.log(n / math.log(2)))
        growth = {q: math.log(v[-1] / v[first]) for q in ("normalized_margin", "attained", "scale_free_trace")
                  for v in [values(key, q, layer="")]}  # fmt: skip
        turned.append(growth["scale_free_trace"] / 2 / growth["normalized_margin"])
        attained.append(growth["attained"] / growth["normalized_margin"])
    assert means_of(record, "N21") == pytest.approx([average(turned), average(attained)], rel=1e-9)


def test_the_trap_of_running_statistics_follows_from_the_stored_histories(built_book):
    record, values = record_of(built_book, "trace_evolution")
    keys = record["claims"]["N1"]["runs"]
    logs = [math.log10(values(k, "trace_running", epoch=1.0)[0] / values(k, "trace", epoch=1.0)[0]) for k in keys]
    assert record["claims"]["N1"]["measured"][0]["value"] == pytest.approx(sum(logs) / len(logs), rel=1e-12)


def test_the_error_of_the_estimator_follows_from_the_stored_histories(built_book):
    record, values = record_of(built_book, "trace_estimators")
    keys = record["claims"]["A1e"]["runs"]
    ratios = {mode: [values(k, "ratio", layer="0.01", split=mode)[0] for k in keys] for mode in ("eval", "train")}
    found = {i: [m["value"] for m in record["claims"][i]["measured"]] for i in ("A1e", "N11")}
    assert found["A1e"] == pytest.approx([sum(ratios["eval"]) / len(keys)], rel=1e-12)
    logs = [sum(map(math.log10, ratios[mode])) / len(keys) for mode in ("eval", "train")]
    assert found["N11"] == pytest.approx(logs, rel=1e-12)


def test_the_worst_accepted_estimate_is_among_the_stored_ones_that_pass_the_rule(built_book):
    record, values = record_of(built_book, "trace_estimators")
    errors = []
    for key in record["claims"]["N12"]["runs"]:
        for epoch in (0.0, 1.0):
            noise = sum(1 / rms for rms in values(key, "rms", epoch=epoch))
            for epsilon in ("0.1", "0.03", "0.01"):
                rows = [values(key, "ratio", epoch=epoch, layer=epsilon, split=mode) for mode in ("eval", "train")]
                errors += [abs(v - 1) for row in rows for v in row if float(epsilon) * noise <= 0.25]
    found = record["claims"]["N12"]["measured"][1]["value"]
    assert found == pytest.approx(max(errors), rel=1e-12) if errors else math.isnan(found)


def settings_of(built_book, chapter, key):
    return json.loads((built_book.parent.parent / "runs" / "store" / chapter / key / "run.json").read_text())["settings"]


def means_of(record, claim):
    return [m["value"] for m in record["claims"][claim]["measured"]]


def average(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def slope(points):
    """Of the line of least squares."""
    x, y = np.array(points).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def ranks(numbers):
    """Ranks from 1, equal numbers sharing the mean of theirs."""
    return [sum(b < a for b in numbers) + (sum(b == a for b in numbers) + 1) / 2 for a in numbers]


def rank_correlation(a, b):
    da, db = ([r - (len(x) + 1) / 2 for r in ranks(x)] for x in (a, b))
    norm = math.sqrt(sum(v * v for v in da) * sum(v * v for v in db))
    return sum(x * y for x, y in zip(da, db, strict=True)) / norm if norm else math.nan


def test_rise_and_changes_of_the_trace_follow_from_the_stored_histories(built_book):
    record, values = record_of(built_book, "trace_evolution")

    def star(key):
        accuracy = values(key, "accuracy", split="train")
        return next(i for i, a in enumerate(accuracy) if a >= accuracy.max() - 0.005)

    traces = {key: values(key, "trace", split="train") for i in ("A2", "N2", "N3") for key in record["claims"][i]["runs"]}
    up = [traces[k][: star(k) + 1] for k in record["claims"]["A2"]["runs"]]
    assert means_of(record, "A2")[0] == pytest.approx(average(rank_correlation(v, range(len(v))) for v in up), nan_ok=True)
    to_star = [math.log(traces[k][star(k)] / traces[k][0]) for k in record["claims"]["N3"]["runs"]]
    assert means_of(record, "N3") == pytest.approx([average(to_star)], rel=1e-12)
    corner = {"constant": [], "cosine": []}
    for key in record["claims"]["N2"]["runs"]:
        s, trace = settings_of(built_book, "trace_evolution", key), traces[key]
        if s["weight_decay"] == 0:
            corner[s["schedule"]].append(math.log(trace[-1] / trace[2 * len(trace) // 3]))
    assert means_of(record, "N2") == pytest.approx([average(corner["constant"]), average(corner["cosine"])], rel=1e-9)


def test_falls_and_likeness_of_the_sweeps_follow_from_the_stored_histories(built_book):
    record, values = record_of(built_book, "trace_sweeps")
    where = {}
    for key in record["claims"]["A14"]["runs"]:
        s = settings_of(built_book, "trace_sweeps", key)
        where[s["lr"], s["momentum"], s["seed"]] = key
    seeds = range(record["claims"]["A14"]["seeds"])

    def fall(key):
        """Smallest trace of the first fifth of the epochs, at least one, over the initial one; smoke has three."""
        return values(key, "trace", split="train", epoch=1.0)[0] / values(key, "trace", split="train", epoch=0.0)[0]

    slow, weak, base = sets = ((0.001, 0.9), (0.1, 0.1), (0.1, 0.9))
    falls = [average(fall(where[lr, mu, seed]) for seed in seeds) for lr, mu in sets]
    best = {k: average(max(values(where[(*k, seed)], "accuracy", split="test")) for seed in seeds) for k in sets}
    expected = [*falls, best[slow] - best[base], best[weak] - best[base]]
    assert means_of(record, "A14") == pytest.approx(expected, rel=1e-12, abs=1e-12)
    curves = {"depth": {}, "init": {}}
    for key in record["claims"]["A15"]["runs"]:
        s = settings_of(built_book, "trace_sweeps", key)
        group = "depth" if s["model"].startswith("resnet") else "init"
        curves[group].setdefault(s["seed"], []).append(values(key, "trace", split="train"))
    expected = [average(rank_correlation(*pair) for pair in curves[group].values()) for group in ("depth", "init")]
    assert means_of(record, "A15") == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


Setting = namedtuple("Setting", "name seed lr epochs", defaults=(0, 0.1, 10))


def test_accuracies_of_the_sweeps_are_compared_with_the_base_run_of_their_seed():
    """At smoke no run gets better than at its start, so these are made up."""
    traces = {"base": (2, 3, 4), "slow": (2, 1, 0.5), "weak": (2, 1.5, 0.2)}  # initial, within the first fifth, after it
    accuracies = {"base": (0.1, 0.5, 0.4), "slow": (0.1, 0.2, 0.3), "weak": (0.1, 0.45, 0.2)}
    first = {name: [Setting(name)] for name in traces}
    found = {
        each[0]: made_up({("trace", "train"): {0: a, 2: b, 10: c}, ("time", ""): {0: 0, 2: 1, 10: 2},
                          ("accuracy", "test"): dict(zip((0, 2, 10), accuracies[name], strict=True))}, name=name)
        for (name, each), (a, b, c) in zip(first.items(), traces.values(), strict=True)
    }  # fmt: skip
    judged = Cells("trace_sweeps", sweeps={"first": first}, found=found).run('judge("A14"')
    assert judged["A14"] == pytest.approx([0.5, 0.75, 1.5, 0.3 - 0.5, 0.45 - 0.5])
