"""The book in a browser: every page, light and dark, wide and on a phone, without a word to the outside."""

import pytest
import yaml
from browser import PHONE, WIDE, chromium, console_errors, outside_requests, resize, screenshot, serve, wait_for
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

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


VISIBLE = "return [...document.querySelectorAll('.claim')].filter(c => c.offsetHeight).map(c => c.id)"
MARKS = "return [...document.querySelectorAll('.claim-id')].map(m => ({...m.dataset}))"


def open_ledger(driver, site, address=""):
    driver.get(f"{site}/{CONTENTS['root']}.html")  # so that the page is loaded anew
    driver.get(f"{site}/claims.html{address}")
    wait_for(driver, lambda: driver.find_element(By.ID, "ledger-filter").is_displayed(), "the filter did not appear")


def ids(marks, **wanted):
    return [f"claim-{m['id'].lower()}" for m in marks if all(m[k] == v for k, v in wanted.items())]


def told(driver):
    return driver.find_element(By.ID, "ledger-count").text


def test_the_ledger_is_filtered_by_keyboard_and_the_view_is_in_the_address(driver, site):
    resize(driver, WIDE)
    open_ledger(driver, site)
    marks = driver.execute_script(MARKS)
    assert driver.execute_script(VISIBLE) == ids(marks)
    source = driver.find_element(By.NAME, "source")
    driver.execute_script("arguments[0].focus()", source)
    driver.switch_to.active_element.send_keys("Deep")  # a select takes the option that begins with what is typed
    assert driver.execute_script(VISIBLE) == ids(marks, source="deep_linear")
    assert told(driver) == f"{len(ids(marks, source='deep_linear'))} of {len(marks)} claims shown"
    driver.switch_to.active_element.send_keys(Keys.TAB)
    assert driver.switch_to.active_element.get_attribute("name") == "verdict"
    driver.switch_to.active_element.send_keys("not j")
    assert driver.execute_script(VISIBLE) == ids(marks, source="deep_linear", verdict="not judged")
    assert "source=deep_linear&verdict=not+judged" in driver.current_url
    assert driver.execute_script("return [...document.querySelectorAll('h2')].filter(h => h.offsetHeight).length") <= 2
    shown = driver.execute_script(VISIBLE)
    driver.refresh()
    wait_for(driver, lambda: told(driver), "the filter did not appear")
    assert driver.execute_script(VISIBLE) == shown
    driver.find_element(By.CSS_SELECTOR, "#ledger-filter button").send_keys(Keys.ENTER)
    wait_for(driver, lambda: driver.execute_script(VISIBLE) == ids(marks), "not all claims came back")
    assert driver.current_url.endswith("claims.html")


def test_the_ledger_is_filtered_by_verdict_and_words(driver, site):
    open_ledger(driver, site)
    driver.execute_script(  # verdicts of small runs are alike: give every third claim another
        "document.querySelectorAll('.claim-id').forEach((m, i) => { m.dataset.verdict = i % 3 ? 'holds' : 'fails' })"
    )
    marks = driver.execute_script(MARKS)
    verdict = Select(driver.find_element(By.NAME, "verdict"))
    verdict.select_by_value("fails")
    wait_for(driver, lambda: driver.execute_script(VISIBLE) == ids(marks, verdict="fails"), "other claims are shown")
    assert told(driver) == f"{(len(marks) + 2) // 3} of {len(marks)} claims shown"
    verdict.select_by_value("holds")
    wait_for(driver, lambda: driver.execute_script(VISIBLE) == ids(marks, verdict="holds"), "other claims are shown")
    verdict.select_by_value("")
    driver.find_element(By.NAME, "words").send_keys("KERNEL distance a16")
    assert "claim-a16" in driver.execute_script(VISIBLE)
    assert len(driver.execute_script(VISIBLE)) <= 5  # those that mention it
    assert "words=KERNEL+distance+a16" in driver.current_url


def test_a_linked_view_a_linked_claim_and_an_unknown_value(driver, site):
    open_ledger(driver, site, "?source=cone&verdict=fails")
    marks = driver.execute_script(MARKS)
    assert driver.execute_script(VISIBLE) == ids(marks, source="cone", verdict="fails")
    open_ledger(driver, site, "?source=cone#claim-a5m")
    assert "claim-a5m" in driver.execute_script(VISIBLE)  # the claim wins
    open_ledger(driver, site, "?source=cone#claim-d3")
    assert driver.execute_script(VISIBLE) == ids(marks, source="cone")
    open_ledger(driver, site, "?verdict=perhaps")
    assert driver.execute_script(VISIBLE) == ids(marks)


def test_two_clicks_lead_from_the_front_page_to_the_figure_of_a_claim(driver, site):
    console_errors(driver)
    resize(driver, WIDE)
    driver.get(f"{site}/{CONTENTS['root']}.html")
    driver.execute_script("arguments[0].click()", driver.find_element(By.CSS_SELECTOR, 'table a[href="claims.html?source=eos"]'))
    wait_for(driver, lambda: driver.find_elements(By.ID, "ledger-filter"), "the ledger did not open")
    assert set(driver.execute_script(VISIBLE)) == set(ids(driver.execute_script(MARKS), source="eos"))
    link = driver.find_element(By.CSS_SELECTOR, '#claim-b1 a[href$="#fig-eos-rates"]')
    driver.execute_script("arguments[0].click()", link)
    wait_for(driver, lambda: driver.current_url.endswith("executed/eos_alignment.html#fig-eos-rates"), "the figure did not open")
    assert driver.find_element(By.CSS_SELECTOR, "#fig-eos-rates img").is_displayed()
    assert not console_errors(driver)


def test_the_ledger_is_whole_without_scripts_and_on_paper(driver, site):
    resize(driver, WIDE)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(f"{site}/claims.html")
        boxes = driver.find_elements(By.CSS_SELECTOR, ".claim")
        assert boxes
        assert all(box.is_displayed() for box in (boxes[0], boxes[-1]))
        assert not driver.find_element(By.ID, "ledger-filter").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    open_ledger(driver, site, "?source=cone")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not driver.find_element(By.NAME, "source").is_displayed()
        assert told(driver).startswith(str(len(driver.execute_script(VISIBLE))))  # a filtered view says that it is one
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
