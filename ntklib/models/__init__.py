"""Networks by name, and the care that batch normalisation needs."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ntklib.data.stored import StoredImages
from ntklib.models.between import between
from ntklib.models.initialization import SCHEMES, initialize, scale_parameters
from ntklib.models.mlp import ACTIVATIONS, MLP
from ntklib.models.modular_transformer import ModularTransformer
from ntklib.models.ntk_mlp import NTKMLP, NTKLinear, ScaledOutput
from ntklib.models.outline import Part, inner_outputs, outline, part_of
from ntklib.models.resnet import LAYERS, ResNet
from ntklib.models.vgg import STAGES, VGG
from ntklib.models.vit import ViT
from ntklib.models.wide_resnet import WIDE, WideResNet
from ntklib.random import stream
from ntklib.text import check_known

__all__ = [
    "ACTIVATIONS", "LAYERS", "MLP", "NAMES", "NTKMLP", "SCHEMES", "STAGES", "VGG", "WIDE", "ModularTransformer", "NTKLinear",
    "Part", "ResNet", "ScaledOutput", "ViT", "WideResNet", "between", "build", "calibrate_batch_norm", "check_name", "initialize",
    "inner_outputs", "outline", "part_of", "recalibrated", "scale_parameters",
]  # fmt: skip

MAKERS: dict[str, Callable[..., nn.Module]] = {  # name -> model(name, shape of one input, outputs, width)
    "mlp": lambda _, shape, c, width: MLP(math.prod(shape), [width, width], c),
    **dict.fromkeys(STAGES, lambda name, shape, c, width: VGG(name, in_channels=shape[0], num_classes=c, width=width)),
    **dict.fromkeys(LAYERS, lambda name, shape, c, width: ResNet(name, in_channels=shape[0], num_classes=c, width=width)),
    **dict.fromkeys(WIDE, lambda name, shape, c, width: WideResNet(name, in_channels=shape[0], num_classes=c, width=width)),
    "vit": lambda _, shape, c, width: ViT(input_shape=shape, num_classes=c, width=width),
}
NAMES = tuple(MAKERS)


def check_name(name: str) -> None:
    """Raise ``ValueError`` with the nearest name when no model has this name."""
    check_known("model", name, NAMES)


def build(
    name: str, *, input_shape: Sequence[int], num_classes: int, width: int, init: str = "standard", seed: int = 0
) -> nn.Module:
    """Build and initialize a model by name.

    Args:
        name: ``"mlp"`` (two hidden ReLU layers of ``width`` units); ``"cnn"``, ``"vgg11"``, ``"vgg16"``, ``"resnet18"``,
            ``"resnet34"``, ``"resnet50"``, ``"resnet101"`` (first stage with ``width`` channels; 64 is the standard network);
            ``"resnet20"`` (the same; 16 is the standard network); ``"wrn10_2"``, ``"wrn16_2"``, ``"wrn28_2"`` (32 is); ``"vit"``
            (tokens of dimension ``width``, a multiple of 4).
        input_shape: Shape of one input, ``(channels, height, width)`` for all but the multilayer perceptron.
        num_classes: Outputs c.
        width: See ``name``.
        init: Scheme of ``initialize``.
        seed: Weights are drawn from ``stream(seed, "init")``.

    Raises:
        ValueError: If a name is unknown, or the width or the input shape does not fit the model.
    """
    check_name(name)
    if width < 1:
        msg = f"width must be at least 1. Got {width}."
        raise ValueError(msg)
    if name != "mlp" and len(input_shape) != 3:
        msg = f"{name} takes images of shape (channels, height, width). Got inputs of shape {tuple(input_shape)}."
        raise ValueError(msg)
    with torch.random.fork_rng([]):  # layers draw PyTorch's default weights from the global generator when they are made
        model = MAKERS[name](name, tuple(input_shape), num_classes, width)
    # channels last: convolutions train a third faster
    return initialize(model, init, stream(seed, "init")).to(memory_format=torch.channels_last)


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, x: Tensor | StoredImages, batch_size: int = 256) -> nn.Module:
    """Set the running statistics of all batch-normalisation modules to the statistics of ``x``, in place.

    Each statistic becomes the plain average over batches of ``x`` of the batch statistic (mean; variance with the n - 1 of
    PyTorch), computed with all modules normalising by the batch, as in training. A fresh network has running mean 0 and variance
    1, with which eval mode is another function than the one that training starts from; call this before a kernel at
    initialization. Mode and momentum of the modules are restored.

    Args:
        model: Any module; without batch normalisation nothing happens.
        x: Inputs, ``[n, *input]``, typically the training inputs.
        batch_size: Examples per batch; the last, smaller batch is left out when there is a full one.

    Returns:
        The same module.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    before = [(m, m.training) for m in model.modules()], [(m, m.momentum) for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.train()
        m.momentum = None  # cumulative average
    full = len(x) // batch_size * batch_size or len(x)
    for batch in (x[:full] if isinstance(x, Tensor) else x.first(full)).split(batch_size):
        model(batch)
    for m, training in before[0]:
        m.training = training
    for m, momentum in before[1]:
        m.momentum = momentum
    return model


def recalibrated(model: nn.Module, x: Tensor | StoredImages, batch_size: int = 256) -> nn.Module:
    """Return a copy of the model in eval mode whose batch-normalisation statistics are those of ``x``.

    Running statistics are averages over the last tens of training steps, over which the weights moved; this is the network at its
    present weights. Without batch normalisation it is a plain copy. See ``calibrate_batch_norm``.
    """
    return calibrate_batch_norm(copy.deepcopy(model), x, batch_size).eval()
