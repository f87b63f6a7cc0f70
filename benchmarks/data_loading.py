"""What data cost: loading CIFAR-10, an epoch's augmentation beside its training, and decoding images from files.

``python -m benchmarks.data_loading`` writes random images in the format of CIFAR-10 (50,000 and 10,000) and of ImageNet (JPEG files
of 500 x 375 pixels) into a temporary folder, and prints

- the seconds, of the clock and of the processor, that loading takes the first and the second time, for each storage;
- the time to make a batch ready (index, standardise, augment) as a fraction of a training step on ready batches, with the default
  network of the chapter ``trace_evolution`` on the CPU, and with the standard ResNet-18 on a GPU; both are medians over batches of
  rounds taken in turn, and the seconds of an epoch are the median times the steps of an epoch;
- the images per second that are decoded and cut out at random.
"""

import hashlib
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from ntklib import chapters, data, models, provenance
from ntklib.data import STORAGES, Dataset, StreamedImages
from ntklib.data.augment import AUGMENTATIONS
from ntklib.data.crops import resized_crop_flip
from ntklib.training import BatchOrder, sgd
from ntklib.training.batches import batches

STORED = STORAGES[:2]  # those whose batches are made ready in the run's own process


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def random_cifar10(root: Path, per_file: int = 10_000) -> Iterator[None]:
    """Write pickled batches of random images as CIFAR-10 has them, and let torchvision expect their checksums meanwhile."""
    folder, draw = root / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> list[str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return [file, hashlib.md5(raw).hexdigest()]

    def batch() -> dict[str, Any]:
        pixels, labels = draw.integers(0, 256, (per_file, 3072), dtype=np.uint8), draw.integers(0, 10, per_file).tolist()
        return {"data": pixels, "labels": labels, "filenames": ["image.png"] * per_file}

    before = CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta
    names = write(CIFAR10.meta["filename"], {CIFAR10.meta["key"]: [f"class {k}" for k in range(10)]})
    CIFAR10.train_list, CIFAR10.test_list = ([write(file, batch()) for file, _ in part] for part in before[:2])
    CIFAR10.meta = {**CIFAR10.meta, "md5": names[1]}
    try:
        with environment(NTKLIB_DATA=str(root), NTKLIB_OFFLINE="1"):
            yield
    finally:
        CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = before


@dataclass(frozen=True)
class Loading:
    """Seconds of loading a dataset, by the clock and of the processor."""

    storage: str
    first: float
    second: float
    second_processor: float


def loading(storage: str, device: str) -> Loading:
    """Load twice; the first time finds files that were just written."""
    times = []
    for _ in range(2):
        start = time.perf_counter(), time.process_time()
        data.load("cifar10", storage=storage).to(device)
        wait(device)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return Loading(storage, times[0][0], *times[1])


@dataclass(frozen=True)
class Share:
    """Milliseconds of a step and of making its batch ready (by the clock on a GPU, else of the processor), and their ratio."""

    storage: str
    augment: str
    step: float
    batch: float
    share: float
    epoch: float


def shares(images: dict[str, Dataset], device: str, *, steps: int, rounds: int) -> list[Share]:
    """Time making batches ready against training steps on batches that are ready."""
    parameters = chapters.default_parameters("trace_evolution")
    width, batch_size = (64 if device.startswith("cuda") else parameters["width"]), parameters["batch_size"]
    order = BatchOrder(len(next(iter(images.values())).x_train), batch_size, seed=0)
    chosen = range(min(steps, order.per_epoch))
    ways: dict[Any, Callable[[], Any]] = {"step": _training(images["float32"], order, parameters["model"], width, len(chosen))}
    for storage, augment in [(s, a) for s in images for a in AUGMENTATIONS]:
        feed = lambda s=storage, a=augment: sum(1 for _ in batches(images[s], order, AUGMENTATIONS[a], chosen))  # noqa: E731
        ways[storage, augment] = feed
    times: dict[Any, list[float]] = {way: [] for way in ways}
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    for _ in range(rounds + 1):
        for way, call in ways.items():
            start = clock()
            call()
            wait(device)
            times[way].append((clock() - start) / len(chosen))
    each = {way: median(found[1:]) for way, found in times.items()}  # the first round warms up
    step = each.pop("step")
    return [Share(*way, 1e3 * step, 1e3 * t, t / step, t * order.per_epoch) for way, t in each.items()]


def _training(images: Dataset, order: BatchOrder, name: str, width: int, steps: int) -> Callable[[], Any]:
    """Training steps of one network, that goes on at each call, on the same few batches."""
    index = torch.cat([order.indices(step) for step in range(steps)])[: steps * order.batch_size]
    few = Dataset("few", images.x_train[index], images.y_train[index], images.x_test[:1], images.y_test[:1], images.num_classes)
    net = models.build(name, input_shape=few.input_shape, num_classes=few.num_classes, width=width).to(few.x_train.device)
    loop = sgd(net, few, lr=0.01, momentum=0.9, batch_size=order.batch_size, epochs=1000)
    next(loop)
    return lambda: next(loop)


@dataclass(frozen=True)
class Decoding:
    """Images of files per second, decoded, cut out at random, and standardised on the device."""

    workers: int
    rate: float


def decoding(folder: Path, device: str, *, count: int, workers: list[int]) -> list[Decoding]:
    """Time one pass over JPEG files for each number of workers, their start included."""
    from ntklib.data.folders import ImageFiles

    draw = np.random.default_rng(0)
    paths = tuple(folder / f"{k}.jpg" for k in range(count))
    for path in paths:
        smooth = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))  # blurred: noise would make larger files
        smooth.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    mean, std = torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 64.0)
    images, y = StreamedImages(ImageFiles(paths), mean, std).to(device), torch.zeros(count, dtype=torch.int64, device=device)
    order = BatchOrder(count, 32, seed=0)
    found = []
    for number in workers:
        with environment(NTKLIB_WORKERS=str(number)):
            start = time.perf_counter()
            for _ in batches(Dataset("files", images, y, images, y, 1), order, resized_crop_flip, range(order.per_epoch)):
                pass
            wait(device)
            found.append(Decoding(number, count / (time.perf_counter() - start)))
    return found


def wait(device: str) -> None:
    """Let a GPU end what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@click.command(help=__doc__)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--per-file", default=10_000, show_default=True, help="Images in each of the six files of CIFAR-10.")
@click.option("--steps", default=8, show_default=True, help="Batches per round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--files", default=256, show_default=True, help="JPEG files to decode.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Keep the results in this file.")
def main(device: str, per_file: int, steps: int, rounds: int, files: int, target: Path | None) -> None:
    """Print three tables and keep them if asked."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, random_cifar10(Path(folder), per_file):
        loads = [loading(storage, device) for storage in STORAGES]
        images = {storage: data.load("cifar10", storage=storage).to(device) for storage in STORED}
        parts = shares(images, device, steps=steps, rounds=rounds)
        cores = os.cpu_count() or 1
        rates = decoding(Path(folder), device, count=files, workers=sorted({0, 1, cores - 1, cores}))
    click.echo(f"{'storage':12} {'first load':>12} {'second load':>12} {'(processor)':>12}")
    for a in loads:
        click.echo(f"{a.storage:12} {a.first:10.2f} s {a.second:10.2f} s {a.second_processor:10.2f} s")
    click.echo(f"\n{'storage':12} {'augmentation':18} {'batch':>10} {'step':>10} {'share':>8} {'epoch of batches':>17}")
    for b in parts:
        click.echo(f"{b.storage:12} {b.augment:18} {b.batch:7.2f} ms {b.step:7.1f} ms {b.share:8.1%} {b.epoch:15.2f} s")
    click.echo(f"\n{'workers':>12} {'images per second':>18}")
    for c in rates:
        click.echo(f"{c.workers:12} {c.rate:18.0f}")
    if target is not None:
        report = {"date": provenance.utc_now(), **provenance.machine(device), "loading": [asdict(a) for a in loads]}
        report |= {"shares": [asdict(b) for b in parts], "decoding": [asdict(c) for c in rates]}
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
