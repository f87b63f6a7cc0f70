"""Figures: functions from axes and tidy frames to axes, in one style."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

PALETTE = sns.color_palette("colorblind")
MARKERS = "osD^vPX*"
COLUMN = 7.2  # inches: width of a figure in the book


def use_style() -> None:
    """Set the book's figure style for the session: colour-blind-safe colours, white face (legible on dark pages), no title."""
    for empty in ("No artists with labels found", "Data has no positive values"):  # axes without curves, where all runs diverged
        warnings.filterwarnings("ignore", message=empty)
    sns.set_theme(context="notebook", style="ticks", palette=PALETTE)
    mpl.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 160, "figure.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False,
        "axes.labelsize": 11, "legend.frameon": False, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "lines.markersize": 4, "lines.linewidth": 1.6, "image.cmap": "cividis", "figure.constrained_layout.use": True,
    })  # fmt: skip


def figure(rows: int = 1, columns: int = 1, height: float = 2.9, **options: Any) -> tuple[Figure, Any]:
    """Make a figure as wide as the book's column, ``height`` inches per row; panels that share an abscissa name it once, below."""
    fig, axes = plt.subplots(rows, columns, figsize=(COLUMN, height * rows), **options)
    if rows > 1 and options.get("sharex") in (True, "all", "col"):
        for ax in np.reshape(axes, (rows, columns))[:-1].flat:
            ax.xaxis.label.set_visible(False)
    return fig, axes


def seed_curves(
    ax: Axes,
    history: pd.DataFrame,
    labels: Mapping[str, str],
    *,
    x: str = "epoch",
    split: str | None = None,
    layer: str | None = None,
    first_style: int = 0,
) -> Axes:
    """Draw quantities against time: mean over runs with a band of one standard error, and each run as a thin line.

    Args:
        ax: Axes to draw on.
        history: Tidy frame of one or more runs.
        labels: Quantity -> legend entry, in order.
        x: ``"epoch"`` or ``"step"``.
        split: Keep rows of this split only.
        layer: Keep rows of this layer only.
        first_style: Index of the first colour and marker.
    """
    kept = history
    for column, wanted in (("split", split), ("layer", layer)):
        kept = kept if wanted is None else kept[kept[column] == wanted]
    for i, (quantity, label) in enumerate(labels.items(), first_style):
        part = pd.DataFrame(kept[kept["quantity"] == quantity])
        table = part.pivot_table(index=x, columns="run", values="value").replace([np.inf, -np.inf], np.nan)
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        ax.plot(table.index, table.to_numpy(), color=color, linewidth=0.6, alpha=0.35)
        mean, sem = table.mean(axis=1), table.sem(axis=1).fillna(0.0)
        ax.fill_between(table.index, mean - sem, mean + sem, color=color, alpha=0.25, linewidth=0)
        ax.plot(table.index, mean, color=color, marker=marker, label=label)
    return _name_time(ax, x)


def sweep_curves(
    ax: Axes,
    history: pd.DataFrame,
    quantity: str,
    by: str,
    values: Sequence[Any],
    *,
    x: str = "epoch",
    split: str | None = None,
    labels: Sequence[str] | None = None,
    ordered: bool = True,
) -> Axes:
    """Draw one quantity for every value of a setting: mean over runs with a band of one standard error.

    Args:
        ax: Axes to draw on.
        history: Tidy frame of all runs, with the setting ``by`` as a column.
        quantity: The quantity.
        by: Column of the setting.
        values: Its values, in the order of the legend; a value without rows is left out.
        x: Column of the abscissa.
        split: Keep rows of this split only.
        labels: Legend entries. Default: the values.
        ordered: Whether the values are a scale, drawn with colours from dark to light, or kinds, drawn with the palette.
    """
    kept = history[history["quantity"] == quantity]
    kept = kept if split is None else kept[kept["split"] == split]
    colors = [plt.get_cmap("viridis")(c) for c in np.linspace(0, 0.85, len(values))] if ordered else PALETTE
    for i, value in enumerate(values):
        table = pd.DataFrame(kept[kept[by] == value]).pivot_table(index=x, columns="run", values="value")
        table = table.replace([np.inf, -np.inf], np.nan)
        if table.empty:
            continue
        mean, sem = table.mean(axis=1), table.sem(axis=1).fillna(0.0)
        color, label = colors[i % len(colors)], str(value) if labels is None else labels[i]
        ax.fill_between(table.index, mean - sem, mean + sem, color=color, alpha=0.25, linewidth=0)
        ax.plot(table.index, mean, color=color, marker=MARKERS[i % len(MARKERS)], label=label)
    return _name_time(ax, x)


def _name_time(ax: Axes, x: str) -> Axes:
    """Label the abscissa; epochs are whole numbers there."""
    ax.set_xlabel(x)
    locator = ax.xaxis.get_major_locator()
    if x == "epoch" and isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)
    return ax


def rate_curves(ax: Axes, frame: pd.DataFrame, quantity: str, label: str, *, style: int = 0) -> Axes:
    """Draw a quantity against the learning rate: each seed as a thin line, mean and standard error over seeds that have a value.

    A run without a value (nan), one that diverged or did not get where the quantity is measured, is a cross at the lower edge.

    Args:
        ax: Axes to draw on; the abscissa is made logarithmic.
        frame: One row per run with the columns ``lr``, ``seed`` and the quantity.
        quantity: Column to draw.
        label: Legend entry.
        style: Index of colour and marker.
    """
    table = frame.pivot_table(index="lr", columns="seed", values=quantity, dropna=False).astype(float)
    color, marker = PALETTE[style % len(PALETTE)], MARKERS[style % len(MARKERS)]
    ax.plot(table.index, table.to_numpy(), color=color, linewidth=0.6, alpha=0.35)
    ax.errorbar(table.index, table.mean(axis=1), table.sem(axis=1).fillna(0.0), color=color, marker=marker, label=label)
    missing = table.index[table.isna().any(axis=1)]
    if len(missing):  # a line without points would reach to the corner of the figure
        height = np.full(len(missing), 0.03 + 0.045 * style)
        ax.plot(missing, height, "x", color=color, transform=ax.get_xaxis_transform(), clip_on=False)
    ax.set(xlabel=r"learning rate $\eta$", xscale="log")
    drawn = {float(r) for line in ax.lines for r in np.asarray(line.get_xdata()) if r > 0}
    rate_ticks(ax, sorted(drawn))
    return ax


def rate_ticks(ax: Axes, rates: Sequence[float], apart: float = 0.07) -> Axes:
    """Put plain ticks at learning rates on a logarithmic axis, labels only where they have room."""
    if not len(rates):
        return ax
    low, high = np.log(ax.get_xlim())
    kept: list[float] = []
    for rate in rates:
        if not kept or np.log(rate / kept[-1]) > 2 * apart * (high - low):
            kept.append(float(rate))
    ax.set_xticks(kept, [f"{r:g}" for r in kept])
    ax.set_xticks([r for r in rates if r not in kept], minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def join_legends(*axes: Axes, **options: Any) -> None:
    """Put the legends of axes that share a panel into one, on the first."""
    handles, labels = zip(*(pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)), strict=True)
    axes[0].legend(handles, labels, **options)


def kernel_matrix(ax: Axes, kernel: np.ndarray, y: Sequence[int], label: str = r"$K$") -> Axes:
    """Show an ``[n, n]`` kernel of examples sorted by class, with the class boundaries as lines and the classes as ticks."""
    order = np.argsort(np.asarray(y), kind="stable")
    image = ax.imshow(np.asarray(kernel)[np.ix_(order, order)], interpolation="nearest")
    classes, starts = np.unique(np.asarray(y)[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    for start in starts[1:]:
        ax.axhline(start - 0.5, color="white", linewidth=0.5)
        ax.axvline(start - 0.5, color="white", linewidth=0.5)
    ax.set_xticks((starts + ends - 1) / 2, classes)
    ax.set_yticks((starts + ends - 1) / 2, classes)
    ax.set(xlabel="class of $x'$", ylabel="class of $x$")
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85)
    return ax


def spectrum(ax: Axes, eigvals: np.ndarray, **options: Any) -> Axes:
    """Draw eigenvalues, descending, against their index on logarithmic axes."""
    ax.loglog(np.arange(1, len(eigvals) + 1), eigvals, marker=".", linestyle="none", **options)
    ax.set(xlabel="index $i$", ylabel=r"eigenvalue $\lambda_i$")
    return ax


def mark_diverged(ax: Axes, history: pd.DataFrame, *, x: str = "epoch") -> Axes:
    """Mark with a cross where runs of a combined history diverged; nothing is drawn when none did."""
    if "status" not in history:
        return ax
    diverged = pd.DataFrame(history[history["status"] == "diverged"])
    for n, (_, run) in enumerate(diverged.groupby("run")):
        position = float(run[x].to_numpy().max())
        ax.axvline(position, color="black", linestyle=":", linewidth=1)
        label = "diverged" if n == 0 else None
        ax.plot([position], [0.5], marker="x", color="black", linestyle="none", transform=ax.get_xaxis_transform(), label=label)
    return ax


def distance_map(ax: Axes, time: Sequence[float], distance: np.ndarray, label: str, **options: Any) -> Axes:
    """Show pairwise distances ``[m, m]`` between ``m`` measured times as a heat map, one square per pair, with ticks at times."""
    image = ax.imshow(np.asarray(distance), origin="lower", interpolation="nearest", **options)
    shown = range(0, len(time), max(1, len(time) // 7))
    labels = [f"{time[i]:g}" for i in shown]
    ax.set_xticks(list(shown), labels)
    ax.set_yticks(list(shown), labels)
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85)
    return ax


def network_diagram(ax: Axes, parts: Sequence[Any], marks: Mapping[str, str]) -> Axes:
    """Draw the parts of a network as a row of boxes from the input on, with arrows at the marked outputs.

    Args:
        ax: Axes to draw on; its frame is taken away.
        parts: Objects with ``name``, ``shape`` (of the output for one example) and ``parameters`` (their number), in order.
        marks: Part name -> words at the arrow that leaves its output.
    """
    size = 9 - max(0, len(parts) - 7) * 0.6
    for i, part in enumerate(parts):
        marked = part.name in marks
        color = PALETTE[list(marks).index(part.name) % len(PALETTE)] if marked else (0.5, 0.5, 0.5)
        ax.add_patch(FancyBboxPatch((i, 0), 0.7, 0.55, "round,pad=0.04", facecolor=(*color, 0.2), edgecolor=color))
        words = f"{part.name}\n{'×'.join(map(str, part.shape))}\n{part.parameters:,}"
        ax.text(i + 0.35, 0.275, words, ha="center", va="center", fontsize=size, linespacing=1.5)
        ax.annotate("", (i - 0.04, 0.275), (i - 0.26, 0.275), arrowprops={"arrowstyle": "->", "color": "black"})
        if marked:
            ax.annotate(
                marks[part.name], (i + 0.35, 0.6), (i + 0.35, 0.95), ha="center", color=color,
                arrowprops={"arrowstyle": "<-", "color": color},
            )  # fmt: skip
    ax.text(-0.3, 0.275, "image", ha="right", va="center", fontsize=size)
    ax.set(xlim=(-0.8, len(parts)), ylim=(-0.1, 1.1))
    ax.axis("off")
    return ax


def phase_portrait(
    ax: Axes, matrix: np.ndarray, paths: Sequence[np.ndarray] = (), *, exact: bool = True, limit: float = 1.2
) -> Axes:
    r"""Draw the flow of :math:`\dot x = A x` in the plane, measured paths on top, and the solutions that start where these do.

    Args:
        ax: Axes to draw on.
        matrix: A, ``[2, 2]``; of a residual in the plane of two kernel eigenvectors, minus the eigenvalues on the diagonal.
        paths: Measured paths, ``[times, 2]`` each, from their first point.
        exact: Whether to add the solution from the first point of each path, dashed.
        limit: Half the width of the square that is shown.
    """
    a = np.asarray(matrix, dtype=float)
    grid = np.linspace(-limit, limit, 25)
    u, v = np.meshgrid(grid, grid)
    slope = np.tensordot(a, np.stack([u, v]), 1)
    # sqrt of the speed: slow parts stay visible beside fast ones
    speed = np.sqrt(np.hypot(*slope) / max(np.hypot(*slope).max(), 1e-300))
    ax.streamplot(grid, grid, *slope, color=speed, cmap="Greys", norm=Normalize(-0.6, 1.6), density=0.8, linewidth=0.8)
    eigvals, eigvecs = np.linalg.eig(a)
    for path in map(np.asarray, paths):
        if exact:
            times = np.concatenate([[0], np.geomspace(1e-3, 1e3, 400)]) / max(np.abs(eigvals).max(), 1e-300)
            start = np.linalg.solve(eigvecs, path[0])
            solution = (eigvecs @ (np.exp(np.outer(eigvals, times)) * start[:, None])).real
            ax.plot(*solution, color=PALETTE[1], linestyle="--", linewidth=1)
        ax.plot(*path.T, color=PALETTE[0], linewidth=1.6)
        ax.plot(*path[0], marker="o", color=PALETTE[0])
        if len(path) > 1:
            ax.plot(*path[-1], marker="s", color="black", markersize=3)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    return ax


def value_map(ax: Axes, table: pd.DataFrame, label: str = "", *, limits: tuple[float, float], levels: Sequence[float] = ()) -> Axes:
    """Show a table of positive numbers as a logarithmic heat map with the numbers written in, and "div." where there is none.

    Args:
        ax: Axes to draw on.
        table: Rows and columns in the order of the axes, from below and from the left.
        label: Label of the colour bar; without one there is no bar.
        limits: Smallest and largest value of the colours.
        levels: Values at which to draw a line between cells.
    """
    values = table.to_numpy(dtype=float)
    image = ax.imshow(values, origin="lower", aspect="auto", interpolation="nearest", norm=LogNorm(*limits))
    for (i, j), value in np.ndenumerate(values):
        known = np.isfinite(value)
        dark = known and float(np.log(value / limits[0]) / np.log(limits[1] / limits[0])) < 0.6
        ax.text(j, i, f"{value:.2g}" if known else "div.", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for level in levels:
        inside = np.where(np.isfinite(values), values, np.inf) >= level
        for i, j in np.argwhere(inside[:, 1:] != inside[:, :-1]):
            ax.plot([j + 0.5] * 2, [i - 0.5, i + 0.5], color=PALETTE[3], linewidth=2)
        for i, j in np.argwhere(inside[1:] != inside[:-1]):
            ax.plot([j - 0.5, j + 0.5], [i + 0.5] * 2, color=PALETTE[3], linewidth=2)
    ax.set_xticks(range(values.shape[1]), [f"{c:g}" for c in table.columns])
    ax.set_yticks(range(values.shape[0]), [f"{r:g}" for r in table.index])
    if label:
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.85)
    return ax


def normalized_curve(
    ax: Axes, table: pd.DataFrame, *, logarithmic: bool = False, events: Mapping[str, float] | None = None
) -> Axes:
    """Draw the curves of several runs, each mapped to [0, 1] by its own range, as mean and band of one standard error.

    Args:
        ax: A small panel; its abscissa is made logarithmic, its ticks are left to the caller.
        table: One row per step, one column per run.
        logarithmic: Whether the logarithm is mapped.
        events: Event -> time, drawn as lines in the style of ``event_style``; nan is left out.
    """
    values = table.astype(float).replace([np.inf, -np.inf], np.nan)
    values = values.where(values > 0).apply(np.log) if logarithmic else values
    span = (values.max() - values.min()).replace(0.0, np.nan)
    scaled = pd.DataFrame((values - values.min()) / span).dropna(how="all")
    mean, sem = scaled.mean(axis=1), scaled.sem(axis=1).fillna(0.0)
    for i, time in enumerate((events or {}).values()):
        if np.isfinite(time):
            ax.axvline(time, **event_style(i))
    ax.fill_between(scaled.index, mean - sem, mean + sem, color="black", alpha=0.2, linewidth=0)
    ax.plot(scaled.index, mean, color="black", linewidth=1.1)
    ax.set(xscale="log", ylim=(-0.08, 1.08))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def event_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the line of an event, by its place in the list of events."""
    return {"color": PALETTE[(0, 1, 2, 4)[index % 4]], "linestyle": ("-", "--", "-.", ":")[index % 4], "linewidth": 1.3}


def ratio_map(ax: Axes, values: pd.DataFrame, marks: pd.DataFrame, *, limit: float, label: str = "") -> Any:
    """Show a table of log ratios as a heat map with the ratios written in; nan is an empty, hatched cell.

    Args:
        ax: Axes to draw on.
        values: Natural logarithms of ratios, rows from above.
        marks: Same shape; cells that are true are framed.
        limit: Logarithm at which the colours end.
        label: Label of the abscissa.

    Returns:
        The image, for a colour bar.
    """
    numbers = values.to_numpy(dtype=float)
    image = ax.imshow(numbers, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    for (i, j), value in np.ndenumerate(numbers):
        if not np.isfinite(value):
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="0.93", edgecolor="0.75", hatch="////", linewidth=0))
            continue
        ratio = np.exp(value)
        text = f"{ratio:.2g}" if 0.01 <= ratio < 99.5 else f"{ratio:.0e}"
        ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if abs(value) > 0.75 * limit else "black")
        if bool(marks.to_numpy()[i, j]):
            ax.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.8))
    ax.set_xticks(range(values.shape[1]), [str(c) for c in values.columns], rotation=90, fontsize=7)
    ax.set_yticks(range(values.shape[0]), [str(r) for r in values.index], fontsize=8)
    ax.tick_params(length=0)
    ax.set_xlabel(label, fontsize=8)
    return image
