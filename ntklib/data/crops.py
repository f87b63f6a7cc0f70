"""Random crops of random size and shape, resized: the usual augmentation of training images of ImageNet."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AREA, SHAPE = (0.08, 1.0), (3 / 4, 4 / 3)  # least and largest share of the area, and width / height
ATTEMPTS = 10


def crop_draws(n: int, generator: torch.Generator) -> Float[Tensor, "n numbers"]:
    """Draw all that decides ``n`` crops, whatever the size of the images: uniform numbers in [0, 1), drawn on the CPU."""
    return torch.rand(n, 1 + 4 * ATTEMPTS, generator=generator)


def crop_boxes(draws: Float[Tensor, "n numbers"], height: int, width: int) -> tuple[Int[Tensor, "n 4"], Bool[Tensor, " n"]]:
    """Return the boxes that are cut out of images of this size, and which are mirrored left-right (with probability 1/2).

    A box has a share of the area that is uniform in [0.08, 1] and a ratio of width to height whose logarithm is uniform in
    [log 3/4, log 4/3], at a uniform place (Szegedy et al. 2015, arXiv:1409.4842v1, section 6, with the choices of torchvision's
    ``RandomResizedCrop``): the first of ten attempts that fits into the image, and else the largest middle part of a legal shape.

    Args:
        draws: Of ``crop_draws``.
        height: Of the images, in pixels.
        width: Of the images.

    Returns:
        Top, left, height and width of each box, ``[n, 4]``, and the mirrored ones, ``[n]``; both on the CPU.
    """
    numbers = draws.double()
    area, shape, down, right = numbers[:, 1:].reshape(len(draws), ATTEMPTS, 4).unbind(2)  # [n, attempts]
    pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    ratio = (math.log(SHAPE[0]) + (math.log(SHAPE[1]) - math.log(SHAPE[0])) * shape).exp()
    w, h = (pixels * ratio).sqrt().round(), (pixels / ratio).sqrt().round()
    boxes = torch.stack([(down * (height - h + 1)).floor(), (right * (width - w + 1)).floor(), h, w], dim=2)
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1)  # of the largest, which is 1
    chosen = boxes[torch.arange(len(draws)), first]
    most_w, most_h = min(width, round(height * SHAPE[1])), min(height, round(width / SHAPE[0]))
    middle = torch.tensor([(height - most_h) // 2, (width - most_w) // 2, most_h, most_w], dtype=torch.float64)
    return torch.where(fits.any(1)[:, None], chosen, middle).long(), numbers[:, 0] < 0.5


def resized_crop_flip(
    x: Float[Tensor, "n channels height width"], generator: torch.Generator, *, whole: int | None = None, rows: slice = slice(None)
) -> Float[Tensor, "n channels height width"]:
    """Cut a random box out of each image, see ``crop_boxes``, resize it to the size of the image, and mirror half of them.

    Bilinear, from the pixels of the box alone; the numbers are drawn on the CPU.

    Args:
        x: A batch of images, or ``rows`` of one.
        generator: On the CPU.
        whole: Images of the batch, for all of which is drawn. Default: ``x`` is all of it.
        rows: Which of them ``x`` holds.
    """
    n, _, height, width = x.shape
    draws = crop_draws(n if whole is None else whole, generator)[rows]
    boxes, flip = crop_boxes(draws, height, width)
    top, left, h, w = boxes.to(x.device, x.dtype).unbind(1)
    down, across = _weights(top, h, height), _weights(left, w, width)  # [n, height, height], [n, width, width]
    across = torch.where(flip.to(x.device)[:, None, None], across.flip(1), across)
    return down[:, None] @ x @ across[:, None].mT


def _weights(start: Float[Tensor, " n"], length: Float[Tensor, " n"], size: int) -> Float[Tensor, "n size size"]:
    """Weight of each pixel (last) in each of ``size`` equally spaced points of its interval, by linear interpolation."""
    places = torch.arange(size, dtype=start.dtype, device=start.device)
    at = (places + 0.5) * (length / size)[:, None] - 0.5  # from the first pixel of the interval
    at = torch.minimum(at.clamp(min=0), length[:, None] - 1) + start[:, None]  # [n, points]
    return (1 - (at[:, :, None] - places).abs()).clamp(min=0)
