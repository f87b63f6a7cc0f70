"""Functions of every number by itself: their derivative is taken once and serves all output directions."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ntklib.kernels.operations import Emission, Operation


class Pointwise(Operation):
    """A function of every number by itself, without parameters."""

    def __init__(self) -> None:
        super().__init__(None, None, (None, None))

    def factors(self, g: Tensor) -> Iterator[Emission]:  # noqa: ARG002
        yield from ()


class Activation(Pointwise):
    """z = f(x), number by number.

    Args:
        function: f.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.saved = x.detach()
        return self.function(self.saved)

    def pull_back(self, g: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self.saved.requires_grad_()
            (slope,) = torch.autograd.grad(self.function(x).sum(), x)
        return in_order_of(slope, g) * slope


class ReLU(Pointwise):
    """z = max(x, 0), with derivative 0 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        self.saved = torch.relu(x).detach()  # what the next layer keeps too
        return self.saved

    def pull_back(self, g: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(in_order_of(self.saved, g), self.saved, 0)


def in_order_of(x: Tensor, g: Tensor) -> Tensor:
    """``g [K, n, ...]``, every ``g[k]`` in memory as ``x [n, ...]``, where x has an order.

    Gradients in another order than the values that they belong to slow down everything below.
    """
    if g.stride()[1:] == x.stride() or 0 in x.stride() or x.numel() == 0:
        return g
    return g.new_empty_strided(g.shape, (x.numel(), *x.stride())).copy_(g)
