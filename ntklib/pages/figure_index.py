"""The index from the sources' figures and theorems to the figures, cells, claims and commands of this book."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ntklib import claims
from ntklib.execute import fill
from ntklib.pages.places import Figure, Places, all_places, code_anchor, command, in_table, ledger_anchor

ELSEWHERE = "elsewhere in the text"
KINDS = ("Figure", "Lemma", "Proposition", "Theorem")
LABEL = re.compile(rf"({'|'.join(KINDS)})s? (\d+(?:\.\d+)?)(?:\(\w\))?(?: and (\d+(?:\.\d+)?))?")
MISSING = """## What is not reproduced

- {cite}`trace`: Figures 14 and 15. Their captions and their descriptions are missing from the text that we have, so that what they
  show is not known. Of Figure 16 we know the caption only; optimizers and architectures are our choice.
- {cite}`eos`: we know the abstract and the caption of Figure 1. Other figures are not known to us.
- {cite}`stability`: a poster without experiments of its own; its phase portraits are redrawn with measured residuals.
- {cite}`cone`: the figures were not available to us. The experiments that its abstract names are done, the figures are our own.
- {cite}`deep_linear`: figures of nonlinear networks on images and of low-rank adaptation of a language model are known from
  reviews, without their settings. The dependence on the complexity of the task is repeated on small images, the adaptation is not.
"""


@dataclass
class Row:
    """What the book has for one place of a source."""

    figures: dict[str, tuple[Figure, Places]] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)


def figures_page(parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the page.

    Args:
        parameters: Chapter -> values that its captions name.
    """
    lines = [
        "# Figure index\n",
        "From the figures and theorems of the sources to the figures of this book, with the cell that draws each, the claims that "
        "are judged there, and the command that computes the chapter again.\n",
    ]
    for source, title in claims.SOURCES.items():
        lines += [f"## {title}\n", f"Source: {{cite:t}}`{source}`\n"]
        lines += ["| place | figure of this book | claims | chapter |", "|---|---|---|---|"]
        rows = index(source)
        lines += [_row(place, rows[place], parameters) for place in sorted(rows, key=_order)]
        lines.append("")
    return "\n".join([*lines, MISSING])


def index(source: str) -> dict[str, Row]:
    """Rows of one source by place: from the metadata of figure cells, and from the places of claims and their figures."""
    places, rows = all_places(), {}
    for chapter in places.values():
        for figure in chapter.figures:
            for name, what in figure.reproduces:
                for label in labels(what) if name == source else []:
                    rows.setdefault(label, Row()).figures[figure.name] = (figure, chapter)
    drawn = set(rows)  # where no figure is named as a reproduction, those of the claims stand in
    for entry in claims.ledger():
        about = _about(entry, source)
        if about is None or entry["chapter"] not in places:
            continue
        chapter = places[entry["chapter"]]
        name = chapter.figure_of(claims.load_claims()[entry["id"]])
        figure = next((f for f in chapter.figures if f.name == name), None)
        for label in labels(about):
            row = rows.setdefault(label, Row())
            row.claims.append(entry)
            if figure and label not in drawn:
                row.figures[figure.name] = (figure, chapter)
    return rows


def labels(place: str) -> list[str]:
    """Figures and theorems that a place names: "Figures 5 and 6, section 5.2" gives "Figure 5" and "Figure 6"."""
    found = [f"{kind} {n}" for kind, *numbers in LABEL.findall(place) for n in numbers if n]
    return list(dict.fromkeys(found)) or [ELSEWHERE]


def _about(entry: Mapping[str, Any], source: str) -> str | None:
    """The part of a claim's place that is about a source; a finding of this book may name a figure of one."""
    if entry["source"] == source:
        return entry["place"]
    named = re.search(r"; (.+) of the (\w+) paper", entry["place"])
    return named[1] if entry["source"] == claims.OWN and named and named[2] == source else None


def _order(place: str) -> tuple[int, float]:
    kind, _, number = place.partition(" ")
    return (KINDS.index(kind), float(number)) if kind in KINDS else (len(KINDS), 0.0)


def _row(place: str, row: Row, parameters: Mapping[str, Mapping[str, Any]]) -> str:
    shown = "<br>".join(_figure(f, parameters.get(p.chapter, {})) for f, p in row.figures.values()) or "–"
    judged = "<br>".join(f"{{ref}}`{e['id']} <{ledger_anchor(e['id'])}>` {claims.badge(e['verdict'])}" for e in row.claims) or "–"
    chapters = dict.fromkeys([p.chapter for _, p in row.figures.values()] + [e["chapter"] for e in row.claims])
    places = all_places()
    where = "<br>".join(f"[{places[c].title}](executed/{c}.ipynb)<br>`{command(c, 'default')}`" for c in chapters)
    return f"| {place} | {shown} | {judged} | {where} |"


def _figure(figure: Figure, values: Mapping[str, Any]) -> str:
    caption = fill(figure.caption, dict(values))
    first = re.sub(r" \([^()]*\)", "", re.split(r"\. |\.$", caption)[0])
    return f"{{numref}}`{figure.name}` ({{ref}}`cell <{code_anchor(figure.name)}>`): {in_table(first)}"
