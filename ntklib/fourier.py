"""Fourier series on the residues of a modulus: of a table of embeddings, and of the logits of modular addition."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntklib.training.losses import precise_cross_entropy


def fourier_basis(p: int) -> tuple[Float[Tensor, "p p"], Int[Tensor, " p"]]:
    r"""Return the orthonormal real Fourier basis of functions on the residues 0..p-1, and each row's frequency.

    .. math:: \frac{1}{\sqrt p} , \quad \sqrt{2/p} \cos(2 \pi k a / p) , \quad \sqrt{2/p} \sin(2 \pi k a / p) , \quad 1 \le k < p/2

    in this order, and for even p the alternating function of frequency p/2. Float64.

    Raises:
        ValueError: If p is below 2.
    """
    if p < 2:
        msg = f"p must be at least 2. Got {p}."
        raise ValueError(msg)
    a = torch.arange(p, dtype=torch.float64)
    rows, frequencies = [torch.full((p,), 1 / math.sqrt(p), dtype=torch.float64)], [0]
    for k in range(1, (p + 1) // 2):
        angle = 2 * math.pi / p * (k * a % p)
        rows += [math.sqrt(2 / p) * angle.cos(), math.sqrt(2 / p) * angle.sin()]
        frequencies += [k, k]
    if p % 2 == 0:
        rows.append((1 - 2 * (a % 2)) / math.sqrt(p))
        frequencies.append(p // 2)
    return torch.stack(rows), torch.tensor(frequencies)


def fourier_power(table: Float[Tensor, "p d"]) -> Float[Tensor, " frequencies"]:
    r"""Return the power of a table of p rows at every frequency 0..p//2, summed over columns.

    .. math:: P_k = \sum_{F_j \text{ of frequency } k} \lVert F_j W \rVert^2 , \qquad \sum_k P_k = \lVert W \rVert_F^2

    (Parseval). For the embedding of a network, W holds the rows of the residues alone, not that of "=".

    Args:
        table: W, one row per residue.
    """
    basis, frequencies = fourier_basis(len(table))
    squares = (basis.to(table.device) @ table.detach().double()).square().sum(1)
    return squares.new_zeros(len(table) // 2 + 1).index_add(0, frequencies.to(table.device), squares)


def key_frequencies(power: Float[Tensor, " frequencies"], share: float = 0.9) -> list[int]:
    """Return the fewest frequencies, strongest first, that hold at least ``share`` of the power; frequency 0 does not count.

    Args:
        power: Power at frequencies 0, 1, ....
        share: Part of the power of all frequencies but 0, in (0, 1].

    Raises:
        ValueError: If the share is not in (0, 1], or there is no power beside frequency 0.
    """
    rest = power[1:].double()
    if not 0 < share <= 1:
        msg = f"share must be in (0, 1]. Got {share}."
        raise ValueError(msg)
    if not float(rest.sum()) > 0:
        msg = "There must be power at a frequency other than 0. Got none."
        raise ValueError(msg)
    order = rest.argsort(descending=True)
    held = rest[order].cumsum(0) / rest.sum()
    count = int((held < share * (1 - 1e-12)).sum()) + 1
    return [int(k) + 1 for k in order[:count]]


def sum_waves(logits: Float[Tensor, "p p c"], frequencies: list[int]) -> Float[Tensor, "p p c"]:
    r"""Return the part of the logits that is a wave of the given frequencies in a + b.

    .. math:: \sum_{k} \bigl[ A_k(c) \cos w_k (a + b) + B_k(c) \sin w_k (a + b) \bigr] , \qquad w_k = 2 \pi k / p

    with the coefficients of the orthogonal projection, for every output c: functions of a + b mod p are averages over the pairs
    of that sum, and of these the rows of ``fourier_basis`` are taken. Frequency 0 is the mean over all pairs.

    Args:
        logits: f(a, b)_c for all pairs.
        frequencies: The frequencies k, 0..p//2.
    """
    p = len(logits)
    residues = torch.arange(p, device=logits.device)
    sums = (residues[:, None] + residues) % p  # [p, p]
    means = logits.new_zeros(p, logits.shape[2], dtype=torch.float64)
    means.index_add_(0, sums.flatten(), logits.detach().double().flatten(0, 1))  # p pairs per sum
    basis, of = (t.to(logits.device) for t in fourier_basis(p))
    rows = basis[torch.isin(of, torch.tensor(frequencies, device=of.device))]
    return (rows.T @ (rows @ (means / p)))[sums]


def restricted_logits(logits: Float[Tensor, "p p c"], frequencies: list[int]) -> Float[Tensor, "p p c"]:
    """Return the logits with nothing left but their mean over pairs and the waves in a + b of the key frequencies.

    Their loss is the restricted loss of Nanda et al. 2023 (arXiv:2301.05217v3, section 5.1).
    """
    return sum_waves(logits, [0, *frequencies])


def excluded_logits(logits: Float[Tensor, "p p c"], frequencies: list[int]) -> Float[Tensor, "p p c"]:
    """Return the logits without the waves in a + b of the key frequencies; their loss on training pairs is the excluded loss.

    (Nanda et al. 2023, arXiv:2301.05217v3, section 5.1.)
    """
    return logits.double() - sum_waves(logits, frequencies)


def cosine_power(logits: Float[Tensor, "p p p"]) -> Float[Tensor, " frequencies"]:
    r"""Return the power of the logits along :math:`\cos w_k (a + b - c)`, for frequencies k = 0..p//2.

    .. math:: P_k = \frac{\langle f, u_k \rangle^2}{\lVert u_k \rVert^2} , \qquad u_k(a, b, c) = \cos w_k (a + b - c)

    The :math:`u_k` are orthogonal, so the sum over k is at most :math:`\lVert f \rVert^2`, and the sum over k > 0 at most
    ``logit_variance``: their quotient is the share of the logits that this algorithm explains. Frequency 0 is the overall mean.
    """
    p = len(logits)
    residues = torch.arange(p, device=logits.device)
    away = (residues[:, None, None] + residues[:, None] - residues) % p  # a + b - c
    sums = logits.new_zeros(p, dtype=torch.float64).index_add_(0, away.flatten(), logits.detach().double().flatten())
    cosines = torch.cos(2 * math.pi / p * (torch.arange(p // 2 + 1)[:, None] * torch.arange(p) % p).double()).to(logits.device)
    return (cosines @ sums).square() / (p * p * cosines.square().sum(1))


def logit_variance(logits: Float[Tensor, "p p c"]) -> float:
    """Return the squared norm of the logits after their mean over the outputs of each pair is taken away: softmax ignores it."""
    f = logits.detach().double()
    return float((f - f.mean(2, keepdim=True)).square().sum())


def progress_losses(
    logits: Float[Tensor, "p p p"], frequencies: list[int], train: Int[Tensor, "n_train 2"], test: Int[Tensor, "n_test 2"]
) -> tuple[float, float]:
    """Return the restricted loss on test pairs and the excluded loss on training pairs, both mean cross-entropies in nats.

    The restricted loss is low once the key frequencies carry a general solution, however the rest of the network does on training
    pairs; the excluded loss is low while the network also knows its training pairs by heart.

    Args:
        logits: f(a, b)_c for all pairs.
        frequencies: Key frequencies, as from ``key_frequencies`` at the end of training.
        train: Training pairs.
        test: Test pairs.
    """
    p = len(logits)
    losses = []
    for f, pairs in ((restricted_logits(logits, frequencies), test), (excluded_logits(logits, frequencies), train)):
        losses.append(float(precise_cross_entropy(f[pairs[:, 0], pairs[:, 1]], pairs.sum(1) % p)))
    return losses[0], losses[1]
