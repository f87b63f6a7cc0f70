"""Training loops as generators: they yield the state before each measured step, never print and never save."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ntklib.data.augment import augment_by_name
from ntklib.data.datasets import Dataset
from ntklib.models import calibrate_batch_norm
from ntklib.random import stream
from ntklib.training.losses import loss_by_name
from ntklib.training.schedules import learning_rate
from ntklib.training.state import State

Checkpoint = tuple[int, dict[str, Tensor]]  # step, State.tensors()


def sgd(
    model: nn.Module,
    data: Dataset,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    batch_size: int,
    epochs: int,
    schedule: str = "constant",
    loss: str = "cross_entropy",
    augment: str = "none",
    seed: int = 0,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""Stochastic gradient descent with momentum on mini-batches drawn without replacement.

    .. math:: v_{s+1} = \mu v_s + \nabla L(w_s) + \lambda w_s, \qquad w_{s+1} = w_s - \eta_s v_{s+1}

    as in PyTorch and the main paper (appendix B.1): momentum is not damped, so the effective learning rate is lr/(1 - momentum),
    and weight decay acts on all parameters. ``L`` is the mean over the batch. A new permutation of the training data is drawn per
    epoch; the last batch of an epoch may be smaller (a last batch of one example is left out). Before the first step,
    batch-normalisation statistics are calibrated on the training data, so that eval mode means something at step 0.

    Batches and augmentations are functions of the seed and the step, so a run resumed from a checkpoint takes the same steps.

    Args:
        model: Network to train, in place, on the device of the data.
        data: Training images and labels.
        lr: Learning rate at step 0, in units of loss and parameters (no factor of the batch size).
        momentum: mu in [0, 1).
        weight_decay: lambda, added to the gradient (not decoupled).
        nesterov: Nesterov's variant of momentum.
        batch_size: Examples per step.
        epochs: Passes over the data.
        schedule: See ``learning_rate``.
        loss: See ``ntklib.training.losses``.
        augment: See ``ntklib.data.augment``.
        seed: Seed of batches, augmentation and dropout.
        measure_at: Steps at which to yield. Default: 0 and every epoch's end.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last one. After a state whose loss or parameters are not finite
        (``diverged``) the loop ends.
    """
    loss_fn, transform = loss_by_name(loss), augment_by_name(augment)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    per_epoch = steps_per_epoch(len(data.x_train), batch_size)
    total = epochs * per_epoch
    measured = set(range(0, total + 1, per_epoch) if measure_at is None else measure_at) | {total}

    def rate(step: int) -> float:
        return learning_rate(schedule, lr, step, total)

    state = State(0, 0.0, model, float("nan"), rate(0), optimizer, total)
    if resume is None:
        calibrate_batch_norm(model, data.x_train)
        if 0 in measured:
            model.eval()
            yield state
    else:
        state.step = resume[0]
        state.restore(resume[1])

    running, since = torch.zeros((), device=data.x_train.device), 0
    for step in range(state.step, total):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == state.step:
            batches = _batches(len(data.x_train), batch_size, seed, epoch)
        index = batches[position].to(data.x_train.device)
        x, y = transform(data.x_train[index], stream(seed, "augment", step)), data.y_train[index]
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        running, since = running + _sgd_step(model, optimizer, loss_fn, x, y, seed, step), since + 1
        if step + 1 in measured:
            value = float(running) / since
            finite = bool(torch.isfinite(running)) and all(bool(w.isfinite().all()) for w in model.parameters())
            model.eval()
            state = State(step + 1, (step + 1) / per_epoch, model, value, rate(step + 1), optimizer, total, not finite)
            yield state
            if not finite:
                return
            running, since = torch.zeros_like(running), 0


def _sgd_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn, x: Tensor, y: Tensor, seed: int, step: int) -> Tensor:
    """Take one step in training mode; dropout masks depend on the seed and the step alone. Returns the loss before it."""
    model.train()
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(stream(seed, "dropout", step).initial_seed())
        loss = loss_fn(model(x), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps of ``sgd`` per pass over ``n`` examples: the last batch may be smaller, one of a single example is left out.

    Raises:
        ValueError: If a number is not positive.
    """
    if n < 1 or batch_size < 1:
        msg = f"n and batch_size must be at least 1. Got {n} and {batch_size}."
        raise ValueError(msg)
    count = -(-n // batch_size)
    last = n - (count - 1) * batch_size
    return count - (last == 1 and count > 1)


def _batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    batches = torch.randperm(n, generator=stream(seed, "batches", epoch)).split(batch_size)
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches  # batch norm needs two examples


def gradient_descent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    loss: str = "half_mse",
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""Full-batch gradient descent, :math:`w_{s+1} = w_s - \eta \nabla L(w_s)`, in eval mode.

    With the loss ``half_mse``, (1/2n) sum of squares, outputs move by -(lr/n) K r to first order in lr, so one step is a time
    lr/n of the gradient flow of the summed loss.

    Args:
        model: Network to train, in place.
        x: Inputs, ``[n, *input]``.
        y: Labels, ``[n]``.
        lr: Learning rate.
        steps: Number of steps.
        loss: See ``ntklib.training.losses``.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last; ``loss`` is the loss at that state. After a loss that is not finite
        (``diverged``) the loop ends.
    """
    loss_fn = loss_by_name(loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state = State(0, 0.0, model, float("nan"), lr, optimizer, steps)
    if resume is not None:
        state.step = resume[0]
        state.restore(resume[1])
    model.eval()
    for step in range(state.step, steps + 1):
        value = loss_fn(model(x), y)
        finite = bool(torch.isfinite(value))
        measured = measure_at is None or step in measure_at or step == steps or not finite
        if measured and (resume is None or step > resume[0]):
            yield State(step, float(step), model, float(value.detach()), lr, optimizer, steps, not finite)
        if not finite or step == steps:
            return
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
