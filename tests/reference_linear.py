"""Deep linear networks by definition: torch autograd on full matrices, one entry and one step at a time."""

import math

import torch
from torch import Tensor


def factorization_loss(weights: list[Tensor], target: Tensor) -> Tensor:
    """1/2 ||W_L ... W_1 - M||_F^2."""
    product = weights[0]
    for w in weights[1:]:
        product = w @ product
    return ((product - target) ** 2).sum() / 2


def descend(weights: list[Tensor], target: Tensor, lr: float, steps: int) -> list[Tensor]:
    """Plain gradient descent by autograd."""
    for _ in range(steps):
        leaves = [w.clone().requires_grad_() for w in weights]
        gradients = torch.autograd.grad(factorization_loss(leaves, target), leaves)
        weights = [w - lr * g for w, g in zip(weights, gradients, strict=True)]
    return weights


def hessian(weights: list[Tensor], target: Tensor) -> Tensor:
    """Hessian over all entries of all layers, by two backward passes per row."""
    flat = torch.cat([w.reshape(-1) for w in weights]).requires_grad_()
    d = len(target)
    layers = [part.reshape(d, d) for part in flat.split(d * d)]
    (gradient,) = torch.autograd.grad(factorization_loss(layers, target), flat, create_graph=True)
    return torch.stack([torch.autograd.grad(g, flat, retain_graph=True)[0] for g in gradient])


def step_matrix(weights: list[Tensor], target: Tensor, lr: float) -> Tensor:
    """Jacobian of one step of gradient descent."""
    h = hessian(weights, target)
    return torch.eye(len(h), dtype=h.dtype) - lr * h


def curvature_sum(s_i: float, s_j: float, depth: int) -> float:
    """sum_l s_i^(2(L-l)/L) s_j^(2(l-1)/L), term by term."""
    return math.fsum(s_i ** (2 * (depth - k) / depth) * s_j ** (2 * (k - 1) / depth) for k in range(1, depth + 1))
