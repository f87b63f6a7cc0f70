"""Links from words of the chapters to the glossary and the ledger: which words, and that the built pages have them."""

import importlib.util
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from ntklib.claims import load_claims

ROOT = Path(__file__).resolve().parent.parent


def first_name(text, names):
    spec = importlib.util.spec_from_file_location("terms", ROOT / "book" / "_ext" / "terms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.first_name(text, dict.fromkeys(names))
    return found and (found[0], found[1][0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two kernel\ndistances of the cone", ("kernel distance", "kernel\ndistances")),
        ("Cones and a cone", ("cone", "Cones")),
        ("the icecone and second-cone", None),
        ("in Phase II, after Phase I", ("Phase II", "Phase II")),
        ("phase II or Phase IIb", None),
        ("A2v, A20 and A2 (see KTA)", ("A2", "A2")),
        ("the kta of ktas", None),
    ],
)
def test_the_first_whole_word_is_found_in_its_spelling(text, found):
    assert first_name(text, ["cone", "kernel distance", "Phase I", "Phase II", "A2", "KTA"]) == found


def test_of_two_names_that_begin_together_the_longer_counts():
    assert first_name("the sharpness bound", ["sharpness", "sharpness bound"]) == ("sharpness bound", "sharpness bound")


@pytest.mark.slow
def test_chapters_lead_to_the_glossary_and_to_each_claim_that_they_name_once(built_book):
    claims, linked = load_claims(), set()
    for path in sorted((built_book / "executed").glob("*.html")):
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        links = [a["href"] for a in page.select("main a.term-link")]
        assert len(links) == len(set(links)), path.name
        assert all(address.startswith(("../glossary.html#", "../claims.html#claim-")) for address in links)
        assert not page.select("h1 .term-link, h2 .term-link, pre .term-link, .math .term-link, figcaption .term-link, a a")
        linked |= {a.get_text() for a in page.select("main a.term-link") if "claims.html" in a["href"]}
    assert linked <= claims.keys()
    assert len(linked) >= 40
