"""Addresses on built pages: what they lead to is there, what leads to the web is well formed."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

ADDRESSES = ("href", "src", "data", "poster")
HOST = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")


@cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: Path) -> frozenset[str]:
    return frozenset(e.get("id") or e.get("name") for e in parsed(path).select("[id], a[name]"))


def target(page: Path, address: str) -> tuple[Path, str]:
    """The file a local address on a page leads to, and its anchor."""
    parts = urlsplit(address)
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)


def pages(root: Path) -> list[Path]:
    """All pages of a built book, but for what its theme brings along."""
    return [p for p in sorted(root.resolve().rglob("*.html")) if "_static" not in p.parts]


def problems(root: Path) -> list[str]:
    """Broken links, missing anchors and files, names given twice and malformed addresses on all pages below ``root``."""
    return [f"{page.relative_to(root.resolve())}: {p}" for page in pages(root) for p in _on_page(page, root.resolve())]


def _on_page(page: Path, root: Path) -> list[str]:
    found = []
    counts = Counter(e["id"] for e in parsed(page).select("[id]"))
    found += [f"{name!r} names {n} elements" for name, n in counts.items() if n > 1]
    for element in parsed(page).select(", ".join(f"[{a}]" for a in ADDRESSES)):
        for attribute in ADDRESSES:
            address = element.get(attribute)
            if address is not None and (wrong := _wrong(page, root, address)):
                found.append(f"{attribute}={address!r} {wrong}")
    return found


def _wrong(page: Path, root: Path, address: str) -> str:
    """What is wrong with an address; nothing for a good one."""
    if not address or address != address.strip() or re.search(r"\s", address):
        return "is empty or has white space in it"
    parts = urlsplit(address)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        return "" if parts.scheme == "https" and HOST.fullmatch(parts.netloc) else "is no secure address of a host"
    file, anchor = target(page, address)
    if not file.is_file() or not file.is_relative_to(root):
        return "leads to no file of the book"
    if anchor and file.suffix == ".html" and anchor not in anchors(file):
        return "leads to no anchor of its page"
    return ""
