"""What the chapters on the trace judge follows from the histories they stored, by plain loops."""

import json
import math

import pandas as pd
import pytest

from ntklib import claims

pytestmark = pytest.mark.slow


def record_of(built_book, chapter):
    """What a chapter measured at smoke, and a reader of values in its stored histories by key."""
    runs = built_book.parent.parent / "runs"
    record = json.loads((runs / "results" / "smoke" / f"{chapter}.json").read_text())
    store = runs / "store" / chapter

    def values(key, quantity, **where):
        rows = pd.read_parquet(next((store / key).glob("history-*.parquet")))
        for column, wanted in {"quantity": quantity, **where}.items():
            rows = rows[rows[column] == wanted]
        return rows["value"].to_numpy()

    return record, values


def test_identities_hold_in_the_chapters_at_any_preset(built_book):
    """They are computed on small nets that no preset changes, so a wrong formula in a chapter shows here."""
    record, _ = record_of(built_book, "trace_estimators")
    listed = claims.load_claims()
    identities = [i for i in record["claims"] if listed[i].kind == "identity"]
    assert {"A1", "A1v"} <= set(identities)
    for i in identities:
        measured = [claims.Measured(**m) for m in record["claims"][i]["measured"]]
        judgement = claims.Judgement(listed[i], measured, 1, "smoke")
        assert judgement.parts == [claims.HOLDS] * len(measured), (i, measured)


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
