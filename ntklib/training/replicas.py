"""Many small networks trained in one batched run: seeds, and learning rates, side by side in one stack of weights.

A step of a small network costs what the calls of its operations cost, not its arithmetic; r networks in one stack share the calls.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import vmap

from ntklib.data.datasets import Dataset
from ntklib.models.mlp import MLP
from ntklib.text import check_known
from ntklib.training.batches import epoch_batches, steps_per_epoch
from ntklib.training.losses import loss_by_name
from ntklib.training.schedules import learning_rate
from ntklib.training.state import Checkpoint, State

FAMILIES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class StackedMLP(nn.Module):
    """r multilayer perceptrons of one shape as one module with weights ``[r, in, out]`` and biases ``[r, 1, out]``.

    The buffer ``fallen``, ``[r]``, marks networks that have stopped training because something in them was not finite.

    Args:
        models: Perceptrons with the same layers; their parameters are copied.

    Raises:
        ValueError: If there is none, one is no ``MLP``, or their layers differ.
    """

    fallen: Tensor

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        shapes = {str(model) for model in models}
        if not all(isinstance(model, MLP) for model in models) or len(shapes) != 1:
            got = sorted({type(model).__name__ for model in models}) if len(shapes) <= 1 else f"{len(shapes)} different builds"
            msg = f"A stack requires at least one MLP, all of one build. Got {got}. Train other networks one by one."
            raise ValueError(msg)
        self.skeleton: list[Any] = [copy.deepcopy(models[0])]  # in a list: its parameters are not the stack's
        layers = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in models]
        same = list(zip(*layers, strict=True))
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach().T for layer in each]) for each in same)
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in each]) for each in same if each[0].bias is not None
        )
        self.register_buffer("fallen", torch.zeros(len(models), dtype=torch.bool, device=self.weights[0].device))

    def __len__(self) -> int:
        return len(self.weights[0])

    def forward(self, x: Tensor) -> Float[Tensor, "r n c"]:
        """Outputs of every network on its own inputs ``[r, n, *input]``."""
        h, k = x.flatten(2), 0
        for module in list(self.skeleton[0].layers)[1:]:  # the first flattens
            if isinstance(module, nn.Linear):
                h = torch.baddbmm(self.biases[k], h, self.weights[k]) if len(self.biases) else h @ self.weights[k]
                k += 1
            else:
                h = module(h)
        return h

    @torch.no_grad()
    def unstack(self, index: int) -> nn.Module:
        """A copy of one network, as a plain module in eval mode."""
        model = copy.deepcopy(self.skeleton[0]).to(self.weights[0])
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        for k, layer in enumerate(linear):
            layer.weight.copy_(self.weights[k][index].T)
            if layer.bias is not None:
                layer.bias.copy_(self.biases[k][index, 0])
        return model.eval()


@dataclass(kw_only=True)
class Replicas(State):
    """Networks trained together, at one measured step: a ``State`` whose model is the stack, so that a ``Run`` can resume it.

    ``loss`` is the mean over the networks that still train, ``lr`` is the largest rate, and ``diverged`` says that none trains.

    Attributes:
        losses: Training loss of each, ``[r]``: at this state for full-batch descent; for mini-batches the mean over the steps since
            the last measured one, nan at step 0.
        fallen: Which networks have met a loss or parameter that is not finite, ``[r]``: they stay as they were then.
    """

    losses: Float[Tensor, " r"]
    fallen: Bool[Tensor, " r"]

    @property
    def stack(self) -> StackedMLP:
        """The networks; ``stack.unstack(i)`` is one as a plain module."""
        return cast("StackedMLP", self.model)


def replicated_gradient_descent(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    lrs: Sequence[float],
    steps: int,
    loss: str = "half_mse",
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[Replicas]:
    r"""Full-batch gradient descent of r networks at once, each with its own learning rate: r times ``gradient_descent``.

    .. math:: w^{(i)}_{s+1} = w^{(i)}_s - \eta_i \nabla L(w^{(i)}_s)

    Every network sees the same data; losses, scale conventions and measured steps are those of ``gradient_descent``.

    Args:
        models: Perceptrons of one build, copied: the arguments stay as they are.
        x: Inputs, ``[n, *input]``.
        y: Labels, ``[n]``.
        lrs: Learning rate of each network.
        steps: Number of steps.
        loss: See ``ntklib.training.losses``.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The networks before each measured step, after the last, and where one diverges. When all have diverged the loop ends.

    Raises:
        ValueError: If the networks cannot be stacked, or there is not one learning rate for each.
    """
    if len(lrs) != len(models):
        msg = f"lrs must have one learning rate for each of the {len(models)} networks. Got {len(lrs)}."
        raise ValueError(msg)
    stack = StackedMLP(models)
    each, inputs = vmap(loss_by_name(loss), in_dims=(0, None)), x.expand(len(stack), *x.shape)
    rate = torch.tensor(lrs, dtype=stack.weights[0].dtype, device=x.device)[:, None, None]
    start = _begin(stack, None, resume)
    for step in range(start, steps + 1):
        losses = each(stack(inputs), y)
        fresh = ~torch.isfinite(losses) & ~stack.fallen
        stack.fallen = stack.fallen | fresh
        none_fallen = not bool(stack.fallen.any())
        measured = measure_at is None or step in measure_at or step == steps or (not none_fallen and bool(fresh.any()))
        if measured and (resume is None or step > resume[0]):
            yield _state(stack, step, float(step), losses.detach(), max(lrs), None, steps)
        if step == steps or bool(stack.fallen.all()):
            return
        grads = torch.autograd.grad(losses.sum(), list(stack.parameters()))
        with torch.no_grad():
            for w, g in zip(stack.parameters(), grads, strict=True):
                w.addcmul_(g if none_fallen else g.masked_fill(stack.fallen[:, None, None], 0), rate, value=-1)


def replicated_minibatches(
    models: Sequence[nn.Module],
    data: Dataset,
    *,
    optimizer: str = "sgd",
    lr: float,
    momentum: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    batch_size: int,
    epochs: int,
    schedule: str = "constant",
    loss: str = "cross_entropy",
    seeds: Sequence[int],
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[Replicas]:
    r"""Mini-batch training of r networks at once, each with the batches of its own seed: r times ``sgd``, ``adam`` or ``adamw``.

    Updates, scale conventions and measured steps are those of the loop of that name without augmentation; all networks share the
    learning rate and its schedule.

    Args:
        models: Perceptrons of one build, copied: the arguments stay as they are.
        data: Training images and labels.
        optimizer: ``"sgd"`` (with ``momentum``), ``"adam"`` or ``"adamw"`` (with ``beta1`` and ``beta2``).
        lr: Learning rate at step 0.
        momentum: See ``sgd``.
        beta1: See ``adamw``.
        beta2: See ``adamw``.
        weight_decay: See the loops; decoupled for ``"adamw"`` only.
        batch_size: Examples per step and network.
        epochs: Passes over the data.
        schedule: See ``learning_rate``.
        loss: See ``ntklib.training.losses``.
        seeds: Seed of each network's batches.
        measure_at: Steps at which to yield. Default: 0 and every epoch's end.
        resume: A step and its ``State.tensors()``.

    Yields:
        The networks before each measured step and after the last. When all have diverged the loop ends.

    Raises:
        ValueError: If the networks cannot be stacked, there is not one seed for each, or the optimizer is unknown.
    """
    if len(seeds) != len(models):
        msg = f"seeds must have one seed for each of the {len(models)} networks. Got {len(seeds)}."
        raise ValueError(msg)
    stack, rows = StackedMLP(models), len(data.x_train)
    family = _family(optimizer)
    options = {"momentum": momentum} if optimizer == "sgd" else {"betas": (beta1, beta2)}
    chosen = family(stack.parameters(), lr=lr, weight_decay=weight_decay, **options)
    per_epoch = steps_per_epoch(rows, batch_size)
    total = epochs * per_epoch
    measured = set(range(0, total + 1, per_epoch) if measure_at is None else measure_at) | {total}
    start = _begin(stack, chosen, resume)
    each, running, since = vmap(loss_by_name(loss)), torch.zeros(len(stack), device=data.x_train.device), 0
    if resume is None and 0 in measured:
        yield _state(stack, 0, 0.0, torch.full_like(running, torch.nan), learning_rate(schedule, lr, 0, total), chosen, total)
    for step in range(start, total):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            order = [epoch_batches(rows, batch_size, seed, epoch) for seed in seeds]
        index = torch.stack([mine[position] for mine in order]).to(data.x_train.device)  # pyright: ignore
        for group in chosen.param_groups:
            group["lr"] = learning_rate(schedule, lr, step, total)
        losses = each(stack(data.x_train[index]), data.y_train[index])
        chosen.zero_grad(set_to_none=True)
        losses.sum().backward()
        _step_of_the_living(stack, chosen)
        running, since = running + losses.detach(), since + 1
        if step + 1 in measured:
            whole = torch.stack([w.isfinite().flatten(1).all(1) for w in stack.parameters()]).all(0)
            stack.fallen = stack.fallen | ~torch.isfinite(running) | ~whole
            rate = learning_rate(schedule, lr, step + 1, total)
            yield _state(stack, step + 1, (step + 1) / per_epoch, running / since, rate, chosen, total)
            if bool(stack.fallen.all()):
                return
            running, since = torch.zeros_like(running), 0


def _family(name: str) -> Any:
    check_known("optimizer", name, FAMILIES)
    return FAMILIES[name]


def _begin(stack: StackedMLP, optimizer: torch.optim.Optimizer | None, resume: Checkpoint | None) -> int:
    """Load the checkpoint, if there is one, and return the step from which to go on."""
    if resume is None:
        return 0
    State(resume[0], math.nan, stack, math.nan, math.nan, optimizer).restore(resume[1])
    return resume[0]


def _state(
    stack: StackedMLP, step: int, epoch: float, losses: Tensor, lr: float, optimizer: torch.optim.Optimizer | None, total: int
) -> Replicas:
    loss, fallen = float(losses[~stack.fallen].mean()), stack.fallen
    return Replicas(step, epoch, stack, loss, lr, optimizer, total, bool(fallen.all()), losses=losses, fallen=fallen)


@torch.no_grad()
def _step_of_the_living(stack: StackedMLP, optimizer: torch.optim.Optimizer) -> None:
    """Step, and put fallen networks back as they were."""
    if not bool(stack.fallen.any()):
        optimizer.step()
        return
    before = [w.clone() for w in stack.parameters()]
    optimizer.step()
    for w, old in zip(stack.parameters(), before, strict=True):
        w.copy_(torch.where(stack.fallen[:, None, None], old, w))
