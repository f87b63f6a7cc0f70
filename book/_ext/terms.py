"""Sphinx extension: in the prose of a chapter the first mention of a term leads to the glossary, that of a claim to the ledger."""

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

from ntklib.claims import load_claims
from ntklib.pages.places import ledger_anchor

EVERYWHERE = {"NTK", "trace", "sem", "standard error", "claim", "criterion", "verdict", "preset"}  # on every page
CLOSED = (nodes.reference, nodes.title, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.caption, nodes.raw)
Target = tuple[str, str]  # page, anchor


class TermsToLinks(SphinxPostTransform):
    """Link each term and each claim once a page; code, outputs, headings, captions and formulas stay as they are."""

    default_priority = 30  # after references are resolved, so that existing links are seen

    def run(self, **_: Any) -> None:
        """Go through the text of an executed chapter."""
        if not self.env.docname.startswith("executed/"):
            return
        wanted = {**self._terms(), **self._claims()}
        for text in list(self.document.findall(nodes.Text)):
            if wanted and not _closed(text):
                pieces = list(self._pieces(str(text), wanted))
                if len(pieces) > 1:
                    text.parent.replace(text, pieces)

    def _terms(self) -> dict[str, Target]:
        objects = self.env.get_domain("std").objects  # type: ignore[attr-defined]
        return {name: target for (kind, name), target in objects.items() if kind == "term" and name not in EVERYWHERE}

    def _claims(self) -> dict[str, Target]:
        labels = self.env.get_domain("std").anonlabels  # type: ignore[attr-defined]
        return {claim: labels[ledger_anchor(claim)] for claim in load_claims() if ledger_anchor(claim) in labels}

    def _pieces(self, text: str, wanted: dict[str, Target]) -> Iterator[nodes.Node]:
        while found := first_name(text, wanted):
            name, match = found
            page, anchor = wanted.pop(name)
            yield nodes.Text(text[: match.start()])
            link = make_refnode(self.app.builder, self.env.docname, page, anchor, nodes.Text(match[0]))
            link["classes"].append("term-link")
            yield link
            text = text[match.end() :]
        yield nodes.Text(text)


def first_name(text: str, names: dict[str, Any]) -> tuple[str, re.Match[str]] | None:
    """The name that comes first in a text, the longer of two that begin together; in any case, also with a plural s."""
    matches = [(name, match) for name in names if (match := _pattern(name).search(text))]
    return min(matches, key=lambda pair: (pair[1].start(), -len(pair[0])), default=None)


def _pattern(name: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, name.split()))
    code = name.upper() == name or not name.islower()  # acronyms and claims are spelled in one way
    return re.compile(rf"(?<![\w-]){words}{'' if code else 's?'}(?![\w-])", 0 if code else re.IGNORECASE)


def _closed(node: nodes.Node) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, CLOSED) or str(getattr(node, "attributes", {}).get("nb_element", "")).startswith("cell_code"):
            return True
    return False


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the transform; called by Sphinx."""
    app.add_post_transform(TermsToLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
