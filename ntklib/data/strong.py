"""Strong augmentations for semi-supervised learning: every image draws its own, whole batches at a time.

All work on pixels in [0, 1], 0 black and 1 white, ``[n, channels, height, width]``. Draws are made on the CPU and do not depend on
the device.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ntklib.data.augment import Images
from ntklib.text import check_known

ROTATE, LOG_SCALE, SHEAR, SHIFT, CONTRAST, CUT = 30.0, 0.2, 0.3, 0.15, 0.5, 0.35  # ranges of ``geometric``
OPERATIONS = (
    "identity", "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
AFFINE = OPERATIONS.index("rotate")  # the first of the geometric ones
NUM_OPERATIONS, LEVELS = 2, 9  # of ``rand_augment``: drawn per image; strengths 1..9 in tenths


def geometric(x: Images, generator: torch.Generator) -> Images:
    """Rotate, scale, shear and shift each image at random, change its contrast and black out a square: for grey digits.

    Uniform draws: rotation up to 30 degrees, logarithm of the scale up to 0.2, shear of columns against rows up to 0.3, shifts up
    to 0.15 of the side, all of either sign, as one bilinear resampling with black outside; contrast ``m + c (x - m)`` about the
    image's mean m with c in [0.5, 1.5], clipped to [0, 1]; a square of 0.35 of the side, its centre anywhere in the image.
    """
    draw = 2 * torch.rand(len(x), 6, generator=generator) - 1
    angle, scale, shear = draw[:, 0] * math.radians(ROTATE), torch.exp(draw[:, 1] * LOG_SCALE), draw[:, 2] * SHEAR
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    first = torch.stack([cos, shear * cos - sin, 2 * SHIFT * draw[:, 3]], 1)  # in halves of the side
    second = torch.stack([sin, shear * sin + cos, 2 * SHIFT * draw[:, 4]], 1)
    x = resample(x, torch.stack([first, second], 1), "bilinear")
    contrast = (1 + CONTRAST * draw[:, 5]).to(x)[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    return cutout((mean + contrast * (x - mean)).clamp(0, 1), generator, CUT, 0.0)


def resample(x: Images, matrix: Float[Tensor, "n 2 3"], mode: str) -> Images:
    """Read each image at affinely moved places, black outside: place (x, y) of the result at ``matrix @ (x, y, 1)``.

    Coordinates run from -1 to 1 between the outer edges of the image.
    """
    grid = F.affine_grid(matrix.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)


def cutout(x: Images, generator: torch.Generator, side: float, value: float) -> Images:
    """Fill one square of each image with ``value``; its centre is uniform in the image, parts outside are lost.

    Args:
        x: Images.
        generator: CPU generator.
        side: Of the square, as a fraction of the image's shorter side, rounded to pixels.
        value: Pixel value.
    """
    n, _, h, w = x.shape
    length = round(side * min(h, w))
    corner = torch.rand(n, 2, generator=generator) * torch.tensor([h, w]) - length / 2
    start = corner.round().to(x.device)  # [n, 2]
    hidden = _between(start[:, 0], length, h)[:, None, :, None] & _between(start[:, 1], length, w)[:, None, None, :]
    return torch.where(hidden, value, x)


def _between(start: Float[Tensor, " n"], length: int, size: int) -> Bool[Tensor, "n size"]:
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < start[:, None] + length)


def rand_augment(x: Images, generator: torch.Generator) -> Images:
    r"""Apply two random operations to each image, each with probability 1/2, then cut out a grey square of half the side.

    RandAugment (Cubuk et al. 2020, arXiv:1909.13719v2) with the operations and strengths of FixMatch's public code: strength m is
    uniform in 0.1, ..., 0.9 per image and operation,

    ============================================ ==============================================================================
    identity, autocontrast, equalize             no strength
    brightness, color, contrast, sharpness       blend :math:`d + (0.9 m + 0.05)(x - d)` with a black, grey, mean or smoothed d
    posterize                                    keep the 4 + floor(4 m) highest of 8 bits
    solarize                                     invert pixels from 256 - floor(256 m) on
    rotate                                       by floor(30 m) degrees, either direction
    shear_x, shear_y, translate_x, translate_y   by 0.3 m (of the side; whole pixels for shifts), either direction
    ============================================ ==============================================================================

    The geometric ones read the nearest pixel, black outside. Images are rounded to 256 levels first.
    """
    n = len(x)
    kind = torch.randint(len(OPERATIONS), (NUM_OPERATIONS, n), generator=generator)
    level = torch.randint(1, LEVELS + 1, (NUM_OPERATIONS, n), generator=generator)
    sign = 2 * torch.randint(2, (NUM_OPERATIONS, n), generator=generator) - 1
    kind *= torch.rand(NUM_OPERATIONS, n, generator=generator) < 0.5  # operation 0 is the identity
    pixels = (255 * x).round().to(torch.uint8)
    for k, m, s in zip(kind, level, sign, strict=True):
        pixels = _each(pixels, k, m, s)
    return cutout(pixels.to(x.dtype) / 255, generator, 0.5, 127 / 255)


def _each(pixels: Tensor, kind: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Apply operation ``kind[i]`` with strength ``level[i] / 10`` and ``sign[i]`` to image i: one call per operation."""
    out = pixels.clone()
    for k in range(1, AFFINE):
        index = (kind == k).nonzero().squeeze(1)
        if len(index):
            place = index.to(pixels.device)
            out[place] = _photometric(OPERATIONS[k], pixels[place], level[index].to(pixels.device)[:, None, None, None])
    index = (kind >= AFFINE).nonzero().squeeze(1)
    if len(index):
        place = index.to(pixels.device)
        matrix = affine_matrices(kind[index], level[index], sign[index], tuple(pixels.shape[2:]))  # pyright: ignore[reportArgumentType]
        out[place] = resample(pixels[place].float(), matrix, "nearest").to(torch.uint8)
    return out


def _photometric(name: str, x: Tensor, level: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    match name:
        case "autocontrast":
            return V.autocontrast(x)
        case "equalize":
            return V.equalize(x)
        case "posterize":
            return x & (256 - 2 ** (4 - 4 * level // 10)).to(torch.uint8)
        case "solarize":
            return torch.where(x >= 256 - 256 * level // 10, 255 - x, x)
    adjust = {
        "brightness": V.adjust_brightness, "color": V.adjust_saturation, "contrast": V.adjust_contrast,
        "sharpness": V.adjust_sharpness,
    }[name]  # fmt: skip
    if name == "color" and x.shape[1] == 1:
        return x  # grey already
    plain = adjust(x, 0.0).float()
    return (plain + (0.09 * level + 0.05) * (x.float() - plain)).round().clamp(0, 255).to(torch.uint8)


def affine_matrices(kind: Tensor, level: Tensor, sign: Tensor, size: tuple[int, int]) -> Float[Tensor, "n 2 3"]:
    """Matrices of the geometric operations of ``rand_augment`` for ``resample``, which has sides of length 2."""
    h, w = size
    by = {name: kind == k for k, name in enumerate(OPERATIONS)}
    angle = torch.where(by["rotate"], sign * (3 * level), 0).double().deg2rad()
    amount = 0.03 * level * sign
    pixels = lambda side: sign * (3 * level * side // 100)  # noqa: E731
    matrix = torch.zeros(len(kind), 2, 3, dtype=torch.float64)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle)
    matrix[:, 0, 1] = -torch.sin(angle) * h / w + torch.where(by["shear_x"], amount, 0.0) * h / w
    matrix[:, 1, 0] = torch.sin(angle) * w / h + torch.where(by["shear_y"], amount, 0.0) * w / h
    # a shear leaves the upper left corner, not the centre, where it is
    matrix[:, 0, 2] = torch.where(by["translate_x"], 2 * pixels(w) / w, torch.where(by["shear_x"], amount, 0.0) * h / w)
    matrix[:, 1, 2] = torch.where(by["translate_y"], 2 * pixels(h) / h, torch.where(by["shear_y"], amount, 0.0) * w / h)
    return matrix.float()


STRONG: dict[str, Callable[[Images, torch.Generator], Images]] = {"geometric": geometric, "rand_augment": rand_augment}


def strong_by_name(name: str) -> Callable[[Images, torch.Generator], Images]:
    """Return the strong augmentation of this name, or raise ``ValueError`` with the known ones."""
    check_known("strong augmentation", name, STRONG)
    return STRONG[name]
