"""The Hessian's critical directions, and the oscillation in them that keeps gradient descent at the edge of stability."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor
from torch.func import grad, jvp, vmap

from ntklib.directions import plain_attention
from ntklib.random import stream

Loss = Callable[[Tensor], Tensor]  # parameter vector [p] -> scalar
TOLERANCE = 1e-3  # residual of an eigenvector, relative to its eigenvalue: the eigenvalue is then good to its square
ROUNDS = 60  # iterations of the eigensolver
ITERATIONS = 5000  # of the complementarity problem
ACCURACY = 1e-10  # of its solution


def hessian_product(loss: Loss, w: Float[Tensor, " p"], v: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """H V: the derivative of the gradient along every column of V."""
    with plain_attention():
        return vmap(lambda u: jvp(grad(loss), (w,), (u,))[1], in_dims=1, out_dims=1)(v)


def critical_modes(
    loss: Loss, w: Float[Tensor, " p"], k: int, start: Float[Tensor, "p _"] | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "p k"]]:
    """The k largest eigenvalues of the Hessian, descending, with eigenvectors, by SciPy's block method from a start near them.

    Along a path the last eigenvectors are a good start, and a few products with the whole block suffice. The eigenvectors have a
    relative residual of at most ``TOLERANCE``, which leaves an error of its square in the eigenvalues.

    Args:
        loss: Loss as a function of the parameter vector.
        w: Parameters.
        k: Number of eigenvalues, less than a fifth of the parameters.
        start: Vectors to start from. Default: random ones.

    Raises:
        ValueError: If k is out of range.
        RuntimeError: If the eigenvectors do not converge.
    """
    p = len(w)
    if not 1 <= k < max(2, p):
        msg = f"The number of critical eigenvalues must be from 1 to p - 1 = {p - 1}. Got {k}."
        raise ValueError(msg)
    if p <= max(64, 5 * k):  # the block method needs room
        eigvals, eigvecs = torch.linalg.eigh(hessian_product(loss, w, torch.eye(p, dtype=w.dtype, device=w.device)))
        return eigvals.flip(0)[:k], eigvecs.flip(1)[:, :k]
    guess = torch.randn(p, k, generator=stream(0, "critical"), dtype=w.dtype).to(w.device) if start is None else start

    def product(v: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(np.ascontiguousarray(v)).to(w.device, w.dtype)
        return hessian_product(loss, w, block.reshape(p, -1)).double().cpu().numpy().reshape(v.shape)

    operator = LinearOperator((p, p), matvec=product, matmat=product, dtype=np.float64)
    scale = float(np.linalg.norm(product(guess.double().cpu().numpy()), axis=0).max() / float(guess.norm(dim=0).max()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the tolerance was missed, which is checked here
        found = lobpcg(operator, guess.double().cpu().numpy(), tol=0.3 * TOLERANCE * scale, maxiter=ROUNDS)
    eigvals, eigvecs = np.asarray(found[0]), np.asarray(found[1])
    residual = np.linalg.norm(product(eigvecs) - eigvecs * eigvals, axis=0).max()
    if not residual <= 10 * TOLERANCE * np.abs(eigvals).max():
        msg = f"The top {k} eigenvectors of the Hessian must converge. Got a residual of {residual:.1e}. Ask for fewer of them."
        raise RuntimeError(msg)
    order = np.argsort(-eigvals)
    to_torch = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(w.device, w.dtype)  # noqa: E731
    return to_torch(eigvals[order]), to_torch(eigvecs[:, order])


def curvature_gradients(loss: Loss, w: Float[Tensor, " p"], basis: Float[Tensor, "p k"]) -> Float[Tensor, "k k p"]:
    r"""Gradients of the Hessian's entries in fixed directions, :math:`g_{ij} = \nabla_w\, u_i^\top H(w)\, u_j`: third derivatives."""
    k = basis.shape[1]
    rows, columns = torch.triu_indices(k, k)

    def entry(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        slope = lambda w: jvp(loss, (w,), (u,))[1]  # noqa: E731
        return jvp(slope, (w,), (v,))[1]

    with plain_attention():
        half = vmap(grad(entry), in_dims=(None, 1, 1))(w, basis[:, rows], basis[:, columns])
    full = half.new_zeros(k, k, len(w))
    full[rows, columns], full[columns, rows] = half, half
    return full


def oscillation_covariance(
    eigvals: Float[Tensor, " k"],
    slopes: Float[Tensor, "k k p"],
    gradient: Float[Tensor, " p"],
    lr: float,
    dt: float,
) -> Float[Tensor, "k k"]:
    r"""The covariance X of the oscillation in the critical directions that keeps all of them at or below 2/lr.

    After a time dt of the central flow the Hessian in these directions is, to first order,

    .. math:: M' = \Lambda - \eta\, dt\, \big( \langle g_{ij}, \nabla L \rangle + \tfrac12 \textstyle\sum_{kl}
        \langle g_{ij}, g_{kl} \rangle X_{kl} \big), \qquad X \succeq 0, \quad \tfrac2\eta I - M' \succeq 0, \quad
        \big\langle X, \tfrac2\eta I - M' \big\rangle = 0 .

    These are the conditions of a convex problem, :math:`\min_{X \succeq 0} \tfrac14 \langle X, \mathcal G X \rangle + \langle X, B
    \rangle` with :math:`B = \langle g, \nabla L \rangle + (\tfrac2\eta I - \Lambda) / (\eta\, dt)`. For one direction it is
    :math:`X = \max(0, -2 B / \lVert g \rVert^2)`; for several, accelerated projected gradient descent with restarts. (Cohen et al.
    2024, arXiv:2410.24206, state the complementarity in continuous time, where the second part of B is absent; with it directions
    near the edge need no classification, and small departures from it are undone.)

    Args:
        eigvals: Hessian eigenvalues of the directions.
        slopes: Gradients of the Hessian's entries, see ``curvature_gradients``.
        gradient: Gradient of the loss.
        lr: Learning rate eta.
        dt: Length of the step, in gradient steps.

    Returns:
        X, symmetric and positive semidefinite, in squared units of the parameters; zero when nothing would pass the edge.
    """
    k = len(eigvals)
    flat = slopes.reshape(k * k, -1).double()
    gram = flat @ flat.T  # [k k, k k]
    slack = torch.diag((2 / lr - eigvals.double()) / (lr * dt))
    linear = (slopes.double() @ gradient.double()) + slack
    if k == 1:
        size = float(gram[0, 0])
        return (-2 * linear / size if size > 0 else torch.zeros_like(linear)).clamp(min=0).to(eigvals.dtype)
    top = 0.5 * float(torch.linalg.eigvalsh(gram)[-1])
    if top == 0 or float(torch.linalg.eigvalsh(linear)[0]) >= 0:  # X = 0 meets all conditions
        return torch.zeros(k, k, dtype=eigvals.dtype, device=eigvals.device)
    slope = lambda x: 0.5 * (gram @ x.reshape(-1)).reshape(k, k) + linear  # noqa: E731
    x, ahead, momentum = torch.zeros_like(linear), torch.zeros_like(linear), 1.0
    for _ in range(ITERATIONS):
        new = _positive_part(ahead - slope(ahead) / top)
        change = new - x
        if float(((ahead - new) * change).sum()) > 0:  # the momentum points uphill: start anew
            ahead, momentum = x, 1.0
            continue
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        x, ahead, momentum = new, new + (momentum - 1) / following * change, following
        if float(change.norm()) <= ACCURACY * float(new.norm()):
            break
    return x.to(eigvals.dtype)


def _positive_part(matrix: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix."""
    eigvals, eigvecs = torch.linalg.eigh((matrix + matrix.T) / 2)
    return eigvecs @ torch.diag(eigvals.clamp(min=0)) @ eigvecs.T
