"""Verdicts follow from numbers, and the ledger lists every claim once."""

import json
import math

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner

from ntklib import Chapter, Measured, Verdicts, chapters, claims, over_seeds, storage
from ntklib.__main__ import cli
from ntklib.claims import FAILS, HOLDS, INCONCLUSIVE, NOT_JUDGED, OTHER_PRESET, Criterion, number

IDS = [
    "A1", "A1v", "A1e", "A2", "A3", "A4", "A5", "A5m", *(f"A{i}" for i in range(6, 17)), *(f"B{i}" for i in range(1, 8)),
    *(f"C{i}" for i in range(1, 6)), *(f"D{i}" for i in range(1, 7)), *(f"E{i}" for i in range(1, 9)),
]  # fmt: skip


@pytest.fixture
def chapter(monkeypatch, tmp_path):
    """A chapter at its default preset, writing into a folder of its own."""
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path))
    return Chapter("trace_estimators", chapters.preset_parameters("trace_estimators", "default"))


@pytest.mark.parametrize(
    ("value", "sem", "expected"),
    [
        (0.9, 0.04, HOLDS), (0.9, 0.06, INCONCLUSIVE), (0.8, 0.0, HOLDS), (0.79, 0.0, FAILS), (0.7, 0.04, FAILS),
        (0.7, 0.06, INCONCLUSIVE), (0.9, math.nan, INCONCLUSIVE), (math.nan, 0.0, INCONCLUSIVE), (math.inf, 0.0, HOLDS),
        (-math.inf, 0.0, FAILS),
    ],
)  # fmt: skip
def test_a_verdict_needs_two_standard_errors_of_distance(value, sem, expected):
    assert Criterion("x", low=0.8).verdict(Measured(value, sem)) == expected
    assert Criterion("x", high=-0.8).verdict(Measured(-value, sem)) == expected


def test_a_two_sided_range_is_left_on_both_sides():
    criterion = Criterion("x", 0.9, 1.1)
    found = [criterion.verdict(Measured(v, 0.01)) for v in (0.8, 0.9, 1.0, 1.1, 1.2)]
    assert found == [FAILS, INCONCLUSIVE, HOLDS, INCONCLUSIVE, FAILS]


def test_over_seeds_is_the_mean_with_its_standard_error():
    measured = over_seeds([1.0, 2.0, 3.0, 6.0])
    assert measured.value == 3.0
    assert measured.sem == pytest.approx(math.sqrt(((4 + 1 + 0 + 9) / 3) / 4), rel=1e-15)
    assert math.isnan(over_seeds([1.0]).sem)
    assert math.isnan(over_seeds([]).value)


def test_a_count_of_numpy_is_saved_as_a_number(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(np.int64(1))], seeds=np.int64(5))  # pyright: ignore[reportArgumentType]
    saved = storage.read_json(verdicts.save())["claims"]["A1v"]
    assert (saved["measured"], saved["seeds"]) == ([{"value": 1.0, "sem": 0.0}], 5)


def test_a_number_shows_two_digits_of_its_error():
    assert number(Measured(1.23456, 0.0123)) == "1.235 ± 0.012"
    assert number(Measured(123.4, 56.0)) == "123 ± 56"
    assert number(Measured(2.0)) == "2"
    assert number(Measured(1.7e15, 1.6e15)) == "1.7e+15 ± 1.6e+15"
    assert number(Measured(math.inf, math.nan)) == "inf"
    assert number(Measured(3.0, math.inf)) == "3 ± inf"
    assert "unknown" in number(Measured(2.0, math.nan))


def test_every_claim_of_the_sources_is_listed_once_with_a_chapter_and_criteria():
    listed = claims.load_claims()
    assert [i for i in listed if not i.startswith("N")] == IDS
    for claim in listed.values():
        assert claim.criteria
        assert claim.source in [*claims.SOURCES, claims.OWN]
        assert claim.kind in ("identity", "statistic", "confounded", "qualitative")
        assert claim.seeds >= 1
        for c in claim.criteria:
            assert c.low < c.high
            assert math.isfinite(c.low) or math.isfinite(c.high)


def test_each_claim_of_a_written_chapter_is_judged_there_and_nowhere_else():
    written = chapters.names()
    sources = {name: "".join(c.source for c in nbformat.read(chapters.notebook_path(name), 4).cells) for name in written}
    for claim in claims.load_claims().values():
        judged_in = [name for name, source in sources.items() if f'judge("{claim.id}"' in source]
        assert judged_in in ([claim.chapter], []), claim.id
    judged = {i for i in claims.load_claims() for s in sources.values() if f'judge("{i}"' in s}
    assert judged >= {"A1", "A1v", "A1e", "A2"}


def test_the_worst_criterion_decides_and_too_few_seeds_are_inconclusive(chapter):
    verdicts = Verdicts(chapter)
    good, bad, unsure = Measured(0.95, 0.01), Measured(0.9, 0.01), Measured(0.1, 0.02)
    assert verdicts.judge("A2", [good, Measured(0.05, 0.01)], seeds=5).verdict == HOLDS
    assert verdicts.judge("A2", [good, Measured(0.05, 0.01)], seeds=4).verdict == INCONCLUSIVE
    assert verdicts.judge("A2", [good, unsure], seeds=5).verdict == INCONCLUSIVE
    failing = verdicts.judge("A2", [good, bad], seeds=5)
    assert (failing.verdict, failing.deciding) == (FAILS, 1)
    assert "verdict-fails" in failing._repr_markdown_()


def test_another_preset_is_not_judged(chapter):
    chapter.parameters["momentum"] = 0.5
    judgement = Verdicts(chapter).judge("A1v", [Measured(1.0, 0.01)])
    assert chapter.preset == "custom"
    assert judgement.verdict == OTHER_PRESET


def test_wrong_use_of_judge_is_explained(chapter):
    verdicts = Verdicts(chapter)
    with pytest.raises(ValueError, match="Unknown claim 'A1x'"):
        verdicts.judge("A1x", [Measured(1.0)])
    with pytest.raises(ValueError, match="Claim A2 has 2 criteria, so 2 numbers are needed. Got 1"):
        verdicts.judge("A2", [Measured(1.0)])


def test_the_ledger_reads_saved_verdicts_and_exports_json(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(1.02, 0.02)])
    verdicts.judge("N11", [Measured(0.1, 0.05), Measured(math.nan, math.nan)], seeds=6)
    verdicts.save()
    done = CliRunner().invoke(cli, ["claims", "--json"])
    entries = {e["id"]: e for e in json.loads(done.stdout)}
    assert done.exit_code == 0
    assert (entries["A1v"]["verdict"], entries["A1v"]["value"]) == (HOLDS, 1.02)
    assert (entries["N11"]["verdict"], entries["N11"]["quantity"][-16:]) == (FAILS, "fixed statistics")
    assert entries["N11"]["criteria"][1]["value"] is None
    assert (entries["B1"]["verdict"], entries["B1"]["value"]) == (NOT_JUDGED, None)
    keys = "id source statement kind chapter preset quantity value sem seeds threshold verdict run hardware"
    assert all(set(keys.split()) <= e.keys() for e in entries.values())


def test_a_failing_identity_sets_the_exit_status_and_a_failing_statistic_does_not(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1e", [Measured(2.0, 0.1)], seeds=3)
    verdicts.save()
    assert CliRunner().invoke(cli, ["claims"]).exit_code == 0
    verdicts.judge("A1v", [Measured(2.0, 0.1)])
    verdicts.save()
    assert CliRunner().invoke(cli, ["claims"]).exit_code == 1


def test_a_damaged_result_file_is_set_aside_and_not_judged(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(1.0, 0.01)])
    path = verdicts.save()
    path.write_text(path.read_text().replace("1.0", "1.1"))
    with pytest.warns(storage.DamagedFileWarning, match=r"trace_estimators\.json is damaged"):
        entries = {e["id"]: e for e in claims.ledger()}
    assert entries["A1v"]["verdict"] == NOT_JUDGED
