"""Generated pages say what the ledger and the notebooks say: links, counts, intervals, the data file."""

import json
import math
import re

import nbformat
import pytest
from click.testing import CliRunner

from ntklib import Chapter, Measured, Verdicts, chapters, claims
from ntklib.__main__ import cli
from ntklib.claims import FAILS, HOLDS, NOT_JUDGED, Criterion
from ntklib.pages import export, figure_index, ledger, picture
from ntklib.pages.interval import HEIGHT, WIDTH, drawing
from ntklib.pages.places import NO_FIGURE, Figure, Places, all_places, judged_claims

CLAIMS = claims.load_claims()


@pytest.fixture
def chapter(monkeypatch, tmp_path):
    """A chapter at its default preset, writing into a folder of its own."""
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path))
    return Chapter("trace_estimators", chapters.preset_parameters("trace_estimators", "default"))


@pytest.fixture(scope="module")
def places():
    return all_places()


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_every_claim_is_judged_in_one_cell_and_its_figure_is_of_that_chapter(places, claim):
    if claim.chapter not in places:
        pytest.skip(f"{claim.chapter} is not in the book yet")
    assert [c for c, p in places.items() if claim.id in p.judged] == [claim.chapter]
    cell, _ = places[claim.chapter].judged[claim.id]
    assert claim.id in nbformat.read(chapters.notebook_path(claim.chapter), 4).cells[cell].source
    shown = places[claim.chapter].figure_of(claim)
    assert shown in {f.name for f in places[claim.chapter].figures} | {None}
    assert claim.figure != shown or shown is not None
    assert (shown is None) <= (claim.figure in ("", NO_FIGURE))


def test_most_claims_have_a_figure(places):
    shown = [places[c.chapter].figure_of(c) for c in CLAIMS.values() if c.chapter in places]
    assert sum(s is not None for s in shown) >= 0.8 * len(shown)


def test_the_figure_of_a_claim_is_the_nearest_of_its_section():
    figures = [Figure(f"fig-{i}", "", [], cell, section) for i, (cell, section) in enumerate([(2, 1), (5, 2), (9, 2)])]
    claim = CLAIMS["B1"]
    for cell, section, wanted in [(7, 2, "fig-1"), (3, 2, "fig-1"), (11, 2, "fig-2"), (1, 1, "fig-0"), (12, 3, None)]:
        assert Places("x", "x", figures, {"B1": (cell, section)}).figure_of(claim) == wanted
    assert Places("x", "x", figures).figure_of(claim) is None


def test_claims_are_read_from_calls_and_from_loops_around_them():
    assert judged_claims('verdicts.judge("A5m", [x])') == ["A5m"]
    assert judged_claims("for c, q in (('B1', 'kta'), ('N113', 'top')):\n    verdicts.judge(c, [q])") == ["B1", "N113"]
    assert judged_claims('x = record["A1"]  # nothing is judged') == []


def test_the_drawing_puts_value_and_bounds_where_they_belong():
    def numbers(svg):
        dot = float(re.search(r'cx="([\d.]+)"', svg)[1])
        band = [float(v) for v in re.search(r'class="range" x="([\d.]+)" y="1" width="([\d.]+)"', svg).groups()]
        bar = [float(v) for v in re.search(r'class="bar" d="M([\d.]+) 7.0H([\d.]+)"', svg).groups()]
        return dot, band[0], band[0] + band[1], *bar

    dot, left, right, low, high = numbers(drawing(Criterion("x", 0, 10), Measured(4, 0.5), HOLDS))
    assert (dot - left) / (right - left) == pytest.approx(0.4, abs=0.01)
    assert ((low - left) / (right - left), (high - left) / (right - left)) == pytest.approx((0.3, 0.5), abs=0.01)
    dot, left, right, *_ = numbers(drawing(Criterion("x", low=1.0), Measured(3.0), HOLDS))
    assert left < dot < right == WIDTH - 4  # a range without an upper bound fills the rest
    dot, left, right, *_ = numbers(drawing(Criterion("x", high=1.0), Measured(3.0), FAILS))
    assert left == 4 < right < dot
    assert drawing(Criterion("x", 0), Measured(math.inf), HOLDS) == drawing(Criterion("x", 0), Measured(1, math.nan), HOLDS) == ""
    same = drawing(Criterion("x", high=0), Measured(0.0), HOLDS)
    assert f'height="{HEIGHT}"' in same
    assert "nan" not in same


def test_the_page_tells_value_interval_seeds_figure_code_and_command(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(1.02, 0.02)], seeds=7)
    verdicts.save()
    page = ledger.claims_page()
    entry = page.split(":name: claim-a1v\n")[1].split("::::\n")[0]
    for words in ("1.020 ± 0.020", "interval 0.980 to 1.060", "required: between 0.9 and 1.1", "7 seeds", "preset default",
                  "{numref}`fig-estimators-draws`", "<judged-a1v>", "python -m ntklib run trace_estimators --preset default",
                  'data-source="trace" data-verdict="holds" data-chapter="trace_estimators"'):  # fmt: skip
        assert words in entry
    assert re.findall(r":name: claim-(\w+)", page) == [i.lower() for i in CLAIMS]
    assert page.count('data-verdict="holds"') == 1


def test_counts_add_up_and_lead_to_the_claims_they_count(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(1.0, 0.01)])
    verdicts.judge("A1e", [Measured(2.0, 0.1)], seeds=3)
    verdicts.save()
    entries = claims.ledger()
    assert ledger.counts(entries) == {HOLDS: 1, FAILS: 1, claims.INCONCLUSIVE: 0, NOT_JUDGED: len(CLAIMS) - 2}
    rows = ledger.count_table(entries).strip().splitlines()
    assert [r.split("|")[1].strip() for r in rows[2:]] == [*ledger.TITLES.values(), "all"]
    assert 'href="claims.html?source=trace&amp;verdict=fails">1</a>' in rows[2]
    assert f'href="claims.html">{len(CLAIMS)}</a>' in rows[-1]


def test_the_data_file_is_valid_json_and_what_the_command_prints(chapter):
    verdicts = Verdicts(chapter)
    verdicts.judge("A1v", [Measured(1.02, 0.02)])
    verdicts.judge("N11", [Measured(math.inf), Measured(math.nan, math.nan)], seeds=6)
    verdicts.judge("A1e", [Measured(2.0, math.nan)], seeds=3)
    verdicts.save()

    def no_literal(name):
        raise AssertionError(name)

    text = export.as_json()
    entries = {e["id"]: e for e in json.loads(text, parse_constant=no_literal)}
    assert CliRunner().invoke(cli, ["claims", "--json"]).output == text + "\n"
    assert list(entries) == list(CLAIMS)
    assert all(set(export.FIELDS) <= e.keys() for e in entries.values())
    assert entries["A1v"]["criteria"][0]["interval"] == pytest.approx([0.98, 1.06])
    assert (entries["A1v"]["criteria"][0]["low"], entries["A1v"]["reason"]) == (0.9, None)
    assert entries["A1v"]["date"][:2] == "20"
    assert [c["reason"] for c in entries["N11"]["criteria"]] == [
        "value: plus infinity", "value: not a number, as nothing could be measured"]  # fmt: skip
    assert entries["N11"]["criteria"][0]["interval"] is None
    assert entries["N11"]["criteria"][0]["high"] is None
    assert entries["A1e"]["reason"] == "sem: unknown"
    assert entries["B1"]["reason"] is None
    assert entries["B1"]["figure"] == "executed/eos_alignment.html#fig-eos-rates"
    assert entries["B1"]["code"] == "executed/eos_alignment.html#judged-b1"
    assert entries["C1"]["figure"] is None
    assert {e["entry"] for e in entries.values()} == {f"claims.html#claim-{i.lower()}" for i in CLAIMS}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("Figures 5 and 6, section 5.2", ["Figure 5", "Figure 6"]),
        ("Theorem 5.1 (equation 7) and Figure 9, section 5.3.2", ["Theorem 5.1", "Figure 9"]),
        ("abstract; Figure 1(b), section 3.1", ["Figure 1"]),
        ("abstract; Theorem 1 and Lemma 1 (known from a digest)", ["Theorem 1", "Lemma 1"]),
        ("abstract", [figure_index.ELSEWHERE]),
    ],
)
def test_figures_and_theorems_are_read_from_places(place, expected):
    assert figure_index.labels(place) == expected


def test_the_index_has_every_figure_that_a_cell_reproduces_and_every_claim(places):
    rows = {source: figure_index.index(source) for source in claims.SOURCES}
    for chapter in places.values():
        for figure in chapter.figures:
            for source, what in figure.reproduces:
                assert all(figure.name in rows[source][label].figures for label in figure_index.labels(what))
    listed = {e["id"] for source in rows.values() for row in source.values() for e in row.claims}
    assert {i for i, c in CLAIMS.items() if c.source != claims.OWN and c.chapter in places} <= listed
    numbers = {int(label.split()[1]) for label in rows["trace"] if label.startswith("Figure")}
    assert set(range(1, 17)) - numbers == {14, 15}  # the page says why


@pytest.mark.usefixtures("chapter")
def test_the_picture_is_drawn_without_stored_runs_and_says_so():
    found = picture.story("default")
    assert found.image.startswith(b"<?xml")
    assert found.image == picture.story("default").image  # nothing depends on the time
    assert found.caption.count("No stored runs.") == 4
    assert f"{len(CLAIMS)} claims" in found.caption
    assert "Curves of the preset smoke" in picture.story("smoke").caption
