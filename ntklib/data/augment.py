"""Random augmentations of image batches, vectorised on the device of the images."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ntklib.text import unknown

Images = Float[Tensor, "n channels height width"]


def crop_flip(x: Images, generator: torch.Generator, padding: int = 4) -> Images:
    """Shift each image by up to ``padding`` pixels (zeros outside) and mirror it left-right with probability 1/2.

    The usual CIFAR augmentation (He et al. 2016, section 4.2). Drawn on the CPU, so it does not depend on the device.
    """
    n, _, h, w = x.shape
    shift = torch.randint(2 * padding + 1, (n, 2), generator=generator).to(x.device)
    flip = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    rows = shift[:, :1] + torch.arange(h, device=x.device)  # [n, h]
    cols = shift[:, 1:] + torch.arange(w, device=x.device)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    padded = F.pad(x, [padding] * 4)
    example = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[example, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Callable[[Images, torch.Generator], Images]] = {"none": lambda x, _: x, "crop_flip": crop_flip}


def augment_by_name(name: str) -> Callable[[Images, torch.Generator], Images]:
    """Return the augmentation of this name, or raise ``ValueError`` with the known ones."""
    if name not in AUGMENTATIONS:
        raise ValueError(unknown("augmentation", name, AUGMENTATIONS))
    return AUGMENTATIONS[name]
