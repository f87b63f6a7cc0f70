"""Networks on the straight line between two states of training."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntklib.text import check_known


@torch.no_grad()
def between(model: nn.Module, before: Mapping[str, Tensor], fraction: float) -> nn.Module:
    r"""Return a copy of the model with parameters :math:`(1 - u)\, \theta_{\mathrm{before}} + u\, \theta_{\mathrm{model}}`.

    Buffers, such as batch-normalisation statistics, are those of the model: calibrate them for the new weights.

    Args:
        model: Network at the later state; left as it was.
        before: Parameters at the earlier state, by name; further names are ignored.
        fraction: u, 0 for the earlier state and 1 for the later one.

    Raises:
        ValueError: If a parameter of the model is missing in ``before``.
    """
    moved = copy.deepcopy(model)
    for name, w in moved.named_parameters():
        check_known("parameter", name, before)
        start = before[name].to(w)
        w.copy_(start + fraction * (w - start))
    return moved
