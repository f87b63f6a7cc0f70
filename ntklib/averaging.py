"""What an exponential moving average of parameters does: its own steps, the gradient bound behind it, and exact cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ntklib.data.partial import PartlyLabelled, WeakAndStrong
from ntklib.estimators import ntk_trace
from ntklib.random import stream
from ntklib.text import check_known
from ntklib.training.losses import cross_entropy, one_hot

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class GradientBound:
    r"""The two factors that bound a gradient of the cross-entropy, and the gradient.

    Attributes:
        gradient: :math:`\lVert \nabla L \rVert` of the mean cross-entropy, over trainable parameters.
        scale: :math:`\sqrt{\operatorname{Tr} K / n}`, with n examples (not n c).
        error: :math:`\sqrt{\frac1n \sum_i \lVert \mathrm{onehot}(y_i) - p_i \rVert^2}`, between 0 and the square root of 2.
    """

    gradient: float
    scale: float
    error: float

    @property
    def right(self) -> float:
        """The right-hand side, ``scale * error``."""
        return self.scale * self.error

    @property
    def tightness(self) -> float:
        """Gradient over right-hand side, in [0, 1]; nan where the right-hand side is 0."""
        return self.gradient / self.right if self.right else math.nan


def gradient_bound(model: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> GradientBound:
    r"""Bound the gradient of the mean cross-entropy by the trace of the NTK and the error of the probabilities.

    .. math:: \lVert \nabla L \rVert = \Bigl\lVert \frac1n \sum_i J_i^\top (p_i - \mathrm{onehot}(y_i)) \Bigr\rVert
        \le \sqrt{\frac{\operatorname{Tr} K}{n}} \sqrt{\frac1n \sum_i \lVert \mathrm{onehot}(y_i) - p_i \rVert^2}

    (the last step of the proof of the main paper's Theorem 5.1, its equation 12). It is two applications of the Cauchy-Schwarz
    inequality and needs no assumption on training. Equality holds when all J_i are of rank one along the error of their example,
    and all J_i^T (p_i - y_i) are equal. The trace is exact; Tr K could be replaced by the largest eigenvalue of K.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``; left exactly as it was.
        x: Inputs, ``[n, *input]``.
        y: Labels or pseudo-labels, ``[n]``.

    Raises:
        ValueError: As in ``ntk_trace``, or if there is not one label per input.
    """
    if len(x) != len(y):
        msg = f"One label per input is required. Got {len(x)} inputs and {len(y)} labels."
        raise ValueError(msg)
    trace = ntk_trace(model, x, normalize=False).mean
    outputs, grads = _gradient(model, x, y)
    return GradientBound(_norm(grads), math.sqrt(trace / len(x)), probability_error(outputs, y))


@torch.no_grad()
def training_pairs(
    model: nn.Module, data: PartlyLabelled, augment: WeakAndStrong, num: int, threshold: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw the pairs of images and labels or pseudo-labels that FixMatch trains a network on.

    ``num`` weakly augmented labelled images (each about as often as the others), and, of ``num`` unlabelled ones, those strongly
    augmented whose weakly augmented version the network is sure of, with its pseudo-labels. As many are drawn of either kind, the
    sum of their cross-entropies over ``num`` estimates FixMatch's loss with equal weights (lambda_u = 1). The draws depend on the
    seed alone, the mask and the pseudo-labels on the network.

    Args:
        model: Network in eval mode.
        data: Images.
        augment: Weak and strong augmentation.
        num: How many of either kind; more unlabelled images than there are are not drawn.
        threshold: Probability from which on a pseudo-label counts; above 1 there is none, as in supervised training.
        seed: Seed of images and augmentations.

    Returns:
        Inputs ``[n, channels, height, width]`` and labels ``[n]``, with n between ``num`` and ``2 * num``.
    """
    draws = lambda use: stream(seed, "pairs", use)  # noqa: E731
    index = torch.arange(num, device=data.y_labelled.device) % len(data.y_labelled)
    chosen = torch.randperm(len(data.x_unlabelled), generator=draws("images"))[:num].to(data.x_unlabelled.device)
    images = data.x_unlabelled[chosen]
    confidence, labels = model(augment.weak(images, draws("weak"))).softmax(1).max(1)
    sure = confidence >= threshold
    x = torch.cat([augment.weak(data.x_labelled[index], draws("labelled")), augment.strong(images, draws("strong"))[sure]])
    return x, torch.cat([data.y_labelled[index], labels[sure]])


def descent_cosine(model: nn.Module, x: Tensor, y: Int[Tensor, " n"], direction: Mapping[str, Tensor]) -> float:
    r"""Cosine of the angle between a direction in parameter space and the descent of the mean cross-entropy.

    .. math:: \frac{\langle d, -\nabla L \rangle}{\lVert d \rVert \lVert \nabla L \rVert}

    With the model an average z^2 and d = z^1 - z^2, the direction of the average's last step, it is 1 where the average follows
    gradient flow, as the main paper's Theorem 5.1 assumes (its equation 10).

    Args:
        model: Network in eval mode at which the gradient is taken.
        x: Inputs, ``[n, *input]``.
        y: Labels or pseudo-labels, ``[n]``.
        direction: d by name of trainable parameter.

    Returns:
        The cosine; nan where the direction or the gradient is 0.

    Raises:
        ValueError: If the direction does not name the trainable parameters.
    """
    names = [name for name, w in model.named_parameters() if w.requires_grad]
    if direction.keys() != set(names):
        msg = f"direction must name the {len(names)} trainable parameters of the model. Got {len(direction)} names."
        raise ValueError(msg)
    _, grads = _gradient(model, x, y)
    moves = [direction[name] for name in names]
    size = _norm(grads) * _norm(moves)
    inner = sum(float((d.double() * g.double()).sum()) for d, g in zip(moves, grads, strict=True))
    return -inner / size if size else math.nan


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradient of the mean cross-entropy in each trainable parameter."""
    params = [w for w in model.parameters() if w.requires_grad]
    with torch.enable_grad():
        outputs = model(x)
        grads = torch.autograd.grad(cross_entropy(outputs, y), params, allow_unused=True, materialize_grads=True)
    return outputs.detach(), list(grads)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def probability_error(outputs: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> float:
    r"""Root mean square distance of predicted probabilities from the labels.

    .. math:: \sqrt{\tfrac1n \sum_i \lVert \mathrm{onehot}(y_i) - \mathrm{softmax}(f(x_i)) \rVert^2}

    The square sums over classes and is at most 2 per example (main paper, equation 7).
    """
    outputs = outputs.double()
    return float((one_hot(y, outputs.shape[1], outputs.dtype) - outputs.softmax(1)).square().sum(1).mean().sqrt())


def average_path(path: np.ndarray, tau: float, update: str = AFTER) -> np.ndarray:
    r"""Average a path of parameters step by step, from the common start z^2_0 = z^1_0.

    .. math:: z^2_{n+1} = \tau z^2_n + (1 - \tau) z^1_{n+1} \text{ (after the step)}, \qquad
        z^2_{n+1} = \tau z^2_n + (1 - \tau) z^1_n \text{ (before it)}

    Args:
        path: z^1 after 0, 1, ... steps, ``[steps + 1, *shape]``.
        tau: Decay rate in (0, 1).
        update: ``"after"`` the optimizer's step, as ``ExponentialAverages``, or ``"before"`` it, as the main paper prints.

    Returns:
        z^2, of the shape of ``path``.

    Raises:
        ValueError: If tau is outside (0, 1) or the update is unknown.
    """
    _check(tau)
    _check_update(update)
    path = np.asarray(path, dtype=float)
    averages = [path[0]]
    for target in path[1:] if update == AFTER else path[:-1]:
        averages.append(tau * averages[-1] + (1 - tau) * target)
    return np.array(averages)


def average_speed(distance: float, tau: float) -> float:
    r"""Length of the last step of an average, from its distance to the parameters.

    .. math:: \lVert z^2_n - z^2_{n-1} \rVert = \frac{1 - \tau}{\tau} \lVert z^1_n - z^2_n \rVert

    Exact when the average is updated after the optimizer's step, z^2_n = tau z^2_{n-1} + (1 - tau) z^1_n, for every training. It is
    the left-hand side of the main paper's equation 7. With the update that the paper prints, from z^1_{n-1}, the same factor is off
    by 1/tau: there :math:`z^2_{n+1} - z^2_n = (1 - \tau)(z^1_n - z^2_n)`. In units of parameters per optimizer step.

    Args:
        distance: :math:`\lVert z^1_n - z^2_n \rVert`, see ``ExponentialAverages.distance``.
        tau: Decay rate in (0, 1).

    Raises:
        ValueError: If tau is outside (0, 1).
    """
    _check(tau)
    return (1 - tau) / tau * distance


def steady_lag(tau: float, update: str = AFTER) -> float:
    r"""Lag of an average behind parameters that drift by one unit per step, in the limit of many steps.

    .. math:: z^1_n - z^2_n \to \frac{\tau}{1 - \tau} \text{ (updated after the step)}, \qquad
        \frac{1}{1 - \tau} \text{ (before it, with } z^1_n \text{ to make } z^2_{n+1})

    Either way the average then moves as fast as the parameters do, whatever tau. After n steps the lag is 1 - tau^n of this.

    Args:
        tau: Decay rate in (0, 1).
        update: ``"after"`` or ``"before"`` the optimizer's step.

    Raises:
        ValueError: If tau is outside (0, 1) or the update is unknown.
    """
    _check(tau)
    _check_update(update)
    return (tau if update == AFTER else 1.0) / (1 - tau)


def mode_average(factor: float, tau: float, steps: np.ndarray) -> np.ndarray:
    r"""Average of a mode that gradient descent multiplies by ``factor`` in every step, started at 1.

    .. math:: z^1_n = q^n, \qquad z^2_n = \tau^n + (1 - \tau) q \, \frac{q^n - \tau^n}{q - \tau} ,
        \qquad q = 1 - \eta h

    on a quadratic loss with curvature h, updated after the step; for q = tau the fraction is n tau^(n-1). (The discrete form of
    z2 = a/(a - k) e^(-k t) + C e^(-a t) with k = eta h and a = 1 - tau.) It decays like the slower of q^n and tau^n.

    Args:
        factor: q in (-1, 1).
        tau: Decay rate in (0, 1).
        steps: Numbers of steps n.

    Raises:
        ValueError: If tau is outside (0, 1) or the factor outside (-1, 1).
    """
    _check(tau)
    if not -1 < factor < 1:
        msg = f"factor = 1 - lr * curvature must be in (-1, 1), where descent is stable. Got {factor:g}."
        raise ValueError(msg)
    n = np.asarray(steps, dtype=float)
    return tau**n + (1 - tau) * factor * _divided_difference(factor, tau, n)


def _divided_difference(a: float, b: float, n: np.ndarray) -> np.ndarray:
    """(a^n - b^n) / (a - b) for b > 0; near a = b by expm1, which loses no digits there."""
    if abs(a - b) > 0.5 * b:
        return (np.float_power(abs(a), n) * np.where((a < 0) & (n % 2 == 1), -1.0, 1.0) - b**n) / (a - b)
    log = math.log1p((a - b) / b)  # log(a/b)
    return b ** (n - 1) * (np.expm1(n * log) / math.expm1(log) if log else n)


def mode_speed(factor: float, tau: float, steps: np.ndarray) -> np.ndarray:
    r"""Step of a mode's average relative to the gradient step at the average: 1 where the average follows gradient descent.

    .. math:: \frac{z^2_n - z^2_{n+1}}{\eta h z^2_n} = 1 - \frac{\tau^{n+1}}{z^2_n}
        \;\to\; \min\Bigl(1, \frac{1 - \tau}{\eta h}\Bigr)

    for 0 < eta h <= 1. It starts at 1 - tau, rises, and is always below 1: the average of a slow mode (eta h < 1 - tau) ends up
    following the gradient, that of a fast mode moves at the rate 1 - tau of the average.

    Args:
        factor: q = 1 - eta h in [0, 1).
        tau: Decay rate in (0, 1).
        steps: Numbers of steps n.

    Raises:
        ValueError: If tau is outside (0, 1) or the factor outside [0, 1).
    """
    if not 0 <= factor < 1:
        msg = f"factor = 1 - lr * curvature must be in [0, 1), so that the mode decays without changing sign. Got {factor:g}."
        raise ValueError(msg)
    _check(tau)
    n = np.asarray(steps, dtype=float)
    with np.errstate(over="ignore"):  # infinite: the average follows
        # divided by tau^n above and below, so that it neither over- nor underflows
        return 1 - tau / (1 + (1 - tau) * factor / tau * _divided_difference(factor / tau, 1.0, n))


def descent_defect(tau: float, steps: np.ndarray) -> np.ndarray:
    r"""Weight of the initial gradient step by which an average misses gradient descent on a quadratic loss, tau^(n+1).

    .. math:: z^2_{n+1} = z^2_n - \eta \nabla L(z^2_n) + \tau^{n+1} \eta \nabla L(z_0)

    exactly, for gradient descent z^1 with a constant rate on any quadratic and a common start z_0, because the average is a linear
    filter. So "the average satisfies gradient flow" holds there but for a term that dies out in 1/(1 - tau) steps.

    Args:
        tau: Decay rate in (0, 1).
        steps: Numbers of steps n.

    Raises:
        ValueError: If tau is outside (0, 1).
    """
    _check(tau)
    return tau ** (np.asarray(steps, dtype=float) + 1)


def filter_gain(tau: float, frequency: np.ndarray) -> np.ndarray:
    r"""Gain of an average on a motion of the parameters with a frequency, in radians per step.

    .. math:: |H_\tau(\omega)| = \frac{1 - \tau}{|1 - \tau e^{-i \omega}|}
        = \Bigl(1 + \frac{2 \tau (1 - \cos\omega)}{(1 - \tau)^2}\Bigr)^{-1/2}

    It is 1 at frequency 0 and falls with tau at every other one. Steps of the average are the average of the steps, so, as the
    average with the larger tau is a causal filter of gain at most 1 of that with the smaller one, the sum over the first n steps
    of the squared ``average_speed`` falls with tau, for every n and every path of the parameters.

    Args:
        tau: Decay rate in (0, 1).
        frequency: Angular frequencies.

    Raises:
        ValueError: If tau is outside (0, 1).
    """
    _check(tau)
    return (1 + 2 * tau * (1 - np.cos(np.asarray(frequency, dtype=float))) / (1 - tau) ** 2) ** -0.5


def _check(tau: float) -> None:
    if not 0 < tau < 1:
        msg = f"A decay rate between 0 and 1, both excluded, is required. Got {tau:g}."
        raise ValueError(msg)


def _check_update(update: str) -> None:
    check_known("update", update, (AFTER, BEFORE))
