"""Time the kernel and the trace estimators: ``python -m benchmarks``.

Contestants alternate within one process, on one thread, so that a slow phase of the machine hits all of them; the median over
rounds is reported, and agreement is checked in the same run. The peers of the structured engine are added with that engine.
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntklib import empirical_ntk, models, ntk_trace
from ntklib.random import stream

ROUNDS = 5


def published_recipe(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel as in torch.func's tutorial: vmap of jacrev, then one einsum per parameter."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def f(params: dict[str, Tensor], x_i: Tensor) -> Tensor:
        return functional_call(model, {**params, **buffers}, (x_i[None],))[0]

    jacobians = vmap(jacrev(f), (None, 0))(params, x).values()
    return torch.stack([torch.einsum("Naf,Mbf->NMab", j.flatten(2), j.flatten(2)) for j in jacobians]).sum(0)


def medians(contestants: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contestant over interleaved rounds, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    console = Console()
    workloads = {
        "MLP 784-64-64-10, n = 32": (models.build("mlp", input_shape=(1, 28, 28), num_classes=10, width=64), 32),
        "ResNet-18, width 8, n = 16": (models.build("resnet18", input_shape=(1, 28, 28), num_classes=10, width=8), 16),
    }
    table = Table("workload", "ours (s)", "torch.func recipe (s)", "ratio", "relative difference", title="exact kernel, float32")
    estimates = Table("workload", "method", "seconds per draw", "relative sd", "draws for 1 %", "seconds for 1 %", title="trace")
    for name, (model, n) in workloads.items():
        model.eval()
        x = torch.randn(n, 1, 28, 28, generator=stream(0, "x"))
        ours, theirs = empirical_ntk(model, x), published_recipe(model, x)
        found = medians({"ours": lambda m=model, x=x: empirical_ntk(m, x), "recipe": lambda m=model, x=x: published_recipe(m, x)})
        difference = float((ours - theirs).norm() / theirs.norm())
        ratio = found["recipe"] / found["ours"]
        table.add_row(name, f"{found['ours']:.3f}", f"{found['recipe']:.3f}", f"{ratio:.2f}x", f"{difference:.1e}")
        for row in estimator_rows(model, x):
            estimates.add_row(name, *row)
    console.print(table)
    console.print(estimates)


def estimator_rows(model: nn.Module, x: Tensor, draws: int = 32) -> list[list[str]]:
    """Cost and scatter of one draw of each estimator, and what a relative standard error of 1 % costs."""
    exact = ntk_trace(model, x).mean
    rows = []
    for method, options in {"perturbation": {"epsilon": 1e-3}, "jvp": {}, "output": {}}.items():
        start = time.perf_counter()
        estimate = ntk_trace(model, x, method=method, num_samples=draws, generator=stream(0, method), **options)
        seconds = (time.perf_counter() - start) / draws
        scatter = estimate.variance**0.5 / exact
        needed = max(1, round((scatter / 0.01) ** 2))
        rows.append([method, f"{seconds:.4f}", f"{scatter:.3f}", f"{needed}", f"{seconds * needed:.3g}"])
    return rows


if __name__ == "__main__":
    main()
