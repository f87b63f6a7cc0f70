"""Modular addition: all pairs of residues, split at random into training and test pairs."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ntklib.random import stream


@dataclass(frozen=True)
class ModularPairs:
    """The task a + b mod p.

    Attributes:
        p: Modulus.
        train: Training pairs (a, b), ``[n_train, 2]``.
        test: All other pairs, ``[n_test, 2]``.
    """

    p: int
    train: Int[Tensor, "n_train 2"]
    test: Int[Tensor, "n_test 2"]

    def sums(self, pairs: Int[Tensor, "n 2"]) -> Int[Tensor, " n"]:
        """Labels (a + b) mod p."""
        return pairs.sum(1) % self.p

    def tokens(self, pairs: Int[Tensor, "n 2"]) -> Int[Tensor, "n 3"]:
        """The inputs "a b =", where "=" is token p."""
        return F.pad(pairs, (0, 1), value=self.p)

    def one_hot(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n 3 tokens"]:
        """The same as one-hot vectors of length p + 1, float32."""
        return F.one_hot(self.tokens(pairs), self.p + 1).float()

    def all_pairs(self) -> Int[Tensor, "pairs 2"]:
        """All pairs (a, b), b changing fastest: logits of them are reshaped to ``[p, p, c]``."""
        residues = torch.arange(self.p, device=self.train.device)
        return torch.cartesian_prod(residues, residues)

    def to(self, device: str | torch.device) -> "ModularPairs":
        """Return the same pairs on another device."""
        return ModularPairs(self.p, self.train.to(device), self.test.to(device))


def check_modular_task(p: int, train_fraction: float) -> int:
    """Return the number of training pairs, the fraction of all p^2 rounded down; warn when p is not prime.

    Raises:
        ValueError: If p is below 2, or there would be no training or no test pair.
    """
    if p < 2:
        msg = f"p must be at least 2, so that there are two residues to tell apart. Got {p}."
        raise ValueError(msg)
    count = int(train_fraction * p * p)
    if not 1 <= count < p * p:
        msg = (
            f"train_fraction must leave at least one of the {p * p} pairs for training and one for testing, "
            f"so be at least {1 / p**2:.2g} and below 1. Got {train_fraction:g}."
        )
        raise ValueError(msg)
    if any(p % q == 0 for q in range(2, int(p**0.5) + 1)):
        msg = f"p = {p} is not prime: the task is well defined, but frequencies that share a factor with p are not all alike."
        warnings.warn(msg, stacklevel=3)
    return count


def modular_addition(p: int, train_fraction: float, *, seed: int = 0) -> ModularPairs:
    """Split all p^2 ordered pairs at random; (a, b) and (b, a) count as two (Nanda et al. 2023, arXiv:2301.05217v3, section 3).

    Args:
        p: Modulus, at least 2.
        train_fraction: Share of the pairs that is trained on; the number is rounded down.
        seed: Seed of the split.

    Raises:
        ValueError: If p is below 2, or there would be no training or no test pair.
    """
    count = check_modular_task(p, train_fraction)
    order = torch.randperm(p * p, generator=stream(seed, "pairs"))
    pairs = torch.stack([order // p, order % p], 1)
    return ModularPairs(p, pairs[:count], pairs[count:])
