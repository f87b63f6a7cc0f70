"""The checker of links finds what is broken, and nothing else."""

import pytest
from links import problems

WHOLE = """<html><body><h1 id="top">a</h1><a href="#top">b</a><a name="old">c</a><a href="sub/other.html#end">d</a>
<a href="#old">e</a><a href="https://example.org/a_(b)?c=d#e">f</a><img src="sub/picture%20one.png" alt="g">
<a href="sub/data.csv" download>h</a>
<a href="sub/">i</a><img src="data:image/png;base64,AA=="></body></html>"""


@pytest.fixture
def site(tmp_path):
    """A book of two pages, and a function that puts a line on the first and says what is wrong then."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.html").write_text('<a id="end" href="../page.html">back</a>')
    (tmp_path / "sub" / "index.html").write_text("<p>")
    (tmp_path / "sub" / "picture one.png").write_bytes(b"")
    (tmp_path / "sub" / "data.csv").write_text("")
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "theme.html").write_text('<a href="nowhere.html">')

    def with_line(line):
        (tmp_path / f"page{len(line)}.html").write_text(WHOLE + line)
        (tmp_path / "page.html").write_text(WHOLE)
        return problems(tmp_path)

    return with_line


def test_a_whole_book_has_no_problem(site):
    assert site("") == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('<a href="absent.html">x</a>', "href='absent.html' leads to no file"),
        ('<a href="sub/absent.csv" download>x</a>', "href='sub/absent.csv' leads to no file"),
        ('<img src="sub/absent.png" alt="x">', "src='sub/absent.png' leads to no file"),
        ('<object data="absent.svg"></object>', "data='absent.svg' leads to no file"),
        ('<a href="../outside.html">x</a>', "href='../outside.html' leads to no file of the book"),
        ('<a href="#absent">x</a>', "href='#absent' leads to no anchor"),
        ('<a href="sub/other.html#absent">x</a>', "href='sub/other.html#absent' leads to no anchor"),
        ('<p id="top">x</p>', "'top' names 2 elements"),
        ('<a href="">x</a>', "href='' is empty"),
        ('<a href="https://example.org/a b">x</a>', "has white space"),
        ('<a href="http://example.org/">x</a>', "is no secure address of a host"),
        ('<a href="//example.org/">x</a>', "is no secure address of a host"),
        ('<a href="https://example">x</a>', "is no secure address of a host"),
        ('<a href="https://exa_mple..org/">x</a>', "is no secure address of a host"),
        ('<a href="javascript:void(0)">x</a>', "is no secure address of a host"),
    ],
)
def test_each_kind_of_fault_is_named_with_its_page(site, line, said):
    (found,) = site(line)
    assert found.startswith(f"page{len(line)}.html: ")
    assert said in found
