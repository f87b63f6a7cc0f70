"""Gradient descent on the logistic loss far beyond where a float can hold the loss."""

import math
from collections.abc import Collection, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.training.state import Checkpoint, State

TAIL = 40.0  # beyond this margin log(log(1 + exp(-q))) is -q to double precision: the next term is exp(-q)/2


def log_logistic_loss(outputs: Float[Tensor, "n 1"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Return the logarithm of the mean logistic loss, :math:`\log \frac1n \sum_i \log(1 + e^{-y_i f(x_i)})`.

    The loss of the main paper's section 4 (which sums over examples: log n more). Computed with log-sum-exp, so that a loss of
    exp(-10000), which is zero as a number, keeps all digits of its logarithm and of the gradient. In units of nats.

    Args:
        outputs: f(x_i), ``[n, 1]``.
        y: Labels +1 and -1, in the dtype of the outputs.

    Raises:
        ValueError: If a label is not +1 or -1.
    """
    if not bool((y.abs() == 1).all()):
        msg = f"Labels must be +1 or -1. Got {y[y.abs() != 1][0].item():g}."
        raise ValueError(msg)
    q = y * outputs[:, 0]
    # clamped, so that the branch not taken is finite in the backward pass too
    losses = torch.where(q >= TAIL, -q, F.softplus(-q.clamp(max=TAIL)).log())
    return losses.logsumexp(0) - math.log(len(y))


def normalized_descent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""Full-batch gradient descent on the logistic loss with steps that lower the logarithm of the loss by ``lr`` each.

    .. math:: w_{s+1} = w_s - \eta_s \nabla L(w_s), \qquad
        \eta_s = \frac{\mathrm{lr} \cdot L(w_s)}{\lVert \nabla L(w_s) \rVert^2} , \qquad\text{so that}\qquad
        \log L(w_{s+1}) = \log L(w_s) - \mathrm{lr} + O(\mathrm{lr}^2) .

    A learning rate that grows as the loss falls, as in the loss-based schedule of Lyu & Li (2019, arXiv:1906.05890), who take
    a factor that they adapt over 1/L: plain gradient descent would need a time of order 1/L. Here the factor is fixed by the
    gradient (of log L, which does not underflow), which leaves one number without units. For lr -> 0 the path is that of gradient
    flow, with log(1/L) as the clock: log(1/L) = log(1/L_0) + lr s.

    Args:
        model: Network with one output, trained in place in eval mode; use float64.
        x: Inputs, ``[n, *input]``.
        y: Labels +1 and -1, ``[n]``, in the dtype of the outputs.
        lr: Fall of log L per step, to first order.
        steps: Number of steps.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last; ``loss`` is L at that state (0 below 1e-308; see
        ``log_logistic_loss``) and ``lr`` is eta. After a loss or a step that is not finite (``diverged``) the loop ends.
    """
    params = [w for w in model.parameters() if w.requires_grad]
    state = State(0, 0.0, model, float("nan"), lr, None, steps)
    if resume is not None:
        state.step = resume[0]
        state.restore(resume[1])
    model.eval()
    for step in range(state.step, steps + 1):
        log_loss = log_logistic_loss(model(x), y)
        gradients = torch.autograd.grad(log_loss, params)  # of L, over L
        rate = lr / torch.stack([g.square().sum() for g in gradients]).sum()
        finite = bool(torch.isfinite(log_loss) & torch.isfinite(rate))
        measured = measure_at is None or step in measure_at or step == steps or not finite
        if measured and (resume is None or step > resume[0]):
            loss = math.exp(float(log_loss.detach()))
            eta = float(rate / log_loss.detach().exp())
            yield State(step, float(step), model, loss, eta, None, steps, not finite)
        if not finite or step == steps:
            return
        with torch.no_grad():
            for w, g in zip(params, gradients, strict=True):
                w.sub_(rate * g)
