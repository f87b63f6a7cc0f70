"""A kernel's eigenvectors against the targets: their shares, what a change of alignment is made of, and statistics of windows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.kernels import empirical_ntk
from ntklib.random import stream

LARGEST = 1e6  # outputs beyond this belong to a run that is about to diverge: their kernel may not be finite


@dataclass(frozen=True)
class TargetModes:
    r"""Eigenvalues of a kernel over n examples, and the share of the targets along each eigenvector.

    .. math:: \mathrm{KTA} = \kappa \sum_i \tilde\lambda_i a_i , \qquad \tilde\lambda_i = \lambda_i / \lVert \lambda \rVert_2 ,
        \quad a_i = \lVert Y^\top v_i \rVert^2 / \lVert Y \rVert_F^2

    Attributes:
        eigvals: All n, descending, in float64.
        shares: The :math:`a_i`, which sum to 1.
        factor: :math:`\kappa = \lVert Y \rVert_F^2 / \lVert Y^\top Y \rVert_F`, which is 1 for a single output.
    """

    eigvals: Float[Tensor, " n"]
    shares: Float[Tensor, " n"]
    factor: float = 1.0

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Eigenvalues over their Euclidean norm, which is the Frobenius norm of the kernel."""
        return self.eigvals / self.eigvals.norm()

    @property
    def alignment(self) -> float:
        """Kernel target alignment, as ``kernel_target_alignment`` of the kernel and the targets."""
        return self.factor * float(self.weights @ self.shares)

    def top(self, k: int) -> float:
        """Share of the targets along the k leading eigenvectors."""
        return float(self.shares[:k].sum())


@torch.no_grad()
def target_modes(kernel: Float[Tensor, "m m"], y: Float[Tensor, "n c"]) -> TargetModes:
    """Decompose a kernel and its targets, see ``TargetModes``.

    Args:
        kernel: Kernel of n examples with themselves: of a single output, or summed over the c outputs.
        y: Targets as used in training, uncentred.

    Raises:
        ValueError: If kernel or targets are zero or not finite, or lengths differ.
    """
    if kernel.shape != (len(y), len(y)):
        msg = f"kernel and y must be [n, n] and [n, c]. Got {tuple(kernel.shape)} and {tuple(y.shape)}."
        raise ValueError(msg)
    matrix, targets = kernel.double(), y.double()
    sizes = float(matrix.norm()), float(targets.norm())
    if not all(0 < size < math.inf for size in sizes):
        msg = f"Kernel and targets must be finite and not zero. Got norms {sizes[0]} and {sizes[1]}."
        raise ValueError(msg)
    eigvals, eigvecs = torch.linalg.eigh((matrix + matrix.T) / 2)
    shares = (eigvecs.T @ targets).square().sum(1) / sizes[1] ** 2
    return TargetModes(eigvals.flip(0), shares.flip(0), sizes[1] ** 2 / float((targets.T @ targets).norm()))


@torch.no_grad()
def network_modes(model: nn.Module, x: Tensor, y: Float[Tensor, "n c"]) -> TargetModes | None:
    """``target_modes`` of a network's NTK, summed over outputs; None where a diverging network has no usable kernel.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``.
        x: Inputs.
        y: Targets.
    """
    size = float(model(x).abs().max())
    if not size < LARGEST:
        return None
    kernel = empirical_ntk(model, x, reduce="trace").double()
    return target_modes(kernel, y) if 0 < float(kernel.norm()) < math.inf else None


@dataclass(frozen=True)
class AlignmentChange:
    r"""A change of KTA in two parts that add up exactly.

    .. math:: \Delta \mathrm{KTA} = \kappa \sum_i \bar a_i\, \Delta \tilde\lambda_i
        + \kappa \sum_i \bar{\tilde\lambda}_i\, \Delta a_i

    with bars for the mean of before and after: the product rule for differences, without a remainder.

    Attributes:
        eigenvalues: The first sum: eigenvalues move, eigenvectors stand still.
        eigenvectors: The second sum.
    """

    eigenvalues: float
    eigenvectors: float

    @property
    def total(self) -> float:
        """Sum of both parts."""
        return self.eigenvalues + self.eigenvectors


def alignment_change(before: TargetModes, after: TargetModes) -> AlignmentChange:
    """Split the change of KTA between two kernels of the same examples, see ``AlignmentChange``.

    Eigenpairs are matched by rank. Where two eigenvalues cross in between, their eigenvectors change places, and both parts see it.

    Raises:
        ValueError: If the two are not of the same size and targets.
    """
    if len(before.eigvals) != len(after.eigvals) or not math.isclose(before.factor, after.factor, rel_tol=1e-6):
        msg = f"Both must be of the same examples and targets. Got {len(before.eigvals)} and {len(after.eigvals)} examples."
        raise ValueError(msg)
    shares, weights = (before.shares + after.shares) / 2, (before.weights + after.weights) / 2
    return AlignmentChange(
        before.factor * float(shares @ (after.weights - before.weights)),
        before.factor * float(weights @ (after.shares - before.shares)),
    )


def at_loss(loss: Sequence[float], value: Sequence[float], level: float) -> float:
    """Value of a quantity where the loss first falls to ``level``: linear in log loss between the two measurements around it.

    nan for a run that never gets there, so that every run is compared at the same loss or not at all.

    Args:
        loss: Losses in the order of training.
        value: The quantity at the same times; a pair of which one is not finite has no value between.
        level: Positive loss.

    Raises:
        ValueError: If lengths differ or the level is not positive.
    """
    if len(loss) != len(value) or not level > 0:
        msg = f"loss and value must have one length and level be positive. Got {len(loss)}, {len(value)} and {level}."
        raise ValueError(msg)
    losses, values = np.asarray(loss, dtype=float), np.asarray(value, dtype=float)
    below = np.flatnonzero(losses <= level * (1 + 1e-6))  # a run that stops at the level does so to rounding
    if not len(below):
        return math.nan
    i = int(below[0])
    if i == 0 or losses[i] >= level:
        return float(values[i])
    share = math.log(losses[i - 1] / level) / math.log(losses[i - 1] / losses[i])
    return float((1 - share) * values[i - 1] + share * values[i])


def block_bootstrap(
    series: Sequence[Float[np.ndarray, "t q"]],
    statistic: Callable[[Float[np.ndarray, "t q"]], float],
    *,
    block: int,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over series of a statistic, resampling blocks of successive rows within each series.

    Successive windows of one run are not independent; blocks keep the dependence within them (Politis & Romano 1992, "A circular
    block-resampling procedure for stationary data": the series is closed to a ring, so that every row is drawn equally often).
    Draws with an undefined statistic are left out.

    Args:
        series: One array per run, rows in time.
        statistic: Of one array.
        block: Rows per block; the whole series where it is shorter.
        draws: Resampled sets.
        level: Coverage.
        seed: Of the draws.

    Returns:
        Lower and upper end; nan for no series.
    """
    draw = np.random.default_rng(stream(seed, "bootstrap").initial_seed())
    means = []
    for _ in range(draws):
        found = [statistic(rows[_blocks(len(rows), block, draw)]) for rows in series if len(rows)]
        means.append(float(np.mean(found)) if found else math.nan)
    kept = np.array([m for m in means if math.isfinite(m)])
    if not len(kept):
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _blocks(length: int, block: int, draw: np.random.Generator) -> np.ndarray:
    """Row numbers of a resampled series, blocks on a ring."""
    size = min(max(1, block), length)
    starts = draw.integers(0, length, -(-length // size))
    return (starts[:, None] + np.arange(size)).ravel()[:length] % length
