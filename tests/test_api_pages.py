"""The reference pages list every public name once, and say of each what it is."""

import inspect
import re
from collections import Counter
from importlib import import_module

import pytest

import ntklib
from ntklib.paths import project_root

FOLDER = project_root() / "book" / "api"
# modules that chapters use as a whole; of the others those names that the package itself gives out, and what these return
WHOLE = ("training", "models", "data", "plots", "phases", "two_layer", "linear_networks", "linear_curvature", "period_doubling")


def listed():
    """Module and name of every entry, page by page."""
    found = []
    for page in sorted(FOLDER.glob("*.md")):
        for block in re.findall(r"```\{eval-rst\}\n\.\. entries:: (\S+)\n\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [(block[0], name) for name in block[1].split()]
    return found


def is_entry(thing):
    return inspect.isfunction(thing) or inspect.isclass(thing)


def public():
    """Functions and classes that a reader may call, by identity."""
    found = {id(getattr(ntklib, name)): name for name in ntklib.__all__ if is_entry(getattr(ntklib, name))}
    for part in WHOLE:
        module = import_module(f"ntklib.{part}")
        own = [n for n, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", None) or own:
            if not name.startswith("_") and is_entry(getattr(module, name)):
                found.setdefault(id(getattr(module, name)), f"{part}.{name}")
    return found


def test_every_public_name_is_listed_once():
    times = Counter(id(getattr(import_module(module), name)) for module, name in listed())
    names = public()
    missing = [name for key, name in names.items() if not times[key]]
    assert not missing, f"add to a page in book/api: {missing}"
    assert not [name for key, name in names.items() if times[key] > 1]


def test_what_is_listed_is_documented_and_under_its_shortest_name():
    for module, name in listed():
        thing = getattr(import_module(module), name)
        assert thing.__doc__, name
        assert module == "ntklib" or name not in ntklib.__all__ or getattr(ntklib, name) is not thing, name


def test_the_index_and_the_contents_lead_to_every_page():
    pages = {page.stem for page in FOLDER.glob("*.md")} - {"index"}
    assert set(re.findall(r"\]\((\w+)\.md\)", (FOLDER / "index.md").read_text())) == pages
    assert set(re.findall(r"file: api/(\w+)", (FOLDER.parent / "_toc.yml").read_text())) == {*pages, "index"}


@pytest.fixture(scope="module")
def signature():
    """The extension of the book that makes signatures readable."""
    import sys

    sys.path.insert(0, str(FOLDER.parent / "_ext"))
    try:
        return import_module("api_pages")._readable
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("(k: ~jaxtyping.Float[Tensor, 'n1 n2 c c']) -> None", "(k: Tensor[n1, n2, c, c]) -> None"),
        ("jaxtyping.Shaped[Tensor, 'n *input'] | None", "Tensor[n, ...] | None"),
        ("jaxtyping.Float[ndarray, ' k']", "ndarray[k]"),
        ("lr: ~typing.Annotated[float, Gt(gt=0)] = 0.1, n: int", "lr: float = 0.1, n: int"),
        ("t: Annotated[tuple[Annotated[float, Gt(gt=0)], ...], ~a.MinLen(min_length=1)]", "t: tuple[float, ...]"),
        ("i: list[Annotated[int, FieldInfo(annotation=NoneType, metadata=[Ge(ge=0)])]]", "i: list[int]"),
        (None, None),
    ],
)
def test_annotations_are_shown_without_machinery(signature, raw, shown):
    assert signature(raw) == shown
