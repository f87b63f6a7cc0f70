"""Runs with squared loss up to and beyond the edge of stability: task, network, training loop, and what is measured."""

import math
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ntklib import data, models
from ntklib.alignment import TargetModes, alignment_change, at_loss, network_modes
from ntklib.data import Dataset
from ntklib.models import MLP
from ntklib.operator import NTKOperator
from ntklib.random import stream
from ntklib.settings import ImageSettings, Positive
from ntklib.spectra import top_eigenpairs
from ntklib.text import check_known
from ntklib.training import State, central_flow, gradient_descent, gradient_flow, half_mse, one_hot, sgd, steps_per_epoch
from ntklib.training.flows import FlowState, hessian_modes

PERCEPTRONS = {"linear": "identity", "tanh": "tanh", "relu": "relu"}  # name -> activation
NETWORKS = (*PERCEPTRONS, "cnn", "vit")
TARGETS = ("parity", "classes")
METHODS = ("descent", "sgd", "flow", "central")
SHOWN = 20  # eigenvectors whose shares are kept at the end of a run
LEADING = 5  # eigenvectors that count as leading
ARRIVAL = 0.97  # a run is at the edge from the first time that lr lambda_1 / 2 has come this near to 1


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
        every: Steps between two measurements; even, so that an oscillation of period two is always met in the same phase.
        method: ``"descent"`` (full batch), ``"sgd"``, ``"flow"`` (gradient flow) or ``"central"`` (central flow).
        batch_size: Examples per step of ``"sgd"``, which measures once per epoch and does not end at ``stop_at``.
        num_critical: Hessian eigenvalues that ``"central"`` watches.
        substeps: Its steps per gradient step.
        tol: Error bound of ``"flow"``.
        hessian: Whether the largest Hessian eigenvalue is measured beside that of the kernel.
    """

    network: str
    width: Positive
    depth: Annotated[int, Field(ge=1)] = 3
    targets: str = "parity"
    num_train: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    steps: Positive
    stop_at: Annotated[float, Field(gt=0)]
    every: Positive = 2
    method: str = "descent"
    batch_size: Positive = 1
    num_critical: Positive = 3
    substeps: Annotated[int, Field(ge=2)] = 2
    tol: Annotated[float, Field(gt=0)] = 1e-4
    hessian: bool = False

    @model_validator(mode="after")
    def _check_task(self) -> "EdgeSettings":
        check_known("network", self.network, NETWORKS)
        check_known("targets", self.targets, TARGETS)
        check_known("method", self.method, METHODS)
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


def edge_network(settings: EdgeSettings, task: Dataset) -> nn.Module:
    """The initialized network for a task; perceptrons have biases but for the linear one.

    All parameters are drawn as by ``ntklib.models.initialize`` with the settings' scheme, from the settings' seed.
    """
    input_shape, num_outputs = task.input_shape, task.y_train.shape[1]
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


def edge_loop(
    settings: EdgeSettings, model: nn.Module, task: Dataset
) -> tuple[Callable[..., Iterator[State]], tuple, dict[str, Any]]:
    """The training loop of the settings' method, its positional arguments, and keyword arguments that are no settings."""
    if settings.method == "sgd":
        epochs = max(1, math.ceil(settings.steps / steps_per_epoch(len(task.x_train), settings.batch_size)))
        return sgd, (model, task), {"epochs": epochs, "loss": "half_mse"}
    loop = {"descent": gradient_descent, "flow": gradient_flow, "central": central_flow}[settings.method]
    return loop, (model, task.x_train, task.y_train), {"measure_at": range(0, settings.steps + 1, settings.every)}


def edge_measures(state: State, task: Dataset, settings: EdgeSettings, memory: MutableMapping[str, Tensor]) -> dict[str, float]:
    """What is measured at a state, by name.

    ``loss`` (of the whole training set), ``kta``, ``leading`` (target share of the ``LEADING`` first eigenvectors), ``top``
    (the largest eigenvalue of the NTK over n, the scale of the Hessian of the loss), ``by_eigenvalues`` and ``by_eigenvectors``
    (parts of the change of KTA since the last measured state, see ``alignment_change``), ``sharpness`` if the settings ask for
    it, and of the central flow ``mean_loss``, the predicted time average. A kernel of several outputs is summed over them, but
    ``top`` belongs to the full one. Without a usable kernel, in a diverging run, the loss alone.

    Args:
        state: The state.
        task: Training images and targets.
        settings: The run's settings.
        memory: Modes of the last measured state; replaced by those of this one.
    """
    model, x, y = state.model, task.x_train[:], task.y_train
    with torch.no_grad():
        found = {"loss": float(half_mse(model(x), y))}
    modes = network_modes(model, x, y)
    if modes is None:
        return found
    full: Any = NTKOperator(model, x)
    top = modes.eigvals[0] if y.shape[1] == 1 else top_eigenpairs(full, 1)[0][0]
    found |= {"kta": modes.alignment, "leading": modes.top(LEADING), "top": float(top) / len(x)}
    if "eigvals" in memory:
        change = alignment_change(TargetModes(memory["eigvals"], memory["shares"], modes.factor), modes)
        found |= {"by_eigenvalues": change.eigenvalues, "by_eigenvectors": change.eigenvectors}
    memory.update(eigvals=modes.eigvals.cpu(), shares=modes.shares.cpu())
    if settings.hessian:
        eigvals, memory["basis"] = hessian_modes(model, x, y, start=memory.get("basis"))
        found["sharpness"] = float(eigvals[0])
    if settings.method == "central" and isinstance(state, FlowState) and state.extra:
        found["mean_loss"] = found["loss"] + 0.5 * float(state.extra["covariance"].diagonal() @ state.extra["eigvals"])
    return found


def table_of(history: pd.DataFrame) -> pd.DataFrame:
    """The quantities of one run as columns, one row per measured step, without those of single eigenvectors."""
    rows = pd.DataFrame(history[history["layer"] == ""])
    return rows.pivot_table(index="step", columns="quantity", values="value", dropna=False)


def matched(history: pd.DataFrame, level: float, quantity: str) -> float:
    """Value of a quantity where the loss of a run reaches ``level``; nan if it never does. See ``at_loss``."""
    table = table_of(history)
    return at_loss(table["loss"].tolist(), table[quantity].tolist(), level) if quantity in table else math.nan


def edge_windows(history: pd.DataFrame, lr: float, every: int) -> np.ndarray:
    """Changes over successive windows of a run at the edge of stability, one row each.

    Columns: change of lr lambda_1 / 2 (the sharpness in units of the edge), of KTA, its eigenvalue part and its eigenvector part.
    Only windows of ``every`` steps count, from the first time that the sharpness has come within 3 % of the edge.
    """
    table = table_of(history)
    if "by_eigenvalues" not in table:
        return np.zeros((0, 4))
    scaled = lr * table["top"] / 2
    arrived = scaled.ge(ARRIVAL).cummax().shift(fill_value=False)
    regular = pd.Series(table.index, index=table.index).diff() == every
    columns = [scaled.diff(), table["kta"].diff(), table["by_eigenvalues"], table["by_eigenvectors"]]
    return np.stack([c[arrived & regular].to_numpy() for c in columns], axis=1)
