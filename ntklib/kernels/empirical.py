"""The empirical NTK, exact, in chunks of examples."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.functional import Model, Params, functional_model
from ntklib.kernels.jacobian import examples_per_chunk, jacobian
from ntklib.text import unknown

METHODS = ("auto", "jacobian")
REDUCTIONS = ("trace", "diagonal")


def empirical_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    reduce: str | None = None,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute the empirical neural tangent kernel of every pair of inputs.

    .. math:: K_{ij,ab} = \langle \nabla_\theta f_a(x_i), \nabla_\theta f_b(x_j) \rangle

    (Jacot et al. 2018, arXiv:1806.07572v4, Eq. 2, at finite width; K = J J^T of the main paper's section 3.) No normalisation: no
    factor 1/c, 1/n or 1/width; all trainable parameters count, biases and normalisation scales included. Batch normalisation must
    be in eval mode. Cost: c backward passes per example (twice or more when the Jacobians of all examples exceed the chunk) and
    2 (n c)^2 p floating-point operations; memory: (n1 c)(n2 c) numbers of the result and 2 chunks of c p numbers per example.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. It is left exactly as it was.
        x1: First inputs, ``[n1, *input]``.
        x2: Second inputs, ``[n2, *input]``. Default: ``x1``, and the kernel is then exactly symmetric.
        reduce: ``None`` for ``[n1, n2, c, c]``; ``"trace"`` for the sum over outputs a = b, ``[n1, n2]``; ``"diagonal"`` for the
            entries a = b, ``[n1, n2, c]``.
        method: ``"jacobian"`` or ``"auto"``, which chooses.
        chunk_size: Examples whose Jacobians are held at a time. Default: as many as fit in 512 MiB.

    Returns:
        The kernel, example-major, in the dtype of the parameters and outputs.

    Raises:
        ValueError: If rows interact (batch normalisation in training mode), an option is unknown, or shapes do not fit.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduce, REDUCTIONS))
    if x2 is not None and x1.shape[1:] != x2.shape[1:]:
        msg = f"x1 and x2 must share the input shape. Got {tuple(x1.shape)} and {tuple(x2.shape)}."
        raise ValueError(msg)
    for name, x in (("x1", x1), ("x2", x1 if x2 is None else x2)):
        if len(x) == 0:
            msg = f"{name} must hold at least one example. Got shape {tuple(x.shape)}."
            raise ValueError(msg)
    f, params = functional_model(model)
    with torch.no_grad():
        c = f(params, x1[:1]).shape[1]
    size = examples_per_chunk(params, c, chunk_size)
    if x2 is None:
        return _symmetric(f, params, x1, c, size, reduce)
    rows = []
    for _, j1 in _jacobians(f, params, x1, size):
        rows.append(torch.cat([_contract(j1, j2, reduce) for _, j2 in _jacobians(f, params, x2, size)], dim=1))
    return torch.cat(rows)


def ntk_diagonal(model: nn.Module, x: Tensor, *, chunk_size: int | None = None) -> Float[Tensor, "n c c"]:
    r"""Compute the blocks :math:`K_{ii,ab}` of the empirical NTK, one per example.

    Args:
        model: As in ``empirical_ntk``.
        x: Inputs, ``[n, *input]``.
        chunk_size: Examples whose Jacobians are held at a time. Default: as many as fit in 512 MiB.

    Raises:
        ValueError: As in ``empirical_ntk``.
    """
    f, params = functional_model(model)
    with torch.no_grad():
        c = f(params, x[:1]).shape[1]
    size = examples_per_chunk(params, c, chunk_size)
    return torch.cat([_sum(j @ j.mT for j in pieces) for _, pieces in _jacobians(f, params, x, size)])


def flatten_kernel(kernel: Float[Tensor, "n1 n2 c c"]) -> Float[Tensor, "n1*c n2*c"]:
    """Return the kernel as a matrix, example-major: row i c + a is output a of example i."""
    n1, n2, c, _ = kernel.shape
    return kernel.transpose(1, 2).reshape(n1 * c, n2 * c)


def _jacobians(f: Model, params: Params, x: Tensor, size: int) -> Iterator[tuple[int, list[Tensor]]]:
    for start in range(0, len(x), size):
        yield start, jacobian(f, params, x[start : start + size])


def _symmetric(f: Model, params: Params, x: Tensor, c: int, size: int, reduce: str | None) -> Tensor:
    """Compute blocks on and above the diagonal, then mirror them: K_ij,ab = K_ji,ba."""
    n = len(x)
    shape = {None: (n, n, c, c), "trace": (n, n), "diagonal": (n, n, c)}[reduce]
    kernel: Tensor | None = None
    for i, j1 in _jacobians(f, params, x, size):
        for start in range(i, n, size):
            block = _contract(j1, j1 if start == i else jacobian(f, params, x[start : start + size]), reduce)
            mirrored = block.transpose(0, 1) if reduce else block.permute(1, 0, 3, 2)
            if start == i:  # on the diagonal: symmetric to the last bit
                block = mirrored = (block + mirrored) / 2
            kernel = block.new_zeros(shape) if kernel is None else kernel
            rows, columns = slice(i, i + block.shape[0]), slice(start, start + block.shape[1])
            kernel[rows, columns] = block
            kernel[columns, rows] = mirrored
    assert kernel is not None
    return kernel


def _contract(j1: list[Tensor], j2: list[Tensor], reduce: str | None) -> Tensor:
    """Sum over parameters k of J1_k J2_k^T; each is ``[n, c, p_k]``."""
    pairs = zip(j1, j2, strict=True)
    n1, n2, c = len(j1[0]), len(j2[0]), j1[0].shape[1]
    if reduce == "diagonal":
        return _sum(a.transpose(0, 1) @ b.permute(1, 2, 0) for a, b in pairs).permute(1, 2, 0)  # [c, n1, n2] -> [n1, n2, c]
    if reduce == "trace":
        return _sum(a.reshape(n1, -1) @ b.reshape(n2, -1).T for a, b in pairs)
    gram = _sum(a.reshape(n1 * c, -1) @ b.reshape(n2 * c, -1).T for a, b in pairs)
    return gram.reshape(n1, c, n2, c).transpose(1, 2)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum of tensors, in place in the first."""
    iterator = iter(terms)
    total = next(iterator)
    for term in iterator:
        total += term
    return total
