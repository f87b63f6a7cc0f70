"""Time a step of FixMatch beside the usual eager form: ``python -m benchmarks.fixmatch_step``.

The reference augments image by image with PIL and torchvision in a Python loop, as public code does in its data loader (here in the
same process, so that work is compared with work), passes all three augmentations through the network in one batch, and steps SGD.
Networks, losses, batch sizes and numbers of augmentations are the same; the random draws differ.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ntklib import models
from ntklib.data import PartlyLabelled
from ntklib.random import stream
from ntklib.training import fixmatch


@dataclass(frozen=True)
class Case:
    """What one step is made of.

    Attributes:
        model: Name in ``ntklib.models``.
        width: Its width.
        shape: Of one image.
        batch_size: Labelled images per step.
        mu: Unlabelled images per labelled one.
        padding: Largest shift.
        flip: Whether images are mirrored.
        strong: Strong augmentation.
    """

    model: str
    width: int
    shape: tuple[int, int, int]
    batch_size: int
    mu: int
    padding: int
    flip: bool
    strong: str


CASES = {
    "digits": Case("cnn", 8, (1, 14, 14), 8, 7, 1, False, "geometric"),
    "cifar narrow": Case("wrn28_2", 8, (3, 32, 32), 8, 7, 4, True, "rand_augment"),
    "cifar paper": Case("wrn28_2", 32, (3, 32, 32), 64, 7, 4, True, "rand_augment"),
}
STEPS = 2000  # of the whole run, more than are taken
QUICK = Case("cnn", 2, (3, 8, 8), 2, 2, 1, True, "rand_augment")


def images(case: Case, device: str, n: int = 512) -> PartlyLabelled:
    """Random pixels of 256 levels, standardised as by mean 127.5 and deviation 64."""
    x = torch.randint(256, (n, *case.shape), generator=stream(0, "pixels"))
    x[0], x[1] = 0, 255
    y = torch.randint(10, (n,), generator=stream(0, "labels"))
    x = (x - 127.5) / 64
    black, white = (torch.full((1, case.shape[0], 1, 1), v / 64) for v in (-127.5, 127.5))
    return PartlyLabelled(x[:40], y[:40], x[40:], y[40:], x[:1], y[:1], black, white, 10).to(device)


def network(case: Case, device: str) -> nn.Module:
    """The network of a case, from the same weights each time."""
    return models.build(case.model, input_shape=case.shape, num_classes=10, width=case.width, init="kaiming").to(device)


def ours(case: Case, device: str) -> Iterator[None]:
    """Steps of ``ntklib``: one per ``next``."""
    loop = fixmatch(
        network(case, device), images(case, device), lr=0.03, nesterov=True, batch_size=case.batch_size, mu=case.mu, steps=STEPS,
        padding=case.padding, flip=case.flip, strong=case.strong, measure_at=range(STEPS),
    )  # fmt: skip
    for _ in loop:
        yield


def transforms(case: Case) -> tuple[Callable, Callable]:
    """Weak and strong augmentation of one PIL image, to a standardised tensor."""
    size, mode = case.shape[1], "L" if case.shape[0] == 1 else "RGB"
    weak = [v2.RandomCrop(size, padding=case.padding, padding_mode="reflect"), *([v2.RandomHorizontalFlip()] if case.flip else [])]
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * case.shape[0], [0.25] * case.shape[0])]
    if case.strong == "rand_augment":
        distort = [v2.RandAugment(2, 10)]
    else:
        distort = [v2.RandomAffine([-30, 30], [0.15, 0.15], [0.8, 1.2], [-17, 17]), v2.ColorJitter(contrast=0.5)]
    cut = v2.RandomErasing(1.0, scale=(0.12, 0.25), ratio=(1, 1))
    to_pil = v2.ToPILImage(mode)
    return v2.Compose([to_pil, *weak, *finish]), v2.Compose([to_pil, *weak, *distort, *finish, cut])


def reference(case: Case, device: str) -> Iterator[None]:
    """Steps of the eager form: one per ``next``."""
    model, data = network(case, device), images(case, "cpu")
    weak, strong = transforms(case)
    pixels = lambda x: (x * 64 + 127.5).round().to(torch.uint8)  # noqa: E731
    labelled, unlabelled = pixels(data.x_labelled), pixels(data.x_unlabelled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    b, m = case.batch_size, case.batch_size * case.mu
    yield
    for _ in itertools.count():
        i, j = torch.randint(len(labelled), (b,)), torch.randint(len(unlabelled), (m,))
        x = torch.stack([weak(labelled[k]) for k in i])
        u_weak, u_strong = (torch.stack([change(unlabelled[k]) for k in j]) for change in (weak, strong))
        eager_step(model, optimizer, torch.cat([x, u_weak, u_strong]).to(device), data.y_labelled[i].to(device), m)
        yield


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, m: int) -> None:
    """One batch of labelled, weak and strong images through the network, the two losses, and a step."""
    model.train()
    logits = model(x)
    out, (out_weak, out_strong) = logits[: len(y)], logits[len(y) :].chunk(2)
    confidence, label = out_weak.detach().softmax(1).max(1)
    l2 = (F.cross_entropy(out_strong, label, reduction="none") * (confidence >= 0.95)).mean()
    optimizer.zero_grad()
    (F.cross_entropy(out, y) + l2).backward()
    optimizer.step()
    assert len(out_weak) == m


def measure(case: Case, device: str, steps: int, repeats: int) -> tuple[float, float]:
    """Median CPU seconds (on CUDA: wall seconds) per step of ours and of the reference, in turns."""
    loops = [ours(case, device), reference(case, device)]
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for loop, found in zip(loops, times, strict=True):
            start = clock()
            for _ in range(steps):
                next(loop)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            found.append((clock() - start) / steps)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])  # the first round warms up


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--steps", default=10, show_default=True, help="Steps per measurement.")
@click.option("--repeats", default=7, show_default=True, help="Measurements, in turns; the median counts.")
@click.option("--case", "chosen", multiple=True, type=click.Choice(sorted(CASES)), help="Default: the first two; all on CUDA.")
@click.option("--quick", is_flag=True, help="A tiny case: shows that it runs.")
def main(device: str, steps: int, repeats: int, chosen: tuple[str, ...], quick: bool) -> None:
    """Print milliseconds per step of ours and of the reference, and their ratio."""
    torch.set_num_threads(1)
    default = tuple(CASES) if device.startswith("cuda") else tuple(CASES)[:2]
    cases = {"quick": QUICK} if quick else {name: CASES[name] for name in chosen or default}
    for name, case in cases.items():
        mine, theirs = measure(case, device, 2 if quick else steps, 1 if quick else repeats)
        click.echo(f"{name:14} ntklib {1e3 * mine:8.2f} ms   eager {1e3 * theirs:8.2f} ms   ratio {theirs / mine:.2f}")


if __name__ == "__main__":
    main()
