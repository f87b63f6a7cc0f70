"""The coarse structure of a network: its parts in order, and which of them are looked at from inside."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntklib.text import unknown

INNER = {  # front and middle module, by model
    "mlp": ("layers.2", "layers.4"),
    "cnn": ("stages.0", "stages.1"),
    "vgg": ("stages.0", "stages.2"),
    "resnet": ("layer1", "layer3"),
    "vit": ("blocks.0", "blocks.2"),
}


def inner_outputs(name: str) -> list[str]:
    """Names of a front and a middle module of a model that ``build`` makes, as the main paper's Figure 3 marks them.

    For residual networks these are the first and the third stage, after the ReLU behind their last sum.

    Raises:
        ValueError: If the model is unknown.
    """
    family = name.rstrip("0123456789")
    if family not in INNER:
        raise ValueError(unknown("model", name, INNER))
    return list(INNER[family])


@dataclass(frozen=True)
class Part:
    """A part of a network.

    Attributes:
        name: Its module name.
        shape: Shape of its output for one example.
        parameters: Number of trainable parameters in it.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int


@torch.no_grad()
def outline(model: nn.Module, x: Tensor, inside: Sequence[str] = ()) -> list[Part]:
    """Return the parts that a forward pass runs through, in the order in which they end.

    Parts are the model's children. A child that contains a module of ``inside`` is replaced by its own children, and so on.

    Args:
        model: Network in eval mode.
        x: Inputs, ``[n, *input]``; one example is enough.
        inside: Names of modules that must be parts of their own.

    Raises:
        ValueError: If there is no module of a name in ``inside``.
    """
    modules = dict(model.named_modules())
    for name in inside:
        if name not in modules:
            raise ValueError(unknown("module", name, [n for n in modules if n]))
    parts, handles = [], []

    def note(name: str, module: nn.Module) -> None:
        children = dict(module.named_children())
        if any(other.startswith(f"{name}.") for other in inside):
            for child in children:
                note(f"{name}.{child}", children[child])
            return
        count = sum(w.numel() for w in module.parameters() if w.requires_grad)

        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            parts.append(Part(name, tuple(out.shape[1:]), count))

        handles.append(module.register_forward_hook(hook))

    for name, child in model.named_children():
        note(name, child)
    try:
        model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return parts


def part_of(layer: str, parts: Sequence[Part]) -> str:
    """Name of the part that holds a layer; the layer's own name when none does (a parameter of the model itself)."""
    return next((p.name for p in parts if layer == p.name or layer.startswith(f"{p.name}.")), layer)
