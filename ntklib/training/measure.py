"""Plain measurements of a network on data."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ntklib.data.stored import StoredImages


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor | StoredImages, y: Int[Tensor, " n"], batch_size: int = 1024) -> float:
    """Fraction of examples whose largest output is the label's, in the mode the model is in."""
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True))
    return right / len(y)


@torch.no_grad()
def parameter_norm(model: nn.Module) -> float:
    """Euclidean norm of all trainable parameters."""
    return float(torch.stack([w.square().sum() for w in model.parameters() if w.requires_grad]).sum().sqrt())
