"""What a case of the engine's tests is: a network, inputs, and what the engine has to find out about it.

The first number of an example is negative in the first example, positive in the second, and so on: a network that looks at its sign
treats the example on which the engine checks itself unlike others.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from reference import gradients_by_definition
from torch import Tensor, nn

from ntklib.random import stream


class Net(nn.Module):
    """A forward pass written as a function of the module and its input; parts are modules, or shapes of parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.empty(part)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """A network and the shape of its inputs.

    Attributes:
        build: Makes the network.
        shape: Shape of one example.
        leaves: Parameters without structure, whose gradients are written out.
        streams: Whether layers can be streamed at all.
        tokens: Number of distinct integer inputs; 0 for real inputs.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    leaves: tuple[str, ...] = ()
    streams: bool = True
    tokens: int = 0

    def model(self) -> nn.Module:
        """The network in float64 and eval mode, with random parameters and running statistics."""
        model = deepcopy(self.build()).double().eval()  # layers may be made once for several networks
        generator = stream(0, "parameters")
        with torch.no_grad():
            for name, w in model.named_parameters():
                if "parametrizations" not in name:
                    w.normal_(0, 0.5, generator=generator)
            for name, b in model.named_buffers():
                if name.endswith("running_mean"):
                    b.normal_(0, 0.5, generator=generator)
                if name.endswith("running_var"):
                    b.uniform_(0.5, 2.0, generator=generator)
        return model

    def inputs(self, n: int, seed: int) -> Tensor:
        """Examples ``[n, *shape]``."""
        generator = stream(seed, "inputs")
        if self.tokens:
            return torch.randint(self.tokens, (n, *self.shape), generator=generator)
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        x.flatten(1)[:, 0] = x.flatten(1)[:, 0].abs() * (-1) ** torch.arange(1, n + 1)
        return x

    def truth(self, n1: int = 3, n2: int = 2) -> "Truth":
        """The gradients by definition, on two sets of inputs."""
        model, x1, x2 = self.model(), self.inputs(n1, 1), self.inputs(n2, 2)
        sizes = {name: w.numel() for name, w in model.named_parameters() if w.requires_grad}
        parts = [gradients_by_definition(model, x.clone()).split(list(sizes.values()), 2) for x in (x1, x2)]
        return Truth(model, x1, x2, *(dict(zip(sizes, pieces, strict=True)) for pieces in parts))


@dataclass(frozen=True)
class Truth:
    """A case's network and inputs, with the gradients ``[n, c, numel]`` of every parameter."""

    model: nn.Module
    x1: Tensor
    x2: Tensor
    gradients1: dict[str, Tensor]
    gradients2: dict[str, Tensor]

    def kernel(self, *, cross: bool = False, names: list[str] | None = None) -> Tensor:
        """Sum of inner products of gradients with respect to the named parameters (default: all), ``[n1, n2, c, c]``."""
        second = self.gradients2 if cross else self.gradients1
        chosen = list(second) if names is None else names
        return torch.stack([torch.einsum("iap,jbp->ijab", self.gradients1[name], second[name]) for name in chosen]).sum(0)


def assert_kernel(found: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Equal but for rounding: the same float64 sums in another order, relative to the largest entry."""
    size = float(expected.abs().max()) if scale is None else scale
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * size)
