"""Data of which only a few examples have labels, and the two augmentations they are trained with."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ntklib.data.augment import Images, weak
from ntklib.data.datasets import Dataset
from ntklib.data.strong import strong_by_name
from ntklib.data.subsets import balanced_indices
from ntklib.random import stream


@dataclass(frozen=True)
class PartlyLabelled:
    """Images with labels, images whose labels training does not use, and test images.

    Attributes:
        x_labelled: ``[n, channels, height, width]``.
        y_labelled: Their labels, the same number of each class.
        x_unlabelled: Further training images.
        y_unlabelled: Their labels, by which pseudo-labels are judged; no loss sees them.
        x_test: Test images.
        y_test: Test labels.
        black: Least pixel value of the training images, per channel, ``[1, channels, 1, 1]``.
        white: Largest pixel value of the training images.
        num_classes: Outputs c.
    """

    x_labelled: Float[Tensor, "n_labelled channels height width"]
    y_labelled: Int[Tensor, " n_labelled"]
    x_unlabelled: Float[Tensor, "n_unlabelled channels height width"]
    y_unlabelled: Int[Tensor, " n_unlabelled"]
    x_test: Float[Tensor, "n_test channels height width"]
    y_test: Int[Tensor, " n_test"]
    black: Float[Tensor, "1 channels 1 1"]
    white: Float[Tensor, "1 channels 1 1"]
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(channels, height, width)``."""
        return tuple(self.x_labelled.shape[1:])

    def to(self, device: str | torch.device) -> "PartlyLabelled":
        """Return the same data on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


def hide_labels(data: Dataset, num_labels: int, *, seed: int = 0, reuse_labelled: bool = False) -> PartlyLabelled:
    """Keep the labels of ``num_labels`` training images, the same number of each class, and set those of the others aside.

    Args:
        data: Labelled data.
        num_labels: Labels in all classes together.
        seed: Seed of the choice.
        reuse_labelled: Whether the labelled images are among the unlabelled ones, too, as in FixMatch's experiments.

    Raises:
        ValueError: If the number of labels is not a positive multiple of the number of classes, a class has too few images, or no
            unlabelled image is left.
    """
    n, c = len(data.y_train), data.num_classes
    if num_labels < 1 or num_labels % c:
        msg = f"num_labels must be a positive multiple of the {c} classes, as many for each. Got {num_labels}."
        raise ValueError(msg)
    fewest = int(torch.bincount(data.y_train, minlength=c).min())
    if num_labels > c * fewest or (num_labels == n and not reuse_labelled):
        msg = f"num_labels must be at most {c} times the {fewest} images of the smallest class, and leave unlabelled ones. "
        raise ValueError(msg + f"Got {num_labels} of {n} training images.")
    chosen = balanced_indices(data.y_train, num_labels, stream(seed, "labels")).to(data.y_train.device)
    others = torch.ones(n, dtype=torch.bool, device=data.y_train.device)
    if not reuse_labelled:
        others[chosen] = False
    x, y = data.x_train[:], data.y_train
    return PartlyLabelled(
        x[chosen], y[chosen], x[others], y[others], data.x_test[:], data.y_test,
        x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True), c,
    )  # fmt: skip


def shrink(data: Dataset, factor: int) -> Dataset:
    """Return the same data with images averaged over squares of ``factor`` pixels and standardised again.

    Raises:
        ValueError: If the factor is below 1 or does not divide height and width.
    """
    _, h, w = data.input_shape
    if factor < 1 or h % factor or w % factor:
        msg = f"shrink must be at least 1 and divide height {h} and width {w} of the images. Got {factor}."
        raise ValueError(msg)
    if factor == 1:
        return data
    x_train, x_test = (F.avg_pool2d(x, factor) for x in (data.x_train[:], data.x_test[:]))
    mean, std = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
    return replace(data, x_train=(x_train - mean) / std, x_test=(x_test - mean) / std)


@dataclass(frozen=True)
class WeakAndStrong:
    """FixMatch's two augmentations of standardised images.

    Attributes:
        black: Pixel value that is 0 for the strong augmentation, ``[1, channels, 1, 1]``.
        white: Pixel value that is 1.
        padding: Largest shift of the weak augmentation, in pixels.
        flip: Whether it mirrors images left-right.
        kind: Strong augmentation, applied to a weakly augmented image, see ``ntklib.data.strong``.
    """

    black: Float[Tensor, "1 channels 1 1"]
    white: Float[Tensor, "1 channels 1 1"]
    padding: int
    flip: bool
    kind: str

    def weak(self, x: Images, generator: torch.Generator) -> Images:
        """Shift and flip at random, see ``ntklib.data.augment.weak``."""
        return weak(x, generator, self.padding, self.flip)

    def strong(self, x: Images, generator: torch.Generator) -> Images:
        """Shift and flip at random, then distort."""
        pixels = (self.weak(x, generator) - self.black) / (self.white - self.black)
        return self.black + (self.white - self.black) * strong_by_name(self.kind)(pixels, generator)
