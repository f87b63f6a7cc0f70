"""Sphinx extension: reference pages of the package, and links to them from names in the text."""

import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from ntklib import estimator_table

ARRAY = re.compile(r"(?:~?jaxtyping\.)?[A-Z]\w+\[(?:~?torch\.|~?numpy\.)?(Tensor|ndarray), '([^']*)'\]")
BOUNDED = re.compile(r"(?:~?typing\.)?Annotated\[([\w.~]+(?:\[[^][]*\])?), (?:[^][]|\[[^][]*\])*\]")  # innermost first

# what viewcode puts before a definition: it takes the names of a module to be entered alike, in the package or in the module
BACK_LINK = re.compile(r'<a class="viewcode-back" href="([^"#]*#([^"]*))">[^<]*</a>')


class Entries(SphinxDirective):
    """Names of a module, the argument: an overview by autosummary, then every entry by autodoc."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Hand both library directives the same names."""
        names = " ".join(self.content).split()
        lines = [f".. currentmodule:: {self.arguments[0]}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [*(f"   {name}" for name in names), ""]
        for name in names:
            kind = "exception" if name.endswith("Error") else "class" if name[0].isupper() else "function"
            lines += [f".. auto{kind}:: {name}", ""]
        holder = nodes.section()
        holder.document = self.state.document
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), 0, holder)
        return holder.children


class MeasuredEstimators(SphinxDirective):
    """The stored measurement of one draw of each trace estimator, as a table."""

    def run(self) -> list[nodes.Node]:
        """Read the table; the page is read again when the measurement is another one."""
        self.env.note_dependency(str(estimator_table.source()))
        holder = nodes.section()
        holder.document = self.state.document
        lines = estimator_table.table().splitlines()
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), 0, holder)
        return holder.children


class NamesToLinks(SphinxPostTransform):
    """A name of the package in code type becomes a link to its entry; headings and links stay as they are."""

    default_priority = 20  # after references are resolved

    def run(self, **_: Any) -> None:
        """Compare every literal with the names that have an entry."""
        entries = self.env.get_domain("py").objects  # type: ignore[attr-defined]
        for literal in list(self.document.findall(nodes.literal)):
            name = f"ntklib.{literal.astext().removeprefix('ntklib.').removesuffix('()')}"
            if name in entries and not _within(literal, nodes.reference, nodes.title):
                entry, page = entries[name], self.env.docname
                literal.replace_self(make_refnode(self.app.builder, page, entry.docname, entry.node_id, literal.deepcopy(), name))


def _within(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def _short(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, signature: str | None, returns: str | None) -> Any:
    """Write an array's annotation as ``Tensor[n, c]``, with dots for any number of axes, and numbers without their bounds."""
    return _readable(signature), _readable(returns)


def _readable(text: str | None) -> str | None:
    if text is None:
        return None
    text = re.sub(r"<[^<>]*>", "...", ARRAY.sub(_shape, text))  # a default that is no expression, such as <factory>
    while (plainer := BOUNDED.sub(r"\1", text)) != text:
        text = plainer
    return text


def _shape(found: re.Match[str]) -> str:
    axes = ["..." if axis.startswith("*") else axis for axis in found[2].split()]
    return f"{found[1]}[{', '.join(axes)}]"


def _mend_back_links(app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Lead from the source of a module to the entries of its names, which stand under the package or under the module."""
    if not page.startswith("_modules/ntklib/"):
        return
    entries = app.env.get_domain("py").objects  # type: ignore[attr-defined]
    module = page.removeprefix("_modules/").replace("/", ".")

    def mended(link: re.Match[str]) -> str:
        name = link[2].removeprefix("ntklib.")
        entry = entries.get(f"ntklib.{name}") or entries.get(f"{module}.{name.removeprefix(module.removeprefix('ntklib.') + '.')}")
        if entry is None:
            return ""
        address = f"{app.builder.get_relative_uri(page, entry.docname)}#{entry.node_id}"
        return link[0].replace(link[1], address)

    context["body"] = BACK_LINK.sub(mended, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts; called by Sphinx."""
    app.add_directive("entries", Entries)
    app.add_directive("measured-estimators", MeasuredEstimators)
    app.add_post_transform(NamesToLinks)
    app.connect("autodoc-process-signature", _short)
    app.connect("html-page-context", _mend_back_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
