"""Top eigenpairs of kernels and Hessians, and numbers that summarise a spectrum."""

import inspect
import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from ntklib.kernels import flatten_kernel
from ntklib.operator import SymmetricProducts
from ntklib.random import stream

DENSE = 1024  # matrices up to this size are decomposed whole
DENSE_OPERATOR = 128  # operators up to this size are formed
COLUMNS = 64  # columns of an operator formed at a time
_DRAWS_AT_RESTART = "rng" in inspect.signature(eigsh).parameters  # from SciPy 1.17 on

Pairs = tuple[np.ndarray, np.ndarray, float]  # eigenvalues, eigenvectors, and the scale ||A||


@runtime_checkable
class LinearMap(Protocol):
    """What ``top_eigenpairs`` needs of an operator; ``@`` takes torch vectors ``[m]`` and matrices ``[m, k]``."""

    shape: torch.Size | tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype: ...

    def __matmul__(self, v: Any, /) -> Any: ...


def top_eigenpairs(
    a: Tensor | LinearMap, k: int, *, tol: float | None = None, seed: int = 0, max_restarts: int = 300
) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k"]]:
    r"""Compute the k algebraically largest eigenvalues of a symmetric matrix or operator, with orthonormal eigenvectors.

    .. math:: A v_j = \lambda_j v_j, \qquad \lambda_1 \ge \lambda_2 \ge \dots \ge \lambda_k

    counted with multiplicity. Small matrices, and matrices of which more than a tenth of the spectrum is asked for, are decomposed
    whole (``torch.linalg.eigh``). Otherwise SciPy's implicitly restarted Lanczos method finds the pairs from a random start; as a
    Krylov space holds only one vector of each eigenspace, the search is repeated on the complement of what was found until nothing
    larger is left there. Every result is checked: ||A v_j - lambda_j v_j|| <= tol max|lambda|, so that an eigenvalue of A lies
    within this bound of lambda_j. Eigenvectors are signed so that the entry of largest magnitude is positive; within a repeated
    eigenvalue they are an arbitrary basis.

    Args:
        a: Symmetric matrix ``[m, m]``, kernel ``[n, n, c, c]`` (flattened, m = n c, example-major), or operator with ``shape``,
            ``dtype`` and ``@`` on torch tensors, such as ``NTKOperator`` or ``hessian_operator``.
        k: Number of eigenpairs, from 1 to m.
        tol: Bound on the relative residual, and on the relative asymmetry of ``a``. Default: eps^(2/3) of the dtype, 3.7e-11 in
            float64 and 2.4e-5 in float32.
        seed: Of the start vectors; the same seed gives the same result. Torch's global generator is not used.
        max_restarts: Restarts of the Lanczos method before it gives up.

    Returns:
        ``eigvals``, descending, and ``eigvecs`` in columns, in the dtype and on the device of ``a``.

    Raises:
        TypeError: If ``a`` is neither a floating-point tensor nor an operator on them.
        ValueError: If ``a`` is not square, symmetric and finite, or ``k`` is out of range.
        RuntimeError: If Lanczos does not converge or the residual is larger than ``tol``.
    """
    matrix = _square(a)
    m, device = matrix.shape[0], getattr(matrix, "device", "cpu")
    if not 1 <= k <= m:
        msg = f"k must be from 1 to m = {m}, the size of the matrix. Got {k}."
        raise ValueError(msg)
    tol = _tolerance(matrix.dtype) if tol is None else tol
    if not isinstance(matrix, Tensor) and m <= max(DENSE_OPERATOR, 5 * k):
        matrix = torch.cat([matrix @ part for part in torch.eye(m, dtype=matrix.dtype, device=device).split(COLUMNS, dim=1)], dim=1)
    _check_symmetric(matrix, tol)
    if isinstance(matrix, Tensor) and m <= max(DENSE, 10 * k):
        pairs = _decomposition(matrix, k)
    else:
        pairs = _lanczos(matrix, k, tol, np.random.default_rng(stream(seed, "eigenpairs").initial_seed()), max_restarts)
    _check_residual(matrix, pairs, tol)
    eigvals, eigvecs = (torch.from_numpy(array).to(device, matrix.dtype) for array in pairs[:2])
    largest = eigvecs.gather(0, eigvecs.abs().argmax(dim=0, keepdim=True))
    return eigvals, eigvecs * torch.where(largest < 0, -1, 1)


def effective_rank(spectrum: Tensor) -> float:
    r"""Return the exponential of the spectral entropy, :math:`\exp(-\sum_i p_i \ln p_i)` with :math:`p_i = \lambda_i/\sum\lambda`.

    (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", for the singular values of K, which are its
    eigenvalues, not for those of J.) Between 1 and the rank; the rank exactly when all non-zero eigenvalues are equal.

    Args:
        spectrum: All m eigenvalues ``[m]`` in any order, or a positive semidefinite kernel ``[m, m]`` or ``[n, n, c, c]``.

    Raises:
        ValueError: If the spectrum is not finite, not positive semidefinite, or zero.
    """
    p = _eigenvalues(spectrum)
    p = p[p > 0] / p.sum()
    return math.exp(-float((p * p.log()).sum()))


def participation_ratio(spectrum: Tensor) -> float:
    r"""Return :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2 = (\operatorname{tr} K)^2 / \lVert K \rVert_F^2`.

    Between 1 and the rank, and never above ``effective_rank`` (Rényi entropies of order 2 and 1).

    Args:
        spectrum: As in ``effective_rank``.

    Raises:
        ValueError: As in ``effective_rank``.
    """
    eigvals = _eigenvalues(spectrum)
    return float(eigvals.sum() ** 2 / eigvals.square().sum())


def stable_rank(spectrum: Tensor) -> float:
    r"""Return :math:`\sum_i \lambda_i / \lambda_1`, the stable rank of the Jacobian J of which K = J J^T.

    It is :math:`\lVert J \rVert_F^2 / \lVert J \rVert_2^2` = tr K / lambda_1, a ratio of first powers of the eigenvalues of K; the
    stable rank of K itself would be the ratio of their squares. Between 1 and the rank.

    Args:
        spectrum: As in ``effective_rank``.

    Raises:
        ValueError: As in ``effective_rank``.
    """
    eigvals = _eigenvalues(spectrum)
    return float(eigvals.sum() / eigvals.max())


def effective_dimension(spectrum: Tensor, ridge: float) -> float:
    r"""Return :math:`\operatorname{tr} K (K + \lambda I)^{-1} = \sum_i \lambda_i / (\lambda_i + \lambda)`, the degrees of freedom.

    The ridge lambda is absolute, on the diagonal of K without a factor n: for the loss (1/n) sum of squares + lambda' ||theta||^2
    it is n lambda'. The dimension falls from the rank (ridge -> 0) to 0.

    Args:
        spectrum: As in ``effective_rank``.
        ridge: The positive number added to the diagonal, in units of K.

    Raises:
        ValueError: As in ``effective_rank``, or if ``ridge`` is not positive.
    """
    if not (ridge > 0 and math.isfinite(ridge)):
        msg = f"ridge must be positive and finite. Got {ridge}."
        raise ValueError(msg)
    eigvals = _eigenvalues(spectrum)
    return float((eigvals / (eigvals + ridge)).sum())


def condition_number(spectrum: Tensor) -> float:
    r"""Return :math:`\lambda_1 / \lambda_m`, and infinity when K is singular to working precision, lambda_m <= m eps lambda_1.

    Args:
        spectrum: As in ``effective_rank``; eps is that of its dtype.

    Raises:
        ValueError: As in ``effective_rank``.
    """
    eigvals = _eigenvalues(spectrum)
    top, bottom = float(eigvals.max()), float(eigvals.min())
    return math.inf if bottom <= len(eigvals) * torch.finfo(spectrum.dtype).eps * top else top / bottom


def _eigenvalues(spectrum: Tensor) -> Float[Tensor, " m"]:
    """Eigenvalues in float64, without the negative ones that rounding makes."""
    _check_kind(spectrum)
    if spectrum.ndim != 1:
        matrix = _square(spectrum)
        assert isinstance(matrix, Tensor)
        _check_symmetric(matrix, _tolerance(matrix.dtype))
        eigvals = torch.linalg.eigvalsh(matrix.double())
    else:
        eigvals = spectrum.detach().double()
    bottom, top = (float(eigvals.min()), float(eigvals.max())) if len(eigvals) else (math.nan, math.nan)
    if not (math.isfinite(bottom) and math.isfinite(top)) or bottom == top == 0:
        msg = f"A spectrum must be finite and not zero. Got {len(eigvals)} eigenvalues from {bottom:.3g} to {top:.3g}."
        raise ValueError(msg)
    if bottom < -math.sqrt(torch.finfo(spectrum.dtype).eps) * top:
        msg = f"A kernel must be positive semidefinite. Got eigenvalues from {bottom:.3g} to {top:.3g}."
        raise ValueError(msg)
    return eigvals.clamp(min=0)


def _check_kind(a: Tensor | LinearMap) -> None:
    if not isinstance(getattr(a, "dtype", None), torch.dtype) or not a.dtype.is_floating_point:
        msg = f"A matrix or operator must hold torch floating-point numbers. Got {type(a).__name__} of {getattr(a, 'dtype', None)}."
        raise TypeError(msg)


def _square(a: Tensor | LinearMap) -> Tensor | LinearMap:
    """Check the kind and shape of ``a``, and flatten a kernel with outputs."""
    _check_kind(a)
    shape = tuple(a.shape)
    if isinstance(a, Tensor):
        a = a.detach()
        a = flatten_kernel(a) if len(shape) == 4 and shape[0] == shape[1] and shape[2] == shape[3] else a
    if len(a.shape) != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0:
        msg = f"A matrix or operator must be [m, m], or a kernel [n, n, c, c] of one set. Got shape {shape}."
        raise ValueError(msg)
    return a


def _check_symmetric(matrix: Tensor | LinearMap, tol: float) -> None:
    """Compare a matrix with its transpose, or u . A v with v . A u for two random vectors."""
    if isinstance(matrix, Tensor):
        difference, size = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    else:
        u, v = np.random.default_rng(1).standard_normal((2, matrix.shape[0]))
        au, av = _product(matrix, u), _product(matrix, v)
        difference, size = abs(float(u @ av - v @ au)), float(np.linalg.norm(u) * np.linalg.norm(av))
    if not (math.isfinite(difference) and math.isfinite(size)):
        msg = "A matrix or operator must be finite. Got nan or infinity among its entries or products."
        raise ValueError(msg)
    if difference > tol * size:
        msg = f"A matrix or operator must be symmetric, to a relative {tol:.1e}. Got an asymmetry of {difference / size:.1e}."
        raise ValueError(msg)


def _tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** (2 / 3)


def _product(matrix: Tensor | LinearMap, v: np.ndarray) -> np.ndarray:
    """A v in float64 NumPy, multiplied in the matrix's dtype on its device."""
    product = matrix @ torch.from_numpy(v).to(getattr(matrix, "device", "cpu"), matrix.dtype)
    return product.double().cpu().numpy()


def _norm(matrix: Tensor | LinearMap, rng: np.random.Generator) -> float:
    """||A||_2 from below, by power iteration: enough for a scale."""
    v = rng.standard_normal(matrix.shape[0])
    for _ in range(6):
        v = _product(matrix, v / np.linalg.norm(v))
        if not v.any():
            return 0.0
    return float(np.linalg.norm(v))


def _decomposition(matrix: Tensor, k: int) -> Pairs:
    eigvals, eigvecs = (part.double().cpu().numpy() for part in torch.linalg.eigh((matrix + matrix.T) / 2))  # ascending
    return eigvals[::-1][:k].copy(), eigvecs[:, ::-1][:, :k].copy(), float(np.abs(eigvals).max())


def _lanczos(matrix: Tensor | LinearMap, k: int, tol: float, rng: np.random.Generator, max_restarts: int) -> Pairs:
    """Top k pairs and the scale ||A||: searched for, and searched for again where the first search did not look."""
    m, scale = matrix.shape[0], _norm(matrix, rng)
    shift = 2 * scale  # A + shift is positive definite, and accuracy relative to its eigenvalues is accuracy relative to ||A||
    eigvals, eigvecs = np.zeros(0), np.zeros((m, 0))
    if scale == 0:
        return np.zeros(k), np.eye(m, k), scale

    def outside(v: np.ndarray) -> np.ndarray:
        return v - eigvecs @ (eigvecs.T @ v)

    def product(v: np.ndarray) -> np.ndarray:  # P (A + shift) P with P = 1 - V V^T, which is 0 on what was found
        v = outside(v)
        return outside(_product(matrix, v) + shift * v)

    while True:
        new, vectors = _search(SymmetricProducts(product, m, np.dtype(float)), k, tol, rng, max_restarts)
        new = new - shift
        if len(eigvals) and new.max() <= eigvals.min() + tol * scale:
            return eigvals, eigvecs, scale
        merged = np.concatenate([eigvals, new])
        order = np.argsort(-merged)[:k]
        eigvals, eigvecs = merged[order], np.linalg.qr(np.concatenate([eigvecs, vectors], axis=1)[:, order])[0]
        if k == 1:  # nothing can be missing: almost surely the start has a part in every eigenspace
            return eigvals, eigvecs, scale


def _search(operator: SymmetricProducts, k: int, tol: float, rng: np.random.Generator, max_restarts: int) -> Any:
    """Top k pairs of a positive definite operator, to an accuracy relative to its eigenvalues, of up to 3 ||A||: hence tol / 4."""
    options: dict[str, Any] = {"v0": rng.standard_normal(operator.shape[0]), "tol": tol / 4, "maxiter": max_restarts}
    if _DRAWS_AT_RESTART:
        options["rng"] = rng
    try:
        return eigsh(operator, k, which="LA", **options)
    except ArpackNoConvergence as error:
        msg = (
            f"Lanczos must converge to tol={tol:.1e} in {max_restarts} restarts. Got {len(error.eigenvalues)} of {k} pairs. "
            "Take a larger tol or max_restarts, or another k: pairs converge slowly where the next eigenvalue is near."
        )
        raise RuntimeError(msg) from error


def _check_residual(matrix: Tensor | LinearMap, pairs: Pairs, tol: float) -> None:
    eigvals, eigvecs, scale = pairs
    scale = max(scale, float(np.abs(eigvals).max()))
    columns = [_product(matrix, eigvecs[:, j : j + COLUMNS]) for j in range(0, len(eigvals), COLUMNS)]
    residual = float(np.linalg.norm(np.concatenate(columns, axis=1) - eigvecs * eigvals, axis=0).max())
    if not residual <= tol * scale:
        msg = (
            f"||A v - lambda v|| must be at most tol * {scale:.3g}, tol={tol:.1e}. Got {residual:.1e}. Use float64 or a larger tol."
        )
        raise RuntimeError(msg)
