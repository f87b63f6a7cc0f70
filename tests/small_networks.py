"""Small float64 networks and inputs with fixed draws."""

import torch
from torch import nn

from ntklib.models import MLP, initialize
from ntklib.random import stream

N, D, C = 4, 6, 3
FLOAT64 = {"dtype": torch.float64}


def normal(*shape: int, use: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, use), dtype=torch.float64)


def linear() -> MLP:
    return initialize(MLP(D, [], C), "standard", stream(0, "init")).double()


def mlp() -> MLP:
    return initialize(MLP(D, [8], C, activation="tanh"), "standard", stream(0, "init")).double()


def convolutional(second: nn.Module, size: tuple[int, int], *behind: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """Two convolutions with tanh, the second from 4 channels, and a linear map of what ``behind`` leaves; three images."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, padding=1)
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), *behind, nn.Flatten(), nn.LazyLinear(2)).double()
    x = normal(3, 2, *size)
    net(x)
    return net, x
