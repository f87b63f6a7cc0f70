"""Loss functions of a batch of outputs and labels or targets; every one is a mean over examples."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ntklib.text import check_known


def cross_entropy(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """(1/n) sum_i -log softmax(f(x_i))[y_i]."""
    return F.cross_entropy(outputs, y)


def precise_cross_entropy(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Return the cross-entropy, accurate also where it is tiny.

    .. math:: \frac1n \sum_i \log \bigl( 1 + e^{q_i} \bigr) , \qquad q_i = \log \sum_{a \ne y_i} e^{f_a(x_i)} - f_{y_i}(x_i)

    The same function as ``cross_entropy``. That one subtracts two nearly equal logarithms where the prediction is certain, and its
    gradient in the label's logit is softmax - 1: both are rounded at 6e-8 in float32, where a run that fits its data for thousands
    of steps arrives. Here neither is a difference, so loss and gradient keep their relative accuracy.
    """
    label = y[:, None]
    others = outputs.scatter(1, label, -math.inf).logsumexp(1)
    return -F.logsigmoid(outputs.gather(1, label)[:, 0] - others).mean()


def half_mse(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"] | Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """(1/2n) sum_i ||f(x_i) - y_i||^2: summed over outputs, so that gradient descent moves f by -(lr/n) K r.

    Integers are labels and stand for targets with a 1 at the label; floating-point ``y`` are the targets themselves, ``[n, c]``.
    """
    targets = y if y.is_floating_point() else one_hot(y, outputs.shape[1], outputs.dtype)
    return 0.5 * (outputs - targets).square().sum(1).mean()


def mse(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """(1/nc) sum_i ||f(x_i) - onehot(y_i)||^2: also a mean over outputs, PyTorch's MSELoss; 2/c times ``half_mse``."""
    return F.mse_loss(outputs, one_hot(y, outputs.shape[1], outputs.dtype))


def one_hot(y: Int[Tensor, " n"], c: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n c"]:
    """Targets with a 1 at the label, ``[n, c]``."""
    return F.one_hot(y, c).to(dtype)


LOSSES = {"cross_entropy": cross_entropy, "precise_cross_entropy": precise_cross_entropy, "half_mse": half_mse, "mse": mse}


def loss_by_name(name: str):
    """Return the loss of this name, or raise ``ValueError`` with the known ones."""
    check_known("loss", name, LOSSES)
    return LOSSES[name]
