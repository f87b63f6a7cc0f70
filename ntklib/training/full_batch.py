"""Full-batch AdamW as a generator of states: it yields before each measured step, never prints and never saves."""

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from ntklib.training.losses import loss_by_name
from ntklib.training.minibatch import Checkpoint
from ntklib.training.state import State


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
    loss_fn, evaluate = loss_by_name(loss), forward or model
    fused = x.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused)
    start = -1
    if resume is not None:
        start = resume[0]
        State(start, float(start), model, float("nan"), lr, optimizer, steps).restore(resume[1])
    model.eval()
    for step in range(max(start, 0), steps + 1):
        rate = lr * min(step / warmup, 1.0) if warmup else lr
        value = loss_fn(evaluate(x), y)
        finite = bool(torch.isfinite(value))
        measured = measure_at is None or step in measure_at or step == steps or not finite
        if measured and step > start:
            yield State(step, float(step), model, float(value.detach()), rate, optimizer, steps, not finite)
        if not finite or step == steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()


def log_steps(steps: int, num: int, first: int = 1) -> list[int]:
    """Steps 0 and ``first`` to ``steps``, evenly spaced on a logarithmic axis and at most ``num`` after step 0.

    Steps that would coincide after rounding are left out.

    Raises:
        ValueError: If a number is below 1, or ``first`` beyond ``steps``.
    """
    if num < 1 or not 1 <= first <= steps:
        msg = f"num must be at least 1, and first between 1 and steps = {steps}. Got {num} and {first}."
        raise ValueError(msg)
    return [0, *sorted({round(float(s)) for s in np.geomspace(first, steps, num)} | {steps})]
