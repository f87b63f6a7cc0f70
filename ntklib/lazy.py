"""Networks in NTK parameterization on small tasks, and how far their training is from the linear equation of a constant kernel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ntklib import data
from ntklib.infinite import ACTIVATIONS, infinite_ntk
from ntklib.kernels import empirical_ntk, flatten_kernel
from ntklib.linearized import constant_kernel_flow
from ntklib.models import NTKMLP, ScaledOutput
from ntklib.random import stream
from ntklib.settings import NetworkSettings, Positive
from ntklib.similarity import kernel_distance, kernel_drift
from ntklib.text import check_known, unknown
from ntklib.training.schedules import log_steps
from ntklib.training.state import State

CIRCLE = "circle"  # task: points of the unit circle
TARGETS = ("sine", "mixture", "plane")  # of the circle; images have the parity of their class
FREQUENCIES = (2, 4, 7, 11)
AMPLITUDES = (0.9, 0.7, 0.55, 0.45)
PHASES = (0.0, 1.5708, 1.2, 2.0)
DYNAMICS = ("descent", "flow")
BLOWN_UP = 1e12  # a loss that is this many times the first one is not measured any more


class LazySettings(NetworkSettings):
    """A network in NTK parameterization with scaled, centred output, trained on the whole of a small task.

    Attributes:
        task: ``"circle"``, or an image dataset, whose target is +1 for odd and -1 for even classes.
        num_train: Training examples n.
        target: On the circle: ``"sine"`` (1/2 sin 2 gamma), ``"mixture"`` (four frequencies) or ``"plane"`` (see ``angle``).
        angle: For ``"plane"``, the direction of the first residual in the plane of two eigenvectors of the first kernel.
        first: Index of the plane's first eigenvector, from 1.
        second: Index of its second eigenvector.
        width: Hidden units m of each hidden layer.
        depth: Hidden layers.
        activation: ``"relu"``, ``"erf"`` or ``"identity"``.
        bias_std: sigma_b of NTK parameterization; sigma_w is sqrt(2).
        alpha: Output scale.
        lr_fraction: Learning rate over 2 / (largest eigenvalue of the infinitely wide network's kernel).
        steps: Gradient steps; for a flow, units of time of the same length.
        num_modes: Leading eigenvectors of the first kernel along which the residual is followed.
        num_measured: Steps that are measured, about evenly spaced in the logarithm.
        dynamics: ``"descent"`` or ``"flow"``.
        double: Whether to compute in float64 rather than float32.
    """

    task: str = CIRCLE
    num_train: Annotated[int, Field(ge=2)]
    target: str = "sine"
    angle: float = 0.0
    first: Positive = 1
    second: Positive = 2
    width: Positive
    depth: Positive = 1
    activation: str = "relu"
    bias_std: Annotated[float, Field(ge=0)]
    alpha: Annotated[float, Field(gt=0)] = 1.0
    lr_fraction: Annotated[float, Field(gt=0)]
    steps: Positive
    num_modes: Positive = 4
    num_measured: Positive = 12
    dynamics: str = "descent"
    double: bool = False

    @model_validator(mode="after")
    def _check_names(self) -> "LazySettings":
        if self.task != CIRCLE:
            data.check_name(self.task)
        check_known("target", self.target, TARGETS)
        check_known("activation", self.activation, ACTIVATIONS)
        check_known("dynamics", self.dynamics, DYNAMICS)
        if self.target == "plane" and not (self.first != self.second and max(self.first, self.second) <= self.num_train):
            msg = f"first and second must be different indices from 1 to n = {self.num_train}. Got {self.first} and {self.second}."
            raise ValueError(msg)
        return self


def circle(n: int, dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 2"]]:
    """Angles gamma_i = 2 pi i / n, i = 0..n-1, and their points (cos gamma, sin gamma) on the unit circle."""
    gamma = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return gamma.to(dtype), torch.stack([gamma.cos(), gamma.sin()], 1).to(dtype)


def circle_target(gamma: Float[Tensor, " n"], target: str) -> Float[Tensor, "n 1"]:
    """Values of a function of the angle: ``"sine"`` is 1/2 sin 2 gamma, ``"mixture"`` sums the frequencies of this module.

    Raises:
        ValueError: If the name is unknown.
    """
    if target == "sine":
        return (0.5 * torch.sin(2 * gamma))[:, None]
    if target != "mixture":
        raise ValueError(unknown("function of the angle", target, TARGETS[:2]))
    waves = [a * torch.sin(k * gamma + p) for k, a, p in zip(FREQUENCIES, AMPLITUDES, PHASES, strict=True)]
    return torch.stack(waves).sum(0)[:, None]


def parity_task(dataset: str, n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Class-balanced images as vectors of length sqrt(d), ``[n, d]``, and +1 for odd, -1 for even classes, ``[n, 1]``."""
    images = data.load(dataset, num_train=n, seed=seed)
    return parity_pairs(images.x_train[:], images.y_train, dtype)


def parity_pairs(images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same of given images and labels."""
    x = images.flatten(1).to(dtype)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    return x, (2 * (labels % 2) - 1).to(dtype)[:, None]


@dataclass
class LazyProblem:
    r"""A network before training, its task, and the linear equation that it would obey if its kernel stood still.

    Time t is that of the gradient flow of :math:`\frac12 \sum_i r_i^2`, a sum over examples: dr/dt = -K r, and a step of gradient
    descent with ``half_mse`` and learning rate n ``lr`` is a time ``lr``.

    Attributes:
        model: The network, ``ScaledOutput`` of an ``NTKMLP``; training changes it.
        x: Inputs.
        y: Targets ``[n, 1]``.
        lr: Learning rate eta in units of the summed loss.
        limit: Kernel of the infinitely wide network, alpha^2 included, ``[n, n]``.
        kernel_0: Kernel at the start, ``[n, n]``.
        f_0: Outputs at the start: zero.
        settings: The settings.
    """

    model: ScaledOutput
    x: Tensor
    y: Tensor
    lr: float
    limit: Float[Tensor, "n n"]
    kernel_0: Float[Tensor, "n n"]
    f_0: Float[Tensor, "n 1"]
    settings: LazySettings

    @cached_property
    def modes(self) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        """Eigenvalues of the first kernel, descending, and its eigenvectors in columns."""
        eigvals, eigvecs = torch.linalg.eigh(self.kernel_0)
        return eigvals.flip(0), eigvecs.flip(1)

    @cached_property
    def marks(self) -> list[int]:
        """Steps to measure: 0, and about evenly spaced in the logarithm up to the last."""
        return log_steps(self.settings.steps, self.settings.num_measured)

    @property
    def step_size(self) -> float | None:
        """Length of a step in time for descent, and None for the flow: the ``lr`` of ``constant_kernel_flow``."""
        return self.lr if self.settings.dynamics == "descent" else None

    def blown_up(self, state: State) -> bool:
        """Whether the loss is no number, or beyond all bounds."""
        start = float((self.f_0 - self.y).square().mean()) / 2
        return not math.isfinite(state.loss) or state.loss > BLOWN_UP * start

    @torch.no_grad()
    def measure(self, state: State) -> dict[str, float]:
        r"""Measure a state of training against the constant kernel, with all residuals in units of :math:`\lVert r_0 \rVert`.

        Returns:
            ``time`` t; ``residual``; ``predicted``, the residual of the constant first kernel at the same time (the discrete
            formula for descent); ``gap``, the distance of the outputs to that prediction; ``limit_gap``, to that of the
            infinitely wide network; ``drift`` and ``distance`` S of the kernel from the first one, and ``growth``, the ratio of
            their norms; ``top``, its largest eigenvalue; ``lr_top``, eta lambda_1 / 2, at most 1 when descent on this kernel is
            stable; ``least``, the smallest eigenvalue over the largest.
        """
        t = torch.tensor([self.lr * state.epoch], dtype=self.y.dtype, device=self.y.device)
        unit = float((self.f_0 - self.y).norm())
        f, kernel = self.model(self.x), _kernel(self.model, self.x)
        lazy, wide = (constant_kernel_flow(k, self.f_0, self.y, t, lr=self.step_size)[0] for k in (self.kernel_0, self.limit))
        eigvals = torch.linalg.eigvalsh(kernel)
        return {
            "time": float(t), "residual": float((f - self.y).norm()) / unit, "predicted": float((lazy - self.y).norm()) / unit,
            "gap": float((f - lazy).norm()) / unit, "limit_gap": float((f - wide).norm()) / unit,
            "drift": kernel_drift(self.kernel_0, kernel), "distance": kernel_distance(self.kernel_0, kernel),
            "growth": float(kernel.norm() / self.kernel_0.norm()),
            "top": float(eigvals[-1]), "lr_top": self.lr * float(eigvals[-1]) / 2, "least": float(eigvals[0] / eigvals[-1]),
        }  # fmt: skip

    @torch.no_grad()
    def components(self) -> list[dict[str, float]]:
        r"""Measure the directions of the leading eigenvectors v_i of the first kernel, ``num_modes`` of them.

        Returns:
            For each ``component`` :math:`v_i^\top r` over the norm of the first residual, and ``eigenvalue``, the i-th of the
            kernel as it is now.
        """
        count = self.settings.num_modes
        parts = self.modes[1][:, :count].T @ (self.model(self.x) - self.y)[:, 0] / (self.f_0 - self.y).norm()
        eigvals = torch.linalg.eigvalsh(_kernel(self.model, self.x)).flip(0)
        return [{"component": c, "eigenvalue": v} for c, v in zip(parts.tolist(), eigvals[:count].tolist(), strict=True)]

    @torch.no_grad()
    def forecast(self, state: State) -> dict[str, Tensor]:
        """Outputs at the end, under the kernel as it is now for the time that is left; and the outputs now."""
        left = torch.tensor([self.lr * (self.settings.steps - state.epoch)], dtype=self.y.dtype, device=self.y.device)
        f = self.model(self.x)
        end = constant_kernel_flow(_kernel(self.model, self.x), f, self.y, left, lr=self.step_size)[0]
        return {f"forecast.{state.step}": end, f"outputs.{state.step}": f}

    @torch.no_grad()
    def forecast_errors(self, memory: Mapping[str, Tensor]) -> dict[int, float]:
        """At the end: the distance of the outputs to each remembered forecast over the residual when it was made, by step."""
        f, errors = self.model(self.x), {}
        for name, end in memory.items():
            if name.startswith("forecast."):
                step = int(name.split(".")[1])
                residual = memory[f"outputs.{step}"].to(f) - self.y
                errors[step] = float((f - end.to(f)).norm() / residual.norm())
        return errors


def lazy_problem(settings: LazySettings) -> LazyProblem:
    """Make the network, the task and the learning rate of some settings; the same ones every time."""
    s = settings
    dtype = torch.float64 if s.double else torch.float32
    gamma, x = circle(s.num_train, dtype)
    y = torch.zeros_like(gamma)[:, None]
    if s.task != CIRCLE:
        x, y = parity_task(s.task, s.num_train, s.seed, dtype)
    elif s.target != "plane":
        y = circle_target(gamma, s.target)
    x, y = x.to(s.device), y.to(s.device)
    draw, widths = stream(s.seed, "init"), [s.width] * s.depth
    network = NTKMLP(x.shape[1], widths, 1, activation=s.activation, bias_std=s.bias_std, generator=draw, dtype=dtype)
    model = ScaledOutput(network.to(s.device), s.alpha).eval()
    limit = s.alpha**2 * infinite_ntk(x, depth=s.depth, activation=s.activation, bias_std=s.bias_std)
    lr = s.lr_fraction * 2 / float(torch.linalg.eigvalsh(limit)[-1])
    problem = LazyProblem(model, x, y, lr, limit, _kernel(model, x), torch.zeros_like(y), s)
    if s.task == CIRCLE and s.target == "plane":  # r_0 = -y in the plane, as long as that of the sine
        ray = math.cos(s.angle) * problem.modes[1][:, s.first - 1] + math.sin(s.angle) * problem.modes[1][:, s.second - 1]
        problem.y = -math.sqrt(s.num_train / 8) * ray[:, None]
    return problem


def _kernel(model: ScaledOutput, x: Tensor) -> Float[Tensor, "n n"]:
    """The kernel of the one output as a matrix."""
    return flatten_kernel(empirical_ntk(model, x)).detach()
