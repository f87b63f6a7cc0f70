"""The ledger, the front page and the index of figures in the built book: anchors, counts, links both ways, the data file."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from links import parsed, target

from ntklib import book, chapters, claims

pytestmark = pytest.mark.slow

ROOT_PAGE = yaml.safe_load((chapters.project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))["root"]
CHAPTERS = book.contents()
VERDICTS = {
    claims.HOLDS: "verdict-holds",
    claims.FAILS: "verdict-fails",
    claims.INCONCLUSIVE: "verdict-inconclusive",
    claims.NOT_JUDGED: "verdict-unjudged",
}


def page(built_book, name):
    return parsed(built_book / f"{name}.html")


def article(built_book, name):
    return page(built_book, name).select_one("article.bd-article")


def words(element):
    return " ".join(element.get_text(" ").split())


def cell_at(mark):
    """The code cell with an anchor: its own, or in a mark at its beginning where it has several."""
    return mark if "cell" in mark.get("class", []) else mark.find_parent("div", class_="cell")


@pytest.mark.parametrize("claim", claims.load_claims())
def test_the_ledger_has_an_entry_with_a_verdict_for_every_claim(built_book, claim):
    entry = article(built_book, "claims").find("div", id=f"claim-{claim.lower()}", class_="claim")
    assert words(entry.select_one(".claim-id")) == entry.select_one(".claim-id")["data-id"] == claim
    badge = entry.select_one(".verdict")
    assert VERDICTS[words(badge)] in badge["class"]
    listed = claims.load_claims()[claim]
    assert len(entry.select("li .quantity")) == len(entry.select("li .required")) == len(listed.criteria)
    if listed.chapter in CHAPTERS:
        assert entry.find("a", href=f"executed/{listed.chapter}.html")
        assert entry.find("a", href=f"executed/{listed.chapter}.html#judged-{claim.lower()}")
        assert f"python -m ntklib run {listed.chapter} --preset default" in [words(c) for c in entry.find_all("code")]


def test_the_ledger_counts_its_verdicts_rightly(built_book):
    shown = article(built_book, "claims")
    badges = [words(b) for b in shown.select(".claim .verdict")]
    said = re.findall(r"(\d+)\s+(holds|fails|inconclusive|not judged)", words(shown.find("p")))
    assert {v: int(n) for n, v in said} == {
        v: sum(b.startswith(v) for b in badges) for v in (claims.HOLDS, claims.FAILS, claims.INCONCLUSIVE, claims.NOT_JUDGED)
    }


def test_counts_on_the_front_page_lead_to_as_many_entries(built_book):
    marks = [m.attrs for m in page(built_book, "claims").select(".claim-id")]
    links = page(built_book, ROOT_PAGE).select('table a[href^="claims.html"]')
    assert len(links) >= 2 * len(claims.SOURCES)
    for link in links:
        wanted = parse_qs(urlsplit(link["href"]).query)
        assert int(words(link)) == sum(all(m[f"data-{k}"] in v for k, v in wanted.items()) for m in marks)


def test_the_front_page_opens_with_the_picture_and_names_every_source(built_book):
    shown = article(built_book, ROOT_PAGE)
    figure = shown.find("figure")
    assert len(figure.find("img")["alt"]) > 200
    assert "seeds" in words(figure.find("figcaption"))
    assert shown.find(["figure", "h2"]) is figure  # before the first section
    assert {a["href"] for a in shown.select("li a")} >= {f"claims.html?source={s}" for s in claims.SOURCES}


def test_each_judging_cell_has_its_anchor_and_its_verdict_leads_back(built_book):
    for claim in claims.load_claims().values():
        if claim.chapter in CHAPTERS:
            cell = cell_at(page(built_book, f"executed/{claim.chapter}").find(id=f"judged-{claim.id.lower()}"))
            assert ".judge(" in words(cell.select_one(".cell_input")).replace(" ", "")
            back = [a for a in cell.select(".cell_output a") if a["href"] == f"../claims.html#claim-{claim.id.lower()}"]
            assert not cell.select_one(".cell_output strong") or back, claim.id


def test_the_data_file_has_every_claim_with_addresses_that_exist(built_book):
    entries = json.loads((built_book / "claims.json").read_text(encoding="utf-8"))
    assert [e["id"] for e in entries] == list(claims.load_claims())
    for entry in entries:
        for field in ("figure", "code", "entry"):
            if entry[field]:
                file, anchor = target(built_book / "index.html", entry[field])
                assert parsed(file).find(id=anchor), entry[field]
    assert page(built_book, "claims").find("a", href="claims.json")


def test_the_figure_index_leads_to_figures_and_to_the_cells_that_draw_them(built_book):
    shown = article(built_book, "figures")
    rows = [r.find_all("td") for r in shown.select("tbody tr")]
    assert {"Figure 1", "Figure 16", "Theorem 4.1"} <= {words(r[0]) for r in rows}
    for _, drawn, judged, where in rows:
        links = drawn.find_all("a")
        assert bool(links) or bool(judged.find("a"))
        for link in links:
            file, anchor = target(built_book / "figures.html", link["href"])
            found = parsed(file).find(id=anchor)
            if words(link) == "cell":
                assert cell_at(found).find("figure")["id"] == anchor.removeprefix("code-")
            else:
                assert words(link) in words(found.find("figcaption"))
        assert where.find("code")
