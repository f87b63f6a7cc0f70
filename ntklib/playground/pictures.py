"""The pictures of the playground: figures that are built once, and whose lines then move."""

import io
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator
from PIL import Image

from ntklib.playground.instruments import EdgePath, MapOrbit, Spectrum, TraceCurve, bifurcation
from ntklib.plots import COLUMN, MARKERS, PALETTE

LIVE_DPI = 110
FIXED: Any = "none"  # the style's layout engine would be at work in every drawing; matplotlib's annotations leave out this value
RANKS = ("effective rank", "participation ratio", "stable rank")
GHOST = {"color": "0.65", "linewidth": 1.2, "linestyle": "-", "zorder": 1}  # the curve before the last change


class Picture(ABC):
    """A figure with its artists.

    Axes, ticks and words cost far more to draw than lines. They are drawn once and kept as pixels, on which the lines are drawn
    anew; only where the limits of the axes change (they are rounded, so that this is rare) is the whole figure drawn again.
    """

    columns = 1
    height = 2.9  # inches

    def __init__(self) -> None:
        self.figure = Figure(figsize=(COLUMN, self.height), dpi=LIVE_DPI, facecolor="white", layout=FIXED)
        self._canvas = FigureCanvasAgg(self.figure)
        self.axes: list[Axes] = list(np.atleast_1d(self.figure.subplots(1, self.columns)))
        self.figure.subplots_adjust(left=0.1, right=0.985, bottom=0.175, top=0.96, wspace=0.05 + 0.12 * self.columns)
        self._ghosts: list[tuple[Line2D, Line2D]] = []
        self._moving: list[tuple[Axes, Line2D]] = []
        self._frame: Any = None  # what the kept pixels belong to
        self._pixels: Any = None
        self._drawn = False
        self.values: dict[str, Any] = {}  # arguments of the instrument behind what is shown
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make axes, labels and empty artists."""

    @abstractmethod
    def move(self, result: Any) -> None:
        """Put the artists where a result wants them."""

    @abstractmethod
    def words(self, result: Any) -> str:
        """What the picture shows, in a sentence with numbers; the alternative text of the picture."""

    def backdrop(self) -> Any:
        """What else than the limits of the axes a change of would make the kept pixels wrong."""
        return None

    def line(self, ax: Axes, *, ghost: bool = False, **style: Any) -> Line2D:
        """An empty line that moves; with a ghost, which shows where the line was before the last change."""
        if ghost:
            (shadow,) = ax.plot([], [], **GHOST)
            self.moves(ax, shadow)
        (line,) = ax.plot([], [], **style)
        if ghost:
            self._ghosts.append((line, shadow))
        return self.moves(ax, line)

    def moves(self, ax: Axes, line: Line2D) -> Line2D:
        """Leave a line out of the kept pixels."""
        line.set_animated(True)
        self._moving.append((ax, line))
        return line

    def update(self, result: Any, values: dict[str, Any]) -> None:
        """Show a result; what was shown before becomes a grey shadow."""
        if self._drawn:
            for line, ghost in self._ghosts:
                ghost.set_data(*line.get_data())
        self.values = dict(values)
        self.move(result)
        self._drawn = True

    def forget(self) -> None:
        """Drop the shadows."""
        self._drawn = False
        for _, ghost in self._ghosts:
            ghost.set_data([], [])

    def png(self) -> bytes:
        """The picture for a screen, as fast as can be."""
        canvas = self._canvas
        frame = [[(ax.get_xlim(), ax.get_ylim()) for ax in self.axes], self.backdrop()]
        if frame != self._frame:
            canvas.draw()
            self._frame, self._pixels = frame, canvas.copy_from_bbox(self.figure.bbox)
        canvas.restore_region(self._pixels)
        for ax, line in self._moving:
            ax.draw_artist(line)
        content = io.BytesIO()
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(content, "png", compress_level=1)
        return content.getvalue()

    def print(self, dpi: int = 160) -> bytes:
        """The picture for a page."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=dpi)
        self._frame = None
        return content.getvalue()


def _decades(*arrays: np.ndarray, span: float = 1e6) -> tuple[float, float]:
    """Powers of ten around all positive values, over not much more than ``span``."""
    values = np.concatenate(arrays)
    values = values[np.isfinite(values) & (values > 0)]
    top = float(np.ceil(np.log10(values.max()) + 1e-3)) if len(values) else 0.0
    bottom = float(np.floor(np.log10(values.min()) - 1e-3)) if len(values) else -1.0
    return 10 ** max(bottom, top - round(np.log10(span))), 10**top


class TracePicture(Picture):
    """Trace along training, beside the accuracies."""

    columns = 2

    def build(self) -> None:
        left, right = self.axes
        self.trace = self.line(left, ghost=True, color=PALETTE[0], marker=MARKERS[0])
        left.set(xlabel="step", ylabel=r"trace Tr $K$ / $(nc)$", yscale="log")
        self.train = self.line(right, ghost=True, color=PALETTE[1], marker=MARKERS[1], label="training images")
        self.test = self.line(right, color=PALETTE[2], marker=MARKERS[2], linestyle="--", label="test images")
        right.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03))
        right.legend(loc="lower right")

    def move(self, result: TraceCurve) -> None:
        self.trace.set_data(result.step, result.trace)
        self.train.set_data(result.step, result.train)
        self.test.set_data(result.step, result.test)
        for ax in self.axes:
            ax.set_xlim(-0.03 * self.values["steps"], 1.03 * self.values["steps"])
        self.axes[0].set_ylim(*_decades(result.trace, span=1e9))

    def words(self, result: TraceCurve) -> str:
        end = f"The run diverged after step {result.step[-1]}. " if result.diverged else ""
        return (
            f"{end}Trace from {result.trace[0]:.3g} at step 0 to {result.trace[-1]:.3g} at step {result.step[-1]}; "
            f"training accuracy {result.train[-1]:.0%}, test accuracy {result.test[-1]:.0%}."
        )


class SpectrumPicture(Picture):
    """Eigenvalues of a kernel and of its limit, beside their ranks."""

    columns = 2

    def build(self) -> None:
        left, right = self.axes
        self.limit = self.line(left, color=PALETTE[1], linestyle="--", label="infinite width, step 0")
        self.eigvals = self.line(left, ghost=True, color=PALETTE[0], marker=MARKERS[0], linestyle="none", label="this network")
        left.set(xlabel="index $i$", ylabel=r"eigenvalue $\lambda_i$", xscale="log", yscale="log")
        left.legend(loc="lower left")
        self.limit_ranks = self.line(right, color=PALETTE[1], marker="|", markersize=16, markeredgewidth=2, linestyle="none")
        self.ranks = self.line(right, color=PALETTE[0], marker=MARKERS[0], markersize=7, linestyle="none")
        right.set(xlabel="number of directions", xscale="log", ylim=(-0.6, 2.6))
        right.yaxis.set_major_locator(FixedLocator([2, 1, 0]))
        right.yaxis.set_major_formatter(FixedFormatter([r.replace(" ", "\n") for r in RANKS]))

    def move(self, result: Spectrum) -> None:
        index, heights = np.arange(1, len(result.eigvals) + 1), np.array([2, 1, 0])
        self.eigvals.set_data(index, result.eigvals)
        self.limit.set_data(index, result.limit)
        self.ranks.set_data(result.ranks, heights)
        self.limit_ranks.set_data(result.limit_ranks, heights)
        self.axes[1].set_xlim(0.9, len(index))
        self.axes[0].set(xlim=(0.9, 1.1 * len(index)), ylim=_decades(result.eigvals, result.limit))

    def words(self, result: Spectrum) -> str:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in zip(RANKS, result.ranks, strict=True))
        limit = "no closed form for the infinitely wide network with this activation"
        if np.isfinite(result.limit_distance):
            of = ", ".join(f"{v:.3g}" for v in result.limit_ranks)
            limit = f"at infinite width {of}; relative distance from that kernel {result.limit_distance:.2g}"
        short = "" if result.step == self.values["steps"] else " The run diverged."
        return f"After {result.step} steps, of {len(result.eigvals)} directions: {numbers}; {limit}.{short}"


class EdgePicture(Picture):
    """Sharpness against 2 / learning rate, loss and alignment along gradient descent."""

    columns = 3

    def build(self) -> None:
        first, second, third = self.axes
        self.sharpness = self.line(first, ghost=True, color=PALETTE[0], label="gradient descent")
        edge = first.axhline(1.0, color="black", linestyle="--", linewidth=1, label=r"$2/\eta$")
        flow = first.axhline(1.0, color=PALETTE[1], linestyle=":", linewidth=1.5, label="end of gradient flow")
        self.edge, self.flow = self.moves(first, edge), self.moves(first, flow)
        self.loss = self.line(second, ghost=True, color=PALETTE[2])
        self.alignment = self.line(third, ghost=True, color=PALETTE[3])
        first.set(ylabel=r"sharpness $\lambda_1 / \lambda_1^*$")
        second.set(ylabel="loss", yscale="log")
        third.set(ylabel="KTA", ylim=(-0.02, 1.02))
        for ax in self.axes:
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(MaxNLocator(4))
        first.legend(loc="lower right", fontsize=8)

    def move(self, result: EdgePath) -> None:
        step = np.arange(len(result.loss))
        sharp, edge, flow = result.sharpness / result.least, result.edge / result.least, result.flow / result.least
        self.edge.set_ydata([edge, edge])
        self.flow.set_ydata([flow, flow])
        self.sharpness.set_data(step, sharp)
        self.loss.set_data(step, np.maximum(result.loss, 1e-30))
        self.alignment.set_data(step, result.alignment)
        for ax in self.axes:
            ax.set_xlim(0, self.values["steps"])
        highest = max(1.05 * edge, 1.05 * flow, min(float(sharp.max()), 3 * max(edge, flow)))
        self.axes[0].set_ylim(0, np.ceil(2 * highest) / 2)
        self.axes[1].set_ylim(*_decades(np.clip(result.loss, 1e-30, 1e3), span=1e12))

    def words(self, result: EdgePath) -> str:
        tail = slice(-50, None)
        if result.diverged:
            return f"Diverged at step {len(result.loss)}; gradient flow would end at {result.flow / result.edge:.3g} times 2/η."
        low, high = result.sharpness[tail].min() / result.edge, result.sharpness[tail].max() / result.edge
        return (
            f"Over the last steps the sharpness is between {low:.3g} and {high:.3g} times 2/η (gradient flow would end at "
            f"{result.flow / result.edge:.3g} times 2/η); loss {result.loss[-1]:.2g}, kernel target alignment "
            f"{result.alignment[-1]:.3g}."
        )


class MapPicture(Picture):
    """Bifurcation diagram with the learning rate marked, cobweb, and the path."""

    columns = 3

    def build(self) -> None:
        first, second, third = self.axes
        (self.cascade,) = first.plot([], [], color=PALETTE[0], marker=",", linestyle="none")
        self.mark = self.moves(first, first.axvline(1.0, color=PALETTE[3], linewidth=1.2))
        first.set(xlabel=r"learning rate $\eta\,/\,(2/S)$", ylabel=r"$\rho\,/\,\rho^*$", ylim=(0, 1.6))
        second.plot([0, 1.6], [0, 1.6], color="black", linewidth=0.8)
        self.curve = self.line(second, color=PALETTE[2], linewidth=1.6)
        self.web = self.line(second, color=PALETTE[3], linewidth=0.8)
        second.set(xlabel=r"$\rho_t\,/\,\rho^*$", ylabel=r"$\rho_{t+1}\,/\,\rho^*$", xlim=(0, 1.6), ylim=(0, 1.6))
        self.path = self.line(third, ghost=True, color=PALETTE[3], marker=MARKERS[0], markersize=3, linewidth=0.8)
        third.set(xlabel="step", ylabel=r"$\rho_t\,/\,\rho^*$", ylim=(0, 1.6))
        third.xaxis.set_major_locator(MaxNLocator(4))

    def backdrop(self) -> Any:
        return self.values["depth"]

    def move(self, result: MapOrbit) -> None:
        low, high = min(0.9, self.values["lr"]), max(1.6, self.values["lr"])
        unit, kept = bifurcation(self.values["depth"], low, high)
        self.cascade.set_data(np.tile(unit, len(kept)), kept.ravel())
        self.axes[0].set_xlim(low, high)
        self.mark.set_xdata([self.values["lr"]] * 2)
        self.curve.set_data(*result.curve)
        corners = np.repeat(result.path, 2)
        self.web.set_data(corners[:-1], np.concatenate([[0.0], corners[2:]]))
        self.path.set_data(np.arange(len(result.path)), result.path)
        self.axes[2].set_xlim(-1, len(result.path))

    def words(self, result: MapOrbit) -> str:
        kind = {1: "comes to rest", 0: "shows no period up to 32", -1: "diverges"}.get(
            result.period, f"ends on an orbit of period {result.period}"
        )
        return f"At {self.values['lr']:g} times the edge a mode of a network of {self.values['depth']} layers {kind}."
