"""The built book is whole: pages, links, figures with their words, the ledger and the index."""

import json
import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import links
import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from links import parsed, target

from ntklib import book, chapters

pytestmark = pytest.mark.slow

CONTENTS = yaml.safe_load((chapters.project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
ENTRIES = [entry for part in CONTENTS["parts"] for chapter in part["chapters"] for entry in (chapter, *chapter.get("sections", []))]
PAGES = [CONTENTS["root"], *(entry["file"] for entry in ENTRIES)]
CHAPTERS = book.contents()
PRESET = "smoke"  # of the runs behind the fixture's book
RESOURCES = dict.fromkeys(["audio", "iframe", "img", "script", "source", "video"], "src") | {"object": "data", "link": "href"}
OUTSIDE = re.compile(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)'\"]*")  # in a style sheet


def page(built_book, name):
    return parsed(built_book / f"{name}.html")


def article(built_book, name):
    return page(built_book, name).select_one("article.bd-article")


def html_pages(built_book):
    found = links.pages(built_book)
    assert len(found) > len(PAGES)  # and the search page
    return found


def words(element):
    return " ".join(element.get_text(" ").split())


def figure_cells(chapter):
    """Source metadata of a chapter's figures, by name."""
    cells = nbformat.read(chapters.notebook_path(chapter), 4).cells
    found = [c.metadata["mystnb"] for c in cells if "figure" in c.metadata.get("mystnb", {})]
    return {m["figure"]["name"]: m for m in found}


def parameters(chapter):
    return chapters.default_parameters(chapter) | chapters.preset_parameters(chapter, PRESET)


FIGURES = [(chapter, name) for chapter in CHAPTERS for name in figure_cells(chapter)]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_of_the_contents_is_there_with_one_title(built_book, name):
    titles = page(built_book, name).find_all("h1")
    printed = [h for h in titles if h.find_parent(class_="onlyprint")]  # the theme's second copy, on paper only
    assert len(titles) - len(printed) == 1
    assert article(built_book, name).h1
    assert page(built_book, name).html["lang"] == "en"


@pytest.mark.parametrize("name", PAGES)
def test_headings_descend_one_level_at_a_time(built_book, name):
    levels = [int(h.name[1]) for h in article(built_book, name).find_all(re.compile(r"^h[1-6]$"))]
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels


def test_the_sidebar_leads_to_every_page(built_book):
    links = page(built_book, CONTENTS["root"]).select("nav.bd-links a.reference.internal")
    assert {f"{name}.html" for name in PAGES if name != CONTENTS["root"]} <= {a["href"] for a in links}


def test_every_link_leads_somewhere_and_every_name_is_given_once(built_book):
    assert not links.problems(built_book)


def test_no_page_loads_anything_from_outside(built_book):
    outside = []
    for path in html_pages(built_book):
        for tag, attribute in RESOURCES.items():
            for element in parsed(path).find_all(tag, **{attribute: True}):
                if urlsplit(element[attribute]).netloc:
                    outside.append(f"{path.name}: {element}")
        outside += [
            f"{path.name}: {s}" for s in parsed(path).find_all("style") if re.search(r"@import|url\(['\"]?(https?:)?//", s.text)
        ]
    for sheet in built_book.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        outside += [f"{sheet.name}: {m}" for m in re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)'\"]*", text)]
    assert not outside


def test_links_to_the_web_are_plain_hyperlinks_with_a_secure_address(built_book):
    for path in html_pages(built_book):
        for element in parsed(path).find_all(href=re.compile(r"^(\w+:)?//")):
            assert element.name == "a"
            assert element["href"].startswith("https://"), f"{path.name}: {element['href']}"


def test_every_image_has_an_alternative_text(built_book):
    images = [(path.name, image) for path in html_pages(built_book) for image in parsed(path).find_all("img")]
    assert len(images) >= len(FIGURES)
    assert not [(name, image["src"]) for name, image in images if not image.get("alt", "").strip()]


@pytest.mark.parametrize("name", PAGES)
def test_no_markup_is_left_over_in_the_text(built_book, name):
    copy = BeautifulSoup(str(article(built_book, name)), "html.parser")
    for element in copy.select("pre, code, .math, .sig, script, style"):
        element.decompose()
    assert not re.findall(r".{0,30}(?:\$|\\\w|\{\w+\}|\]\(|`).{0,30}", copy.get_text())


@pytest.mark.parametrize(("chapter", "name"), FIGURES)
def test_each_figure_says_its_seeds_and_leaves_no_parameter_open(built_book, chapter, name):
    source, values = figure_cells(chapter)[name], parameters(chapter)
    figure = page(built_book, f"executed/{chapter}").find("figure", id=name)
    image, caption = figure.find("img"), words(figure.find("figcaption"))
    assert re.match(r"Figure \d+ ", caption)
    assert re.search(r"\bseeds?\b", caption)
    if "{num_seeds}" in source["figure"]["caption"]:
        assert f"{values['num_seeds']} seeds" in caption
    assert not [p for p in values if f"{{{p}}}" in caption + image["alt"]]
    assert image["alt"].split()[:5] == source["image"]["alt"].split()[:5]
    assert len(image["alt"]) > 40


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_chapter_shows_its_figures_and_outputs_and_no_error(built_book, chapter):
    shown = article(built_book, f"executed/{chapter}")
    assert [f["id"] for f in shown.find_all("figure")] == list(figure_cells(chapter))
    assert not shown.select(".traceback, .cell_output .stderr")
    executed = nbformat.read(built_book.parent.parent / "book" / "executed" / f"{chapter}.ipynb", 4)
    code = [c for c in executed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert {o.output_type for c in code for o in c.outputs} <= {"stream", "display_data", "execute_result"}
    assert not [o for c in code for o in c.outputs if o.get("name") == "stderr"]
    assert executed.metadata["ntklib"]["preset"] == PRESET


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_chapter_shows_the_parameters_of_the_run(built_book, chapter):
    shown = article(built_book, f"executed/{chapter}").get_text()
    for name, value in chapters.preset_parameters(chapter, PRESET).items():
        written = json.dumps(value).replace("true", "True").replace("false", "False")  # papermill's quotes, Python's words
        assert re.search(rf"^{name} = {re.escape(written)}$", shown, re.MULTILINE), name


def test_the_search_index_knows_the_subject(built_book):
    text = (built_book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    found = [index[part]["kernel"] for part in ("terms", "titleterms")]  # one page is a number, several are a list
    pages = {index["docnames"][i] for f in found for i in (f if isinstance(f, list) else [f])}
    assert {f"executed/{c}" for c in CHAPTERS} <= pages


def test_the_download_button_gives_the_executed_notebook(built_book):
    for chapter in CHAPTERS:
        link = page(built_book, f"executed/{chapter}").select_one("a.btn-download-source-button")
        file, _ = target(built_book / "executed" / f"{chapter}.html", link["href"])
        assert nbformat.read(Path(file), 4).metadata["ntklib"]["chapter"] == chapter
