"""Training on mini-batches as generators of states: they yield before each measured step, never print and never save."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ntklib.data.augment import augment_by_name
from ntklib.data.datasets import Dataset
from ntklib.data.stored import sample
from ntklib.models import calibrate_batch_norm
from ntklib.random import stream
from ntklib.text import check_known
from ntklib.training.batches import BatchOrder, batches
from ntklib.training.ema import ExponentialAverages
from ntklib.training.losses import loss_by_name
from ntklib.training.options import Forward, TrainingOptions, determinism, float32_products
from ntklib.training.parallel import ALONE, Alone, Loss
from ntklib.training.schedules import learning_rate
from ntklib.training.state import Checkpoint, State


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
    ema_decays: Sequence[float] = (),
    ema_buffers: str = "copy",
    channels_last: bool = False,
    precision: str = "float32",
    compile: bool = False,
    deterministic: bool = False,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
    processes: Alone = ALONE,
) -> Iterator[State]:
    r"""Stochastic gradient descent with momentum on mini-batches drawn without replacement.

    .. math:: v_{s+1} = \mu v_s + \nabla L(w_s) + \lambda w_s, \qquad w_{s+1} = w_s - \eta_s v_{s+1}

    as in PyTorch and the main paper (appendix B.1): momentum is not damped, so the effective learning rate is lr/(1 - momentum),
    and weight decay acts on all parameters. ``L`` is the mean over the batch. A new permutation of the training data is drawn per
    epoch; the last batch of an epoch may be smaller (a last batch of one example is left out). Before the first step,
    batch-normalisation statistics are calibrated on the training data (images in files: the first 8,192), so that eval mode means
    something at step 0.

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
        ema_decays: Decay rates of moving averages of the parameters, updated after each step, see ``ExponentialAverages``. They
            do not change training.
        ema_buffers: What the averaged networks take for buffers, see there.
        channels_last: See ``TrainingOptions``, and so for the next three.
        precision: ``"float32"``, ``"tf32"`` or ``"bf16"``, of training steps.
        compile: Compile the network for training steps.
        deterministic: Refuse operations whose result is not the same every time.
        measure_at: Steps at which to yield. Default: 0 and every epoch's end.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.
        processes: Those that take each step together, see ``ntklib.training.parallel``; all call the loop with the same arguments.

    Yields:
        The state before each measured step and after the last one. After a state whose loss or parameters are not finite
        (``diverged``) the loop ends.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    plan = _Plan(lr, batch_size, epochs, schedule, loss, augment, seed, tuple(ema_decays), ema_buffers)
    options = TrainingOptions(channels_last, precision, compile, deterministic)
    with determinism(deterministic, data.y_train.device), float32_products("float32", data.y_train.device):
        yield from _minibatches(model, data, optimizer, plan, options, measure_at, resume, processes)


def adamw(
    model: nn.Module,
    data: Dataset,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    batch_size: int,
    epochs: int,
    schedule: str = "constant",
    loss: str = "cross_entropy",
    augment: str = "none",
    seed: int = 0,
    ema_decays: Sequence[float] = (),
    ema_buffers: str = "copy",
    channels_last: bool = False,
    precision: str = "float32",
    compile: bool = False,
    deterministic: bool = False,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
    processes: Alone = ALONE,
) -> Iterator[State]:
    r"""Adam with decoupled weight decay on mini-batches drawn without replacement.

    .. math:: w_{s+1} = (1 - \eta_s \lambda) w_s - \eta_s \, \hat m_{s+1} / (\sqrt{\hat v_{s+1}} + 10^{-8})

    where m and v are averages of the gradient and of its square with decay rates ``beta1`` and ``beta2``, and the hat divides them
    by 1 - beta^(s+1) (Kingma & Ba 2015, arXiv:1412.6980v9, Algorithm 1; Loshchilov & Hutter 2019, arXiv:1711.05101v3, Algorithm 2,
    with PyTorch's convention that the decay is multiplied by the learning rate). ``decoupled=False`` is plain Adam: the decay
    lambda w is added to the gradient, so the averages see it. All else is as in ``sgd``.
    """
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
    plan = _Plan(lr, batch_size, epochs, schedule, loss, augment, seed, tuple(ema_decays), ema_buffers)
    options = TrainingOptions(channels_last, precision, compile, deterministic)
    with determinism(deterministic, data.y_train.device), float32_products("float32", data.y_train.device):
        yield from _minibatches(model, data, optimizer, plan, options, measure_at, resume, processes)


OPTIMIZERS = {"sgd": sgd, "adam": partial(adamw, decoupled=False), "adamw": adamw}


def loop_by_optimizer(name: str) -> Callable[..., Iterator[State]]:
    """Return the training loop of the optimizer of this name, or raise ``ValueError`` with the known ones."""
    check_known("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]


@dataclass(frozen=True)
class _Plan:
    """What a loop is told to do, whichever the optimizer."""

    lr: float
    batch_size: int
    epochs: int
    schedule: str
    loss: str
    augment: str
    seed: int
    ema_decays: tuple[float, ...]
    ema_buffers: str


def _minibatches(
    model: nn.Module,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    plan: _Plan,
    options: TrainingOptions,
    measure_at: Collection[int] | None,
    resume: Checkpoint | None,
    processes: Alone,
) -> Iterator[State]:
    order = BatchOrder(len(data.x_train), plan.batch_size, plan.seed)
    loss_fn, transform, total = loss_by_name(plan.loss), augment_by_name(plan.augment), plan.epochs * order.per_epoch
    processes.check(order.smallest)
    measured = set(range(0, total + 1, order.per_epoch) if measure_at is None else measure_at) | {total}

    def rate(step: int) -> float:
        return learning_rate(plan.schedule, plan.lr, step, total)

    forward = Forward(model, options, processes)
    if resume is None:
        calibrate_batch_norm(model, sample(data.x_train))
    averages = ExponentialAverages(model, plan.ema_decays, plan.ema_buffers) if plan.ema_decays else None
    state = State(0, 0.0, model, float("nan"), rate(0), optimizer, total, averages=averages)
    if resume is None:
        if 0 in measured:
            model.eval()
            yield state
    else:
        state.step = resume[0]
        state.restore(resume[1])

    running, since = torch.zeros((), device=data.y_train.device), 0
    steps = range(state.step, total)
    with closing(batches(data, order, transform, steps, processes)) as feed:
        for step, (x, y) in zip(steps, feed, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            part = processes.part(loss_fn, len(order.indices(step)))
            with float32_products(options.precision, x.device):
                running, since = running + _gradients(model, forward, part, x, y, plan.seed, step), since + 1
            optimizer.step()
            if averages is not None:
                averages.update()
            if step + 1 in measured:
                running = processes.mean(running)
                value = float(running) / since
                finite = bool(torch.isfinite(running)) and all(bool(w.isfinite().all()) for w in model.parameters())
                finite = processes.agree(finite)
                model.eval()
                epoch = (step + 1) / order.per_epoch
                state = State(step + 1, epoch, model, value, rate(step + 1), optimizer, total, not finite, averages)
                yield state
                if not finite:
                    return
                running, since = torch.zeros_like(running), 0


def _gradients(model: nn.Module, forward: Forward, loss_fn: Loss, x: Tensor, y: Tensor, seed: int, step: int) -> Tensor:
    """Loss of a batch in training mode, its gradients left in the parameters; dropout masks depend on seed and step alone."""
    model.train()
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices):
        masks = stream(seed, "dropout", step).initial_seed()
        torch.default_generator.manual_seed(masks)  # torch.manual_seed formats a stack trace for a GPU that is not there
        if x.is_cuda:
            torch.cuda.manual_seed(masks)
        loss = loss_fn(forward(x), y)
    for w in model.parameters():
        w.grad = None
    loss.backward()
    return loss.detach()
