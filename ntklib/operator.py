"""Products with the empirical NTK that never form it, nor the Jacobian."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import vjp, vmap

from ntklib.directions import directional_derivative, plain_attention
from ntklib.functional import Model, Params, functional_model

Pullback = Callable[[Tensor], tuple[Params]]

BUDGET = 512 * 2**20  # bytes of activations held at a time, unless the caller sets chunk_size
PARAMETERS = 2**22  # scalars of parameters, over all columns that share one pass
MAX_COLUMNS = 64


class NTKOperator:
    r"""The empirical NTK of a model on ``x`` as a linear operator: products with K = J J^T in the memory of a few gradients.

    .. math:: K v = J (J^\top v), \quad (K v)_{ia} = \sum_{jb} \langle \nabla_\theta f_a(x_i), \nabla_\theta f_b(x_j) \rangle v_{jb}

    (the kernel of ``empirical_ntk``, Jacot et al. 2018, arXiv:1806.07572v4, Eq. 2, at finite width; no factor 1/n, 1/c or
    1/width). Order is example-major: row i c + a is output a of example i, as in ``flatten_kernel``. One product takes a
    vector-Jacobian product of every chunk of examples, summed to one vector of p parameters, then a Jacobian-vector product of
    every chunk: about twice the time of a gradient of the loss on all examples. Memory is p numbers per column and the activations
    of one chunk, whatever n; where one chunk holds all examples, its activations are kept for the next product.

    The operator is a snapshot: it copies the model when it is made, and later training does not move it. ``x`` is not copied.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. It is left exactly as it was.
        x: Inputs, ``[n, *input]``.
        output: Name of an inner module whose output, flattened, stands for f. Default: the model's output.
        params: Names of the parameters that count. Default: all trainable ones.
        chunk_size: Examples differentiated at a time. Default: as many as have their activations fit in 512 MiB.

    Attributes:
        shape: ``(n c, n c)``.
        dtype: Data type of the outputs, hence of vectors and products.
        device: Device of the outputs, hence of vectors and products.

    Raises:
        ValueError: If rows interact (batch normalisation in training mode), no parameter is trainable, ``x`` is empty or
            ``chunk_size`` is not positive.

    Example:
        >>> operator = NTKOperator(model, x)
        >>> top, _ = top_eigenpairs(operator, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        x: Shaped[Tensor, "n *input"],
        *,
        output: str | None = None,
        params: Iterable[str] | None = None,
        chunk_size: int | None = None,
    ):
        f, theta = restricted_model(copy.deepcopy(model), output, params)
        self._jacobian = JacobianProducts(f, theta, x, chunk_size)
        size = len(x) * self._jacobian.c
        self.shape = torch.Size((size, size))
        self.dtype, self.device = self._jacobian.dtype, self._jacobian.device

    def __repr__(self) -> str:
        return f"NTKOperator(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply the kernel with a vector ``[n c]`` or with the columns of a matrix ``[n c, k]``.

        Raises:
            ValueError: If the shape, dtype or device of ``v`` does not fit the operator's.
        """
        if not isinstance(v, Tensor):
            return NotImplemented
        if v.ndim not in (1, 2) or len(v) != self.shape[1]:
            msg = f"An operator of shape {tuple(self.shape)} takes [{self.shape[1]}] or [{self.shape[1]}, k]. Got {tuple(v.shape)}."
            raise ValueError(msg)
        if (v.dtype, v.device.type) != (self.dtype, self.device.type):
            msg = f"Vectors must be {self.dtype} on {self.device}, as the operator. Got {v.dtype} on {v.device}."
            raise ValueError(msg)
        if v.numel() == 0:
            return v.clone()
        columns = v.detach().reshape(len(v), -1).T.reshape(-1, len(self._jacobian.x), self._jacobian.c)  # [k, n, c]
        groups = columns.split(self._jacobian.columns_at_a_time)
        product = torch.cat([self._jacobian.push(self._jacobian.pull(group)) for group in groups])  # J (J^T v)
        return product.reshape(len(columns), -1).T.reshape(v.shape)

    @property
    def T(self) -> "NTKOperator":
        """The transpose: the operator itself, as K is symmetric."""
        return self

    def adjoint(self) -> "NTKOperator":
        """Return the adjoint: the operator itself, as K is real and symmetric."""
        return self

    def to_dense(self) -> Float[Tensor, "m m"]:
        """Return K as a matrix, ``[n c, n c]``: n c products, for tests and small n c (``empirical_ntk`` is much faster)."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return K as a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors and matrices of the operator's dtype."""

        def product(v: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(np.ascontiguousarray(v)).to(self.device, self.dtype)).cpu().numpy()

        return SymmetricProducts(product, self.shape[0], torch.empty(0, dtype=self.dtype).numpy().dtype)


class SymmetricProducts(LinearOperator):
    """A function that multiplies a symmetric matrix with NumPy vectors ``[m]`` and matrices ``[m, k]``, as SciPy wants it."""

    def __init__(self, product: Callable[[np.ndarray], np.ndarray], size: int, dtype: np.dtype):
        super().__init__(dtype, (size, size))
        self._product = product

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._product(x)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._product(X)

    def _adjoint(self) -> LinearOperator:
        return self


class JacobianProducts:
    """Products with the Jacobian J of f on ``x`` and with its transpose, for several columns at once, in bounded memory.

    Columns share one pass as long as their parameters are few: it saves small networks 2 to 6 times the time and large ones none.
    Examples are taken in chunks whose activations, for all these columns, fit in ``BUDGET``.
    """

    def __init__(self, f: Model, params: Params, x: Tensor, chunk_size: int | None):
        if len(x) == 0:
            msg = f"x must hold at least one example. Got shape {tuple(x.shape)}."
            raise ValueError(msg)
        if chunk_size is not None and chunk_size < 1:
            msg = f"chunk_size must be at least 1. Got {chunk_size}."
            raise ValueError(msg)
        self.f, self.params, self.x = f, params, x
        self._chunk_size = chunk_size
        self._pullback: Pullback | None = None
        out, self._bytes_per_example = _activations(f, params, x[:1])
        self.c, self.dtype, self.device = out.shape[1], out.dtype, out.device

    @property
    def columns_at_a_time(self) -> int:
        """How many columns share one pass over the examples."""
        fitting = min(MAX_COLUMNS, PARAMETERS // sum(w.numel() for w in self.params.values()))
        if self._chunk_size is not None:
            fitting = min(fitting, BUDGET // (self._chunk_size * self._bytes_per_example))
        return max(1, fitting)

    @torch.no_grad()
    def push(self, direction: Params) -> Float[Tensor, "k n c"]:
        """Return J w for each of the k directions w, which are parameters with a leading axis."""
        return torch.cat([self._push(part, direction) for part in self._chunks(_length(direction))], dim=1)

    @torch.no_grad()
    def pull(self, v: Float[Tensor, "k n c"]) -> Params:
        """Return J^T v for each of the k columns v, as parameters with a leading axis."""
        parts = self._chunks(len(v))
        total: Params = {}
        for part, v_part in zip(parts, v.split(len(parts[0]), dim=1), strict=True):
            gradient = self._pull(part, v_part)
            total = {name: g + total[name] for name, g in gradient.items()} if total else gradient
        return total

    def _chunks(self, k: int) -> tuple[Tensor, ...]:
        fitting = max(1, BUDGET // ((k + 1) * self._bytes_per_example))
        return self.x.split(fitting if self._chunk_size is None else self._chunk_size)

    def _push(self, part: Tensor, direction: Params) -> Tensor:
        if _length(direction) == 1:  # convolutions with one set of weights are faster unbatched
            return directional_derivative(self.f, self.params, part, {name: w[0] for name, w in direction.items()})[None]
        return vmap(partial(directional_derivative, self.f, self.params, part))(direction)

    def _pull(self, part: Tensor, v: Tensor) -> Params:
        pull = self._pullback_of(part)
        if len(v) == 1:
            return {name: g[None] for name, g in pull(v[0])[0].items()}
        return vmap(pull)(v)[0]

    def _pullback_of(self, part: Tensor) -> Pullback:
        """The map J^T of a chunk; kept for the next product when the chunk is all there is."""
        if self._pullback is not None:
            return self._pullback
        with plain_attention():
            pullback = vjp(lambda params: self.f(params, part), self.params)[1]
        if len(part) == len(self.x):
            self._pullback = pullback
        return pullback


def restricted_model(model: nn.Module, output: str | None, params: Iterable[str] | None) -> tuple[Model, Params]:
    """``functional_model`` with the options that were given."""
    options = {"output": output, "params": params}
    return functional_model(model, **{name: value for name, value in options.items() if value is not None})


def _length(direction: Params) -> int:
    return len(next(iter(direction.values())))


def _activations(f: Model, params: Params, x: Tensor) -> tuple[Float[Tensor, "n c"], int]:
    """Outputs, and the bytes that their backward pass keeps besides the parameters."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = f({name: w.detach().requires_grad_() for name, w in params.items()}, x)
    for w in params.values():
        kept.pop(w.data_ptr(), None)
    return out.detach(), max(1, sum(kept.values()))
