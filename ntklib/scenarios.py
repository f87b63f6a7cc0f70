"""Six kinds of training from the book's chapters, small, in one form: network, loop, and what is measured along it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntklib import data, models
from ntklib.edge import EdgeSettings, edge_network, edge_task, targets_of
from ntklib.fixmatch_probe import FixMatchProbe
from ntklib.fixmatch_settings import FixMatchSettings
from ntklib.grokking_settings import GrokkingSettings
from ntklib.lazy import LazySettings, lazy_problem, parity_pairs
from ntklib.modular_settings import ModularSettings
from ntklib.probes import Gauges
from ntklib.settings import Settings, SupervisedSettings
from ntklib.text import unknown
from ntklib.training import (
    State,
    cross_entropy,
    fixmatch,
    full_batch_adamw,
    gradient_descent,
    half_mse,
    log_steps,
    loop_by_optimizer,
    loss_by_name,
    pseudo_label_loss,
    steps_per_epoch,
)  # fmt: skip

FITTED = 1000  # examples at most on which the training accuracy is measured
CURVED = 200  # the same for the training loss and its Hessian
STATISTICS = 2048  # images at most for batch normalisation's statistics

SUPERVISED = SupervisedSettings(
    dataset="mnist5k", num_train=500, num_test=1000, model="mlp", width=64, lr=0.02, momentum=0.9, batch_size=50, epochs=80,
    num_probe=1,
)  # fmt: skip
ADDITION = ModularSettings(
    p=23, train_fraction=0.7, width=32, heads=4, hidden=64, lr=0.015, weight_decay=1.0, steps=3000, num_measured=1, num_probe=1,
    num_kernel=1, epsilon=0.01,
)  # fmt: skip
DIGITS = GrokkingSettings(
    dataset="digits", num_train=100, num_test=400, width=50, init_scale=5.0, lr=0.01, weight_decay=0.2, batch_size=100,
    epochs=2500, num_measured=1, num_probe=1, num_kernel=1,
)  # fmt: skip
FIXMATCH = FixMatchSettings(
    dataset="mnist5k", num_test=1000, shrink=2, num_labels=40, model="mlp", width=64, lr=0.03, batch_size=8, mu=7, steps=600,
    padding=1, flip=False, strong="geometric", eval_every=1, num_probe=1,
)  # fmt: skip
EDGE = EdgeSettings(dataset="digits", network="tanh", width=64, depth=4, num_train=200, lr=0.2, steps=1000, stop_at=1e-300)
LAZY = LazySettings(task="digits", num_train=100, width=512, bias_std=0.5, lr_fraction=0.5, steps=1000)
BASES: dict[str, Settings] = {
    "supervised": SUPERVISED, "grokking addition": ADDITION, "grokking digits": DIGITS, "FixMatch": FIXMATCH,
    "edge of stability": EDGE, "lazy": LAZY,
}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One training run and how it is measured.

    Attributes:
        name: A key of ``BASES``.
        training: Settings of the run, of the kind of the chapter that it is taken from.
        num_kernel: Training examples of the kernel, at most.
        num_measured: Measured steps after step 0, evenly spaced on a logarithmic axis, at most.
        first: The first of them.
    """

    name: str
    training: Settings
    num_kernel: int
    num_measured: int
    first: int = 1

    @property
    def device(self) -> str:
        """Device of the run."""
        return str(self.training.model_dump()["device"])

    def flat(self) -> dict[str, Any]:
        """All settings in one mapping, by which a ``Run`` is found again."""
        own = {"scenario": self.name, "num_kernel": self.num_kernel, "num_measured": self.num_measured, "first": self.first}
        return self.training.model_dump() | own


def scenario(name: str, changes: Mapping[str, Any], *, num_kernel: int, num_measured: int, first: int = 1) -> Scenario:
    """Take the settings of ``BASES`` with some changes.

    Raises:
        ValueError: If the name is unknown, a change is no legal setting, or a count is too small.
    """
    if name not in BASES:
        raise ValueError(unknown("scenario", name, BASES))
    if num_kernel < 2 or num_measured < 6:
        msg = f"num_kernel must be at least 2 and num_measured at least 6. Got {num_kernel} and {num_measured}."
        raise ValueError(msg)
    return Scenario(name, BASES[name].but(**changes), num_kernel, num_measured, first)


@dataclass(frozen=True)
class Scene:
    """A network before training, with all that is needed to train and to measure it.

    Attributes:
        model: The network; training changes it.
        loop: Generator of states.
        arguments: Its positional arguments.
        steps: Length of the run.
        gauges: What is measured.
        options: Keyword arguments of the loop that are no settings.
        statistics: Inputs for batch normalisation's statistics.
    """

    model: nn.Module
    loop: Callable[..., Iterator[State]]
    arguments: tuple
    steps: int
    gauges: Gauges
    options: dict[str, Any] = field(default_factory=dict)
    statistics: Tensor | None = None

    def marks(self, num: int, first: int) -> list[int]:
        """Measured steps, see ``log_steps``; even ones, so that an oscillation of period two is always met in one phase."""
        return sorted(
            {step + step % 2 if step < self.steps else step for step in log_steps(self.steps, num, min(first, self.steps))}
        )

    def at(self, state: State) -> nn.Module:
        """The network of a state in eval mode, with the statistics of batch normalisation at its present weights."""
        return state.model if self.statistics is None else models.recalibrated(state.model, self.statistics)


def stage(s: Scenario) -> Scene:
    """Make the network, the task and the loop of a scenario; the same ones every time."""
    makers: dict[type, Callable[[Any, int], Scene]] = {
        SupervisedSettings: _images, GrokkingSettings: _images, ModularSettings: _addition, FixMatchSettings: _fixmatch,
        EdgeSettings: _edge, LazySettings: _lazy,
    }  # fmt: skip
    return makers[type(s.training)](s.training, s.num_kernel)


def _images(s: SupervisedSettings, num_kernel: int) -> Scene:
    """Mini-batches on images; with enlarged parameters for ``GrokkingSettings``."""
    images = data.load(s.dataset, num_train=s.num_train or None, num_test=s.num_test or None, seed=s.seed, storage=s.storage).to(
        s.device
    )
    grokking = isinstance(s, GrokkingSettings)
    images = images.in_unit_range() if grokking else images
    net = models.build(
        s.model, input_shape=images.input_shape, num_classes=images.num_classes, width=s.width, init=s.init, seed=s.seed
    )
    net = (models.scale_parameters(net, s.init_scale) if isinstance(s, GrokkingSettings) else net).to(s.device)
    steps = s.epochs * steps_per_epoch(len(images.x_train), s.batch_size)
    probe = data.probe_set(images.x_train, images.y_train, min(num_kernel, len(images.x_train)), s.seed)
    fitted, curved = (
        data.probe_set(images.x_train, images.y_train, min(num, len(images.x_train)), s.seed) for num in (FITTED, CURVED)
    )
    gauges = Gauges(probe, fitted, (images.x_test[:], images.y_test), curved, loss_by_name(s.loss))
    return Scene(net, loop_by_optimizer(s.optimizer), (net, images), steps, gauges, statistics=images.x_train[:STATISTICS])


def _addition(s: ModularSettings, num_kernel: int) -> Scene:
    """A transformer on modular addition, full batch."""
    pairs = data.modular_addition(s.p, s.train_fraction, seed=s.seed).to(s.device)
    net = models.ModularTransformer(p=s.p, width=s.width, heads=s.heads, hidden=s.hidden, seed=s.seed).to(s.device)
    few = pairs.train[:num_kernel]
    whole, rest = ((pairs.tokens(part), pairs.sums(part)) for part in (pairs.train, pairs.test))
    curved = (whole[0][:CURVED], whole[1][:CURVED])
    gauges = Gauges((pairs.tokens(few), pairs.sums(few)), whole, rest, curved, loss_by_name(s.loss), pairs.one_hot(few))
    arguments = (net, pairs.train, pairs.sums(pairs.train))
    return Scene(net, full_batch_adamw, arguments, s.steps, gauges, {"forward": net.folded})


def _fixmatch(s: FixMatchSettings, num_kernel: int) -> Scene:
    """FixMatch; the kernel is that of unlabelled images, whose hidden labels are its targets."""
    images = data.load(s.dataset, num_train=s.num_train or None, num_test=s.num_test or None, seed=s.seed)
    parts = data.hide_labels(data.shrink(images, s.shrink), s.num_labels, seed=s.seed, reuse_labelled=s.reuse_labelled)
    parts = parts.to(s.device)
    net = models.build(
        s.model, input_shape=parts.input_shape, num_classes=parts.num_classes, width=s.width, init=s.init, seed=s.seed
    ).to(s.device)
    augment = data.WeakAndStrong(parts.black, parts.white, s.padding, s.flip, s.strong)
    fixed = FixMatchProbe.draw(parts, augment, min(CURVED // 2, len(parts.x_unlabelled)), s.seed)
    hidden = data.probe_set(parts.x_unlabelled, parts.y_unlabelled, min(num_kernel, len(parts.x_unlabelled)), s.seed)
    labelled = (parts.x_labelled, parts.y_labelled)
    first = len(parts.x_labelled)
    x = torch.cat([parts.x_labelled, fixed.weak, fixed.strong])
    y = torch.cat([parts.y_labelled, torch.zeros(len(x) - first, dtype=torch.long, device=x.device)])

    def loss(outputs: Tensor, y: Tensor) -> Tensor:  # labelled, weak and strong images in one batch
        weak, strong = outputs[first:].chunk(2)
        return cross_entropy(outputs[:first], y[:first]) + s.lambda_u * pseudo_label_loss(weak, strong, s.threshold).loss

    gauges = Gauges(hidden, labelled, (parts.x_test, parts.y_test), (x, y), loss)
    return Scene(net, fixmatch, (net, parts), s.steps, gauges, statistics=x)


def _edge(s: EdgeSettings, num_kernel: int) -> Scene:
    """Full-batch gradient descent on the parity of digits, at a large learning rate."""
    task = edge_task(s)
    net = edge_network(s, task)
    held = data.load(s.dataset, num_train=s.num_train, seed=s.seed).to(s.device)
    test = (held.x_test[:], targets_of(held.y_test, s.targets, held.num_classes) if s.targets == "parity" else held.y_test)
    train = (task.x_train[:], task.y_train if s.targets == "parity" else held.y_train)
    probe = (task.x_train[:num_kernel], task.y_train[:num_kernel])
    gauges = Gauges(probe, train, test, (task.x_train[:], task.y_train), half_mse)
    return Scene(net, gradient_descent, (net, task.x_train, task.y_train), s.steps, gauges)


def _lazy(s: LazySettings, num_kernel: int) -> Scene:
    """A wide network in NTK parameterization on the parity of images, full batch."""
    p = lazy_problem(s)
    held = data.load(s.task, num_train=s.num_train, seed=s.seed)
    test = tuple(part.to(p.x) for part in parity_pairs(held.x_test[:], held.y_test))
    gauges = Gauges((p.x[:num_kernel], p.y[:num_kernel]), (p.x, p.y), (test[0], test[1]), (p.x, p.y), half_mse)
    return Scene(p.model, gradient_descent, (p.model, p.x, p.y), s.steps, gauges, {"lr": p.lr * len(p.x)})
