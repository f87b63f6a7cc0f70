"""Networks and tasks for training at the edge of stability: squared loss, full batch, a few hundred images."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ntklib import data, models
from ntklib.data import Dataset
from ntklib.models import MLP
from ntklib.random import stream
from ntklib.settings import ImageSettings, Positive
from ntklib.text import unknown
from ntklib.training import one_hot

PERCEPTRONS = {"linear": "identity", "tanh": "tanh", "relu": "relu"}  # name -> activation
NETWORKS = (*PERCEPTRONS, "cnn", "vit")
TARGETS = ("parity", "classes")


class EdgeSettings(ImageSettings):
    """One run with squared loss, (1/2n) sum of squares, that ends at a loss.

    Attributes:
        network: ``"linear"``, ``"tanh"`` or ``"relu"`` (perceptrons), ``"cnn"`` or ``"vit"``.
        width: Units of every hidden layer, channels of the first stage, or dimension of a token.
        depth: Weight layers of a perceptron.
        targets: ``"parity"`` (one output, +1 for even and -1 for odd labels) or ``"classes"`` (one-hot).
        num_train: Class-balanced training subset.
        lr: Learning rate; of gradient flow the unit of time.
        steps: Gradient steps at most.
        stop_at: Loss at which the run ends.
        every: Steps between two measurements.
        batch_size: Examples per step of stochastic gradient descent; 0 for full-batch gradient descent.
        flow: Whether the run follows gradient flow.
    """

    network: str
    width: Positive
    depth: Annotated[int, Field(ge=1)] = 3
    targets: str = "parity"
    num_train: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    steps: Positive
    stop_at: Annotated[float, Field(gt=0)]
    every: Positive = 1
    batch_size: Annotated[int, Field(ge=0)] = 0
    flow: bool = False

    @model_validator(mode="after")
    def _check_task(self) -> "EdgeSettings":
        for kind, got, known in (("network", self.network, NETWORKS), ("targets", self.targets, TARGETS)):
            if got not in known:
                raise ValueError(unknown(kind, got, known))
        if self.batch_size > self.num_train:
            msg = f"batch_size must be at most num_train = {self.num_train}. Got {self.batch_size}."
            raise ValueError(msg)
        return self


def edge_task(settings: EdgeSettings) -> Dataset:
    """The training images, with targets ``[n, 1]`` or ``[n, classes]`` as floating-point numbers in place of labels."""
    loaded = data.load(settings.dataset, num_train=settings.num_train, num_test=1, seed=settings.seed).to(settings.device)
    return replace(loaded, y_train=targets_of(loaded.y_train, settings.targets, loaded.num_classes))


def targets_of(labels: Tensor, targets: str, num_classes: int) -> Tensor:
    """Targets of a regression: parity of the label, +1 for even and -1 for odd ones, ``[n, 1]``; or one-hot, ``[n, classes]``."""
    return 1.0 - 2.0 * (labels % 2)[:, None].float() if targets == "parity" else one_hot(labels, num_classes)


def edge_network(settings: EdgeSettings, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """The initialized network; perceptrons have biases but for the linear one.

    All parameters are drawn as by ``ntklib.models.initialize`` with the settings' scheme, from the settings' seed.
    """
    if settings.network in PERCEPTRONS:
        hidden, kind = [settings.width] * (settings.depth - 1), PERCEPTRONS[settings.network]
        bias = settings.network != "linear"
        with torch.random.fork_rng([]):
            net = MLP(int(torch.Size(input_shape).numel()), hidden, num_outputs, activation=kind, bias=bias)
        net = models.initialize(net, settings.init, stream(settings.seed, "init"))
    else:
        net = models.build(
            settings.network, input_shape=input_shape, num_classes=num_outputs, width=settings.width, init=settings.init,
            seed=settings.seed,
        )  # fmt: skip
    return net.to(settings.device).eval()
