"""The picture of the front page: verdicts by source, and four measured curves, drawn from the stored runs of the chapters."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ntklib import claims, plots, storage
from ntklib.paths import runs_root

COLORS = {claims.HOLDS: "#00609a", claims.FAILS: "#a33a00", claims.INCONCLUSIVE: "#ffd75e", claims.NOT_JUDGED: "#d9d9d9"}
ABSENT = "no stored runs"
SIZE = (7.0, 7.8)  # inches; narrower than other figures, so that its words stay legible on a phone


@dataclass(frozen=True)
class Panel:
    """What one panel shows: a sentence for the caption, and one in numbers for readers who do not see it."""

    caption: str
    alt: str


@dataclass(frozen=True)
class Story:
    """The picture (SVG) with its words."""

    image: bytes
    caption: str
    alt: str


def story(preset: str) -> Story:
    """Draw the picture from the results of a preset; a panel whose runs are not stored says so."""
    import matplotlib as mpl

    plots.use_style()
    fixed: dict[Any, Any] = {"svg.hashsalt": "story", "svg.fonttype": "path"}  # the same numbers give the same file
    with mpl.rc_context({**fixed, "axes.labelsize": 10, "axes.titlesize": 10}):
        fig = plots.plt.figure(figsize=SIZE)
        parts: Any = fig.subfigures(2, 1, height_ratios=[0.3, 0.7])
        axes = [parts[0].subplots(), *parts[1].subplots(2, 2).flat]
        words = [_verdicts(axes[0], claims.ledger())]
        words += [_panel(ax, draw, preset) for ax, draw in zip(axes[1:], CURVES, strict=True)]
        for letter, ax, title in zip("abcde", axes, TITLES, strict=True):
            ax.set_title(f"{letter}   {title}", loc="left")
        buffer = io.BytesIO()
        fig.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
        plots.plt.close(fig)
    lettered = [f"({letter}) {w.caption}" for letter, w in zip("abcde", words, strict=True)]
    toys = "" if preset == "default" else f" Curves of the preset {preset}, not of the one on which verdicts rest."
    return Story(buffer.getvalue(), " ".join(lettered) + toys, " ".join(w.alt for w in words))


TITLES = (
    "verdicts by source",
    "trace of the kernel",
    "alignment with the targets",
    "direction of the kernel",
    "deep linear networks",
)


def _panel(ax: Axes, draw: Callable[[Axes, str], Panel], preset: str) -> Panel:
    try:
        return draw(ax, preset)
    except (FileNotFoundError, LookupError, ValueError):  # nothing stored, or too little of it
        ax.clear()
        ax.text(0.5, 0.5, ABSENT, ha="center", va="center", transform=ax.transAxes, color="grey")
        ax.set(xticks=[], yticks=[])
        return Panel(f"{ABSENT.capitalize()}.", f"An empty panel: {ABSENT}.")


def _record(chapter: str, preset: str) -> dict[str, Any]:
    record = storage.read_json(runs_root() / "results" / preset / f"{chapter}.json")
    if record is None:
        msg = f"{chapter} has no results at preset {preset}."
        raise FileNotFoundError(msg)
    return record


def _runs(chapter: str, claim: str, preset: str) -> list[Any]:
    """The runs behind a claim that did not diverge."""
    from ntklib.runs import load_result

    found = [load_result(chapter, key) for key in _record(chapter, preset)["claims"][claim]["runs"]]
    return [r for r in found if not r.diverged]


def _verdicts(ax: Axes, entries: Sequence[dict[str, Any]]) -> Panel:
    """Stacked bars of the counts, sources from above."""
    titles = {**claims.SOURCES, claims.OWN: "Findings of this book"}
    counts: Any = pd.DataFrame({s: {v: 0 for v in COLORS} for s in titles})
    for e in entries:
        counts.loc[e["verdict"] if e["verdict"] in COLORS else claims.NOT_JUDGED, e["source"]] += 1
    left = np.zeros(len(titles))
    for verdict, color in COLORS.items():
        row = counts.loc[verdict].to_numpy()
        if row.any():
            bars = ax.barh(range(len(titles)), row, left=left, color=color, edgecolor="white", label=verdict)
            ink = "black" if verdict in (claims.INCONCLUSIVE, claims.NOT_JUDGED) else "white"
            ax.bar_label(bars, [str(n) if n else "" for n in row], label_type="center", color=ink, fontsize=9)
            left += row
    ax.set_yticks(range(len(titles)), list(titles.values()))
    ax.invert_yaxis()
    ax.set(xlabel="number of claims")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.legend(loc="upper right", ncols=1)
    told = "; ".join(
        f"{title}: {', '.join(f'{n} {v}' for v, n in counts[s].items() if n)}" for s, title in titles.items() if counts[s].any()
    )
    return Panel(f"Verdicts on the {len(entries)} claims of the ledger.", f"Stacked bars of verdicts. {told}.")


def _trace(ax: Axes, preset: str) -> Panel:
    """The schedule stops the trace: the perceptron of the controls."""
    from ntklib.runs import combine

    without_decay = [r for r in _runs("trace_evolution", "N2", preset) if r.settings["weight_decay"] == 0]
    said, seeds = [], 0
    for i, (schedule, label) in enumerate({"constant": "constant rate", "cosine": "cosine schedule"}.items()):
        mine = [r for r in without_decay if r.settings["schedule"] == schedule]
        history: Any = combine(mine, "seed").query("quantity == 'trace' and split == 'train'")
        plots.seed_curves(ax, history, {"trace": label}, first_style=i)
        for line in ax.lines:
            line.set_markevery(4)
        mean = history.groupby("epoch")["value"].mean()
        late = mean.iloc[len(mean) * 2 // 3]
        moved = f"from {mean.iloc[0]:,.0f} to {mean.iloc[-1]:,.0f}, {mean.iloc[-1] / late - 1:+.1%} in the last third"
        said.append(f"with a {label} {moved}")
        seeds = len(mine)
    ax.set(ylabel=r"trace Tr $K$ / $(nc)$", ylim=(0, None))
    ax.legend(loc="lower right")
    return Panel(
        f"The trace of a perceptron, trained without decay, rises and rests when the schedule stops the steps; {_seeds(seeds)} "
        "({numref}`fig-trace-controls`).",
        f"The trace against the epoch: {'; '.join(said)}.",
    )


def _alignment(ax: Axes, preset: str) -> Panel:
    """KTA at the same loss against the learning rate, beside gradient flow."""
    from ntklib.edge import matched

    level = _record("eos_alignment", preset)["parameters"]["level"]
    found = _runs("eos_alignment", "B1", preset)
    settings = [{k: r.settings[k] for k in ("lr", "seed", "method")} for r in found]
    rows: Any = pd.DataFrame([s | {"kta": matched(r.history, level, "kta")} for s, r in zip(settings, found, strict=True)])
    descent, flow = rows[rows["method"] == "descent"], rows[rows["method"] == "flow"]["kta"]
    descent = descent.dropna(subset=["kta"])
    if descent.empty or flow.dropna().empty:
        msg = f"No run reaches the loss {level:g}."
        raise ValueError(msg)
    plots.rate_curves(ax, descent, "kta", "gradient descent")
    ax.axhline(flow.mean(), color=plots.PALETTE[1], linestyle="--", label="gradient flow")
    ax.set(ylabel=f"KTA at loss {level:g}", ylim=(0, 1))
    ax.legend(loc="upper left")
    means = descent.groupby("lr")["kta"].mean()
    return Panel(
        "Kernel target alignment (KTA) at the same loss grows with the learning rate beyond the edge of stability; "
        f"{_seeds(descent['seed'].nunique())} ({{numref}}`fig-eos-rates`).",
        f"Alignment against the learning rate: {flow.mean():.2f} for gradient flow, {means.iloc[0]:.2f} at rate "
        f"{means.index[0]:g}, {means.iloc[-1]:.2f} at rate {means.index[-1]:g}.",
    )


def _cone(ax: Axes, preset: str) -> Panel:
    """Angles of the kernel to the first and to the last one."""
    from ntklib.cone import angles_from_distances
    from ntklib.phases import pairwise_distances

    rows, found = [], _runs("cone_effect", "D4", preset)
    for r in found:
        steps = [int(t) for t in r.history.query("split == 'train' and quantity == 'trace'")["step"]]
        steps = [t for t in steps if t % r.settings["interval"] == 0]
        angle = angles_from_distances(pairwise_distances(r.history, "full", steps))
        for quantity, values in (("first", angle[0]), ("last", angle[-1])):
            rows += [{"run": r.key, "step": t, "quantity": quantity, "value": v} for t, v in zip(steps, values, strict=True)]
    table: Any = pd.DataFrame(rows)
    plots.seed_curves(ax, table, {"first": "to the initial one", "last": "to the last one"}, x="step")
    for line in ax.lines:
        line.set_markevery(5)
    ax.set(ylabel="angle (radians)", ylim=(0, None))
    ax.legend(loc="center right")
    mean = table.groupby(["quantity", "step"])["value"].mean()
    middle = mean["first"].index[len(mean["first"]) // 2]
    return Panel(
        f"After an early phase the kernel hardly turns away further from the initial one, yet keeps moving; {_seeds(len(found))} "
        "({numref}`fig-cone-angles`).",
        f"Angles between kernels against the step: to the initial kernel {mean['first'][middle]:.2f} radians in the middle of "
        f"training and {mean['first'].iloc[-1]:.2f} at its end; to the last kernel {mean['last'].iloc[0]:.2f} at the start and "
        f"{mean['last'][middle]:.2f} in the middle.",
    )


def _bifurcation(ax: Axes, preset: str) -> Panel:
    """End-to-end singular values over the last steps, against the learning rate."""
    from ntklib import period_doubling as doubling
    from ntklib.runs import load_result, load_tensors_of

    record = _record("deep_linear_networks", preset)
    wanted = record["parameters"]["targets"]
    found = (load_result("deep_linear_networks", key) for key in record["runs"])
    one = next((r for r in found if r.settings.get("targets") == wanted and "perturbation" not in r.settings), None)
    if one is None:
        raise LookupError
    values = load_tensors_of(one)["model.values"].numpy()
    s = one.settings
    unit = np.linspace(s["lr_low"], s["lr_high"], s["num_lr"])
    for k in range(len(wanted)):
        ax.plot(unit, values[:, :, k].T, ",", rasterized=True, color=plots.PALETTE[k])
    ax.axvline(1, color="grey", linestyle=":", linewidth=1)
    first, second = (d.lr for d in doubling.doublings(wanted[0], s["depth"], 2))
    ax.set(xlabel=r"learning rate $\eta S_1 / 2$", ylabel="singular values", xlim=(unit[0], unit[-1]))
    return Panel(
        "Singular values of a deep linear network on its last steps: past the edge (dotted) they alternate, double their period "
        "and become chaotic; deterministic, no seeds ({numref}`fig-dln-bifurcation`).",
        f"Bifurcation diagram of {len(wanted)} singular values: one value each below the edge of stability, two of the largest "
        f"from there on, four from {second / first:.3f} times the edge, then chaos.",
    )


def _seeds(number: int) -> str:
    return f"mean and standard error over {number} seeds"


CURVES = (_trace, _alignment, _cone, _bifurcation)


def write(preset: str, folder: Path) -> Story:
    """Draw the picture and write it as ``story.svg``, if it changed."""
    found = story(preset)
    path = folder / "story.svg"
    if not path.exists() or path.read_bytes() != found.image:
        storage.write_atomic(path, found.image)
    return found
