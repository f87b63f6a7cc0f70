"""Full-batch training as generators of states: they yield before each measured step, never print and never save."""

from collections.abc import Collection, Iterator

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
