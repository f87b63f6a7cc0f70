"""Networks trained in one stack against the same networks trained one by one.

``python -m benchmarks.replicas`` takes both in turn, on one thread or on the GPU, and prints the medians, the cost of r networks in
one stack in units of a single run, and how much quicker a network is in the stack than alone (above 1: stacking pays). Losses at
the end must agree.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from ntklib import provenance
from ntklib.data import Dataset
from ntklib.models.initialization import initialize
from ntklib.models.mlp import MLP
from ntklib.random import stream
from ntklib.training import adamw, gradient_descent, replicated_gradient_descent, replicated_minibatches

Losses = Callable[[], list[float]]


@dataclass(frozen=True)
class Case:
    """A network and a way to train it.

    Attributes:
        kind: ``"full"`` (gradient descent on all examples) or ``"batches"`` (AdamW).
        widths: Input, hidden and output units.
        examples: Training examples.
        batch: Examples per step, for ``"batches"``.
        activation: Activation.
    """

    kind: str
    widths: tuple[int, ...]
    examples: int
    batch: int
    activation: str


CASES = {
    "edge of stability, 64-64-64-10": Case("full", (64, 64, 64, 10), 200, 0, "tanh"),
    "grokking on digits, 784-100-100-10": Case("batches", (784, 100, 100, 10), 400, 200, "relu"),
    "grokking on digits, 784-200-200-10": Case("batches", (784, 200, 200, 10), 1000, 200, "relu"),
}


@dataclass(frozen=True)
class Result:
    """Seconds per step of one size; ``cost`` = stacked / one alone, ``gain`` = r separate runs / the stack."""

    case: str
    replicas: int
    alone: float
    stacked: float
    cost: float
    gain: float
    difference: float


def _network(case: Case, seed: int, device: str) -> MLP:
    d, *hidden, c = case.widths
    model = MLP(d, hidden, c, activation=case.activation)
    return initialize(model, "standard", stream(seed, "init")).to(device)


def _data(case: Case, device: str) -> Dataset:
    x = torch.randn(case.examples, case.widths[0], generator=stream(0, "x"))
    y = torch.randint(case.widths[-1], (case.examples,), generator=stream(0, "y"))
    return Dataset("random", x[:, None, None], y, x[:1, None, None], y[:1], case.widths[-1]).to(device)


def methods(case: Case, r: int, steps: int, device: str) -> tuple[Losses, Losses]:
    """Train ``r`` networks one by one, and in one stack; both return the last losses."""
    data = _data(case, device)
    x, y = data.x_train, data.y_train
    per_epoch = max(1, case.examples // max(1, case.batch))
    common: dict[str, Any] = {"lr": 1e-3, "batch_size": case.batch, "epochs": max(1, steps // per_epoch)}

    def run(seed: int) -> Iterator[Any]:
        model = _network(case, seed, device)
        if case.kind == "full":
            return gradient_descent(model, x, y, lr=0.01, steps=steps, measure_at=())
        return adamw(model, data, seed=seed, measure_at=(), **common)

    def stack() -> Iterator[Any]:
        models = [_network(case, seed, device) for seed in range(r)]
        if case.kind == "full":
            return replicated_gradient_descent(models, x, y, lrs=[0.01] * r, steps=steps, measure_at=())
        return replicated_minibatches(models, data, optimizer="adamw", seeds=range(r), measure_at=(), **common)

    return lambda: [list(run(seed))[-1].loss for seed in range(r)], lambda: list(stack())[-1].losses.tolist()


def compare(name: str, r: int, *, steps: int = 100, repeats: int = 5, device: str = "cpu") -> Result:
    """Median seconds per step of both ways, taken in turn, after one round of each that does not count."""
    case = CASES[name]
    alone, stacked = methods(case, r, steps, device)
    taken: dict[Losses, list[float]] = {alone: [], stacked: []}
    losses: dict[Losses, list[float]] = {}
    for _ in range(repeats + 1):
        for method, times in taken.items():
            start = time.perf_counter()
            losses[method] = method()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / steps)
    one, all_of_them = (median(times[1:]) for times in taken.values())
    pairs = zip(losses[alone], losses[stacked], strict=True)
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    return Result(name, r, one / r, all_of_them, r * all_of_them / one, one / all_of_them, difference)


@click.command(help=__doc__)
@click.option("--replicas", "sizes", multiple=True, type=int, help="Networks in a stack.  [default: 1, 2, 8; on a GPU also 64]")
@click.option("--steps", default=100, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Keep the results in this file.")
def main(sizes: tuple[int, ...], steps: int, repeats: int, device: str, target: Path | None) -> None:
    """Print a table and keep it if asked."""
    torch.set_num_threads(1)
    click.echo(f"{'case':36} {'r':>3} {'alone':>10} {'stack':>10} {'cost':>6} {'gain':>6}  losses differ by")
    results = []
    for name in CASES:
        for r in sizes or ((1, 2, 8, 64) if device.startswith("cuda") else (1, 2, 8)):
            found = compare(name, r, steps=steps, repeats=repeats, device=device)
            results.append(asdict(found))
            click.echo(
                f"{name:36} {r:3} {1e3 * found.alone:7.3f} ms {1e3 * found.stacked:7.3f} ms {found.cost:6.2f} {found.gain:6.2f}  "
                f"{found.difference:.1e}"
            )
    if target is not None:
        report = {
            "date": provenance.utc_now(),
            "steps": steps,
            "repeats": repeats,
            **provenance.machine(device),
            "results": results,
        }
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
