"""Sphinx extension: pages of the book load nothing from outside and run without script errors."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

OUTSIDE = ("http:", "https:", "//")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect both steps; called by Sphinx."""
    app.connect("config-inited", _silence_thebe)
    app.connect("html-page-context", _drop_assets, priority=900)  # after every extension has added its own
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _silence_thebe(app: Sphinx, _: Config) -> None:
    """Disconnect sphinx-thebe, which Jupyter Book always loads.

    It serves live code only, which this book does not offer, but gives every page an address on a CDN and declares it twice (an
    error on the browser's console), and the address of somebody else's repository.
    """
    for listeners in list(app.events.listeners.values()):
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def _drop_assets(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Leave out scripts and style sheets from outside, and thebe's style sheet, which no longer has a file."""
    for kind in ("script_files", "css_files"):
        context[kind] = [asset for asset in context.get(kind, []) if not _is_dropped(str(getattr(asset, "filename", asset) or ""))]


def _is_dropped(address: str) -> bool:
    return address.startswith(OUTSIDE) or address.endswith("sphinx-thebe.css")
