"""Seeded class-balanced subsets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntklib.data.stored import StoredImages
from ntklib.random import stream


def balanced_indices(y: Int[Tensor, " n"], num: int, generator: torch.Generator) -> Int[Tensor, " num"]:
    """Draw ``num`` distinct indices, as many of each class as the data allow.

    Classes take turns, each in a random order of its examples, so the counts differ by at most one until a class is used up.

    Args:
        y: Labels, ``[n]``.
        num: How many indices, 1..n.
        generator: CPU generator.

    Raises:
        ValueError: If ``num`` is not in 1..n.
    """
    if not 1 <= num <= len(y):
        msg = f"The number of examples must be between 1 and the {len(y)} there are. Got {num}."
        raise ValueError(msg)
    order = torch.randperm(len(y), generator=generator)
    labels = y.cpu()[order]
    turn = torch.zeros(len(y), dtype=torch.long)
    for label in labels.unique():
        mine = (labels == label).nonzero().squeeze(1)
        turn[mine] = torch.arange(len(mine))
    return order[torch.argsort(turn, stable=True)[:num]]


def probe_set(x: Tensor | StoredImages, y: Int[Tensor, " n"], num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a fixed class-balanced sample ``(x, y)`` of ``num`` examples, on which kernels are measured along training.

    Raises:
        ValueError: If ``num`` is larger than the data.
    """
    index = balanced_indices(y, num, stream(seed, "probe")).to(x.device)
    return x[index], y[index]


def two_classes(
    x: Tensor | StoredImages, y: Int[Tensor, " n"], classes: tuple[int, int], num: int, seed: int = 0
) -> tuple[Tensor, Float[Tensor, " num"]]:
    """Return a class-balanced sample of two classes in float64: inputs, ``[num, *input]``, and labels +1 (first class) and -1.

    Raises:
        ValueError: If the two classes are one, or have fewer than ``num`` examples together.
    """
    if classes[0] == classes[1]:
        msg = f"The two classes must differ. Got {classes[0]} and {classes[1]}."
        raise ValueError(msg)
    both = ((y == classes[0]) | (y == classes[1])).nonzero().squeeze(1)
    index = both[balanced_indices(y[both], num, stream(seed, "two_classes")).to(y.device)]
    return x[index].double(), torch.where(y[index] == classes[0], 1.0, -1.0).double()
