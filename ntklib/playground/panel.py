"""Sliders over the instruments: in a notebook that a person runs, a panel; in a batch, its picture at the first values."""

import base64
import html
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ntklib import progress
from ntklib.playground import instruments, pictures
from ntklib.playground.pictures import LIVE_DPI, Picture
from ntklib.text import unknown

# ipywidgets gives the handle of a slider no name: it takes the text of the label and points at the value beside it
NAMES = """
(() => {
  const name = () => {
    document.querySelectorAll('.ntklib-playground [role=slider]:not([aria-label])').forEach((handle, i) => {
      const box = handle.closest('.widget-inline-hbox'), label = box && box.querySelector('.widget-label');
      if (!label || !label.textContent) return;
      const value = box.querySelector('.widget-readout');
      handle.setAttribute('aria-label', label.textContent);
      if (value) {
        value.id = value.id || `playground-${Date.now()}-${i}`;
        handle.setAttribute('aria-describedby', value.id);
      }
    });
  };
  let rounds = 0;
  const timer = setInterval(() => { name(); if (++rounds > 100) clearInterval(timer); }, 100);
})();
"""


@dataclass(frozen=True)
class Control:
    """One thing to set: a slider over numbers, or a menu of words.

    Attributes:
        name: Argument of the instrument.
        label: What the reader sees, with symbol and unit.
        values: All values, in order.
    """

    name: str
    label: str
    values: tuple[Any, ...]

    def options(self, start: Any) -> list[tuple[str, Any]]:
        """Texts and values, with the starting value put in where it belongs.

        Raises:
            ValueError: If the starting value is a word that is not on the menu.
        """
        if start in self.values:
            found = list(self.values)
        elif isinstance(start, str):
            raise ValueError(unknown(self.name, start, self.values))
        else:
            found = sorted([*self.values, start])
        return [(f"{v:g}" if isinstance(v, float) else str(v), v) for v in found]


@dataclass(frozen=True)
class Instrument:
    """An experiment, its picture and what can be set.

    Attributes:
        compute: Pure function of the values.
        picture: Kind of picture of its result.
        controls: What the reader sets; other arguments stay as given.
    """

    compute: Callable[..., Any]
    picture: type[Picture]
    controls: tuple[Control, ...]


def _grid(low: float, high: float, step: float) -> tuple[float, ...]:
    return tuple(round(low + k * step, 6) for k in range(round((high - low) / step) + 1))


SEED = Control("seed", "seed", tuple(range(10)))
INSTRUMENTS = {
    "trace": Instrument(
        instruments.trace_along_training, pictures.TracePicture,
        (
            Control("width", "width m (hidden units)", (4, 8, 16, 32, 64, 128, 256)),
            Control("lr", "learning rate η", (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)),
            Control("weight_decay", "weight decay λ", (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
            Control("init_scale", "scale of initialization", (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)),
            SEED,
        ),
    ),
    "spectrum": Instrument(
        instruments.kernel_spectrum, pictures.SpectrumPicture,
        (
            Control("width", "width m (hidden units)", (2, 4, 8, 16, 32, 64, 128, 256)),
            Control("depth", "hidden layers", (1, 2, 3, 4)),
            Control("activation", "activation", ("relu", "erf", "identity", "tanh", "gelu")),
            Control("steps", "steps of training", (0, 1, 2, 5, 10, 20, 40)),
            SEED,
        ),
    ),
    "edge": Instrument(
        instruments.edge_path, pictures.EdgePicture,
        (
            Control("lr", "learning rate η / largest stable", _grid(0.1, 1.3, 0.01)),
            Control("readout", "readout at the end of the flow", (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)),
            Control("top", "dominant singular value", (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)),
            SEED,
        ),
    ),
    "map": Instrument(
        instruments.map_orbit, pictures.MapPicture,
        (
            Control("lr", "learning rate η / (2/S)", _grid(0.5, 1.6, 0.005)),
            Control("depth", "layers L", (2, 3, 4, 5, 6)),
            Control("start", "start ρ₀ / ρ*", _grid(0.05, 1.2, 0.05)),
        ),
    ),
}  # fmt: skip


class Panel:
    """An instrument at values that can be changed.

    Attributes:
        values: Present arguments of the instrument.
        picture: Its picture.
        words: What the picture shows.

    Args:
        name: ``"trace"``, ``"spectrum"``, ``"edge"`` or ``"map"``.
        start: Arguments of the instrument: a value for every control, and for what cannot be changed.

    Raises:
        ValueError: If the name is unknown, or a control has no value.
    """

    def __init__(self, name: str, **start: Any) -> None:
        if name not in INSTRUMENTS:
            raise ValueError(unknown("instrument", name, INSTRUMENTS))
        self.instrument = INSTRUMENTS[name]
        missing = [c.name for c in self.instrument.controls if c.name not in start]
        if missing:
            msg = f"The instrument {name} requires a starting value for every control. Missing: {', '.join(missing)}."
            raise ValueError(msg)
        self.name, self.start, self.values = name, dict(start), dict(start)
        self.picture = self.instrument.picture()
        self._known: dict[tuple, Any] = {}
        self._resetting = False
        self.refresh()

    def refresh(self) -> None:
        """Compute, unless it was computed before, and move the picture's lines."""
        key = tuple(self.values.values())
        if key not in self._known:
            self._known[key] = self.instrument.compute(**self.values)
        self.picture.update(self._known[key], self.values)
        self.words = self.picture.words(self._known[key])

    def html(self) -> str:
        """The picture as an element with its words as alternative text, and the words below it."""
        width, height = (self.picture.figure.get_size_inches() * LIVE_DPI).astype(int)
        data = base64.b64encode(self.picture.png()).decode()
        words = html.escape(self.words)
        return (
            f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" style="max-width: 100%; height: auto" '
            f'alt="{words}"><p style="line-height: 1.4; margin: 0">{words}</p>'
        )

    @cached_property
    def widget(self) -> Any:
        """Sliders, a button that puts them back, and the picture."""
        import ipywidgets as widgets

        self.inputs = {c.name: self._input(c) for c in self.instrument.controls}
        self.output = widgets.HTML(self.html())
        self.button = widgets.Button(description="reset", tooltip="put all sliders back to their first values")
        self.button.on_click(lambda _: self.reset())
        row = widgets.Box([*self.inputs.values(), self.button], layout=widgets.Layout(flex_flow="row wrap"))
        box = widgets.VBox([row, self.output])
        box.add_class("ntklib-playground")
        return box

    def _input(self, control: Control) -> Any:
        import ipywidgets as widgets

        options, start = control.options(self.start[control.name]), self.start[control.name]
        kind = widgets.Dropdown if isinstance(start, str) else widgets.SelectionSlider
        chosen = kind(
            options=options, value=start, description=control.label, style={"description_width": "15em"},
            layout=widgets.Layout(width="27em"),
        )  # fmt: skip
        chosen.observe(lambda change: self._changed(control.name, change["new"]), "value")
        return chosen

    def _changed(self, name: str, value: Any) -> None:
        if not self._resetting:
            self.values[name] = value
            self.refresh()
            self.output.value = self.html()

    def reset(self) -> None:
        """Put everything back to the first values, without a shadow."""
        self._resetting = True
        for name, chosen in self.inputs.items():
            chosen.value = self.start[name]
        self._resetting = False
        self.values = dict(self.start)
        self.picture.forget()
        self.refresh()
        self.output.value = self.html()


def is_live() -> bool:
    """Whether a person's frontend runs this kernel: not the runner, papermill or nbconvert, which take no input from a keyboard."""
    if os.environ.get(progress.FILE):
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def show(name: str, **start: Any) -> None:
    """Show an instrument in a notebook: with its sliders where there is a person, as a plain picture in a batch.

    Args:
        name: See ``Panel``.
        start: See ``Panel``.
    """
    from IPython.display import Image, Javascript, display

    panel = Panel(name, **start)
    if is_live():
        display(panel.widget)
        display(Javascript(NAMES))
    else:
        display(Image(panel.picture.print(), format="png"))
