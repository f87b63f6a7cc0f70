"""FixMatch: training on a few labelled images and, through pseudo-labels, on unlabelled ones."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.data.partial import PartlyLabelled, WeakAndStrong
from ntklib.data.strong import strong_by_name
from ntklib.models import calibrate_batch_norm
from ntklib.random import stream
from ntklib.text import check_known
from ntklib.training.ema import ExponentialAverages
from ntklib.training.schedules import learning_rate
from ntklib.training.state import Checkpoint, State

DECAYED = ("weights", "all")
LABELLED_AUGMENTATIONS = ("weak", "strong")


@dataclass
class FixMatchState(State):
    """A state of ``fixmatch``; all numbers are means over the steps since the last measured one, nan where there were none.

    ``loss`` is the whole loss, ``epoch`` counts passes over the unlabelled images.

    Attributes:
        loss_labelled: Cross-entropy of labelled images.
        loss_unlabelled: Cross-entropy of pseudo-labels, a mean over all unlabelled images of a batch, masked ones counting 0.
        mask_rate: Fraction of unlabelled images whose largest probability reached the threshold.
        pseudo_accuracy: Fraction of these whose pseudo-label is the true one; nan if there were none.
    """

    loss_labelled: float = math.nan
    loss_unlabelled: float = math.nan
    mask_rate: float = math.nan
    pseudo_accuracy: float = math.nan


class Unlabelled(NamedTuple):
    """What ``pseudo_label_loss`` returns: the loss, the mask and the pseudo-labels."""

    loss: Float[Tensor, ""]
    mask: Bool[Tensor, " n"]
    labels: Int[Tensor, " n"]


def pseudo_label_loss(weak: Float[Tensor, "n c"], strong: Float[Tensor, "n c"], threshold: float) -> Unlabelled:
    r"""Cross-entropy of strongly augmented images with the labels that the network is sure of when it sees them weakly augmented.

    .. math:: \ell_2 = \frac{1}{n} \sum_i 1[\max_a q_{ia} \ge \phi] \, (-\log p_{i \hat y_i}), \qquad \hat y_i = \arg\max_a q_{ia}

    with q and p the softmax of the two outputs (Sohn et al. 2020, arXiv:2001.07685v2, Eq. 4; n = mu B). The mean is over all n
    images, not over those that pass. No gradient flows through q.

    Args:
        weak: Outputs (logits) on weakly augmented images.
        strong: Outputs on strongly augmented versions of the same images.
        threshold: phi.
    """
    confidence, labels = weak.detach().softmax(1).max(1)
    mask = confidence >= threshold
    losses = F.cross_entropy(strong, labels, reduction="none")
    return Unlabelled((losses * mask).mean(), mask, labels)


def fixmatch(
    model: nn.Module,
    data: PartlyLabelled,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decayed: str = "weights",
    batch_size: int,
    mu: int,
    threshold: float = 0.95,
    lambda_u: float = 1.0,
    steps: int,
    schedule: str = "cosine_7_16",
    padding: int,
    flip: bool,
    strong: str,
    labelled_augment: str = "weak",
    seed: int = 0,
    ema_decays: Sequence[float] = (),
    ema_buffers: str = "copy",
    measure_at: Collection[int] | None = None,
    resume: Checkpoint | None = None,
) -> Iterator[FixMatchState]:
    r"""FixMatch (Sohn et al. 2020, arXiv:2001.07685v2, Algorithm 1) by stochastic gradient descent with momentum.

    .. math:: \ell = \frac{1}{B} \sum_{i \le B} -\log p(y_i \mid \omega(x_i)) + \lambda_u \ell_2

    with :math:`\omega` the weak augmentation and :math:`\ell_2` of ``pseudo_label_loss`` on mu B unlabelled images. Labelled,
    weakly and strongly augmented images pass through the network in one batch in training mode, so that batch normalisation sees
    them together, as in public code; where examples do not interact, the weakly augmented ones, which need no gradient, pass
    apart. ``lambda_u=0`` is supervised training on the same labelled batches, without a look at the unlabelled images.

    Either stream goes through its images in one random order after another, without a break between them. Batches and
    augmentations are functions of the seed and the step, so a run resumed from a checkpoint takes the same steps. Before the first
    step, batch-normalisation statistics are calibrated on unlabelled images.

    Args:
        model: Network to train, in place, on the device of the data.
        data: Labelled and unlabelled images.
        lr: Learning rate at step 0.
        momentum: In [0, 1), not damped.
        nesterov: Nesterov's variant of momentum.
        weight_decay: Added to the gradient (not decoupled).
        decayed: ``"weights"``: it acts on parameters with two or more axes, not on biases and normalisation; ``"all"``: on all.
        batch_size: Labelled images per step, B.
        mu: Unlabelled images per labelled one, at least 1.
        threshold: phi in (0, 1]: the largest probability from which on the most likely class is a pseudo-label.
        lambda_u: Weight of the unlabelled loss.
        steps: Number of steps.
        schedule: See ``learning_rate``.
        padding: Largest shift of the weak augmentation, in pixels.
        flip: Whether it mirrors images.
        strong: Strong augmentation, see ``ntklib.data.strong``.
        labelled_augment: ``"weak"`` as in FixMatch, or ``"strong"``.
        seed: Seed of batches, augmentations and dropout.
        ema_decays: Decay rates of moving averages of the parameters, see ``ExponentialAverages``. They do not change training.
        ema_buffers: What the averaged networks take for buffers, see there; ``"copy"`` as in public code.
        measure_at: Steps at which to yield. Default: 0 and the last; the last is always among them.
        resume: A step and its ``State.tensors()``: continue after that state, which is not yielded again.

    Yields:
        The state before each measured step and after the last one. After a state whose loss or parameters are not finite
        (``diverged``) the loop ends.

    Raises:
        ValueError: If a number is out of its range or a name is unknown.
    """
    check_fixmatch(mu, threshold, lambda_u, decayed, labelled_augment)
    strong_by_name(strong)
    optimizer = torch.optim.SGD(_groups(model, weight_decay, decayed), lr=lr, momentum=momentum, nesterov=nesterov)
    averages = None if resume else _prepared(model, data, ema_decays, ema_buffers)
    averages = averages or (ExponentialAverages(model, ema_decays, ema_buffers) if ema_decays else None)
    augment = WeakAndStrong(data.black, data.white, padding, flip, strong)
    step_of = _Step(model, data, augment, batch_size, mu, threshold, lambda_u, labelled_augment, seed)
    measured = {steps} | set((0,) if measure_at is None else measure_at)

    def state_at(step: int, sums: Tensor, since: int) -> FixMatchState:
        model.eval()
        rate, epoch = learning_rate(schedule, lr, step, steps), step * batch_size * mu / len(data.x_unlabelled)
        finite = bool(sums.isfinite().all()) and all(bool(w.isfinite().all()) for w in model.parameters())
        total, l1, l2, passed, right = (sums / since).tolist() if since else [math.nan] * 5
        seen = mu * batch_size if lambda_u else math.nan
        return FixMatchState(
            step, epoch, model, total, rate, optimizer, steps, not finite, averages,
            l1, l2 if lambda_u else math.nan, passed / seen, right / passed if passed else math.nan,
        )  # fmt: skip

    sums, since = torch.zeros(5, device=data.x_labelled.device), 0
    state = state_at(resume[0] if resume else 0, sums, since)
    if resume:
        state.restore(resume[1])
    elif 0 in measured:
        yield state
    for step in range(state.step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, lr, step, steps)
        sums, since = sums + step_of(step, optimizer), since + 1
        if averages is not None:
            averages.update()
        if step + 1 in measured:
            state = state_at(step + 1, sums, since)
            yield state
            if state.diverged:
                return
            sums, since = torch.zeros_like(sums), 0


def check_fixmatch(mu: int, threshold: float, lambda_u: float, decayed: str, labelled_augment: str) -> None:
    """Raise ``ValueError`` unless the options of ``fixmatch`` are in their ranges."""
    if mu < 1:
        msg = f"mu must be at least 1: unlabelled images per labelled one. For supervised training set lambda_u=0. Got mu={mu}."
        raise ValueError(msg)
    if not 0 < threshold <= 1:
        msg = f"threshold must be in (0, 1]: it bounds a probability. Got {threshold}."
        raise ValueError(msg)
    if lambda_u < 0:
        msg = f"lambda_u must not be negative. Got {lambda_u}."
        raise ValueError(msg)
    check_known("choice of decayed parameters", decayed, DECAYED)
    check_known("augmentation of labelled images", labelled_augment, LABELLED_AUGMENTATIONS)


def rows_interact(model: nn.Module) -> bool:
    """Whether examples of a batch interact in training mode, through batch normalisation."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Stream:
    """Indices of ``n`` examples in one random order after another; batch ``step`` is a function of the seed and the step.

    Args:
        n: Number of examples.
        size: Batch size; may be larger than ``n``.
        seed: Seed of the run.
        use: Name of the stream.
    """

    def __init__(self, n: int, size: int, seed: int, use: str) -> None:
        self.n, self.size, self.seed, self.use = n, size, seed, use
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int) -> Int[Tensor, " size"]:
        """Indices at places ``step * size`` to ``(step + 1) * size - 1`` of the stream."""
        start = step * self.size
        first, last = start // self.n, (start + self.size - 1) // self.n
        self._orders = {k: self._orders[k] if k in self._orders else self._order(k) for k in range(first, last + 1)}
        return torch.cat(list(self._orders.values()))[start - first * self.n :][: self.size]

    def _order(self, k: int) -> Tensor:
        return torch.randperm(self.n, generator=stream(self.seed, self.use, k))


def _groups(model: nn.Module, weight_decay: float, decayed: str) -> list[dict]:
    params = [w for w in model.parameters() if w.requires_grad]
    inside = [w for w in params if w.ndim > 1 or decayed == "all"]
    outside = [w for w in params if w.ndim <= 1 and decayed != "all"]
    groups = [{"params": inside, "weight_decay": weight_decay}, {"params": outside, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _prepared(model: nn.Module, data: PartlyLabelled, decays: Sequence[float], buffers: str) -> ExponentialAverages | None:
    """Calibrate batch normalisation, then start the averages, whose buffers may be averaged, too."""
    calibrate_batch_norm(model, data.x_unlabelled[:2048])
    return ExponentialAverages(model, decays, buffers) if decays else None


@dataclass
class _Step:
    """One step of FixMatch as a function of its number."""

    model: nn.Module
    data: PartlyLabelled
    augment: WeakAndStrong
    batch_size: int
    mu: int
    threshold: float
    lambda_u: float
    labelled_augment: str
    seed: int

    def __post_init__(self) -> None:
        self.labelled = Stream(len(self.data.x_labelled), self.batch_size, self.seed, "labelled")
        self.unlabelled = Stream(len(self.data.x_unlabelled), self.mu * self.batch_size, self.seed, "unlabelled")
        self.together = rows_interact(self.model)

    def __call__(self, step: int, optimizer: torch.optim.Optimizer) -> Tensor:
        """Take the step; returns loss, labelled loss, unlabelled loss, number of pseudo-labels and of right ones before it."""
        x, y = self._batch(step)
        self.model.train()
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            # not torch.manual_seed, which without an initialised CUDA keeps a stack trace of every call
            generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
            generator.manual_seed(stream(self.seed, "dropout", step).initial_seed())
            loss, numbers = self._losses(step, x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach(), *numbers])

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        index = self.labelled.batch(step).to(self.data.x_labelled.device)
        change = getattr(self.augment, self.labelled_augment)
        return change(self.data.x_labelled[index], stream(self.seed, "augment_labelled", step)), self.data.y_labelled[index]

    def _losses(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        zero = torch.zeros((), device=x.device)
        if not self.lambda_u:
            loss = F.cross_entropy(self.model(x), y)
            return loss, [loss.detach(), zero, zero, zero]
        index = self.unlabelled.batch(step).to(x.device)
        images = self.data.x_unlabelled[index]
        weak = self.augment.weak(images, stream(self.seed, "weak", step))
        strong = self.augment.strong(images, stream(self.seed, "strong", step))
        out, out_weak, out_strong = self._outputs(x, weak, strong)
        l1, unlabelled = F.cross_entropy(out, y), pseudo_label_loss(out_weak, out_strong, self.threshold)
        right = unlabelled.mask & (unlabelled.labels == self.data.y_unlabelled[index])
        numbers = [l1.detach(), unlabelled.loss.detach(), unlabelled.mask.sum(), right.sum()]
        return l1 + self.lambda_u * unlabelled.loss, [v.to(l1.dtype) for v in numbers]

    def _outputs(self, x: Tensor, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the three parts; with batch normalisation as one batch."""
        if self.together:
            out, out_weak, out_strong = self.model(torch.cat([x, weak, strong])).split([len(x), len(weak), len(strong)])
            return out, out_weak, out_strong
        with torch.no_grad():
            out_weak = self.model(weak)
        out, out_strong = self.model(torch.cat([x, strong])).split([len(x), len(strong)])
        return out, out_weak, out_strong
