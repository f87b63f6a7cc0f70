"""The page on which JupyterLab opens lists every chapter once, and its links lead somewhere."""

import re

import pytest

from ntklib import book, chapters, start_page


def links():
    return re.findall(r"^- \[(.+)\]\((\S+\.ipynb)\):? (.+)$", start_page.page(), re.MULTILINE)


def test_every_chapter_of_the_contents_is_listed_once_in_its_order():
    assert [path for _, path, _ in links()] == [f"{chapter}.ipynb" for chapter in book.contents()]


def test_every_entry_has_a_title_and_says_what_it_is_about():
    for title, path, words in links():
        assert len(title) > 5, path
        assert words.endswith(("?", ".")), path
        assert 5 <= len(words.split()) <= 80, path
        assert "{" not in words.replace("$K_{", ""), path


def test_every_link_leads_to_a_file():
    for address in re.findall(r"\]\((\S+)\)", start_page.page()):
        assert (chapters.notebooks_folder() / address).exists(), address


def test_the_page_is_written_beside_the_notebooks(tmp_path, monkeypatch):
    page = start_page.page()
    monkeypatch.setattr(chapters, "notebooks_folder", lambda: tmp_path)
    monkeypatch.setattr(start_page, "page", lambda: page)
    assert start_page.write().read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing. Does it\nmove {cite}`a2020`? It does.\n\nMore?", "One thing. Does it move?"),
        ("Nothing is asked here (see {cite}`b`). Or there.\n\nIs it?", "Nothing is asked here (see)."),
        ("", ""),
    ],
)
def test_the_opening_goes_up_to_the_first_question(text, expected):
    assert start_page.opening(text) == expected
