"""The built book is whole: pages, links, figures with their words, the ledger and the index."""

import json
import math
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup

from ntklib import book, chapters, claims

pytestmark = pytest.mark.slow

CONTENTS = yaml.safe_load((chapters.project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [CONTENTS["root"], *(entry["file"] for part in CONTENTS["parts"] for entry in part["chapters"])]
CHAPTERS = book.contents()
PRESET = "smoke"  # of the runs behind the fixture's book
RESOURCES = dict.fromkeys(["audio", "iframe", "img", "script", "source", "video"], "src") | {"object": "data", "link": "href"}
OUTSIDE = re.compile(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)'\"]*")  # in a style sheet
VERDICTS = {
    claims.HOLDS: "verdict-holds",
    claims.FAILS: "verdict-fails",
    claims.INCONCLUSIVE: "verdict-inconclusive",
    claims.NOT_JUDGED: "verdict-unjudged",
    claims.OTHER_PRESET: "verdict-unjudged",
}


@cache
def parsed(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def page(built_book, name):
    return parsed(built_book / f"{name}.html")


def article(built_book, name):
    return page(built_book, name).select_one("article.bd-article")


def html_pages(built_book):
    found = [p for p in built_book.rglob("*.html") if "_static" not in p.parts]
    assert len(found) > len(PAGES)  # and the search page
    return found


def words(element):
    return " ".join(element.get_text(" ").split())


def target(page_path, address):
    """The file a local address on a page leads to, and its anchor."""
    parts = urlsplit(address)
    path = (page_path.parent / unquote(parts.path)).resolve() if parts.path else page_path
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)


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


def test_every_local_link_and_anchor_exists(built_book):
    broken = []
    for path in html_pages(built_book):
        for element in parsed(path).find_all(href=True) + parsed(path).find_all(src=True):
            address = element.get("href") or element.get("src")
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            file, anchor = target(path, address)
            if not file.is_file() or not file.is_relative_to(built_book.resolve()):
                broken.append(f"{path.name}: {address} has no file")
            elif anchor and file.suffix == ".html" and not parsed(file).find(attrs={"id": anchor}):
                broken.append(f"{path.name}: {address} has no anchor")
    assert not broken


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
    for element in copy.select("pre, code, .math, script, style"):
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
        if (s["schedule"] == "cosine") == (s["weight_decay"] > 0):  # cosine with decay, constant without
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

    falls = [average(fall(where[lr, mu, seed]) for seed in seeds) for lr, mu in ((0.001, 0.9), (0.1, 0.1), (0.1, 0.9))]
    best = [average(max(values(where[lr, 0.9, s], "accuracy", split="test")) for s in seeds) for lr in (0.001, 0.1)]
    assert means_of(record, "A14") == pytest.approx([*falls, best[0] - best[1]], rel=1e-12, abs=1e-12)
    curves = {"depth": {}, "init": {}}
    for key in record["claims"]["A15"]["runs"]:
        s = settings_of(built_book, "trace_sweeps", key)
        group = "depth" if s["model"].startswith("resnet") else "init"
        curves[group].setdefault(s["seed"], []).append(values(key, "trace", split="train"))
    expected = [average(rank_correlation(*pair) for pair in curves[group].values()) for group in ("depth", "init")]
    assert means_of(record, "A15") == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)
