"""Images kept as bytes, on the device or off it, and standardised where they are looked at."""

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ntklib import torchrun
from ntklib.data.folders import FolderError, ImageFiles

STORAGES = ("float32", "uint8", "stream")
SAMPLE = 8192  # images in files of which statistics are measured
WORKERS = "NTKLIB_WORKERS"  # environment variable: processes that decode images for a run
CHUNK = 2048  # images whose bytes are summed at a time

Index = Tensor | slice


class StoredImages(ABC):
    """Images that stand in the place of a float32 tensor ``[n, channels, height, width]``, and are kept as bytes.

    An index, a slice or a tensor of integers or booleans, gives the selected images in float32, standardised:
    ``(byte - mean) / std`` per channel, the same values as those of the tensor they stand for if its mean and standard deviation
    are the same.

    Attributes:
        mean: Per channel, ``[channels, 1, 1]``, of bytes.
        std: Standard deviation per channel.
    """

    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]
    dtype = torch.float32

    def standardised(self, pixels: UInt8[Tensor, "*n channels height width"]) -> Float[Tensor, "*n channels height width"]:
        """Return ``(pixels - mean) / std`` on the device of the pixels."""
        return pixels.float().sub_(self.mean).div_(self.std)

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the tensor they stand for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where an index puts images."""

    @abstractmethod
    def __getitem__(self, index: Index) -> Float[Tensor, "*n channels height width"]:
        """Return the selected images, standardised."""

    @abstractmethod
    def to(self, device: str | torch.device) -> "StoredImages":
        """Return the same images for another device."""

    @abstractmethod
    def first(self, num: int) -> "StoredImages":
        """Return the first ``num`` images alone, as they are stored."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Four."""
        return len(self.shape)

    def split(self, batch_size: int) -> Iterator[Float[Tensor, "n channels height width"]]:
        """Yield all images in their order, ``batch_size`` at a time."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]


@dataclass(frozen=True)
class ByteImages(StoredImages):
    """Images kept as bytes on the device: a quarter of the memory of float32.

    Attributes:
        pixels: Bytes ``[n, channels, height, width]``.
        mean: See ``StoredImages``.
        std: See there.
    """

    pixels: UInt8[Tensor, "n channels height width"]
    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def __getitem__(self, index: Index) -> Float[Tensor, "*n channels height width"]:
        return self.standardised(self.pixels[index])

    def first(self, num: int) -> "ByteImages":
        return replace(self, pixels=self.pixels[:num])

    def to(self, device: str | torch.device) -> "ByteImages":
        return ByteImages(self.pixels.to(device), self.mean.to(device), self.std.to(device))


Request = tuple[np.ndarray, np.ndarray | None]  # which images, and random numbers of a crop of each


@dataclass(frozen=True)
class StreamedImages(StoredImages):
    """Images that stay in the memory of the host, or in their files, and come to the device a batch at a time.

    Attributes:
        source: Bytes ``[n, channels, height, width]`` on the CPU, or files.
        mean: See ``StoredImages``.
        std: See there.
    """

    source: Tensor | ImageFiles
    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]

    @property
    def shape(self) -> torch.Size:
        return self.source.shape if isinstance(self.source, Tensor) else torch.Size((len(self.source), *self.source.image_shape))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def __getitem__(self, index: Index) -> Float[Tensor, "*n channels height width"]:
        rows = torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].numpy()
        return self._arrived(read(self.source, (rows, None)))

    def to(self, device: str | torch.device) -> "StreamedImages":
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    @property
    def in_files(self) -> bool:
        """Whether images are decoded when they are asked for."""
        return isinstance(self.source, ImageFiles)

    def first(self, num: int) -> "StreamedImages":
        return replace(self, source=self.source[:num] if isinstance(self.source, Tensor) else ImageFiles(self.source.paths[:num]))

    def split(self, batch_size: int) -> Iterator[Float[Tensor, "n channels height width"]]:
        rows = np.arange(len(self))
        yield from self.stream((rows[start : start + batch_size], None) for start in range(0, len(self), batch_size))

    def stream(self, requests: Iterable[Request]) -> Generator[Float[Tensor, "n channels height width"], None, None]:
        """Yield the images of each request, in order, read ahead by worker processes that end with the iteration.

        With a GPU, bytes go there from pinned memory while the device works, and become float32 on it.

        Args:
            requests: Indices, and where images are cut out at random the ``crop_draws`` of each, otherwise None. They are taken
                a few batches ahead.

        Raises:
            FolderError: If a file is no image.
        """
        arrivals = _read_ahead(self.source, requests, pin_memory=self.device.type == "cuda")
        try:
            for pixels in arrivals:
                if isinstance(pixels, FolderError):
                    raise pixels
                yield self._arrived(pixels)
        finally:
            if hasattr(arrivals, "_shutdown_workers"):
                arrivals._shutdown_workers()

    def _arrived(self, pixels: Tensor) -> Tensor:
        return self.standardised(pixels.to(self.device, non_blocking=True))


def _read_ahead(source: Tensor | ImageFiles, requests: Iterable[Request], *, pin_memory: bool) -> Any:
    workers = worker_count()
    # forked workers share the source; they never touch the GPU. Within a process of a sweep the default would be another
    context = ("fork" if sys.platform == "linux" else "spawn") if workers else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than there are cores: as asked for
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        return iter(
            torch.utils.data.DataLoader(
                _Reader(source), batch_size=None, sampler=requests, num_workers=workers, multiprocessing_context=context,
                pin_memory=pin_memory, generator=torch.Generator(),  # the global one is left alone
            )
        )  # fmt: skip


class _Reader(torch.utils.data.Dataset):
    """What a worker process does: a request in, bytes out; an error that names a file comes back as it is."""

    def __init__(self, source: Tensor | ImageFiles) -> None:
        self.source = source

    def __getitem__(self, request: Request) -> Tensor | FolderError:
        try:
            return read(self.source, request)
        except FolderError as error:
            return error


def read(source: Tensor | ImageFiles, request: Request) -> UInt8[Tensor, "n channels height width"]:
    """Return the bytes of the requested images; only images in files are cut out at random here."""
    rows, draws = request
    if isinstance(source, Tensor):
        return source[torch.from_numpy(rows)]
    alone = torch.utils.data.get_worker_info() is not None  # a worker decodes one image at a time: there are others
    numbers = None if draws is None else torch.from_numpy(draws)
    return torch.from_numpy(source.decode(rows, numbers, threads=1 if alone else None)).permute(0, 3, 1, 2).contiguous()


def worker_count() -> int:
    """Processes that read images for a run: ``NTKLIB_WORKERS``, by default all cores but one, at most 16; 0 reads in the run's own.

    In a job of ``torchrun`` the cores are shared by its processes.

    Raises:
        ValueError: If the variable is not a whole number.
    """
    value = os.environ.get(WORKERS, "")
    if not value:
        return min(16, max(0, (os.cpu_count() or 1) // torchrun.local_size() - 1))
    if not value.isdecimal():
        msg = f"{WORKERS} must be a whole number of processes, 0 for none. Got {value!r}."
        raise ValueError(msg)
    return int(value)


@lru_cache(maxsize=4)
def file_statistics(paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    """``statistics`` of the middles of at most 8,192 images in files, evenly spaced in the alphabetic order of the files."""
    some = sorted(paths)[:: -(-len(paths) // SAMPLE)]
    return statistics(torch.from_numpy(ImageFiles(tuple(some))[:]).permute(0, 3, 1, 2))


def sample(images: Tensor | StoredImages) -> Tensor | StoredImages:
    """Return the images by which statistics of them are measured: all, but of images in files the first 8,192."""
    return images.first(SAMPLE) if isinstance(images, StreamedImages) and images.in_files else images


def statistics(pixels: UInt8[Tensor, "n channels height width"]) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation per channel, ``[channels, 1, 1]``, from exact sums of bytes.

    .. math:: m = S_1 / N, \qquad s^2 = (N S_2 - S_1^2) / (N (N - 1))

    with the sums S_1 of N bytes and S_2 of their squares, counted as whole numbers, so that only the results are rounded. The mean
    that PyTorch takes of float32 numbers is off by a few units of 1e-6 on 50,000 images of 32 x 32 pixels.
    """
    bytes_ = torch.arange(256)
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.int64)
    for part in pixels.split(CHUNK):
        counts += torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in part.unbind(1)])
    n = pixels.numel() // pixels.shape[1]
    sums = torch.stack([(counts * bytes_).sum(1), (counts * bytes_**2).sum(1)]).tolist()
    each = [(s1 / n, ((n * s2 - s1 * s1) / (n * (n - 1))) ** 0.5) for s1, s2 in zip(*sums, strict=True)]
    mean, std = torch.tensor(each, dtype=torch.float64).T.float()[:, :, None, None]
    return mean, std
