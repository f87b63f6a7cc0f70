"""Laws of weak and strong augmentation: seeded, in range, and the same image by image as batch by batch."""

import math

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import torch

from ntklib.data import WeakAndStrong
from ntklib.data.augment import crop_flip, weak
from ntklib.data.strong import OPERATIONS, STRONG, _each, cutout, geometric, rand_augment, resample, strong_by_name
from ntklib.random import stream


def images(n: int = 6, channels: int = 3, h: int = 9, w: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, h, w, generator=stream(seed, "images"))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_the_weak_augmentation_is_a_window_of_the_mirrored_image(padding, flip):
    x, out = images(), weak(images(), stream(1, "weak"), padding, flip)
    generator = stream(1, "weak")
    shift = torch.randint(2 * padding + 1, (6, 2), generator=generator)
    coin = torch.rand(6, generator=generator) < 0.5
    for i in range(6):
        for r in range(9):
            for c in range(12):
                column = 11 - c if flip and coin[i] else c
                place = [r + int(shift[i, 0]) - padding, column + int(shift[i, 1]) - padding]
                for axis, size in enumerate((9, 12)):  # mirrored about the outermost pixel, which is not repeated
                    place[axis] = abs(place[axis])
                    place[axis] = min(place[axis], 2 * (size - 1) - place[axis])
                assert torch.equal(out[i, :, r, c], x[i, :, place[0], place[1]])


def test_weak_augmentation_visits_all_shifts_and_both_sides():
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5).expand(2000, -1, -1, -1)
    seen = {tuple(row) for row in weak(ramp, stream(0, "weak"), 1, True).flatten(1).tolist()}
    assert len(seen) == 18  # 9 shifts, 2 sides
    assert torch.equal(weak(ramp, stream(0, "weak"), 0, False), ramp)


def test_the_zero_padded_crop_is_unchanged_by_sharing_its_window():
    x, padding = images(h=8, w=8), 2
    generator = stream(3, "crop")
    shift, flip = torch.randint(5, (6, 2), generator=generator), torch.rand(6, generator=generator) < 0.5
    padded = torch.nn.functional.pad(x, [padding] * 4)
    for i, image in enumerate(crop_flip(x, stream(3, "crop"), padding)):
        r, c = shift[i].tolist()
        window = padded[i, :, r : r + 8, c : c + 8]
        assert torch.equal(image, window.flip(2) if flip[i] else window)


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("channels", [1, 3])
def test_strong_images_are_seeded_in_range_and_of_the_same_kind(name, channels):
    x, change = images(40, channels), strong_by_name(name)
    before = x.clone()
    out, again, other = (change(x, stream(seed, "strong")) for seed in (0, 0, 1))
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert len({row for row in map(tuple, change(x[:1].expand(40, -1, -1, -1), stream(0, "s")).flatten(1).tolist())}) > 30


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_of_operations_is_each_image_alone(channels):
    n = 5 * len(OPERATIONS)
    pixels = (255 * images(n, channels)).to(torch.uint8)
    kind = torch.arange(n) % len(OPERATIONS)
    level, sign = 1 + torch.arange(n) % 9, 1 - 2 * (torch.arange(n) % 2)
    alone = [_each(pixels[i : i + 1], kind[i : i + 1], level[i : i + 1], sign[i : i + 1]) for i in range(n)]
    assert torch.equal(_each(pixels, kind, level, sign), torch.cat(alone))
    kept = [torch.equal(pixels[i : i + 1], alone[i]) for i in range(n) if kind[i] == 0]
    assert all(kept)


def by_pillow(name: str, image: PIL.Image.Image, level: int, sign: int) -> PIL.Image.Image:
    """The operation as Pillow does it, with FixMatch's strengths."""
    v, (w, h) = level / 10, image.size
    blend = 0.9 * v + 0.05
    affine = lambda *m: image.transform(image.size, PIL.Image.Transform.AFFINE, m)  # noqa: E731
    return {
        "identity": lambda: image,
        "autocontrast": lambda: PIL.ImageOps.autocontrast(image),
        "equalize": lambda: PIL.ImageOps.equalize(image),
        "brightness": lambda: PIL.ImageEnhance.Brightness(image).enhance(blend),
        "color": lambda: PIL.ImageEnhance.Color(image).enhance(blend),
        "contrast": lambda: PIL.ImageEnhance.Contrast(image).enhance(blend),
        "sharpness": lambda: PIL.ImageEnhance.Sharpness(image).enhance(blend),
        "posterize": lambda: PIL.ImageOps.posterize(image, 4 + int(4 * v)),
        "solarize": lambda: PIL.ImageOps.solarize(image, 256 - int(256 * v)),
        "rotate": lambda: image.rotate(sign * int(30 * v)),
        "shear_x": lambda: affine(1, sign * 0.3 * v, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, sign * 0.3 * v, 1, 0),
        "translate_x": lambda: affine(1, 0, sign * int(0.3 * v * w), 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, sign * int(0.3 * v * h)),
    }[name]()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_that_of_pillow(name, sign):
    """Within two of 256 levels; geometric ones up to the few pixels whose place lies on an edge between two."""
    smooth = torch.nn.functional.interpolate(images(1, 3, 5, 6), (32, 40), mode="bicubic").clamp(0.05, 0.9)
    pixels = (255 * smooth).to(torch.uint8)
    for level in (1, 5, 9):
        one = lambda v: torch.tensor([v])  # noqa: E731
        got = _each(pixels, one(OPERATIONS.index(name)), one(level), one(sign))[0].permute(1, 2, 0).int()
        image = by_pillow(name, PIL.Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), level, sign)
        wrong = ((got - torch.from_numpy(np.array(image)).int()).abs() > 2).any(2)
        assert float(wrong.float().mean()) <= (0.02 if "_" in name or name == "rotate" else 0.0)


def test_operations_are_drawn_evenly_and_half_of_them_are_skipped():
    x = torch.full((4000, 1, 8, 8), 0.8)  # flat: solarize and brightness alone change such pixels at the centre
    x[:, :, 0, 0] = 0.1  # keeps autocontrast and equalize from dividing by nothing
    out = rand_augment(x, stream(0, "strong"))
    cut = (out == 127 / 255).flatten(1).any(1)
    assert float(cut.float().mean()) > 0.99  # a cut of half the side always overlaps the image


def test_resampling_by_the_identity_and_by_a_quarter_turn():
    x = images(2, 1, 6, 6)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, -1, -1)
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0]]).expand(2, -1, -1)
    torch.testing.assert_close(resample(x, identity, "bilinear"), x, rtol=1e-5, atol=1e-6)  # float32
    torch.testing.assert_close(resample(x, quarter, "nearest"), x.rot90(1, (2, 3)), rtol=0, atol=0)


@pytest.mark.parametrize("side", [0.0, 0.35, 0.5])
def test_the_cut_square_is_the_one_by_loops(side):
    x, (h, w) = images(20), (9, 12)
    out = cutout(x, stream(2, "cut"), side, 0.25)
    length = round(side * 9)
    corner = torch.rand(20, 2, generator=stream(2, "cut")) * torch.tensor([h, w]) - length / 2
    for i, (top, left) in enumerate(corner.round().tolist()):
        for r in range(h):
            for c in range(w):
                inside = top <= r < top + length and left <= c < left + length
                expected = torch.full((3,), 0.25) if inside else x[i, :, r, c]
                assert torch.equal(out[i, :, r, c], expected)


def test_geometric_distortions_of_a_blob_stay_near_it():
    """A disc in the middle moves by at most the largest shift; its area changes by the square of the scale."""
    yy, xx = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = (((yy - 15.5) ** 2 + (xx - 15.5) ** 2) < 16).float().expand(300, 1, -1, -1)
    out = geometric(disc, stream(0, "strong"))
    bright = out - out.amin((2, 3), keepdim=True)
    place = (bright * xx).sum((1, 2, 3)) / bright.sum((1, 2, 3)).clamp(min=1e-6)
    area = (out > 0.5).float().sum((1, 2, 3))
    assert float(place.median()) == pytest.approx(15.5, abs=1.0)
    assert float(area.median()) == pytest.approx(math.pi * 16, rel=0.25)


def test_weak_and_strong_undo_the_standardisation():
    x = 3 + 5 * images(4, 1, 14, 14)  # black 3, white 8
    three, eight = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 8.0)
    augment = WeakAndStrong(three, eight, 1, False, "geometric")
    generator = stream(5, "strong")
    expected = geometric((weak(x, generator, 1, False) - 3) / 5, generator)
    torch.testing.assert_close(augment.strong(x, stream(5, "strong")), 3 + 5 * expected, rtol=1e-5, atol=1e-5)  # float32
    assert torch.equal(augment.weak(x, stream(6, "weak")), weak(x, stream(6, "weak"), 1, False))
    with pytest.raises(ValueError, match="Unknown strong augmentation 'geometrik'. Did you mean 'geometric'"):
        strong_by_name("geometrik")
