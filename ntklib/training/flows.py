"""Training in continuous time: gradient flow, and the central flow that gradient descent follows at the edge of stability."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from ntklib.directions import flatten_params, plain_attention, unflatten_params
from ntklib.functional import functional_model
from ntklib.training.critical import Hessian, critical_modes, oscillation_covariance
from ntklib.training.losses import loss_by_name
from ntklib.training.state import Checkpoint, State

NEAR = 0.9  # Hessian eigenvalues above this part of 2/lr are watched: those that could pass it within a step
LANDING = 1e-8  # relative accuracy with which the flow stops at a loss
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]  # parameters -> gradient and loss


@dataclass
class FlowState(State):
    """A state of a flow: ``epoch`` is the time in gradient steps, t/lr, a fraction where the flow stopped at a loss.

    Attributes:
        extra: Tensors that a resumed flow needs beside the parameters; for the central flow also what it knows of the oscillation:
            ``eigvals`` (the k largest of the Hessian) and ``covariance`` (of the oscillation in their eigenvectors, ``[k, k]``).
    """

    extra: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors a resumed flow needs, by name: ``model.<name>`` and ``flow.<name>``."""
        return super().tensors() | {f"flow.{k}": v for k, v in self.extra.items()}


def gradient_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    tol: float = 1e-6,
    loss: str = "half_mse",
    stop_at: float | None = None,
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""Gradient flow, the limit of gradient descent for a vanishing learning rate, in eval mode.

    .. math:: \dot w = -\nabla L(w), \qquad t = \mathrm{lr} \cdot s

    State s is at time lr s, where s steps of gradient descent with this learning rate are to first order; but here ``lr`` is only
    the unit of time, not the step. With ``half_mse`` the outputs follow :math:`\dot f = -K (f - y) / n`. Steps are those of Bogacki
    & Shampine (1989, "A 3(2) pair of Runge-Kutta formulas"), with the error of each kept below ``tol`` times the norm of the
    parameters. It is an explicit method: steps stay below 2.5 over the sharpness, whatever the tolerance.

    Args:
        model: Network to train, in place.
        x: Inputs, ``[n, *input]``.
        y: Labels ``[n]``, or targets ``[n, c]``.
        lr: Time between two states.
        steps: Number of such times.
        tol: Bound on the local error of the parameters, relative to their norm.
        loss: See ``ntklib.training.losses``.
        stop_at: End where the loss reaches this value, between two states if need be. Default: do not.
        measure_at: States to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state at each measured time and at the end. ``loss`` is that of the state. After a loss that is not finite
        (``diverged``) the flow ends.

    Raises:
        ValueError: If the unit of time or the tolerance is not positive.
    """
    if not (lr > 0 and tol > 0):
        msg = f"lr, the unit of time, and tol must be positive. Got {lr} and {tol}."
        raise ValueError(msg)
    flow = _Flow(model, x, y, loss, resume)
    h = float(flow.extra["h"]) if resume else lr
    w, k1, value = flow.w, *flow.slope(flow.w)
    for step in range(flow.start, steps + 1):
        done = stop_at is not None and float(value) <= stop_at
        yield from flow.state(
            step, float(step), lr, step if done else steps, value, {"h": torch.tensor(h, dtype=torch.float64)}, measure_at
        )
        if done or step == steps or not torch.isfinite(value):
            return
        left = lr
        while left > 0:
            part = min(h, left)
            new, k4, after, error = _bogacki_shampine(flow.slope, w, k1, part)
            ratio = float(error / (tol * w.norm()))
            if ratio <= 1 or part < 1e-12 * lr or not torch.isfinite(value):
                if stop_at is not None and float(after) <= stop_at:
                    part, w, value = _land(flow.slope, w, k1, part, stop_at)
                    time = step + 1 - (left - part) / lr
                    yield from flow.state(step + 1, time, lr, step + 1, value, {}, None, w)
                    return
                w, k1, value, left = new, k4, after, left - part if part < left else 0.0
            if part == h or ratio > 1:  # a step that was cut short says nothing about the next
                h = part * min(5.0, max(0.2, 0.9 * max(ratio, 1e-9) ** (-1 / 3)))
        flow.w = w


def central_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    num_critical: int = 3,
    substeps: int = 4,
    loss: str = "half_mse",
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[State]:
    r"""The central flow of gradient descent: its path without the oscillations at the edge of stability.

    .. math:: \dot w = -\eta \big[ \nabla L(w) + \tfrac12 \nabla_w \langle \Sigma, H(w) \rangle \big], \qquad
        0 \preceq \Sigma \perp \tfrac2\eta I - H(w) \succeq 0

    (Cohen et al. 2024, "Understanding optimization in deep learning with central flows", arXiv:2410.24206.) Time is in
    steps of gradient descent. Sigma, the covariance of the oscillation, lives on the eigenvectors of the Hessian H whose
    eigenvalues have reached 2/lr, and is the least one that keeps them from passing it (``oscillation_covariance``); below the
    edge it is zero and the flow is gradient flow. Steps are Euler's, ``substeps`` to a step of gradient descent, so the path is
    right to first order in 1/substeps; with fewer than two it would itself be unstable.

    The ``num_critical`` largest eigenvalues may be critical at a time. More eigenvalues beyond 2/lr than that are not held back.
    The Hessian must exist: with ReLU it is that of the pieces, and what the kinks do is left out.

    Args:
        model: Network to train, in place.
        x: Inputs, ``[n, *input]``.
        y: Labels ``[n]``, or targets ``[n, c]``.
        lr: Learning rate eta of the gradient descent that is described.
        steps: Number of its steps.
        num_critical: Eigenvalues k that are watched, less than a fifth of the parameters.
        substeps: Euler steps per gradient step, at least 2.
        loss: See ``ntklib.training.losses``.
        measure_at: Steps at which to yield. Default: all.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        ``FlowState`` at each measured step. ``loss`` is L(w) on the central path; the time average of the loss of
        gradient descent is predicted to be :math:`L(w) + \tfrac12 \langle \Sigma, H(w) \rangle`.

    Raises:
        ValueError: If ``substeps`` is below 2, or ``num_critical`` does not fit.
        RuntimeError: If the eigenvalues do not converge.
    """
    if substeps < 2:
        msg = f"substeps must be at least 2, for the steps of the flow to be stable at the edge. Got {substeps}."
        raise ValueError(msg)
    flow = _Flow(model, x, y, loss, resume)
    basis, dt = flow.extra.get("basis"), 1 / substeps
    for step in range(flow.start, steps + 1):
        value = flow.slope(flow.w)[1]
        if not bool(torch.isfinite(value)):
            yield from flow.state(step, float(step), lr, steps, value, {}, None)
            return
        for part in range(substeps):
            hessian = Hessian(flow.loss, flow.w)
            eigvals, basis = critical_modes(hessian, num_critical, basis, 2 / lr)
            near = int((eigvals > NEAR * 2 / lr).sum())
            push, sigma = torch.zeros_like(flow.w), eigvals.new_zeros(num_critical, num_critical)
            if near:
                slopes = hessian.entries(basis[:, :near])  # [near, near, p]
                sigma[:near, :near] = oscillation_covariance(eigvals[:near], slopes, hessian.gradient.detach(), lr, dt)
                push = 0.5 * torch.einsum("ij,ijp->p", sigma[:near, :near], slopes)
            if part == 0:
                extra = {"eigvals": eigvals, "covariance": sigma, "basis": basis}
                yield from flow.state(step, float(step), lr, steps, value, extra, measure_at)
                if step == steps:
                    return
            flow.w = flow.w - lr * dt * (hessian.gradient.detach() + push)


def hessian_modes(
    model: nn.Module, x: Tensor, y: Tensor, k: int = 3, *, loss: str = "half_mse", start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest Hessian eigenvalues of a network's loss, descending, and eigenvectors; along a run, from those found last.

    ``ntklib.sharpness`` needs no start and is exact to a smaller tolerance; this costs a few products, with a block of
    vectors that converges faster than a single one. See ``critical_modes``.
    """
    flow = _Flow(model, x, y, loss, None)
    return critical_modes(Hessian(flow.loss, flow.w), k, start)


class _Flow:
    """What both flows need: the loss as a function of the parameter vector, and states made of it."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: str, resume: Checkpoint | None) -> None:
        model.eval()
        self.model, self.last, loss_fn = model, -1, loss_by_name(loss)
        if resume is not None:
            self.last = resume[0]
            State(0, 0.0, model, float("nan"), 0.0).restore({k: v for k, v in resume[1].items() if not k.startswith("flow.")})
        f, params = functional_model(model)
        self.params = dict(params)
        self.w = flatten_params(self.params).clone()
        self.extra = {k.removeprefix("flow."): v for k, v in (resume[1] if resume else {}).items() if k.startswith("flow.")}
        self.start = max(0, self.last)
        self.loss = lambda w: loss_fn(f(unflatten_params(w, self.params), x), y)
        self._slope = grad_and_value(self.loss)

    def slope(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and loss."""
        with plain_attention():
            return self._slope(w)

    def state(
        self, step: int, time: float, lr: float, total: int, value: Tensor, extra: dict[str, Tensor],
        measure_at: Collection[int] | None, w: Tensor | None = None,
    ) -> Iterator[State]:  # fmt: skip
        """The state as an iterator of one, or of none when it is not measured; puts the parameters into the model."""
        finite = bool(torch.isfinite(value))
        measured = measure_at is None or step in measure_at or step == total or not finite
        if step > self.last and measured:
            for name, new in unflatten_params(self.w if w is None else w, self.params).items():
                self.params[name].copy_(new)  # views of the model's parameters
            yield FlowState(step, time, self.model, float(value), lr, None, total, not finite, extra=extra)


def _bogacki_shampine(slope: Slope, w: Tensor, k1: Tensor, h: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of w' = -k: new parameters, gradient and loss there, and the norm of the error estimate."""
    k2 = slope(w - h / 2 * k1)[0]
    k3 = slope(w - 3 * h / 4 * k2)[0]
    new = w - h * (2 * k1 + 3 * k2 + 4 * k3) / 9
    k4, value = slope(new)
    return new, k4, value, h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8).norm()


def _land(slope: Slope, w: Tensor, k1: Tensor, h: float, level: float) -> tuple[float, Tensor, Tensor]:
    """The part of a step, by bisection, at whose end the loss is ``level``."""
    low, high, new, value = 0.0, h, w, torch.tensor(float("inf"))
    while high - low > LANDING * h:
        part = (low + high) / 2
        new, _, value, _ = _bogacki_shampine(slope, w, k1, part)
        low, high = (part, high) if float(value) > level else (low, part)
    new, _, value, _ = _bogacki_shampine(slope, w, k1, high)
    return high, new, value
