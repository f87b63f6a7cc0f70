"""One draw of each trace estimator: what it costs and how far it scatters."""

import math
import time

import torch
from torch import Tensor, nn

from ntklib import empirical_ntk, ntk_trace
from ntklib.random import stream

OPTIONS = {"perturbation": {"epsilon": 1e-3}, "jvp": {}, "output": {}}


def closed_form(kernel: Tensor) -> dict[str, float]:
    """Relative standard deviation of one draw, from the kernel ``[n, n, c, c]``."""
    kernel = kernel.double()
    blocks = kernel.diagonal(dim1=0, dim2=1)  # [c, c, n]
    diagonal = blocks.diagonal(dim1=0, dim2=1)  # [n, c]
    trace = float(diagonal.sum())
    gaussian = math.sqrt(2) * float(kernel.norm()) / trace
    output = math.sqrt(2 * max(0.0, float(blocks.square().sum() - diagonal.square().sum()))) / trace
    return {"perturbation": gaussian, "jvp": gaussian, "output": output}


def measure(model: nn.Module, x: Tensor, draws: int) -> dict[str, object]:
    """Measure each estimator over ``draws`` draws, and the orthogonal probes at as many as there are outputs.

    The cost of a draw is given alone and, for ``output``, among c draws that share one forward pass; relative to one forward pass.
    """
    kernel = empirical_ntk(model, x)
    expected, exact = closed_form(kernel), float(torch.einsum("iiaa->", kernel.double()))
    c, forward = kernel.shape[-1], _seconds(lambda: model(x), 3)
    found: dict[str, object] = {"exact": exact, "outputs": c, "forward_cpu_seconds": forward, "draws": draws, "estimators": {}}
    for method, options in OPTIONS.items():
        one = lambda count, method=method, options=options: ntk_trace(  # noqa: E731
            model, x, method=method, num_samples=count, normalize=False, generator=stream(0, method), **options
        )
        scatter = one(draws)
        found["estimators"][method] = {  # pyright: ignore[reportIndexIssue]
            "relative_sd": scatter.variance**0.5 / exact,
            "relative_sd_closed_form": expected[method],
            "mean_over_exact": scatter.mean / exact,
            "cost": _seconds(lambda one=one: one(1), 3) / forward,
            "cost_amortised": _seconds(lambda one=one: one(c), 1) / c / forward,
        }
    frame = ntk_trace(model, x, method="output", probes="orthogonal", num_samples=c, normalize=False, generator=stream(0, "frame"))
    return found | {"orthogonal_error": abs(frame.mean / exact - 1)}


def _seconds(call, repeats: int) -> float:
    """Median CPU seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]
