"""Where a chapter shows and judges what: read from its cells, so that pages can link to a figure and to the code behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

from ntklib import chapters
from ntklib.claims import Claim
from ntklib.paths import project_root

NO_FIGURE = "none"  # in book/claims.yml: no figure shows the claim


@dataclass(frozen=True)
class Figure:
    """A figure cell: its name (the anchor), its caption without filled-in parameters, and what it reproduces."""

    name: str
    caption: str
    reproduces: list[tuple[str, str]]  # source, place
    cell: int
    section: int


@dataclass(frozen=True)
class Places:
    """A chapter's title, its figures in order, and the cell and section in which each claim is judged."""

    chapter: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    judged: dict[str, tuple[int, int]] = field(default_factory=dict)

    def figure_of(self, claim: Claim) -> str | None:
        """Name of the figure that shows a claim.

        The one that ``book/claims.yml`` names; otherwise the last figure before the judging cell in the same section, otherwise the
        first one after it in that section.
        """
        if claim.figure:
            return None if claim.figure == NO_FIGURE else claim.figure
        if claim.id not in self.judged:
            return None
        cell, section = self.judged[claim.id]
        here = [f for f in self.figures if f.section == section]
        before, after = [f.name for f in here if f.cell < cell], [f.name for f in here if f.cell > cell]
        return (before[-1:] or after[:1] or [None])[0]


def contents() -> list[str]:
    """Chapters in the order of the book's table of contents."""
    toc = yaml.safe_load((project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [Path(e).name for e in entries if e.startswith("executed/")]


def all_places() -> dict[str, Places]:
    """What every chapter of the contents shows and judges, by chapter, in their order."""
    return {chapter: places(chapter) for chapter in contents()}


def places(chapter: str) -> Places:
    """Read a chapter's source."""
    found = Places(chapter, chapter)
    section = 0
    for i, cell in enumerate(nbformat.read(chapters.notebook_path(chapter), as_version=4).cells):
        if cell.cell_type == "markdown":
            headings = re.findall(r"^(#{1,2}) (.+)$", cell.source, re.MULTILINE)
            if found.title == chapter and headings:
                found = Places(chapter, headings[0][1], found.figures, found.judged)
            section += sum(level == "##" for level, _ in headings)
            continue
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if "name" in figure:
            sources = [(s, what) for s, _, what in (p.partition(": ") for p in cell.metadata.get("reproduces", []))]
            found.figures.append(Figure(figure["name"], figure.get("caption", ""), sources, i, section))
        found.judged.update(dict.fromkeys(judged_claims(cell.source), (i, section)))
    return found


def judged_claims(source: str) -> list[str]:
    """Ids of the claims that a cell judges: in a call of ``judge``, or in a loop over ids around one."""
    return re.findall(r"""["']([A-Z]\d+[a-z]?)["']""", source) if ".judge(" in source else []


def judged_anchor(claim: str) -> str:
    """Anchor of the cell that judges a claim; the extension ``book/_ext/cells.py`` sets it."""
    return f"judged-{claim.lower()}"


def code_anchor(figure: str) -> str:
    """Anchor of the cell that draws a figure; the same extension sets it."""
    return f"code-{figure}"


def ledger_anchor(claim: str) -> str:
    """Anchor of a claim's entry on the ledger page."""
    return f"claim-{claim.lower()}"


def command(chapter: str, preset: str) -> str:
    """The command that executes a chapter at a preset."""
    return f"python -m ntklib run {chapter} --preset {preset}"


def in_table(text: str) -> str:
    """Text inside a table cell: a bar would end the cell."""
    return text.replace("\\|", "\\Vert ").replace("|", "\\vert ")


def count(things: Sequence[Any] | int, noun: str) -> str:
    """A number with its noun in singular or plural."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}{'' if number == 1 else 's'}"
