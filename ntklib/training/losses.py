"""Loss functions of a batch of outputs and labels or targets; every one is a mean over examples."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ntklib.text import unknown


def cross_entropy(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """(1/n) sum_i -log softmax(f(x_i))[y_i]."""
    return F.cross_entropy(outputs, y)


def half_mse(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"] | Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """(1/2n) sum_i ||f(x_i) - y_i||^2: summed over outputs, so that gradient descent moves f by -(lr/n) K r.

    Integers are labels and stand for targets with a 1 at the label; floating-point ``y`` are the targets themselves, ``[n, c]``.
    """
    targets = y if y.is_floating_point() else one_hot(y, outputs.shape[1], outputs.dtype)
    return 0.5 * (outputs - targets).square().sum(1).mean()


def one_hot(y: Int[Tensor, " n"], c: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n c"]:
    """Targets with a 1 at the label, ``[n, c]``."""
    return F.one_hot(y, c).to(dtype)


LOSSES = {"cross_entropy": cross_entropy, "half_mse": half_mse}


def loss_by_name(name: str):
    """Return the loss of this name, or raise ``ValueError`` with the known ones."""
    if name not in LOSSES:
        raise ValueError(unknown("loss", name, LOSSES))
    return LOSSES[name]
