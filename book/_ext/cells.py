"""Sphinx extension: anchors on the cells that judge claims and draw figures, and links from verdicts to the ledger.

A cell that judges claim A2 gets the label ``judged-a2``, a cell that draws ``fig-x`` the label ``code-fig-x``; both can be the
target of a ``ref`` role. In the output of a judging cell the words "Claim A2" lead to the entry ``claim-a2`` of the ledger.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from ntklib.pages.places import code_anchor, judged_anchor, judged_claims, ledger_anchor


class CellAnchors(SphinxTransform):
    """Label the cells of an executed chapter."""

    default_priority = 500  # before Sphinx collects the labels of a page, at 850

    def apply(self, **_: Any) -> None:
        """Label all code cells of the page; called by Sphinx."""
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code":
                continue
            figure = cell.get("cell_metadata", {}).get("mystnb", {}).get("figure", {}).get("name")
            claims = judged_claims(_source(cell))
            anchors = [*map(judged_anchor, claims), *([code_anchor(figure)] if figure else [])]
            cell["ids"] += anchors
            cell["names"] += anchors
            self.document.note_explicit_target(cell, cell)
            self.document.nameids.update({anchor: anchor for anchor in anchors})  # one cell may judge several claims
            _link_to_ledger(cell, claims, self.env.docname)


def _source(cell: nodes.container) -> str:
    parts = [c for c in cell.children if isinstance(c, nodes.container) and c.get("nb_element") == "cell_code_source"]
    return "\n".join(part.astext() for part in parts)


def _link_to_ledger(cell: nodes.container, claims: list[str], page: str) -> None:
    for words in list(cell.findall(nodes.strong)):
        match = re.fullmatch(r"Claim (\w+)", words.astext())
        if match and match[1] in claims:
            target = ledger_anchor(match[1])
            link = pending_xref("", refdomain="std", reftype="ref", reftarget=target, refexplicit=True, refwarn=True, refdoc=page)
            words.replace_self(link)
            link += nodes.inline("", "", words, classes=["std", "std-ref"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the transform; called by Sphinx."""
    app.add_transform(CellAnchors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
