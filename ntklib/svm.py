"""The hard-margin support vector machine on a given kernel, exactly."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

SEPARABLE = 1e-12  # the problem counts as separable while 1/(1 + 2 D* Tr K/n) is above


@dataclass(frozen=True)
class SVMSolution:
    r"""Optimum of the dual of a hard-margin support vector machine without bias term.

    Attributes:
        alpha: Dual variables, ``[n]``, float64. If the labels are not separable, a proof of it: alpha >= 0 of sum 1 for which the
            combination sum_i alpha_i y_i phi_i of the features is zero.
        optimum: Optimal value D* = 1/2 ||u||^2 of dual and primal, as certified by ``gap``; infinite if not separable.
        gap: Primal objective at u, rescaled to be feasible, minus dual objective at alpha, over D*; not negative but for rounding.
        kkt_residual: Largest violation of the conditions of optimality, in units of the functional margin 1: a margin below 1, or
            one that differs from 1 at an example with alpha > 0.
    """

    alpha: Float[Tensor, " n"]
    optimum: float
    gap: float
    kkt_residual: float

    @property
    def separable(self) -> bool:
        """Whether a vector u with y_i <u, phi_i> > 0 for all i exists."""
        return math.isfinite(self.optimum)

    @property
    def margin(self) -> float:
        r"""Largest :math:`\min_i y_i \langle u, \phi_i \rangle` over unit vectors u, 1/sqrt(2 D*); 0 if not separable."""
        return 1 / math.sqrt(2 * self.optimum)

    @property
    def num_support(self) -> int:
        """Examples with alpha > 0."""
        return int((self.alpha > 0).sum())


def svm_dual(kernel: Tensor, y: Tensor) -> SVMSolution:
    r"""Solve the hard-margin support vector machine without bias term for a kernel and labels.

    .. math::
        D^* = \max_{\alpha \ge 0} \sum_i \alpha_i - \tfrac12 \sum_{ij} \alpha_i \alpha_j y_i y_j K_{ij}
        = \min_u \tfrac12 \lVert u \rVert^2 \;\text{ subject to }\; y_i \langle u, \phi_i \rangle \ge 1, \qquad
        u = \sum_i \alpha_i y_i \phi_i

    (the main paper's Eqs. 2 and 3, with K_ij = <phi_i, phi_j>). The primal is a least-distance problem, which one non-negative
    least-squares problem solves exactly, for kernels of any rank (Lawson & Hanson, "Solving Least Squares Problems", chapter 23):
    with Q = diag(y) K diag(y) = R^T R, minimise ||R z||^2 + (1 - sum z)^2 over z >= 0; then alpha = z / (1 - sum z), and
    1 - sum z = 0 exactly when the labels are not separable. SciPy's active-set ``nnls`` does it in float64, on K over its mean
    diagonal.

    Args:
        kernel: Symmetric positive semidefinite, ``[n, n]``.
        y: Labels +1 and -1.

    Raises:
        ValueError: If the kernel is not square, finite, symmetric, positive semidefinite and non-zero, or a label is not +1 or -1.
    """
    signs = y.detach().cpu().double()
    scale, factor, gram = _factorize(kernel, signs)
    n = len(signs)
    system = np.vstack([factor, np.ones(n)])
    z = nnls(system, np.eye(len(system))[-1], maxiter=100 * n)[0]
    slack = 1 - z.sum()
    if slack <= SEPARABLE:
        certificate = torch.as_tensor(z / z.sum())
        return SVMSolution(certificate, math.inf, math.nan, float((gram @ certificate).abs().max()))
    alpha = torch.as_tensor(_polish(factor, z / slack))
    margins = gram @ alpha
    support = alpha > 0
    kkt = max(float(1 - margins.min()), float((margins - 1)[support].abs().max()), 0.0)
    square = float(alpha @ margins)
    dual = float(alpha.sum()) - square / 2
    primal = square / 2 / float(margins.min()) ** 2
    return SVMSolution(alpha / scale, dual / scale, (primal - dual) / dual, kkt)


def _factorize(kernel: Tensor, y: Tensor) -> tuple[float, np.ndarray, Tensor]:
    """Mean diagonal s, a factor R with R^T R = Q/s, ``[rank, n]``, and Q/s itself."""
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) != len(y):
        msg = f"The kernel must be [n, n] with one label per example. Got {tuple(kernel.shape)} and {len(y)} labels."
        raise ValueError(msg)
    if not bool((y.abs() == 1).all()):
        msg = f"Labels must be +1 or -1. Got {y[y.abs() != 1][0].item():g}."
        raise ValueError(msg)
    k = kernel.detach().cpu().double()
    scale = float(k.diagonal().mean())
    if not bool(torch.isfinite(k).all()) or scale <= 0:
        msg = f"The kernel must be finite with a positive trace. Got a mean diagonal of {scale:g}."
        raise ValueError(msg)
    tolerance = 10 * len(k) * torch.finfo(kernel.dtype).eps * float(k.abs().max())
    if float((k - k.T).abs().max()) > tolerance:
        msg = f"The kernel must be symmetric. Got a difference of {float((k - k.T).abs().max()):.1e} from its transpose."
        raise ValueError(msg)
    gram = (k + k.T) / (2 * scale) * y * y[:, None]
    eigvals, eigvecs = torch.linalg.eigh(gram)
    if float(eigvals[0]) * scale < -tolerance:
        msg = f"The kernel must be positive semidefinite. Got an eigenvalue of {float(eigvals[0]) * scale:.3g}."
        raise ValueError(msg)
    kept = eigvals > len(k) * torch.finfo(torch.float64).eps * eigvals[-1]
    return scale, (eigvals[kept].sqrt() * eigvecs[:, kept]).T.numpy(), gram


def _polish(factor: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Solve for margins of exactly 1 on the support that was found, if that keeps alpha positive."""
    support = alpha > 0
    part = factor[:, support]
    # minimum-norm u with part^T u = 1, then alpha with part alpha = u
    u = np.linalg.lstsq(part.T, np.ones(support.sum()), rcond=None)[0]
    solved = np.linalg.lstsq(part, u, rcond=None)[0]
    if solved.min() <= 0 or np.abs(part.T @ (part @ solved) - 1).max() > np.abs(part.T @ (factor @ alpha) - 1).max():
        return alpha
    refined = np.zeros_like(alpha)
    refined[support] = solved
    return refined
