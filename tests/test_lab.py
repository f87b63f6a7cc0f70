"""A reader finds a chapter in JupyterLab, changes a parameter and runs all cells; known runs return, and sliders move pictures."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import psutil
import pytest
from browser import WAIT, WIDE, chromium, outside_requests, resize, screenshot, wait_for
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ntklib import book, chapters, playground, start_page

pytestmark = pytest.mark.slow

CHAPTER = "quickstart"
WIDTH = 40  # what the reader types; no preset has it
RUN_ALL = 180.0  # seconds for all cells, nearly all of them imports
SETTINGS = {  # Lab's own names
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay on the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "extensionmanager-extension/plugin": {"enabled": False},
}


def smoke_copy(folder, chapter):
    """The chapter's notebook with the smoke preset's values as defaults."""
    notebook = nbformat.read(chapters.notebook_path(chapter), 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in chapters.preset_parameters(chapter, "smoke").items():
        cell.source, count = re.subn(rf"^({name}: \w+ = )[^ ]+", rf"\g<1>{value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1
    nbformat.write(notebook, folder / f"{chapter}.ipynb")


@contextlib.contextmanager
def lab(folder, *options):
    """JupyterLab on a folder, with settings, kernels and runs of its own below it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = folder / "jupyter"
    for name, values in SETTINGS.items():
        path = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    variables = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    variables = {f"JUPYTER_{k}": str(own / v) for k, v in variables.items()}
    variables |= {"JUPYTERLAB_SETTINGS_DIR": str(own / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces")}
    variables |= {"IPYTHONDIR": str(own / "ipython"), "NTKLIB_RUNS": str(folder / "runs"), "NTKLIB_JOBS": "1"}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder / 'work'}", "--IdentityProvider.token=",
        "--ServerApp.password=", "--ServerApp.disable_check_xsrf=true", "--LabApp.news_url=", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate", *options,
    ]  # fmt: skip
    with (folder / "lab.log").open("wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        server = subprocess.Popen(command, cwd=folder, env=os.environ | variables, **streams)
        try:
            yield f"http://127.0.0.1:{port}", server
        finally:
            stop(server)


def stop(server):
    """End the server, which ends its kernels; whatever is left after that is killed."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(20)
    _, left = psutil.wait_procs(family, timeout=5)
    for process in [server, *left]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.wait(10)
    psutil.wait_procs(left, timeout=10)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def asked(address, server):
    """The server's answer to a request of its API; None while it takes no requests yet."""
    assert server.poll() is None, "JupyterLab ended too early"
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def kernel_is_ready(address, server):
    """Whether the one kernel has started, with the page connected to it."""
    kernels = asked(f"{address}/api/kernels", server)
    return kernels and kernels[0]["execution_state"] == "idle" and kernels[0]["connections"] > 0


def find(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def set_width(driver, width):
    """Replace the line of the parameters cell that sets the width, by clicking into it and typing."""
    lines = ".jp-CodeCell .cm-line"
    old = "width: int ="
    line = wait_for(driver, lambda: next((e for e in find(driver, lines) if e.text.startswith(old)), None), f"no line {old!r}")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
    typed = f"width: int = {width}"
    ActionChains(driver).click(line).send_keys(Keys.HOME).key_down(Keys.SHIFT).send_keys(Keys.END).key_up(Keys.SHIFT).perform()
    ActionChains(driver).send_keys(typed).perform()
    wait_for(driver, lambda: typed in [e.text for e in find(driver, lines)], "the new value is not in the cell")


def run_all_cells(driver):
    """Run > Run All Cells."""
    next(e for e in find(driver, ".lm-MenuBar-itemLabel") if e.text == "Run").click()
    entry = ".lm-Menu-item[data-command='runmenu:run-all']"
    wait_for(driver, lambda: find(driver, entry) and find(driver, entry)[0].is_displayed(), "no such entry in the menu")
    find(driver, entry)[0].click()


def numbers(driver):
    """Execution numbers of the code cells, None where a cell has not run or is at work; an error in any of them ends the test."""
    errors = find(driver, "[data-mime-type='application/vnd.jupyter.error']")
    assert not errors, errors[0].text
    prompts = driver.execute_script("return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)")
    found = [re.fullmatch(r"\[(\d+)\]:", p) for p in prompts]
    return [int(f[1]) if f else None for f in found]


def all_cells_ran(driver):
    """Whether every code cell has its number."""
    found = numbers(driver)
    return found and all(found)


def figures(driver):
    """The pictures on the page, by their content, once all of them are drawn."""
    images = driver.execute_script(
        "return [...document.querySelectorAll('.jp-RenderedImage img')].map(i => [i.src, i.naturalWidth])"
    )
    assert min(width for _, width in images) > 300
    return [hashlib.sha256(source.encode()).hexdigest() for source, _ in images]


def figures_of_a_run(driver):
    """Run all cells and wait for the last of them; the figures and the seconds it took."""
    before, start = max((n for n in numbers(driver) if n), default=0), time.monotonic()
    run_all_cells(driver)
    wait_for(driver, lambda: all(n and n > before for n in numbers(driver)), "not all cells ran", RUN_ALL)
    return figures(driver), time.monotonic() - start


def files_of(folder):
    """What would change if a run were computed again: names, sizes and times of the stored files."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_reader_changes_a_parameter_in_jupyterlab_and_what_is_known_is_not_computed_again(tmp_path):
    (tmp_path / "work").mkdir()
    smoke_copy(tmp_path / "work", CHAPTER)
    smoke, store = chapters.preset_parameters(CHAPTER, "smoke"), tmp_path / "runs" / "store" / CHAPTER
    with chromium(tmp_path / "profile") as driver, lab(tmp_path) as (address, server):
        wait_for(driver, lambda: asked(f"{address}/api/status", server), "JupyterLab does not answer")
        resize(driver, WIDE)
        driver.get(f"{address}/lab/tree/{CHAPTER}.ipynb")
        wait_for(driver, lambda: kernel_is_ready(address, server), "no kernel started", 2 * WAIT)

        first, fresh = figures_of_a_run(driver)
        assert len(first) == 2
        kept = files_of(store)
        set_width(driver, WIDTH)
        second, _ = figures_of_a_run(driver)
        assert not set(first) & set(second), "a figure does not follow the parameter"
        both = files_of(store)
        assert both.items() > kept.items()

        again, cached = figures_of_a_run(driver)
        assert again == second
        set_width(driver, smoke["width"])
        back, _ = figures_of_a_run(driver)
        assert back == first
        assert files_of(store) == both, "a known run was computed again"
        print(f"all cells: {fresh:.1f} s with imports and runs, {cached:.1f} s with runs from the store")

        assert not find(driver, ".jp-Dialog")
        screenshot(driver, "lab", WIDE)
        assert not outside_requests(driver)

    found = [json.loads(p.read_text(encoding="utf-8")) for p in store.glob("*/run.json")]
    assert len(found) == 2 * smoke["num_seeds"]
    assert {r["settings"]["width"] for r in found} == {WIDTH, smoke["width"]}
    assert {r["status"] for r in found} == {"complete"}


def options_of_make_lab():
    """The options of JupyterLab in `make lab`."""
    printed = subprocess.run(["make", "-n", "lab"], cwd=chapters.project_root(), capture_output=True, text=True, check=True).stdout
    return [word for word in shlex.split(printed) if word.startswith("--LabApp.")]


def test_lab_opens_on_a_page_that_leads_to_every_chapter(tmp_path):
    folder = tmp_path / "work" / "notebooks"
    shutil.copytree(chapters.notebooks_folder(), folder, ignore=shutil.ignore_patterns(".*"))
    (folder / start_page.PATH).write_text(start_page.page(), encoding="utf-8")
    with chromium(tmp_path / "profile") as driver, lab(tmp_path, *options_of_make_lab()) as (address, server):
        wait_for(driver, lambda: asked(f"{address}/api/status", server), "JupyterLab does not answer")
        resize(driver, WIDE)
        driver.get(address)
        wait_for(driver, lambda: find(driver, ".jp-MarkdownViewer h1"), "the start page is not shown", 2 * WAIT)
        assert find(driver, ".jp-MarkdownViewer h1")[0].text.startswith("Start here")
        links = {e.text: e for e in find(driver, ".jp-MarkdownViewer li a") if e.text}
        titles = {title_of(chapter) for chapter in book.contents()}
        assert titles <= links.keys()
        screenshot(driver, "lab-start", WIDE)

        links[title_of("playground")].click()
        wait_for(driver, lambda: find(driver, ".jp-NotebookPanel h1"), "the chapter did not open")
        assert find(driver, ".jp-NotebookPanel h1")[0].text.startswith(title_of("playground"))
        wait_for(driver, lambda: kernel_is_ready(address, server), "no kernel started", 2 * WAIT)
        assert not outside_requests(driver)


def title_of(chapter):
    cells = nbformat.read(chapters.notebook_path(chapter), 4).cells
    return cells[0].source.splitlines()[0].removeprefix("# ")


def shown(driver):
    """Source and alternative text of every picture of the playground."""
    script = (
        "return [...document.querySelectorAll('.ntklib-playground img')].map(i => [i.src, i.alt, i.complete && i.naturalWidth])"
    )
    return driver.execute_script(script)


def sliders(driver, instrument):
    return find(driver, ".ntklib-playground")[instrument].find_elements(By.CSS_SELECTOR, "[role=slider]")


def test_the_keyboard_moves_the_sliders_of_the_playground(tmp_path):
    (tmp_path / "work").mkdir()
    smoke_copy(tmp_path / "work", "playground")
    with chromium(tmp_path / "profile") as driver, lab(tmp_path) as (address, server):
        wait_for(driver, lambda: asked(f"{address}/api/status", server), "JupyterLab does not answer")
        resize(driver, WIDE)
        driver.get(f"{address}/lab/tree/playground.ipynb")
        wait_for(driver, lambda: kernel_is_ready(address, server), "no kernel started", 2 * WAIT)
        run_all_cells(driver)
        wait_for(driver, lambda: all_cells_ran(driver), "not all cells ran", RUN_ALL)
        wait_for(
            driver, lambda: len(shown(driver)) == 4 and all(width for *_, width in shown(driver)), "not all pictures are there"
        )

        labels = [c.label for i in playground.INSTRUMENTS.values() for c in i.controls if not isinstance(c.values[0], str)]
        named = lambda: [h.get_attribute("aria-label") for k in range(4) for h in sliders(driver, k)]  # noqa: E731
        wait_for(driver, lambda: named() == labels, f"sliders are named {named()}")

        first = shown(driver)
        for k in range(4):
            handle, before = sliders(driver, k)[0], shown(driver)[k]
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", handle)
            ActionChains(driver).send_keys(Keys.ARROW_RIGHT).perform()
            wait_for(driver, lambda k=k, before=before: shown(driver)[k][:2] != before[:2], "the picture did not change")
            after = shown(driver)[k]
            assert after[0] != before[0]
            assert after[1] != before[1]
            screenshot(driver, f"lab-playground-{k}", WIDE)
        reset = find(driver, ".ntklib-playground button")[3]
        reset.click()
        wait_for(driver, lambda: shown(driver)[3][:2] == first[3][:2], "the first picture did not come back")
        assert not find(
            driver,
            ".jp-Dialog, [data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']",
        )
        assert not outside_requests(driver)
