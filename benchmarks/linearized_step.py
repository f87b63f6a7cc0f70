"""A training step of a linearized network beside one of the network itself: ``python -m benchmarks.linearized_step``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.linearized import linearize
from ntklib.models import build, calibrate_batch_norm
from ntklib.random import stream

TARGET = 3.0  # times a step of the network


@dataclass(frozen=True)
class Steps:
    """Median CPU seconds of one training step.

    Attributes:
        network: Of the network in training mode.
        frozen: Of the network in eval mode, with batch normalisation as the linearized network has it.
        linearized: Of the linearized network.
        ratio: Median over rounds of linearized over network.
    """

    network: float
    frozen: float
    linearized: float
    ratio: float


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Take one step of stochastic gradient descent on the cross-entropy, in the mode that the model is in."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    with torch.no_grad():
        for w, gradient in zip(params, gradients, strict=True):
            w -= 1e-4 * gradient


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call: other processes on the machine do not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, width: int, batch_size: int, size: int, rounds: int) -> Steps:
    """Time the three kinds of step in turn, so that a slow phase of the machine hits all of them; the first round warms up."""
    x = torch.randn(batch_size, 1, size, size, generator=stream(0, "x"))
    y = torch.arange(batch_size) % 10
    make = lambda: calibrate_batch_norm(build(name, input_shape=(1, size, size), num_classes=10, width=width), x)  # noqa: E731
    models = [make().train(), make().eval(), linearize(make().eval())]
    times = [[seconds(lambda m=m: step(m, x, y)) for m in models] for _ in range(rounds + 1)][1:]
    network, frozen, linearized = (median(column) for column in zip(*times, strict=True))
    return Steps(network, frozen, linearized, median(row[2] / row[0] for row in times))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="resnet18", show_default=True, help="Name in ntklib.models.")
@click.option("--width", default=4, show_default=True, help="Channels of the first stage, or hidden units.")
@click.option("--batch-size", default=128, show_default=True, help="Examples per step.")
@click.option("--size", default=28, show_default=True, help="Rows and columns of an image.")
@click.option("--rounds", default=9, show_default=True, help="Measured rounds.")
def main(model: str, width: int, batch_size: int, size: int, rounds: int) -> None:
    """Time a training step of a linearized network against one of the network, on one thread."""
    torch.set_num_threads(1)
    found = measure(model, width, batch_size, size, rounds)
    click.echo(f"{model}, width {width}, {batch_size} images of {size} x {size}, one thread, medians of {rounds} rounds (CPU time)")
    click.echo(f"network, training mode  {1e3 * found.network:8.1f} ms")
    click.echo(f"network, eval mode      {1e3 * found.frozen:8.1f} ms")
    click.echo(f"linearized              {1e3 * found.linearized:8.1f} ms")
    click.echo(f"ratio {found.ratio:.2f}, target at most {TARGET:g}: {'met' if found.ratio <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
