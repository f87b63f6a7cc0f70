"""Which examples each step of a training loop takes, and how their images reach the device."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ntklib.data.augment import Augmentation
from ntklib.data.crops import crop_draws, resized_crop_flip
from ntklib.data.datasets import Dataset
from ntklib.data.stored import StoredImages, StreamedImages
from ntklib.random import stream
from ntklib.training.parallel import ALONE, Alone

Feed = Generator[tuple[Tensor, Tensor], None, None]


@dataclass(frozen=True)
class BatchOrder:
    """The batches of a run: a new permutation per epoch, cut into batches, as a function of the seed and the step.

    Attributes:
        n: Training examples.
        batch_size: Examples per step; the last batch of an epoch may be smaller, one of a single example is left out.
        seed: Seed of the run.
    """

    n: int
    batch_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.n, self.batch_size)

    @property
    def smallest(self) -> int:
        """Examples of the smallest batch."""
        return min(self.batch_size, self.n - (self.per_epoch - 1) * self.batch_size)

    def indices(self, step: int) -> Tensor:
        """Examples of the batch of a step, ``[b]`` on the CPU."""
        epoch, position = divmod(step, self.per_epoch)
        return epoch_batches(self.n, self.batch_size, self.seed, epoch)[position]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of batches of ``n`` examples: the last one may be smaller, but one of a single example is left out."""
    full, rest = divmod(n, batch_size)
    return max(1, full + (rest > 1))  # batch normalisation needs two examples


@lru_cache(maxsize=2)
def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Batches of one epoch: indices ``[b]``, to be read only."""
    order = torch.randperm(n, generator=stream(seed, "batches", epoch))
    return order.split(batch_size)[: steps_per_epoch(n, batch_size)]


def batches(data: Dataset, order: BatchOrder, transform: Augmentation, steps: Sequence[int], processes: Alone = ALONE) -> Feed:
    """Yield this process's share of the augmented images and labels of each step, on the device of the data.

    Only the share is read; random numbers are drawn for the whole batch.
    """
    labels = data.y_train
    for step, x in zip(steps, _augmented(data.x_train, order, transform, steps, processes), strict=True):
        yield x, labels[_share(order, step, processes).to(labels.device)]


def _share(order: BatchOrder, step: int, processes: Alone) -> Tensor:
    index = order.indices(step)
    return index if processes.size == 1 else index[processes.share(len(index))]


def _augmented(
    images: Tensor | StoredImages, order: BatchOrder, transform: Augmentation, steps: Sequence[int], processes: Alone
) -> Generator[Tensor, None, None]:
    """Images of each step; those in files are cut out at random where they are decoded, since only there they are whole."""

    def augmented(step: int, x: Tensor) -> Tensor:
        n = len(order.indices(step))
        return transform(x, stream(order.seed, "augment", step), whole=n, rows=processes.share(n))

    def crops(step: int) -> Tensor:
        n = len(order.indices(step))
        return crop_draws(n, stream(order.seed, "augment", step))[processes.share(n)]

    if not isinstance(images, StreamedImages):
        for step in steps:
            yield augmented(step, images[_share(order, step, processes).to(images.device)])
        return
    in_files = transform is resized_crop_flip and images.in_files
    requests = ((_share(order, step, processes).numpy(), crops(step).numpy() if in_files else None) for step in steps)
    with closing(images.stream(requests)) as arrivals:
        for step, x in zip(steps, arrivals, strict=True):
            yield x if in_files else augmented(step, x)
