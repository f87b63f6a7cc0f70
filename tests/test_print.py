"""The book on paper: one page of all, printed by a browser, without what belongs to a screen."""

import re
import shutil
import zlib

import pytest
import yaml
from browser import WIDE, chromium, resize

from ntklib import printing
from ntklib.book import BuildError
from ntklib.paths import project_root

PAGES = {
    "first": "# The first page\n\nSee {numref}`a-table` and {eq}`eq-own`, and the [second](second.md).\n\n```python\nx = 1\n```\n",
    "second": "# The second page\n\n$$\nx^2\n$$ (eq-own)\n\n"
    ":::{table} Numbers.\n:name: a-table\n\n| a | b |\n|---|---|\n| 1 | 2 |\n:::\n",
}


def test_without_a_browser_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"Printing needs Chromium or Chrome .* Got none on the path\. Install one"):
        printing.find_browser()


@pytest.mark.slow
def test_a_browser_that_prints_nothing_is_an_error(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p>text</p>")
    with pytest.raises(BuildError, match=r"printed no PDF of .*page\.html"):
        printing.print_page(page, tmp_path / "page.pdf", shutil.which("true"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A book of two pages with this book's settings, as one page."""
    root = tmp_path_factory.mktemp("printed")
    book = root / "book"
    for part in ("_ext", "_static"):
        shutil.copytree(project_root() / "book" / part, book / part)
    for name in ("_config.yml", "book/references.bib"):
        shutil.copyfile(project_root() / name, root / name)
    for name, text in PAGES.items():
        (book / f"{name}.md").write_text(text, encoding="utf-8")
    (book / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "first", "chapters": [{"file": "second"}]}))
    return printing.single_page(book, root / "_config.yml", root)


def text_of(pdf):
    """Number of drawing commands for text, and the titles of the outline."""
    content = pdf.read_bytes()
    drawn = 0
    for found in re.finditer(rb"stream\r?\n(.*?)endstream", content, re.DOTALL):
        try:
            drawn += len(re.findall(rb"\bT[jJ]\b", zlib.decompress(found[1])))
        except zlib.error:
            continue
    return drawn, re.findall(rb"/Title \((.*?)\)", content)


@pytest.mark.slow
def test_two_pages_are_printed_with_their_text_and_headings(single, tmp_path):
    browser = next((b for b in printing.BROWSERS if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no browser is installed")
    html = single.read_text(encoding="utf-8")
    assert "The second page" in html
    assert "Table 1" in html
    assert "equation (1)" in html
    pdf = printing.print_page(single, tmp_path / "book.pdf", browser)
    assert pdf.read_bytes().startswith(b"%PDF")
    drawn, titles = text_of(pdf)
    assert drawn > 10
    assert {b"The first page", b"The second page"} <= set(titles)


@pytest.mark.slow
def test_what_belongs_to_the_screen_is_not_on_paper(single, tmp_path):
    with chromium(tmp_path / "profile") as driver:
        driver.get(single.as_uri())
        resize(driver, WIDE)
        driver.execute_script("document.documentElement.dataset.theme = 'dark'")
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        shown = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
        for selector in (".bd-sidebar-primary", ".bd-header-article", ".headerlink", ".bd-footer-content"):
            assert driver.execute_script(shown, selector) == 0, selector
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        assert driver.execute_script(style, "article p", "color") == "rgb(0, 0, 0)"
        assert driver.execute_script(style, "body", "backgroundColor") in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
        assert driver.execute_script(style, "pre", "whiteSpace") == "pre-wrap"
