"""The claims ledger as a page: every claim with what was required, measured and found, and where to look."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

from ntklib import claims
from ntklib.pages import export
from ntklib.pages.interval import drawing
from ntklib.pages.places import Places, all_places, command, count, judged_anchor, ledger_anchor

Entry = dict[str, Any]
VERDICTS = (claims.HOLDS, claims.FAILS, claims.INCONCLUSIVE, claims.NOT_JUDGED)
TITLES = {**claims.SOURCES, claims.OWN: "Findings of this book"}


def claims_page() -> str:
    """Markdown of the page."""
    entries, places = claims.ledger(), all_places()
    own = sum(e["source"] == claims.OWN for e in entries)
    lines = [
        "# Claims ledger\n",
        f"{len(entries) - own} claims of the five sources, and {count(own, 'finding')} of this book, each with the test that it "
        f"was put to: {_counts(entries)}.\n",
        "A verdict is computed from the measured number and its standard error: *holds* when the number lies in the required range "
        "with two standard errors to spare, *fails* when it lies outside by as much, *inconclusive* in between or with too few "
        "seeds. In the small drawings the shaded band is the required range, the dot the value and the bar two standard errors to "
        "either side (the interval). Claims whose chapter was not run at the preset that the claim asks for are not judged.\n",
        count_table(entries), _form(entries, places),
    ]  # fmt: skip
    for source, title in TITLES.items():
        mine = [e for e in entries if e["source"] == source]
        if mine:
            lines += [f"(ledger-{source.replace('_', '-')})=", f"## {title}\n"]
            lines += [f"Source: {{cite:t}}`{source}`\n"] if source != claims.OWN else []
            lines += [_entry(e, places.get(e["chapter"])) for e in mine]
    return "\n".join([*lines, _machine_readable(entries)])


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Number of entries by verdict."""
    found = {v: sum(e["verdict"] == v for e in entries) for v in VERDICTS[:-1]}
    return found | {claims.NOT_JUDGED: len(entries) - sum(found.values())}


def filtered(text: str, **wanted: str) -> str:
    """A link to the ledger with a filter set; plain HTML, since the address has a query."""
    query = f"?{urlencode(wanted)}" if wanted else ""
    return f'<a class="reference internal" href="claims.html{escape(query)}">{text}</a>'


def count_table(entries: Sequence[Entry]) -> str:
    """Sources by verdicts; every count leads to the claims that it counts. Verdicts without a claim are left out."""
    totals = counts(entries)
    shown = [v for v in VERDICTS if totals[v]]
    rows = ["| source | claims | " + " | ".join(map(claims.badge, shown)) + " |", "|---|" + "---:|" * (len(shown) + 1)]
    for source, title in TITLES.items():
        mine = [e for e in entries if e["source"] == source]
        found = counts(mine)
        cells = [filtered(str(found[v]), source=source, verdict=v) if found[v] else "0" for v in shown]
        rows.append(f"| {title} | {filtered(str(len(mine)), source=source)} | " + " | ".join(cells) + " |")
    cells = [filtered(str(totals[v]), verdict=v) for v in shown]
    rows.append(f"| all | {filtered(str(len(entries)))} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, ""])


def _counts(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{n} {claims.badge(v)}" for v, n in counts(entries).items())


def _form(entries: Sequence[Entry], places: Mapping[str, Places]) -> str:
    """The filter; hidden until its script runs, so that nothing on the page is without use where scripts are off."""
    chapters = dict.fromkeys(e["chapter"] for e in entries)
    titles = {c: places[c].title if c in places else c for c in chapters}
    return "\n".join([
        '<form id="ledger-filter" role="search" aria-label="Filter the claims" autocomplete="off" hidden>',
        _select("source", TITLES), _select("verdict", {v: v for v in VERDICTS}), _select("chapter", titles),
        '<label>words <input type="search" name="words" autocomplete="off"></label>',
        '<button type="reset">show all</button>',
        '<p id="ledger-count" role="status" aria-live="polite"></p>',
        "</form>\n",
    ])  # fmt: skip


def _select(name: str, options: Mapping[str, str]) -> str:
    listed = "".join(f'<option value="{escape(value)}">{escape(_plain(title))}</option>' for value, title in options.items())
    return f'<label>{name} <select name="{name}"><option value="">all</option>{listed}</select></label>'


def _plain(title: str) -> str:
    return title.replace("$", "").replace("\\", "")


def _entry(e: Entry, place: Places | None) -> str:
    claim = claims.load_claims()[e["id"]]
    data = {"id": e["id"], "source": e["source"], "verdict": _kind(e["verdict"]), "chapter": e["chapter"]}
    attributes = "".join(f' data-{k}="{escape(v)}"' for k, v in data.items())
    head = f'<span class="claim-id"{attributes}>{e["id"]}</span> {claims.badge(e["verdict"])}'
    place_of = f'<span class="claim-place">({" ".join(e["place"].split())})</span>'
    lines = [
        "::::{container} claim", f":name: {ledger_anchor(e['id'])}", "",
        f"{head} {' '.join(e['statement'].split())} {place_of}\n",
        *(f"- {_criterion(claim, i, c)}" for i, c in enumerate(e["criteria"])), "",
        f'<span class="claim-links">{_links(e, claim, place)}</span>\n',
    ]  # fmt: skip
    if e["note"]:
        lines += [f'<span class="claim-note">*Note.* {" ".join(e["note"].split())}</span>\n']
    return "\n".join([*lines, "::::\n"])


def _kind(verdict: str) -> str:
    return claims.NOT_JUDGED if verdict.startswith(claims.NOT_JUDGED) else verdict


def _criterion(claim: claims.Claim, index: int, found: Entry) -> str:
    quantity = f'<span class="quantity">{" ".join(found["quantity"].split())}</span>'
    required = f'<span class="required">required: {found["threshold"]}</span>'
    if "value" not in found:
        return f'{quantity} <span class="measured">{required}</span>'
    measured = claims.Measured(found["value"], found["sem"])
    picture = drawing(claim.criteria[index], measured, found["verdict"])
    required = f'<span class="required">{_interval(measured)}required: {found["threshold"]}</span>'
    return f'{quantity} <span class="measured">{picture}<b>{claims.number(measured)}</b> {required}</span>'


def _interval(measured: claims.Measured) -> str:
    """Two standard errors to either side, to the digits of the error; empty without one."""
    if not (math.isfinite(measured.value) and 0 < measured.sem < math.inf):
        return ""
    ends = (claims.Measured(measured.value + side * claims.Z * measured.sem, measured.sem) for side in (-1, 1))
    return f"interval {' to '.join(claims.number(end).split(' ± ')[0] for end in ends)}; "


def _links(e: Entry, claim: claims.Claim, place: Places | None) -> str:
    """Seeds, preset and machine, then where it is shown and judged, and the command."""
    said = [count(e["seeds"], "seed")] if e["seeds"] else []
    said += [f"preset {e['preset']}", *([_machine(e)] if e["seeds"] else [])]
    if place is None:
        return "; ".join([*said, f"chapter {e['chapter']} (to come)"])
    figure = place.figure_of(claim)
    said += [f"{{numref}}`{figure}`"] if figure else ["no figure"]
    said += [f"{{ref}}`code and verdict <{judged_anchor(e['id'])}>`"] if e["id"] in place.judged else []
    said += [f"chapter [{place.title}](executed/{place.chapter}.ipynb)", f"`{command(place.chapter, e['preset'])}`"]
    return "; ".join(said)


def _machine(e: Entry) -> str:
    return e["hardware"] if e["hardware"] and e["run"] else "computed in the chapter, nothing trained"


def _machine_readable(entries: Sequence[Entry]) -> str:
    """How to take the ledger along: the file, its fields, how to cite."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in export.FIELDS.items()]
    total = count(entries, "object")
    return "\n".join([
        "## The ledger as data\n",
        f'<a class="reference internal" href="{export.NAME}" download>{export.NAME}</a> holds the same entries as a list of '
        f"{total}, and `python -m ntklib claims --json` prints that list. Statements and notes are in the book's own words. To "
        "cite a verdict, name the claim with the commit of its entry, for example *A2, How neural tangent kernels move, commit and "
        f"date as in {export.NAME}*; cite the source for the claim itself. Numbers may be reused under the licence of the book.\n",
        "| field | meaning |", "|---|---|", *rows, "",
    ])  # fmt: skip
