"""Full-batch training as generators of states: they yield before each measured step, never print and never save."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ntklib.training.losses import loss_by_name
from ntklib.training.minibatch import Checkpoint
from ntklib.training.state import State


def gradient_descent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    loss: str = "half_mse",
    stop_at: float | None = None,
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
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last; ``loss`` is the loss at that state. A loop that ends at a loss
        yields its last two steps, measured or not, between which the loss passed ``stop_at``. After a loss that is not finite
        (``diverged``) the loop ends.
    """
    loss_fn = loss_by_name(loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state = State(0, 0.0, model, float("nan"), lr, optimizer, steps)
    if resume is not None:
        state.step = resume[0]
        state.restore(resume[1])
    model.eval()
    last = -1 if resume is None else resume[0]  # step that was yielded last
    before, weights = float("nan"), [w.detach().clone() for w in model.parameters()]  # loss and weights of the step before
    for step in range(state.step, steps + 1):
        value = loss_fn(model(x), y)
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
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()


@contextmanager
def _other_weights(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    own = [w.detach().clone() for w in model.parameters()]
    _put(model, weights)
    yield
    _put(model, own)


@torch.no_grad()
def _put(model: nn.Module, weights: Sequence[Tensor]) -> None:
    for w, new in zip(model.parameters(), weights, strict=True):
        w.copy_(new)
