"""A reader opens a chapter in JupyterLab, changes a parameter and runs all cells."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request

import nbformat
import psutil
import pytest
from browser import WAIT, WIDE, chromium, outside_requests, resize, screenshot, wait_for
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ntklib import chapters

pytestmark = pytest.mark.slow

CHAPTER = "quickstart"
WIDTH = 40  # what the reader types; no preset has it
RUN_ALL = 180.0  # seconds for all cells, nearly all of them imports
SETTINGS = {  # Lab's own names
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay on the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "extensionmanager-extension/plugin": {"enabled": False},
}


def smoke_copy(folder):
    """The chapter's notebook with the smoke preset's values as defaults."""
    notebook = nbformat.read(chapters.notebook_path(CHAPTER), 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in chapters.preset_parameters(CHAPTER, "smoke").items():
        cell.source, count = re.subn(rf"^({name}: \w+ = )[^ ]+", rf"\g<1>{value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1
    nbformat.write(notebook, folder / f"{CHAPTER}.ipynb")


@contextlib.contextmanager
def lab(folder):
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
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
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


def all_cells_ran(driver):
    """Whether every code cell has its number; an error in any of them ends the wait."""
    errors = find(driver, "[data-mime-type='application/vnd.jupyter.error']")
    assert not errors, errors[0].text
    prompts = driver.execute_script("return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)")
    return prompts and all(re.fullmatch(r"\[\d+\]:", p) for p in prompts)


def test_a_reader_changes_a_parameter_in_jupyterlab_and_runs_all_cells(tmp_path):
    (tmp_path / "work").mkdir()
    smoke_copy(tmp_path / "work")
    with chromium(tmp_path / "profile") as driver, lab(tmp_path) as (address, server):
        wait_for(driver, lambda: asked(f"{address}/api/status", server), "JupyterLab does not answer")
        resize(driver, WIDE)
        driver.get(f"{address}/lab/tree/{CHAPTER}.ipynb")
        wait_for(driver, lambda: kernel_is_ready(address, server), "no kernel started", 2 * WAIT)

        set_width(driver, WIDTH)
        run_all_cells(driver)
        wait_for(driver, lambda: all_cells_ran(driver), "not all cells ran", RUN_ALL)

        images = driver.execute_script("return [...document.querySelectorAll('.jp-RenderedImage img')].map(i => i.naturalWidth)")
        assert len(images) >= 2
        assert min(images) > 300
        assert not find(driver, ".jp-Dialog")
        screenshot(driver, "lab", WIDE)
        assert not outside_requests(driver)

    found = [json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "runs" / "store" / CHAPTER).glob("*/run.json")]
    assert len(found) == chapters.preset_parameters(CHAPTER, "smoke")["num_seeds"]
    assert {r["settings"]["width"] for r in found} == {WIDTH}
    assert {r["status"] for r in found} == {"complete"}
