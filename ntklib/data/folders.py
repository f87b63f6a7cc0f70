"""Images in one folder per class, decoded when they are asked for: the layout of ImageNet."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
from jaxtyping import Float
from torch import Tensor

from ntklib.data.crops import crop_boxes

EXTENSIONS = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".webp")
SIDE, SHORTER = 224, 256  # pixels of the crop, and of the shorter side before it
IMAGE_BYTES = {"float32": 5 * 3 * SIDE**2, "uint8": 2 * 3 * SIDE**2}  # of one image: decoded, and as it is stored


class FolderError(ValueError):
    """A folder of images does not have the layout it should have."""


@dataclass(frozen=True)
class ImageFiles:
    """Files as an array of images: an index decodes what it selects.

    The shorter side is scaled to 256 pixels (bilinear, antialiased) and the middle 224 x 224 pixels are kept, as is usual for
    evaluation on ImageNet (He et al. 2016, arXiv:1512.03385v1, section 3.4, with one crop).
    """

    paths: tuple[Path, ...]
    image_shape: ClassVar[tuple[int, int, int]] = (3, SIDE, SIDE)  # decoded, channels first

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """Decode the selected files to uint8 ``[n, 224, 224, 3]``, as many at a time as there are cores.

        Raises:
            FolderError: If a file is no image.
        """
        return self.decode(np.arange(len(self))[index])

    def decode(self, index: np.ndarray, draws: Float[Tensor, "n numbers"] | None = None, threads: int | None = None) -> np.ndarray:
        """Decode the selected files, each cut out as its draws tell, see ``crop_boxes``,, to uint8 ``[n, 224, 224, 3]``.

        Args:
            index: Which files.
            draws: ``crop_draws``, a row per file. Default: the middle of each image.
            threads: Files at a time. Default: the number of cores.

        Raises:
            FolderError: If a file is no image.
        """
        paths, rows = [self.paths[i] for i in index], [None] * len(index) if draws is None else draws
        images = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
        if threads == 1:
            for place, (path, row) in enumerate(zip(paths, rows, strict=True)):
                images[place] = _decode(path, row)
            return images
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # decoding and scaling leave Python's lock
            for place, image in enumerate(pool.map(_decode, paths, rows)):
                images[place] = image
        return images


def check_memory(count: int, storage: str = "float32") -> None:
    """Raise ``MemoryError`` if so many decoded images, training and test images together, would not fit into the free memory."""
    needed, free = count * IMAGE_BYTES[storage], psutil.virtual_memory().available
    if needed > free:
        msg = (
            f"{count:,} images of {SIDE} x {SIDE} pixels need {needed / 2**30:.0f} GiB decoded and stored as {storage}, and "
            f"{free / 2**30:.0f} GiB of memory are free. Take storage='stream', which keeps none, or a subset: num_train and "
            f"num_test together at most {free // IMAGE_BYTES[storage]:,}."
        )
        raise MemoryError(msg)


def _decode(path: Path, draws: Float[Tensor, " numbers"] | None = None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a syntax error
        msg = f"{path} is not an image that can be read: {error}. Replace the file or remove it."
        raise FolderError(msg) from error
    if draws is not None:
        box, flip = crop_boxes(draws[None], image.height, image.width)
        top, left, h, w = box[0].tolist()
        cut = np.asarray(image.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return cut[:, ::-1] if flip else cut
    scale = SHORTER / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    # Pillow's filters are antialiased
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE)))


def image_folders(root: Path, parts: Sequence[str] = ("train", "val")) -> list[tuple[ImageFiles, np.ndarray]]:
    """List the images of each part, ``root/part/class/image``, with labels in the alphabetic order of the classes' names.

    Args:
        root: Folder of the parts.
        parts: Names of their folders.

    Raises:
        FolderError: If a part is missing, a class has no images, a file is empty, or the parts have other classes.
    """
    classes: list[str] = []
    found = []
    for part in parts:
        names = sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir()) if (root / part).is_dir() else []
        if not names:
            msg = f"{root / part} must hold one folder of images per class. Got none."
            raise FolderError(msg)
        if classes and names != classes:
            odd = sorted({*names} ^ {*classes})
            msg = f"{root / part} must have the classes of {root / parts[0]}. Only one of them has {', '.join(odd[:5])}."
            raise FolderError(msg)
        classes = names
        found.append(_labelled(root / part, names))
    return found


def _labelled(folder: Path, classes: Sequence[str]) -> tuple[ImageFiles, np.ndarray]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            mine = sorted((e.name, e.stat().st_size) for e in entries if e.name.lower().endswith(EXTENSIONS))
        empty = [file for file, size in mine if not size]
        if empty or not mine:
            got = f"the empty file {empty[0]}" if empty else "none"
            msg = f"{folder / name} must hold images ({', '.join(EXTENSIONS)}). Got {got}."
            raise FolderError(msg)
        paths += [folder / name / file for file, _ in mine]
        labels += [label] * len(mine)
    return ImageFiles(tuple(paths)), np.array(labels)
