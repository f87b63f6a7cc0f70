"""Initialization schemes, drawn from an explicit generator."""

import math

import torch
from torch import nn

from ntklib.text import check_known

SCHEMES = ("standard", "kaiming", "xavier", "orthogonal", "he")


def initialize(model: nn.Module, scheme: str, generator: torch.Generator) -> nn.Module:
    r"""Draw all parameters in place: weights and biases of linear and convolution layers by the scheme.

    Normalisation layers become the identity map. Parameters that belong to no layer (class tokens, positions) are normal with
    standard deviation 0.02, as is usual for transformers.

    ============ ======================================================================= ==========================
    scheme       weights (fan_in = inputs of one unit, fan_out = uses of one input)      biases
    ============ ======================================================================= ==========================
    standard     uniform, variance 1/(3 fan_in), PyTorch's default for both layer kinds  uniform, same bound
    he           normal, variance 2/fan_in (He et al. 2015, arXiv:1502.01852v1, Eq. 10)  0
    kaiming      normal, variance 2/fan_out for convolutions (torchvision's ResNets);    0; ``standard`` for linear
                 ``standard`` for linear layers                                          layers
    xavier       uniform, variance 2/(fan_in + fan_out)                                  0
    orthogonal   orthonormal rows or columns                                             0
    ============ ======================================================================= ==========================

    Args:
        model: Module to initialize.
        scheme: One of the names above.
        generator: Source of randomness; the global one is not touched.

    Returns:
        The same module.

    Raises:
        ValueError: If the scheme is unknown.
    """
    check_known("initialization", scheme, SCHEMES)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            _draw(module, scheme, generator)
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()  # weight 1, bias 0: no randomness
        else:
            for w in module.parameters(recurse=False):
                nn.init.normal_(w, std=0.02, generator=generator)
    return model


@torch.no_grad()
def scale_parameters(model: nn.Module, factor: float) -> nn.Module:
    r"""Multiply all parameters by ``factor`` in place, biases included: the enlarged start of Liu et al. 2022 (arXiv:2210.01117v2).

    A network that is homogeneous of degree L in its parameters (an MLP of L layers without biases and with ReLU or identity) has
    :math:`f \to s^L f` and :math:`\operatorname{Tr} K \to s^{2(L-1)} \operatorname{Tr} K`.

    Args:
        model: Module to change.
        factor: The factor s, positive.

    Returns:
        The same module.

    Raises:
        ValueError: If the factor is not positive and finite.
    """
    if not 0 < factor < math.inf:
        msg = f"factor must be positive and finite. Got {factor}."
        raise ValueError(msg)
    for w in model.parameters():
        w.mul_(factor)
    return model


@torch.no_grad()
def _draw(layer: nn.Linear | nn.modules.conv._ConvNd, scheme: str, generator: torch.Generator) -> None:
    w, b = layer.weight, layer.bias
    if scheme == "kaiming" and isinstance(layer, nn.Linear):
        scheme = "standard"
    match scheme:
        case "standard":
            bound = 1 / math.sqrt(w[0].numel())  # fan_in
            w.uniform_(-bound, bound, generator=generator)
            if b is not None:
                b.uniform_(-bound, bound, generator=generator)
            return
        case "he":
            nn.init.kaiming_normal_(w, mode="fan_in", generator=generator)
        case "kaiming":
            nn.init.kaiming_normal_(w, mode="fan_out", generator=generator)
        case "xavier":
            nn.init.xavier_uniform_(w, generator=generator)
        case "orthogonal":
            nn.init.orthogonal_(w, generator=generator)
    if b is not None:
        b.zero_()
