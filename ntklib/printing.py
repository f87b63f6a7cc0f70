"""The whole book as one PDF: Sphinx puts all pages into one, and a browser prints it."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ntklib.book import JUPYTER_BOOK, BuildError, build
from ntklib.paths import project_root

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-pdf-header-footer", "--generate-pdf-document-outline",
    "--virtual-time-budget=600000",  # milliseconds of the page's own clock, which stands still while it works: enough for all formulas
)  # fmt: skip
PRINTING_SECONDS = 900


def print_book(preset: str) -> Path:
    """Build the book of a preset from what is executed, put it on one page and print that; return the PDF.

    Raises:
        BuildError: If there is no browser, a chapter is not executed, or a step fails.
    """
    browser = find_browser()
    build(preset)  # writes the generated pages, and checks them all
    page = single_page(project_root() / "book", project_root() / "_config.yml", project_root())
    return print_page(page, project_root() / "_build" / "print" / "ntklib.pdf", browser)


def find_browser() -> str:
    """Return the program that prints.

    Raises:
        BuildError: If there is none.
    """
    for name in BROWSERS:
        if program := shutil.which(name):
            return program
    msg = f"Printing needs Chromium or Chrome ({', '.join(BROWSERS)}). Got none on the path. Install one (Debian: apt install chromium)."
    raise BuildError(msg)


def single_page(book: Path, config: Path, output: Path) -> Path:
    """Build all pages of a book into one and return it.

    Raises:
        BuildError: If the build fails.
    """
    command = [
        sys.executable, "-c", JUPYTER_BOOK, "build", str(book), "--config", str(config), "--path-output", str(output),
        "--builder", "singlehtml", "-n", "--keep-going",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    pages = sorted((output / "_build" / "singlehtml").glob("*.html"), key=lambda path: path.stat().st_size)
    if done.returncode or not pages:
        msg = "\n".join(["The book did not build as one page:", *(done.stdout + done.stderr).splitlines()[-10:]])
        raise BuildError(msg)
    return pages[-1]  # the others lead to it


def print_page(page: Path, pdf: Path, browser: str) -> Path:
    """Print a page of HTML with a browser, without any network.

    Raises:
        BuildError: If the browser prints nothing.
    """
    pdf.parent.mkdir(parents=True, exist_ok=True)
    pdf.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--print-to-pdf={pdf}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PRINTING_SECONDS, check=False)
            said = done.stderr.splitlines()[-5:]
        except subprocess.TimeoutExpired:
            said = [f"It was stopped after {PRINTING_SECONDS} seconds."]
    if not pdf.exists() or pdf.read_bytes()[:4] != b"%PDF":
        msg = "\n".join([f"{browser} printed no PDF of {page}.", *said])
        raise BuildError(msg)
    return pdf
