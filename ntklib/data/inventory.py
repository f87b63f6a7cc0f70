"""What is there of a dataset, and whether it is whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ntklib.data.datasets import LOADERS, DatasetNotFoundError, locate


@dataclass(frozen=True)
class Presence:
    """What a look at a dataset's files found.

    Attributes:
        name: Name of the dataset.
        state: ``"package"`` (carried by one), ``"whole"``, ``"damaged"`` or ``"absent"``.
        place: Folder of the files; None for a package.
        size: Bytes in that folder.
        images: Training and test images, where the dataset was read.
    """

    name: str
    state: str
    place: Path | None
    size: int = 0
    images: tuple[int, int] | None = None

    def __str__(self) -> str:
        read = f", {self.images[0]:,} + {self.images[1]:,} images" if self.images else ""
        if self.state == "package":
            return f"carried by a package{read}"
        if self.state == "absent":
            return f"absent; looked in {' and '.join(map(str, locate(self.name)))}"
        return f"{self.state} in {self.place} ({self.size / 2**20:.0f} MiB{read})"


def look(name: str) -> Presence:
    """Read a dataset if its files are there, and tell what was found; nothing is downloaded.

    torchvision compares the files of CIFAR-10 and CIFAR-100 with their checksums; those of MNIST and Fashion-MNIST must have the
    lengths that their headers announce; of ImageNet both parts must have the same classes, none of them without images and no image
    file empty.

    Raises:
        ValueError: If there is no dataset of this name.
    """
    places = [folder for folder in locate(name) if folder.exists()]
    if locate(name) and not places:
        return Presence(name, "absent", None)
    place = places[0] if places else None
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if place else 0
    try:
        with _offline():
            (x_train, _), (x_test, _) = LOADERS[name]()
    except DatasetNotFoundError:
        return Presence(name, "damaged", place, size)
    return Presence(name, "whole" if place else "package", place, size, (len(x_train), len(x_test)))


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("NTKLIB_OFFLINE")
    os.environ["NTKLIB_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["NTKLIB_OFFLINE"]
        if before is not None:
            os.environ["NTKLIB_OFFLINE"] = before
