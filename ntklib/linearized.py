"""Networks and training as they would be if the kernel did not move."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from ntklib.directions import plain_attention
from ntklib.filters import decompose, filter_matrix, filter_operator
from ntklib.functional import functional_model, unwrap
from ntklib.kernels import flatten_kernel
from ntklib.spectra import LinearMap
from ntklib.training.state import Checkpoint, State

Kernel = Float[Tensor, "n n c c"] | Float[Tensor, "k k"] | LinearMap
TestKernel = Float[Tensor, "m n c c"] | Float[Tensor, "l k"] | LinearMap


def linearize(model: nn.Module, *, centered: bool = False) -> "LinearizedModel":
    r"""Return the first-order Taylor expansion of a model in its parameters, around their present values.

    .. math:: f_{\mathrm{lin}}(x; \theta) = f(x; \theta_0) + J(x; \theta_0)\,(\theta - \theta_0)

    (Lee et al. 2019, arXiv:1902.06720v4, section 2.2.) The centred model leaves out f(x; theta_0), so it starts from the output 0
    with the same kernel, and keeps of the network nothing but its kernel (Loo et al. 2022, arXiv:2210.12030). The result is a
    module with trainable parameters theta under the model's own names, which start at theta_0, so it trains like any other: with
    an optimizer, with ``gradient_descent`` or ``sgd``. It is affine in theta, and its NTK is that of the model at theta_0 for ever.
    A forward pass is one Jacobian-vector product, about four forward passes of the model; a backward pass costs what the model's
    does. Together a training step is about two of the model's (``python -m benchmarks.linearized_step``).

    The model is expanded in eval mode: batch normalisation uses the running statistics that it has now, whether the result is in
    ``train()`` or ``eval()``. Buffers and parameters without ``requires_grad`` are constants. The model is copied, never changed.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. A linearized model is returned as a copy, being its own expansion.
        centered: Leave out the constant f(x; theta_0).

    Returns:
        The linearized model. Its ``state_dict`` holds theta, buffers under the model's names and theta_0 under ``theta_0.``, so
        ``model.load_state_dict(lin.state_dict(), strict=False)`` puts theta into the model.

    Raises:
        ValueError: If rows interact (batch normalisation in training mode: call ``model.eval()``), no parameter is trainable, or a
            linearized model that is not centred is to be centred.
    """
    model = unwrap(model)
    if not isinstance(model, LinearizedModel):
        return LinearizedModel(model, centered=centered)
    if centered and not model.centered:
        msg = "A model must be centred when it is linearized. Got a linearized model: call linearize(model, centered=True) before."
        raise ValueError(msg)
    return copy.deepcopy(model)


def continue_linearized(
    state: State, model: nn.Module | None = None, *, centered: bool = False
) -> tuple["LinearizedModel", Checkpoint]:
    """Return what a training loop needs to go on from a state with the network linearized there.

    ``sgd(lin, data, ..., resume=checkpoint)`` with the arguments of the first run takes the steps that this would have taken next:
    the same batches, learning rates and, as the optimizer's memory is handed on, velocities; only the network is another one.

    Args:
        state: State of a training loop; neither it nor its model is changed.
        model: Network to linearize in place of ``state.model``: the same parameters, for example with batch-normalisation
            statistics that were recalibrated.
        centered: See ``linearize``.

    Returns:
        The linearized network, and the checkpoint to resume it from.

    Raises:
        ValueError: As ``linearize``.
    """
    lin = linearize(state.model if model is None else model, centered=centered)
    memory = {name: w.clone() for name, w in state.tensors().items() if name.startswith("optimizer.")}
    return lin, (state.step, {f"model.{name}": w for name, w in lin.state_dict().items()} | memory)


class LinearizedModel(nn.Module):
    """What ``linearize`` returns: parameters theta, the expansion point theta_0 as buffers, and the model's code."""

    def __init__(self, model: nn.Module, *, centered: bool = False):
        super().__init__()
        self.centered = centered
        self._names = tuple(functional_model(model)[1])  # trainable ones; refuses rows that interact
        if any(name.split(".")[0] == "theta_0" for name in model.state_dict()):
            msg = "The model must have no part named 'theta_0', which names the expansion point. Got one. Rename it."
            raise ValueError(msg)
        for name, w in model.named_parameters():
            holder, leaf = _holder(self, name)
            holder.register_parameter(leaf, nn.Parameter(w.detach().clone(), requires_grad=w.requires_grad))
            if w.requires_grad:
                holder, leaf = _holder(self, f"theta_0.{name}")
                holder.register_buffer(leaf, w.detach().clone())
        for name, b in model.named_buffers():
            holder, leaf = _holder(self, name)
            holder.register_buffer(leaf, b.detach().clone())
        # in a tuple so that it is no submodule: a loop that sets modes or statistics must not reach it
        self._code = (_without_numbers(model),)
        self._f = functional_model(self._code[0])[0]

    def __getstate__(self) -> dict[str, Any]:  # to copy and pickle: a closure is made again
        return {name: value for name, value in self.__dict__.items() if name != "_f"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._f = functional_model(self._code[0])[0]

    def forward(self, x: Tensor) -> Tensor:
        params, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        theta_0 = {name: buffers[f"theta_0.{name}"] for name in self._names}
        constants = {name: w.detach() for name, w in params.items() if name not in theta_0}
        constants |= {name: b.clone() for name, b in buffers.items() if not name.startswith("theta_0.")}
        step = {name: params[name] - w for name, w in theta_0.items()}
        with plain_attention():
            pair = jvp(lambda theta: self._f({**constants, **theta}, x), (theta_0,), (step,))
        return pair[1] if self.centered else pair[0] + pair[1]  # f_0 + J (theta - theta_0)


def _without_numbers(model: nn.Module) -> nn.Module:
    """Copy the code of a model, with tied tensors tied but without their numbers."""
    numbers: dict[int, Tensor] = {id(w): nn.Parameter(w.detach().to("meta"), w.requires_grad) for w in model.parameters()}
    return copy.deepcopy(model, numbers | {id(b): b.detach().to("meta") for b in model.buffers()})


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Make empty modules along a dotted name; the last one, and the name within it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


@torch.no_grad()
def constant_kernel_flow(
    kernel: Kernel,
    f_0: Float[Tensor, "n c"],
    y: Float[Tensor, "n c"],
    t: Float[Tensor, " times"],
    *,
    lr: float | None = None,
    k_test_train: TestKernel | None = None,
    f_test_0: Float[Tensor, "m c"] | None = None,
) -> Float[Tensor, "times _ c"]:
    r"""Outputs of a network in training, under a kernel that stays as it is.

    .. math:: f_t = y + e^{-Kt}(f_0 - y), \qquad f_{*t} = f_{*0} - K_* K^{-1} (1 - e^{-Kt}) (f_0 - y)

    on the training inputs and, given K_* = ``k_test_train``, on others: gradient flow, for the loss :math:`\frac12 \sum_i \lVert
    f(x_i) - y_i \rVert^2`, a sum over examples and outputs with the factor 1/2 (poster, "Training dynamics"; Lee et al. 2019,
    arXiv:1902.06720v4, section 2.2). For the mean (1/2n) pass t/n (and lr/n). Time is learning rate times steps. With ``lr``,
    gradient descent: (1 - lr K)^(t/lr) stands for e^{-Kt}. K is not inverted: K^{-1} (1 - e^{-Kt}) is the integral of e^{-Kt} over
    time, which is t where K is 0. A matrix of size k is decomposed; eigenvalues below k eps lambda_1 count as 0.

    An operator is only multiplied with vectors: by descent t/lr times; by the flow, as a Chebyshev expansion to the accuracy of the
    operator's dtype, about 6 sqrt(lambda_1 t) times for the longest of the times, and to find lambda_1.

    Args:
        kernel: Empirical NTK of the training inputs, positive semidefinite: ``[n, n, c, c]``; or ``[n c, n c]``, example-major,
            such as an ``NTKOperator``; or ``[n, n]``, which stands for K (x) I_c, as at infinite width. The last two may be
            operators.
        f_0: Outputs on the training inputs at time 0.
        y: Targets.
        t: Times, not negative.
        lr: Learning rate of gradient descent, of any size: what diverges grows, to infinity or, as infinities meet, nan.
            ``t / lr`` are rounded to whole steps. Default: gradient flow.
        k_test_train: Kernel of other inputs with the training inputs, ``[m, n, c, c]``, ``[m c, n c]`` or ``[m, n]``.
        f_test_0: Outputs on those other inputs at time 0; given together with ``k_test_train``.

    Returns:
        Outputs at each time, on the training inputs, or on the other ones where these are given.

    Raises:
        ValueError: If shapes do not fit, ``lr`` is not positive, a time is negative or infinite, or an operator is not positive
            semidefinite.
    """
    matrix, residual = _as_matrix(kernel, f_0, y)
    _check_times(t, lr)
    if (k_test_train is None) != (f_test_0 is None):
        msg = "k_test_train and f_test_0 must be given together. Got one of them."
        raise ValueError(msg)
    cross = None if k_test_train is None or f_test_0 is None else _as_cross(k_test_train, residual, y, f_test_0)
    if isinstance(matrix, Tensor):
        filtered = filter_matrix(matrix, residual, t, lr, integral=cross is not None)
    else:
        filtered = filter_operator(matrix, residual, t, lr, integral=cross is not None)
    if cross is None or f_test_0 is None:
        return y + filtered.reshape(-1, *y.shape)
    return f_test_0 - torch.stack([cross @ u for u in filtered]).reshape(-1, *f_test_0.shape)


@torch.no_grad()
def kernel_regression(
    k_train_train: Float[Tensor, "n n c c"] | Float[Tensor, "k k"],
    k_test_train: Float[Tensor, "m n c c"] | Float[Tensor, "l k"],
    y: Float[Tensor, "n c"],
    *,
    ridge: float = 0.0,
    f_0: Float[Tensor, "n c"] | None = None,
    f_test_0: Float[Tensor, "m c"] | None = None,
) -> Float[Tensor, "m c"]:
    r"""Predict at other inputs by kernel regression: without a ridge, where ``constant_kernel_flow`` ends.

    .. math:: f_* = f_{*0} + K_* (K + \lambda I)^{-1} (y - f_0)

    (Lee et al. 2019, arXiv:1902.06720v4, section 2.2, at infinite time.) The ridge lambda is absolute, without a factor n: it is
    the weight in sum of squares + lambda ||theta - theta_0||^2. With a ridge, by Cholesky factorisation. Without, by least squares
    of least norm: eigenvalues below k eps lambda_1, k the size of the matrix, are left out.

    Args:
        k_train_train: Kernel of the training inputs, ``[n, n, c, c]`` or ``[n c, n c]``, or ``[n, n]`` for K (x) I_c.
        k_test_train: Kernel of the other inputs with these, ``[m, n, c, c]``, ``[m c, n c]`` or ``[m, n]``.
        y: Targets.
        ridge: Number added to the diagonal, not negative, in units of the kernel.
        f_0: Outputs on the training inputs before training. Default: 0.
        f_test_0: Outputs on the other inputs before training. Default: 0.

    Raises:
        ValueError: If shapes do not fit, or the ridge is negative or too small for the kernel to become positive definite.
    """
    if not (ridge >= 0 and math.isfinite(ridge)):
        msg = f"ridge must be finite and not negative. Got {ridge}."
        raise ValueError(msg)
    matrix, residual = _as_matrix(k_train_train, torch.zeros_like(y) if f_0 is None else f_0, y)
    cross = _as_cross(k_test_train, residual, y, f_test_0)
    if ridge == 0:
        eigvals, eigvecs = decompose(matrix)
        inverse = torch.where(eigvals == 0, 0, 1 / eigvals)
        solution = eigvecs @ (inverse[:, None] * (eigvecs.T @ residual))
    else:
        ridged = matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if failed:
            msg = f"kernel + ridge must be positive definite. Got ridge={ridge}. Take a larger one, or a kernel in float64."
            raise ValueError(msg)
        solution = torch.cholesky_solve(residual, factor)
    return (0 if f_test_0 is None else f_test_0) - (cross @ solution).reshape(-1, y.shape[1])


def _as_matrix(kernel: Tensor | LinearMap, f_0: Tensor, y: Tensor) -> tuple[Any, Float[Tensor, "k q"]]:
    """The kernel as a matrix or operator of size k = n c or n, and the residual f_0 - y as the columns that it multiplies."""
    n, c = f_0.shape
    if tuple(kernel.shape) not in ((n, n, c, c), (n * c, n * c), (n, n)) or y.shape != f_0.shape:
        got = [tuple(part.shape) for part in (kernel, f_0, y)]
        msg = f"kernel, f_0 and y must be [n, n, c, c] (or [n c, n c] or [n, n]), [n, c] and [n, c]. Got {got}."
        raise ValueError(msg)
    matrix = _flat(kernel)
    return matrix, (f_0 - y).reshape(matrix.shape[0], -1).to(matrix.dtype)


def _as_cross(kernel: Tensor | LinearMap, residual: Tensor, y: Tensor, f_test_0: Tensor | None) -> Any:
    """The kernel of other inputs as a matrix or operator that multiplies what is shaped like the residual."""
    shape, (k, q), c = tuple(kernel.shape), residual.shape, y.shape[1]
    fits = shape[1:] == (k,) or (q == 1 and shape[1:] == (k // c, c, c))
    m, rest = divmod(shape[0] * (q if len(shape) == 2 else c), c)
    if not fits or rest or (f_test_0 is not None and f_test_0.shape != (m, c)):
        got = f"{shape} and {None if f_test_0 is None else tuple(f_test_0.shape)} for a training kernel of size {k}"
        msg = f"k_test_train and f_test_0 must be [m, n, c, c] (or [m c, n c] or [m, n]) and [m, c]. Got {got}."
        raise ValueError(msg)
    return _flat(kernel)


def _flat(kernel: Tensor | LinearMap) -> Any:
    return flatten_kernel(kernel) if isinstance(kernel, Tensor) and kernel.ndim == 4 else kernel


def _check_times(t: Tensor, lr: float | None) -> None:
    if lr is not None and not (lr > 0 and math.isfinite(lr)):
        msg = f"lr must be positive. Got {lr}."
        raise ValueError(msg)
    if not bool((t.isfinite() & (t >= 0)).all()):
        worst = float(t[~(t.isfinite() & (t >= 0))][0])
        msg = f"Times must be finite and not negative. Got {worst}. The limit of infinite time is kernel_regression."
        raise ValueError(msg)
