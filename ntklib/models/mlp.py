"""Multilayer perceptrons."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ntklib.text import check_known


class Erf(nn.Module):
    """The error function: a sigmoid whose infinite-width kernel has a closed form, see ``ntklib.infinite_ntk``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "erf": Erf, "identity": nn.Identity}


class MLP(nn.Module):
    r"""f(x) = W_L a(W_{L-1} ... a(W_1 x + b_1) ...) + b_L on flattened inputs.

    Standard parameterization: no factor of the width in front of the weights.

    Args:
        d: Input dimension (product of all axes but the first).
        widths: Hidden units per hidden layer; empty for a linear model.
        c: Outputs.
        activation: ``"relu"``, ``"tanh"``, ``"gelu"``, ``"erf"`` or ``"identity"`` (a deep linear network).
        bias: Whether layers have biases.
    """

    def __init__(self, d: int, widths: Sequence[int], c: int, *, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        check_known("activation", activation, ACTIVATIONS)
        sizes = [d, *widths, c]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1], bias=bias), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
