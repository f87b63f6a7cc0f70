"""Definitions of spectra, Hessians and sketches by loops in float64, independent of ntklib."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def orthogonal(m: int, generator: torch.Generator) -> Tensor:
    """Product of m random reflections I - 2 u u^T."""
    q = torch.eye(m, dtype=torch.float64)
    for _ in range(min(m, 12)):
        u = torch.randn(m, generator=generator, dtype=torch.float64)
        u = u / u.norm()
        q = q - 2 * torch.outer(u, u @ q)
    return q


def with_spectrum(eigvals: Sequence[float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix with these eigenvalues, and its eigenvectors in columns."""
    q = orthogonal(len(eigvals), generator)
    a = q @ torch.diag(torch.tensor(eigvals, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2, q


def hessian_by_definition(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """``[p, p]``: the gradient of each entry of the gradient, over distinct trainable parameters."""
    params = [w for w in model.parameters() if w.requires_grad]

    def flat_gradient(value: Tensor, create_graph: bool) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(sum(w.numel() for w in params), dtype=torch.float64)
        grads = torch.autograd.grad(value, params, create_graph=create_graph, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).reshape(-1) for g, w in zip(grads, params, strict=True)])

    return torch.stack([flat_gradient(entry, create_graph=False) for entry in flat_gradient(loss(), create_graph=True)])


def hessian_product_by_definition(model: nn.Module, loss: Callable[[], Tensor], v: Tensor) -> Tensor:
    """Gradient of the inner product of the gradient with v."""
    params = [w for w in model.parameters() if w.requires_grad]
    grads = torch.autograd.grad(loss(), params, create_graph=True)
    inner = sum((g * part.reshape(g.shape)).sum() for g, part in zip(grads, v.split([w.numel() for w in params]), strict=True))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(inner, params)])


def spectral_summaries_by_loops(eigvals: Sequence[float], ridge: float) -> dict[str, float]:
    total, top = sum(eigvals), max(eigvals)
    entropy = -sum(v / total * math.log(v / total) for v in eigvals if v > 0)
    return {
        "effective_rank": math.exp(entropy),
        "participation_ratio": total**2 / sum(v * v for v in eigvals),
        "stable_rank": total / top,
        "effective_dimension": sum(v / (v + ridge) for v in eigvals),
        "condition_number": top / min(eigvals) if min(eigvals) > 0 else math.inf,
    }


def frobenius_inner_product(a: Tensor, b: Tensor) -> float:
    return sum(u * v for u, v in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True))


def distance_by_definition(a: Tensor, b: Tensor) -> float:
    return 1 - frobenius_inner_product(a, b) / math.sqrt(frobenius_inner_product(a, a) * frobenius_inner_product(b, b))


def u_statistic_by_loops(phi1: Tensor, phi2: Tensor, left_out: int | None = None) -> float:
    """Mean of (Phi_1j . Phi_2l)^2 over ordered pairs of different draws, without one of them."""
    draws = [j for j in range(phi1.shape[1]) if j != left_out]
    pairs = [frobenius_inner_product(phi1[:, j], phi2[:, i]) ** 2 for j in draws for i in draws if i != j]
    return sum(pairs) / len(pairs)


def jackknife_by_loops(statistic: Callable[[int | None], float], q: int) -> tuple[float, float]:
    """Estimate without bias of order 1/q, and its standard error (Quenouille, Tukey): ``statistic(j)`` leaves draw j out."""
    whole, parts = statistic(None), [statistic(j) for j in range(q)]
    centre = sum(parts) / q
    return q * whole - (q - 1) * centre, math.sqrt((q - 1) / q * sum((s - centre) ** 2 for s in parts))


def u_statistic_variance(kernel: Tensor, q: int) -> float:
    """Variance of the estimate of ||K||_F^2 from q draws (Hoeffding), by Isserlis' theorem for E (z^T A w)^4."""
    square = kernel @ kernel
    second, fourth = float(square.trace()), float((square @ square).trace())
    zeta_1, zeta_2 = 2 * fourth, 2 * second**2 + 6 * fourth
    return (4 * (q - 2) * zeta_1 + 2 * zeta_2) / (q * (q - 1))


def shared_pair_mean(j1: Tensor, j2: Tensor) -> float:
    """E (z^T M z)^2 with M = J_1^T J_2, by Isserlis' theorem over all four indices."""
    m = j1.T @ j2
    p = len(m)
    total = 0.0
    for a in range(p):
        for b in range(p):
            total += float(m[a, a] * m[b, b] + m[a, b] * m[a, b] + m[a, b] * m[b, a])
    return total
