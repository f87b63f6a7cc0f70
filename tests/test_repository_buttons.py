"""Launch buttons: none without an address, and with one they open the source of the chapter, not its executed copy."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from bs4 import BeautifulSoup
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://github.com/someone/some-book"


def extension():
    spec = importlib.util.spec_from_file_location("repository", ROOT / "book" / "_ext" / "repository.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checked(**setting):
    config = SimpleNamespace(repository=setting)
    extension()._check(None, config)
    return config.repository


def buttons(page, **setting):
    context = {"header_buttons": []}
    extension()._add_buttons(SimpleNamespace(config=SimpleNamespace(repository=checked(**setting))), page, "", context, None)
    return context["header_buttons"]


def test_the_setting_is_off_as_delivered():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]
    assert config["config"]["repository"] == {"url": "", "branch": "main"}
    assert config["local_extensions"]["repository"] == "book/_ext"
    assert not config["config"]["html_theme_options"]["launch_buttons"]


@pytest.mark.parametrize("page", ["executed/quickstart", "intro"])
def test_no_address_no_button(page):
    assert buttons(page) == buttons(page, url="", branch="main") == []


def test_a_chapter_opens_from_the_folder_of_notebooks():
    launch, source = buttons("executed/ema", url=ADDRESS, branch="v1")
    assert {b["text"]: b["url"] for b in launch["buttons"]} == {
        "Colab": "https://colab.research.google.com/github/someone/some-book/blob/v1/notebooks/ema.ipynb",
        "Binder": "https://mybinder.org/v2/gh/someone/some-book/v1?urlpath=lab/tree/notebooks/ema.ipynb",
    }
    assert source["url"] == ADDRESS


def test_pages_of_prose_have_the_repository_alone():
    assert [b["label"] for b in buttons("rerun", url=ADDRESS)] == ["source-repository-button"]


@pytest.mark.parametrize("written", [ADDRESS, ADDRESS + "/", ADDRESS + ".git", f" {ADDRESS} "])
def test_the_address_may_be_written_in_any_usual_way(written):
    assert checked(url=written) == {"url": ADDRESS, "branch": "main"}


def test_other_hosts_have_the_services_that_know_them():
    urls = extension().launch_urls("https://gitlab.com/group/part/name", "main", "notebooks/ema.ipynb")
    assert urls == {"Binder": "https://mybinder.org/v2/gl/group%2Fpart%2Fname/main?urlpath=lab/tree/notebooks/ema.ipynb"}
    urls = extension().launch_urls("https://git.example.org/a/b", "x/y", "notebooks/ema.ipynb")
    assert urls["Binder"].startswith("https://mybinder.org/v2/git/https%3A%2F%2Fgit.example.org%2Fa%2Fb/x%2Fy?")


@pytest.mark.parametrize("url", ["github.com/a/b", "http://github.com/a/b", "https://github.com/a"])
def test_an_address_that_cannot_work_is_refused(url):
    with pytest.raises(ExtensionError, match=r"repository.url must be empty or like https://github.com/OWNER/NAME. Got"):
        checked(url=url)


def test_a_misspelt_key_is_refused():
    with pytest.raises(ExtensionError, match="keys url and branch only. Got adress"):
        checked(adress=ADDRESS)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["", ADDRESS])
def test_the_theme_shows_the_buttons(tmp_path, url):
    (tmp_path / "executed").mkdir()
    (tmp_path / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'repository']\nhtml_theme = 'sphinx_book_theme'\nroot_doc = 'intro'\n"
        f"html_theme_options = {{'launch_buttons': {{}}}}\nrepository = {{'url': {url!r}}}\n",
        encoding="utf-8",
    )
    (tmp_path / "intro.md").write_text("# Intro\n\n```{toctree}\nexecuted/ema\n```\n", encoding="utf-8")
    (tmp_path / "executed" / "ema.md").write_text("# A chapter\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(tmp_path), str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    page = BeautifulSoup((out / "executed" / "ema.html").read_text(encoding="utf-8"), "html.parser")
    links = {a["href"] for a in page.select("a[href]") if "mybinder" in a["href"] or "colab" in a["href"]}
    wanted = {b["url"] for b in buttons("executed/ema", url=url)[0]["buttons"]} if url else set()
    assert links == wanted
    assert bool(page.select_one(f"a[href='{ADDRESS}']")) == bool(url)
    for image in page.select(".dropdown-launch-buttons img"):
        assert (out / "executed" / image["src"]).exists()
        assert image.get("alt")
