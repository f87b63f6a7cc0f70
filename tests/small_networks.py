"""Small float64 networks and inputs with fixed draws."""

import torch

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
