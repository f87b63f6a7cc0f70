"""The empirical NTK, exact: the public door."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn

from ntklib.kernels.evaluate import METHODS, Request, evaluate
from ntklib.text import check_known

__all__ = ["METHODS", "empirical_ntk", "flatten_kernel", "ntk_by_layer", "ntk_diagonal"]
REDUCTIONS = ("trace", "diagonal")


def empirical_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    reduce: str | None = None,
    method: str = "auto",
    output: str | None = None,
    params: Iterable[str] | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> Tensor:
    r"""Compute the empirical neural tangent kernel of every pair of inputs.

    .. math:: K_{ij,ab} = \langle \nabla_\theta f_a(x_i), \nabla_\theta f_b(x_j) \rangle

    (Jacot et al. 2018, arXiv:1806.07572v4, Eq. 2, at finite width; K = J J^T of the main paper's section 3.) No normalisation: no
    factor 1/c, 1/n or 1/width; all trainable parameters count, biases and normalisation scales included. Every example is
    evaluated alone, batch normalisation must be in eval mode. The book's page on memory and speed has the costs.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. It is left exactly as it was.
        x1: First inputs, ``[n1, *input]``.
        x2: Second inputs, ``[n2, *input]``. Default: ``x1``, and the kernel is then exactly symmetric.
        reduce: ``None`` for ``[n1, n2, c, c]``; ``"trace"`` for the sum over outputs a = b, ``[n1, n2]``; ``"diagonal"`` for the
            entries a = b, ``[n1, n2, c]``. Both cost less.
        method: ``"structured"`` streams layers and writes out gradients only of parameters that no rule covers; ``"jacobian"``
            writes out all gradients; ``"auto"`` streams where that works.
        output: Name of an inner module whose output (of its first call, flattened) is f in place of the model's.
        params: Names of the trainable parameters that count. Default: all.
        chunk_size: Examples worked on at a time. Default: as many as fit in ``max_memory``.
        max_memory: Bytes that the result and the work may take. Default: half of the free memory.
        tf32: Allow TensorFloat-32 products on a GPU: several times faster, relative errors near 1e-3.
        progress: Show a bar when the work takes more than a few seconds.

    Returns:
        The kernel, example-major, in the dtype of the outputs.

    Raises:
        ValueError: If rows interact (batch normalisation in training mode), an option is unknown, inputs are empty, not finite or
            of unlike shape, or the kernel does not fit in memory.
    """
    if reduce is not None:
        check_known("reduction", reduce, REDUCTIONS)
    request = Request(model, x1, x2, reduce, method, output, params, chunk_size, max_memory, tf32, progress)
    return evaluate(request)[""]


def ntk_by_layer(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    reduce: str | None = None,
    output: str | None = None,
    params: Iterable[str] | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    r"""Compute every layer's contribution to the empirical NTK, in one pass.

    .. math::
        K = \sum_\ell K^{(\ell)}, \qquad
        K^{(\ell)}_{ij,ab} = \langle \nabla_{\theta_\ell} f_a(x_i), \nabla_{\theta_\ell} f_b(x_j) \rangle

    A layer is a module that holds parameters of its own; a parameter that the model itself holds is a layer by its own name, and
    a parameter that several modules share counts once, under the first name.

    The arguments are those of ``empirical_ntk``.

    Returns:
        Kernels by module name, in the order of the modules; they sum to ``empirical_ntk``.

    Raises:
        ValueError: As in ``empirical_ntk``.
    """
    if reduce is not None:
        check_known("reduction", reduce, REDUCTIONS)
    request = Request(model, x1, x2, reduce, "auto", output, params, chunk_size, max_memory, tf32, progress, by_layer=True)
    return evaluate(request)


def ntk_diagonal(
    model: nn.Module,
    x: Tensor,
    *,
    method: str = "auto",
    output: str | None = None,
    params: Iterable[str] | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> Float[Tensor, "n c c"]:
    r"""Compute the blocks :math:`K_{ii,ab}` of the empirical NTK, one per example.

    The arguments are those of ``empirical_ntk``.

    Raises:
        ValueError: As in ``empirical_ntk``.
    """
    return evaluate(Request(model, x, None, "blocks", method, output, params, chunk_size, max_memory, tf32, progress))[""]


def flatten_kernel(kernel: Float[Tensor, "n1 n2 c c"]) -> Float[Tensor, "n1*c n2*c"]:
    """Return the kernel as a matrix, example-major: row i c + a is output a of example i."""
    n1, n2, c, _ = kernel.shape
    return kernel.transpose(1, 2).reshape(n1 * c, n2 * c)
