"""Functions of a kernel applied to a residual: how it decays in time, and what it sums to."""

import math

import torch
from jaxtyping import Float
from scipy.fft import dct
from torch import Tensor

from ntklib.spectra import LinearMap, top_eigenpairs

MARGIN = 1.05  # over the largest eigenvalue found, for the interval on which polynomials stay bounded


def _decay(eigvals: Tensor, t: Tensor, lr: float | None) -> Float[Tensor, "times k"]:
    """e^{-lambda t}, or (1 - lr lambda)^(t/lr)."""
    return torch.exp(-eigvals * t[:, None]) if lr is None else (1 - lr * eigvals) ** torch.round(t / lr)[:, None]


def _integral(eigvals: Tensor, t: Tensor, lr: float | None) -> Float[Tensor, "times k"]:
    """(1 - decay) / lambda, without cancellation where lambda t is small, and t where lambda is 0."""
    steps = t[:, None] if lr is None else torch.round(t / lr)[:, None]
    if lr is None:
        time, log = steps, -eigvals
    else:
        time, log = lr * steps, torch.log1p(-lr * eigvals.clamp(max=0.5 / lr))
    lost = -torch.expm1(steps * log)
    if lr is not None:
        lost = torch.where(lr * eigvals < 0.5, lost, 1 - _decay(eigvals, t, lr))
    return torch.where(eigvals == 0, time, lost / torch.where(eigvals == 0, 1, eigvals))


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, exactly 0 where they are so to rounding, and eigenvectors in columns."""
    eigvals, eigvecs = torch.linalg.eigh(matrix)
    noise = len(matrix) * torch.finfo(matrix.dtype).eps * eigvals.abs().max()
    return torch.where(eigvals.abs() <= noise, 0, eigvals), eigvecs


def filter_matrix(matrix: Tensor, residual: Tensor, t: Tensor, lr: float | None, *, integral: bool) -> Float[Tensor, "times k q"]:
    """The decay of the residual, or its integral over time, in the eigenbasis."""
    eigvals, eigvecs = decompose(matrix)
    factor = (_integral if integral else _decay)(eigvals.double(), t.to(eigvals.device, torch.float64), lr).to(matrix.dtype)
    return eigvecs @ (factor[:, :, None] * (eigvecs.T @ residual))


def filter_operator(
    operator: LinearMap, residual: Tensor, t: Tensor, lr: float | None, *, integral: bool
) -> Float[Tensor, "times k q"]:
    """The decay of the residual, or its integral over time, by products with the operator."""
    if lr is not None:
        return _descend(operator, residual, torch.round(t.double() / lr).long().tolist(), lr, integral)
    top = MARGIN * float(top_eigenpairs(operator, 1, tol=1e-3)[0]) or 1.0
    coefficients = _chebyshev(top, t.double(), integral, torch.finfo(operator.dtype).eps).to(residual)
    out = coefficients[0, :, None, None] * residual
    before, now = torch.zeros_like(residual), residual  # T_1 is half of what the recurrence makes of T_0
    for k, row in enumerate(coefficients[1:]):
        shifted = (2 / top) * (operator @ now) - now  # of spectrum [-1, 1]
        before, now = now, shifted if k == 0 else 2 * shifted - before
        out += row[:, None, None] * now
    bound = residual.norm() * (t.to(residual) if integral else 1)  # for a spectrum in [0, top]
    if not bool((out.flatten(1).norm(dim=1) <= 1.001 * bound).all()):
        msg = "An operator must be positive semidefinite for the flow to converge. Got a residual that grows."
        raise ValueError(msg)
    return out


def _chebyshev(top: float, t: Tensor, integral: bool, eps: float) -> Float[Tensor, "degree times"]:
    """Coefficients of the decay, or of its integral, on [0, top], by interpolation at ever more nodes until they end."""
    nodes = 32
    while True:
        angles = math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        values = (_integral if integral else _decay)(top * torch.cos(angles / 2) ** 2, t.cpu(), None)
        coefficients = torch.from_numpy(dct(values.numpy(), axis=1)) / nodes
        coefficients[:, 0] /= 2
        large = (coefficients.abs() > eps * values.abs().amax(1, keepdim=True)).any(0).nonzero()
        degree = int(large.max()) if len(large) else 0
        if degree < nodes // 2:
            return coefficients[:, : degree + 1].T
        nodes *= 2


def _descend(operator: LinearMap, residual: Tensor, steps: list[int], lr: float, integral: bool) -> Float[Tensor, "times k q"]:
    """r_{s+1} = r_s - lr K r_s, or the sum of lr r_s, at some steps."""
    wanted, found = set(steps), {}
    total = torch.zeros_like(residual)
    for step in range(max(steps, default=0) + 1):
        if step in wanted:
            found[step] = (total if integral else residual).clone()
        if step < max(steps, default=0):
            total = total + lr * residual
            residual = residual - lr * (operator @ residual)
    return torch.stack([found[step] for step in steps])
