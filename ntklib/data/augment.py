"""Random augmentations of image batches, vectorised on the device of the images."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ntklib.data.crops import resized_crop_flip
from ntklib.text import check_known

Images = Float[Tensor, "n channels height width"]
Augmentation = Callable[..., Images]  # (x, generator, *, whole, rows), see crop_flip


def crop_flip(
    x: Images, generator: torch.Generator, padding: int = 4, *, whole: int | None = None, rows: slice = slice(None)
) -> Images:
    """Shift each image by up to ``padding`` pixels (zeros outside) and mirror it left-right with probability 1/2.

    The usual CIFAR augmentation (He et al. 2016, section 4.2). Drawn on the CPU, so it does not depend on the device.

    Args:
        x: A batch of images, or ``rows`` of one.
        generator: On the CPU.
        padding: Largest shift.
        whole: Images of the batch, for all of which is drawn. Default: ``x`` is all of it.
        rows: Which of them ``x`` holds.
    """
    n = len(x) if whole is None else whole
    shift = torch.randint(2 * padding + 1, (n, 2), generator=generator)[rows]
    return window(F.pad(x, [padding] * 4), shift, torch.rand(n, generator=generator)[rows] < 0.5, x.shape[2:])


def weak(x: Images, generator: torch.Generator, padding: int, flip: bool) -> Images:
    """Shift each image by up to ``padding`` pixels, mirrored at the border, and flip it left-right with probability 1/2.

    FixMatch's weak augmentation (Sohn et al. 2020, arXiv:2001.07685v2, section 2.3) with whole pixels; ``flip=False`` for images
    whose mirror image is another thing, such as digits. Drawn on the CPU.
    """
    n = len(x)
    shift = torch.randint(2 * padding + 1, (n, 2), generator=generator)
    coin = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    return window(F.pad(x, [padding] * 4, mode="reflect"), shift, coin, x.shape[2:]) if padding or flip else x


def window(
    padded: Float[Tensor, "n channels rows columns"],
    corner: Int[Tensor, "n 2"],
    flip: Bool[Tensor, " n"],
    size: tuple[int, ...],
) -> Images:
    """Cut a window of ``size`` out of each image at its own corner (row, column), mirrored left-right where ``flip``."""
    device, (h, w) = padded.device, size
    corner, flip = corner.to(device), flip.to(device)
    rows = corner[:, :1] + torch.arange(h, device=device)  # [n, h]
    cols = corner[:, 1:] + torch.arange(w, device=device)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    example = torch.arange(len(padded), device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[example, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": lambda x, _, **__: x, "crop_flip": crop_flip, "resized_crop_flip": resized_crop_flip,
}  # fmt: skip


def augment_by_name(name: str) -> Augmentation:
    """Return the augmentation of this name, or raise ``ValueError`` with the known ones."""
    check_known("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]
