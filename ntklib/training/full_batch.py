"""Full-batch training as generators of states: they yield before each measured step, never print and never save."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ntklib.training.losses import loss_by_name
from ntklib.training.options import full_loss, in_float32
from ntklib.training.state import Checkpoint, State


@in_float32
def gradient_descent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    loss: str = "half_mse",
    stop_at: float | None = None,
    compile: bool = False,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""Full-batch gradient descent, :math:`w_{s+1} = w_s - \eta \nabla L(w_s)`, in eval mode.

    With the loss ``half_mse``, (1/2n) sum of squares, outputs move by -(lr/n) K r to first order in lr, so one step is a time
    lr/n of the gradient flow of the summed loss.

    Args:
        model: Network to train, in place.
        x: Inputs, ``[n, *input]``.
        y: Labels ``[n]``, or targets ``[n, c]``.
        lr: Learning rate.
        steps: Number of steps, at most.
        loss: See ``ntklib.training.losses``.
        stop_at: End at the first step whose loss is at most this. Default: do not.
        compile: Evaluate loss and gradient by ``torch.compile``; on a GPU replayed as CUDA graphs, which saves small networks the
            time of starting each operation.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last; ``loss`` is the loss at that state. A loop that ends at a loss
        yields its last two steps, measured or not, between which the loss passed ``stop_at``. After a loss that is not finite
        (``diverged``) the loop ends.
    """
    evaluate = full_loss(model, loss_by_name(loss), x.device, compile=compile)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state = State(0, 0.0, model, float("nan"), lr, optimizer, steps)
    if resume is not None:
        state.step = resume[0]
        state.restore(resume[1])
    model.eval()
    last = -1 if resume is None else resume[0]  # step that was yielded last
    before, weights = float("nan"), [w.detach().clone() for w in model.parameters()]  # loss and weights of the step before
    for step in range(state.step, steps + 1):
        value = evaluate(x, y)
        finite, reached = bool(torch.isfinite(value)), stop_at is not None and float(value.detach()) <= stop_at
        total = step if reached else steps
        if reached and last < step - 1:
            with _other_weights(model, weights):
                yield State(step - 1, float(step - 1), model, before, lr, optimizer, steps)
        if (measure_at is None or step in measure_at or step == total or not finite) and last < step:
            last = step
            yield State(step, float(step), model, float(value.detach()), lr, optimizer, total, not finite)
        if not finite or step == total:
            return
        if stop_at is not None:
            before, weights = float(value.detach()), [w.detach().clone() for w in model.parameters()]
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # before the next evaluation, whose graph may reuse the memory


@in_float32
def full_batch_adamw(
    model: nn.Module,
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.98,
    weight_decay: float = 1.0,
    warmup: int = 10,
    steps: int,
    loss: str = "precise_cross_entropy",
    forward: Callable[[Tensor], Tensor] | None = None,
    compile: bool = False,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""AdamW on all examples at every step, with a linear warm-up and then a constant learning rate.

    .. math:: \eta_s = \eta \min(s / \mathrm{warmup}, 1) , \qquad
        w_{s+1} = (1 - \eta_s \lambda) w_s - \eta_s \, \hat m_{s+1} / (\sqrt{\hat v_{s+1}} + 10^{-8})

    with the averages of ``adamw``. The defaults are those of the reference code of Nanda et al. 2023 (arXiv:2301.05217v3), whose
    warm-up starts at 0: the first step fills the averages and moves nothing. The model is in eval mode throughout.

    Args:
        model: Network to train, in place.
        x: Inputs, ``[n, *input]``.
        y: Labels, ``[n]``.
        lr: Learning rate after the warm-up.
        beta1: Decay rate of the average of the gradient.
        beta2: Decay rate of the average of its square.
        weight_decay: lambda, on all parameters.
        warmup: Steps until the full learning rate; 0 for none.
        steps: Number of steps.
        loss: See ``ntklib.training.losses``.
        forward: How outputs are evaluated: a method of the model that gives the same outputs in a cheaper way. Default: the model.
        compile: As in ``gradient_descent``.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last; ``loss`` is the loss at that state. After a loss that is not finite
        (``diverged``) the loop ends.

    Raises:
        ValueError: If the loss is unknown or the warm-up is negative.
    """
    if warmup < 0:
        msg = f"warmup must be at least 0 steps. Got {warmup}."
        raise ValueError(msg)
    evaluate = full_loss(forward or model, loss_by_name(loss), x.device, compile=compile)
    fused = x.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused)
    start = -1
    if resume is not None:
        start = resume[0]
        State(start, float(start), model, float("nan"), lr, optimizer, steps).restore(resume[1])
    model.eval()
    for step in range(max(start, 0), steps + 1):
        rate = lr * min(step / warmup, 1.0) if warmup else lr
        value = evaluate(x, y)
        finite = bool(torch.isfinite(value))
        measured = measure_at is None or step in measure_at or step == steps or not finite
        if measured and step > start:
            yield State(step, float(step), model, float(value.detach()), rate, optimizer, steps, not finite)
        if not finite or step == steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = rate
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # before the next evaluation, whose graph may reuse the memory


@contextmanager
def _other_weights(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    own = [w.detach().clone() for w in model.parameters()]
    _put(model, weights)
    try:
        yield
    finally:
        _put(model, own)


@torch.no_grad()
def _put(model: nn.Module, weights: Sequence[Tensor]) -> None:
    for w, new in zip(model.parameters(), weights, strict=True):
        w.copy_(new)
