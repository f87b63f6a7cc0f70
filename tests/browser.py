"""Headless Chromium with its console and network logs, and a server of files, for the tests that look at pages."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT = 60.0  # seconds after which a page that is still not ready is an error; generous, for a busy machine
WIDE, PHONE = (1400, 900), (390, 844)  # CSS pixels
TALLEST = 12_000  # pixels of a screenshot; beyond some 16,000 the browser draws nothing
SCREENSHOTS = "NTKLIB_SCREENSHOTS"  # names the folder in which screenshots are kept; unset, none are made


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A fresh browser with its profile in ``profile``; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    if not program or not driver_program:
        missing = "Chromium" if not program else "chromedriver"
        pytest.skip(f"{missing} is not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDE[0]},{WIDE[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        driver.set_page_load_timeout(WAIT)
        driver.set_script_timeout(WAIT)
        yield driver
    finally:
        driver.quit()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """No line on stderr per request."""


class _QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A browser that leaves a page hangs up on what it still loads; that is no error."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; the address of its root, without a slash at the end."""
    with _QuietServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def wait_for(driver: webdriver.Chrome, condition: Callable[[], Any], message: str, seconds: float = WAIT) -> Any:
    """Wait until ``condition()`` is true and return its value."""
    return WebDriverWait(driver, seconds, poll_frequency=0.1).until(lambda _: condition(), message)


def resize(driver: webdriver.Chrome, size: tuple[int, int]) -> None:
    """Give the page a viewport, a phone's if it is that narrow, and wait until the page has come to rest in it.

    A window, unlike a viewport, cannot be as narrow as a phone.
    """
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE[0]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const ends = a => a.effect && a.effect.getComputedTiming().endTime < Infinity;
        const rest = () => Promise.allSettled(document.getAnimations().filter(ends).map(a => a.finished)).then(() => done());
        requestAnimationFrame(() => requestAnimationFrame(rest));
        """
    )


def console_errors(driver: webdriver.Chrome) -> list[str]:
    """Errors on the console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def outside_requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses on other machines that pages asked for since the last call."""
    return [address for address in _requests(driver) if urlsplit(address).hostname not in ("127.0.0.1", "localhost")]


def _requests(driver: webdriver.Chrome) -> Iterator[str]:
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
        elif message["method"] == "Network.webSocketCreated":
            address = message["params"]["url"]
        else:
            continue
        if not address.startswith(("data:", "blob:", "about:", "chrome:")):
            yield address


def screenshot(driver: webdriver.Chrome, name: str, size: tuple[int, int]) -> None:
    """Keep a picture of the page as ``name.png``, if the environment asks for pictures; ``size`` is that of the viewport."""
    if folder := os.environ.get(SCREENSHOTS):
        Path(folder).mkdir(parents=True, exist_ok=True)
        height = driver.execute_script("return document.documentElement.scrollHeight")
        resize(driver, (size[0], min(height, TALLEST)))  # a viewport as tall as the page shows all of it
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))
        resize(driver, size)
