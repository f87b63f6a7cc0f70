"""Multilayer perceptrons in NTK parameterization, and the output scale that makes training lazy."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.models.mlp import ACTIVATIONS
from ntklib.text import check_known


class NTKLinear(nn.Module):
    r"""One affine map in NTK parameterization, :math:`h \mapsto \sigma_w W h / \sqrt{d} + \sigma_b b` with W, b ~ N(0, 1).

    (Jacot et al. 2018, arXiv:1806.07572v4, section 3, where sigma_w = 1 and sigma_b = beta.) The factors stand in front of the
    parameters, so the gradient of a weight has a factor 1/sqrt(d), and a step of gradient descent moves every weight little.

    Args:
        d: Inputs, the fan-in.
        m: Outputs.
        weight_std: sigma_w.
        bias_std: sigma_b; with 0 there is no bias parameter.
        generator: Source of randomness.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        d: int,
        m: int,
        *,
        weight_std: float,
        bias_std: float,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, d, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(m, generator=generator, dtype=dtype)) if bias_std else None
        self.weight_std, self.bias_std = weight_std, bias_std

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight_std / math.sqrt(self.weight.shape[1])
        if self.bias is None:
            return F.linear(scale * x, self.weight)
        return self.bias_std * F.linear(scale / self.bias_std * x, self.weight, self.bias)


class NTKMLP(nn.Module):
    r"""An MLP whose layers are all ``NTKLinear``: its kernel has a limit for infinite width, ``ntklib.infinite_ntk``.

    Every layer has the same sigma_w and sigma_b, the readout too. Inputs are flattened. The mean of ``empirical_ntk`` over
    initializations tends to ``infinite_ntk(x, depth=len(widths), ...)`` with the same numbers; a single kernel is off by a
    relative error of order width^(-1/2).

    Args:
        d: Input dimension (product of all axes but the first).
        widths: Hidden units per hidden layer; empty for a linear model.
        c: Outputs.
        activation: A name in ``ntklib.models.ACTIVATIONS``.
        weight_std: sigma_w, positive; sqrt(2) keeps the size of signals through ReLU layers.
        bias_std: sigma_b, not negative; with 0 there are no biases.
        generator: Source of randomness.
        dtype: Of the parameters.

    Raises:
        ValueError: If the activation is unknown, a size is not positive, or a number is out of range.
    """

    def __init__(
        self,
        d: int,
        widths: Sequence[int],
        c: int,
        *,
        activation: str = "relu",
        weight_std: float = math.sqrt(2),
        bias_std: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = [d, *widths, c]
        check_known("activation", activation, ACTIVATIONS)
        if min(sizes) < 1:
            msg = f"d, widths and c must be positive. Got {sizes}."
            raise ValueError(msg)
        if not (weight_std > 0 and bias_std >= 0 and math.isfinite(weight_std + bias_std)):
            msg = f"weight_std must be positive and bias_std not negative, both finite. Got {weight_std} and {bias_std}."
            raise ValueError(msg)
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layer = NTKLinear(fan_in, fan_out, weight_std=weight_std, bias_std=bias_std, generator=generator, dtype=dtype)
            layers += [layer, ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ScaledOutput(nn.Module):
    r"""A model whose output is multiplied by a number: :math:`\alpha\, (f(x, \theta) - f(x, \theta_0))`.

    (Chizat, Oyallon & Bach 2019, arXiv:1812.07956v5, section 1.1; theta_0 are the parameters at the time of wrapping.) The
    kernel is alpha^2 times that of f. With the learning rate divided by alpha^2, the residual of the linearized model obeys the
    same equation for every alpha, while the parameters move as 1/alpha: training is the lazier the larger alpha is. Fitting y
    with this model is fitting f(., theta_0) + y / alpha with f.

    Args:
        model: Network f; becomes a part of the result.
        alpha: Factor, positive.
        centered: Whether to subtract the outputs at theta_0, which else grow with alpha too.

    Raises:
        ValueError: If alpha is not positive and finite.
    """

    def __init__(self, model: nn.Module, alpha: float, *, centered: bool = True) -> None:
        super().__init__()
        if not (alpha > 0 and math.isfinite(alpha)):
            msg = f"alpha must be positive and finite. Got {alpha}."
            raise ValueError(msg)
        self.model, self.alpha = model, alpha
        self.start = copy.deepcopy(model).requires_grad_(False) if centered else None

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.model(x) if self.start is None else self.model(x) - self.start(x))
