"""The book in a browser: every page, light and dark, wide and on a phone, without a word to the outside."""

import pytest
import yaml
from browser import PHONE, WIDE, chromium, console_errors, outside_requests, resize, screenshot, serve, wait_for
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ntklib.paths import project_root

pytestmark = pytest.mark.slow

CONTENTS = yaml.safe_load((project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
ENTRIES = [entry for part in CONTENTS["parts"] for chapter in part["chapters"] for entry in (chapter, *chapter.get("sections", []))]
PAGES = [CONTENTS["root"], *(entry["file"] for entry in ENTRIES)]
SIZES = {"wide": WIDE, "phone": PHONE}


@pytest.fixture(scope="module")
def site(built_book):
    with serve(built_book) as address:
        yield address


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def set_theme(driver, site, theme):
    """Store the reader's choice, as the page's own button does; it counts from the next page on."""
    if not driver.current_url.startswith(site):
        driver.get(f"{site}/_static/favicon.svg")  # a small page of the same origin, which storage belongs to
    driver.execute_script("localStorage.setItem('mode', arguments[0]); localStorage.setItem('theme', arguments[0])", theme)


def wait_until_drawn(driver):
    """Wait for mathematics and images; on pages without mathematics there is no MathJax to wait for."""
    driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const mathematics = document.querySelector(".math") ? MathJax.startup.promise : Promise.resolve();
        const images = [...document.images].map(i => i.complete || new Promise(r => i.onload = i.onerror = r));
        Promise.all([mathematics, document.fonts.ready, ...images]).then(() => done());
        """
    )


def too_wide(driver, width):
    """Elements past the right edge, if the page scrolls sideways; a phone would zoom out, so ``width`` is what counts."""
    return driver.execute_script(
        """
        const page = document.documentElement, width = arguments[0];
        if (page.scrollWidth <= width + 1) return [];
        const wide = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > width + 1);
        return [`page: ${page.scrollWidth}`, ...wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120))];
        """,
        width,
    )


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("theme", "first"), [("light", "wide"), ("dark", "phone")])
def test_each_page_is_drawn_whole_and_offline(driver, site, name, theme, first):
    set_theme(driver, site, theme)
    console_errors(driver), outside_requests(driver)  # what earlier pages left
    resize(driver, SIZES[first])
    driver.get(f"{site}/{name}.html")
    wait_until_drawn(driver)
    assert driver.execute_script("return document.documentElement.dataset.theme") == theme

    formulas = len(driver.find_elements(By.CSS_SELECTOR, ".math"))
    assert len(driver.find_elements(By.TAG_NAME, "mjx-container")) == formulas
    assert not driver.find_elements(By.CSS_SELECTOR, "mjx-merror, .MathJax_Error")

    images = driver.execute_script("return [...document.images].map(i => [i.getAttribute('src'), i.naturalWidth, i.alt])")
    assert not [image for image in images if not image[1] or not image[2]]

    for size in sorted(SIZES, key=lambda s: s != first):  # the other size without loading again
        resize(driver, SIZES[size])
        assert not too_wide(driver, SIZES[size][0]), size
        screenshot(driver, f"{name.replace('/', '-')}-{theme}-{size}", SIZES[size])
    assert not console_errors(driver)
    assert not outside_requests(driver)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_keep_their_colours(driver, site, theme):
    set_theme(driver, site, theme)
    resize(driver, WIDE)
    driver.get(f"{site}/executed/quickstart.html")
    for image in driver.find_elements(By.CSS_SELECTOR, "figure img"):
        assert image.value_of_css_property("filter") == "none"
        assert image.value_of_css_property("opacity") == "1"
        assert image.is_displayed()


def test_the_reader_switches_from_light_to_dark(driver, site):
    set_theme(driver, site, "auto")
    resize(driver, WIDE)
    driver.get(f"{site}/{CONTENTS['root']}.html")
    button = next(b for b in driver.find_elements(By.CSS_SELECTOR, "button.theme-switch-button") if b.is_displayed())
    background = "return getComputedStyle(document.body).backgroundColor"
    light = driver.execute_script(background)
    button.click()  # from "as the system", which is light here, to dark
    wait_for(driver, lambda: driver.execute_script("return document.documentElement.dataset.theme") == "dark", "still light")
    assert driver.execute_script(background) != light


def test_the_search_finds_a_term(driver, site):
    set_theme(driver, site, "light")
    console_errors(driver), outside_requests(driver)
    resize(driver, WIDE)
    driver.get(f"{site}/{CONTENTS['root']}.html")
    next(b for b in driver.find_elements(By.CSS_SELECTOR, "button.search-button__button") if b.is_displayed()).click()
    field = wait_for(
        driver,
        lambda: next((f for f in driver.find_elements(By.CSS_SELECTOR, "input[name=q]") if f.is_displayed()), None),
        "the search button opened no field",
    )
    field.send_keys("eigenvalue", Keys.ENTER)
    results = "#search-results ul.search li a"
    wait_for(driver, lambda: driver.find_elements(By.CSS_SELECTOR, results), "no result")
    assert "search.html?q=eigenvalue" in driver.current_url
    wait_for(driver, lambda: "finished" in driver.find_element(By.CSS_SELECTOR, ".search-summary").text, "the search did not end")
    found = [a.get_attribute("href") for a in driver.find_elements(By.CSS_SELECTOR, results)]
    assert any("executed/quickstart.html" in address for address in found)
    screenshot(driver, "search-light-wide", WIDE)
    assert not console_errors(driver)
    assert not outside_requests(driver)
