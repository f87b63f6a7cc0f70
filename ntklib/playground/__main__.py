"""``python -m ntklib.playground``: how long a change of each slider takes, from its event to the finished picture."""

import statistics
import time
from typing import Any

from ntklib import chapters, plots
from ntklib.playground.panel import INSTRUMENTS, Panel

ARGUMENTS = {  # instrument -> its arguments by the names of the chapter's parameters
    "trace": {"steps": "trace_steps", "width": "width", "lr": "lr", "weight_decay": "weight_decay", "init_scale": "init_scale",
              "seed": "seed", "dataset": "dataset", "num_train": "num_train"},
    "spectrum": {"width": "kernel_width", "depth": "depth", "activation": "activation", "steps": "kernel_steps", "seed": "seed",
                 "dataset": "dataset", "num_train": "num_kernel"},
    "edge": {"lr": "edge_lr", "readout": "readout", "top": "top", "seed": "seed", "steps": "edge_steps"},
    "map": {"lr": "map_lr", "depth": "layers", "start": "start"},
}  # fmt: skip


def start_of(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an instrument as the chapter passes them."""
    return {argument: parameters[parameter] for argument, parameter in ARGUMENTS[name].items()}


def changes(name: str, most: int = 8) -> list[tuple[float, str]]:
    """Seconds of every change of one slider at a time, through up to ``most`` of its values, and what was changed."""
    panel = Panel(name, **start_of(name, chapters.default_parameters("playground")))
    _ = panel.widget
    found = []
    for argument, chosen in panel.inputs.items():
        values = [value for _, value in chosen.options]
        for value in values[:: max(1, len(values) // most)]:
            if value != chosen.value:
                began = time.perf_counter()
                chosen.value = value  # computes, draws and hands the picture over before it returns
                found.append((time.perf_counter() - began, f"{argument} {value}"))
        panel.reset()
    return found


def main() -> None:
    """Print median and maximum for each instrument."""
    plots.use_style()
    for name in INSTRUMENTS:
        times = changes(name)
        slowest = max(times)
        print(
            f"{name:9} {len(times):3} changes: median {statistics.median(t for t, _ in times):.3f} s, "
            f"longest {slowest[0]:.3f} s ({slowest[1]})", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
