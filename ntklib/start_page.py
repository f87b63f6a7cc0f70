"""The page on which JupyterLab opens: all chapters with the question of each, and how to work with them.

``python -m ntklib.start_page`` writes it.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import yaml

from ntklib import chapters, storage
from ntklib.paths import project_root

PATH = "start.md"  # in the folder of the notebooks; written by `make lab`, not committed
HEAD = """<!-- Written by `make lab` from the chapters: edit those instead. -->
# Start here

Click on a chapter to open it. To change something, edit a value in the one cell of parameters near its top and choose
*Run > Run All Cells*.

- What was computed before with the same values is loaded from `runs/`, not trained again. The first run of a chapter takes
  minutes on two cores; a run that you interrupt goes on where it stopped. After `make book` all chapters are there at their
  default values.
- For a quick look, copy the values of [presets/smoke.yml](presets/smoke.yml) for the chapter into its cell of parameters: it
  then takes seconds, on networks too small to say anything. [presets/paper.yml](presets/paper.yml) has the sources' own settings.
- A claim is judged only at the preset that it asks for; with other values the chapter says so.
- To try things out without waiting, open the [playground](playground.ipynb): four small experiments with sliders.
"""
FOOT = """
## From a terminal

`python -m ntklib run NAME -p PARAMETER VALUE` runs a chapter with a changed parameter, `python -m ntklib run NAME --preset smoke`
a small one, and `python -m ntklib claims` prints the verdicts. More is on the book's page
[Running it again](../book/rerun.md).
"""


def write() -> Path:
    """Write the page next to the notebooks and return its path."""
    path = chapters.notebooks_folder() / PATH
    storage.write_atomic(path, page().encode())
    return path


def page() -> str:
    """The page as Markdown: the chapters in the order of the book's contents, by part, each with its question."""
    toc = yaml.safe_load((project_root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
    lines = [HEAD]
    for part in toc["parts"]:
        listed = [Path(entry["file"]).name for entry in part["chapters"] if entry["file"].startswith("executed/")]
        if listed:
            lines += [f"## {part['caption']}\n", *(entry(name) for name in listed), ""]
    return "\n".join([*lines, FOOT.lstrip()])


def entry(chapter: str) -> str:
    """A line of the list: the chapter's title, as a link, and its opening up to the first question."""
    notebook: Any = nbformat.read(chapters.notebook_path(chapter), as_version=4)
    text = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title, _, rest = text.partition("\n")
    title = title.removeprefix("# ").strip()
    return f"- [{title}]({chapter}.ipynb){'' if title.endswith('?') else ':'} {opening(rest)}"


def opening(text: str) -> str:
    """The beginning of a text up to its first question; its first sentence, if the first paragraph asks nothing."""
    first = " ".join(text.strip().split("\n\n")[0].split())
    plain = re.sub(r"\s*\{[\w:]+\}`[^`]*`", "", first)  # citations, which JupyterLab would show as they are written
    sentences = re.split(r"(?<=[.?])\s+(?=[A-Z*$])", plain)
    asked = next((i for i, sentence in enumerate(sentences) if sentence.endswith("?")), 0)
    return " ".join(sentences[: asked + 1])


if __name__ == "__main__":
    print(write())
