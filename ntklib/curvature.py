"""The Hessian of a loss, as an operator, and its largest eigenvalues."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.functional import Model, Params
from ntklib.operator import restricted_model
from ntklib.spectra import top_eigenpairs
from ntklib.text import check_known

if TYPE_CHECKING:
    from curvlinops import HessianLinearOperator

LossFunction = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

REDUCTIONS = ("mean", "sum")


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Iterable[Any],
    k: int = 1,
    *,
    reduction: str | None = None,
    params: Iterable[str] | None = None,
    tol: float | None = None,
    seed: int = 0,
) -> Float[Tensor, " k"]:
    r"""Compute the k largest eigenvalues of the Hessian of a loss; the first is the sharpness.

    .. math:: \lambda_1(\nabla^2_\theta L), \qquad L(\theta) = \mathrm{loss}(f(X; \theta), y)

    (Cohen et al. 2021, arXiv:2103.00065v3, section 2.) The scale is that of the loss as given: with a mean over examples gradient
    descent is stable up to sharpness 2/lr, with a sum the same network has n times the sharpness and 1/n of the learning rate. For
    the mean (1/2n) sum of squares the Gauss-Newton part of the Hessian has the non-zero eigenvalues of K/n. Largest means
    algebraically largest, so a saddle's negative eigenvalues never come first.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``. Its mode, parameters, buffers and gradients are left as they were.
        loss_fn: ``loss_fn(outputs, y)`` returns a scalar, for example ``torch.nn.functional.cross_entropy``. It must be twice
            differentiable in the outputs.
        data: The pair ``(x, y)``, or batches ``[(x, y), ...]``, which bound the memory.
        k: Number of eigenvalues.
        reduction: How the losses of several batches combine: ``"mean"`` (weighted by batch size) or ``"sum"``. Default: the
            ``reduction`` that modules such as ``nn.CrossEntropyLoss`` carry. Not needed for a single batch.
        params: Names of the parameters that count. Default: all trainable ones.
        tol: Bound on the relative residual, see ``top_eigenpairs``.
        seed: Of the start vector; the same seed gives the same result.

    Returns:
        Eigenvalues, descending.

    Raises:
        ValueError: If the loss is not a finite differentiable scalar, rows interact (batch normalisation in training mode), no
            parameter is trainable, or an option does not fit.
        RuntimeError: If the eigenvalues do not converge, see ``top_eigenpairs``.
    """
    return top_eigenpairs(hessian_operator(model, loss_fn, data, reduction=reduction, params=params), k, tol=tol, seed=seed)[0]


def hessian_operator(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Iterable[Any],
    *,
    reduction: str | None = None,
    params: Iterable[str] | None = None,
) -> "HessianLinearOperator":
    r"""Return the Hessian :math:`\nabla^2_\theta L` as a linear operator, ``(p, p)``, with ``shape``, ``dtype`` and ``@``.

    It is curvlinops' operator (Dangel et al. 2025, arXiv:2501.19183v1): each product is a forward derivative of the gradient. Order
    is that of ``flatten_params``. The operator is a snapshot: it copies the model, and later training does not move it. The data
    are not copied.

    Args:
        model: As in ``sharpness``.
        loss_fn: As in ``sharpness``.
        data: As in ``sharpness``; an iterator of batches is read once.
        reduction: As in ``sharpness``.
        params: As in ``sharpness``.

    Raises:
        ValueError: As in ``sharpness``.
    """
    batches = _batches(data)
    f, theta = restricted_model(copy.deepcopy(model), None, params)
    _check_loss(f, theta, loss_fn, batches[0])
    with warnings.catch_warnings():  # this import, and torch's forward mode on first use, call the deprecated torch.jit.script
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        from curvlinops import HessianLinearOperator

        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
    network = _Network(f, theta)
    loss = _Loss(loss_fn, _reduction(loss_fn, batches, reduction))
    return HessianLinearOperator(network, loss, list(network.parameters()), batches, check_deterministic=False)


class _Network(nn.Module):
    """The pure function f as a module, because curvlinops takes modules."""

    def __init__(self, f: Model, theta: Params):
        super().__init__()
        self.f, self.names = f, tuple(theta)
        self.theta = nn.ParameterList(theta.values())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(dict(zip(self.names, self.theta, strict=True)), x)


class _Loss(nn.Module):
    """A loss function as a module that says how batches combine."""

    def __init__(self, loss_fn: LossFunction, reduction: str):
        super().__init__()
        self.loss_fn, self.reduction = loss_fn, reduction

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(outputs, y)


def _is_pair(batch: object) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


def _batches(data: Iterable[Any]) -> list[Batch]:
    batches: list[Any] = [data] if _is_pair(data) else list(data)
    for batch in batches:
        if not _is_pair(batch):
            msg = f"data must be a pair of tensors (x, y) or batches [(x, y), ...]. Got {type(batch).__name__} for a batch."
            raise ValueError(msg)
        if len(batch[0]) == 0 or len(batch[0]) != len(batch[1]):
            msg = f"x and y must have the same number of examples, at least one. Got {len(batch[0])} and {len(batch[1])}."
            raise ValueError(msg)
    if not batches:
        msg = "data must hold at least one batch. Got none."
        raise ValueError(msg)
    return [(x, y) for x, y in batches]


def _reduction(loss_fn: LossFunction, batches: list[Batch], reduction: str | None) -> str:
    if reduction is None and len(batches) == 1:
        return "sum"  # of one term: the loss as it is
    reduction = getattr(loss_fn, "reduction", None) if reduction is None else reduction
    if reduction is None:
        msg = f"{len(batches)} batches need reduction='mean' or 'sum', which says how their losses combine. Got none."
        raise ValueError(msg)
    check_known("reduction", reduction, REDUCTIONS)
    return reduction


def _check_loss(f: Model, theta: Params, loss_fn: LossFunction, batch: Batch) -> None:
    x, y = batch
    with torch.enable_grad():
        loss = loss_fn(f({name: w.clone().requires_grad_() for name, w in theta.items()}, x), y)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        msg = f"loss_fn(outputs, y) must return a scalar tensor. Got {got}. Take the mean or the sum over examples."
        raise ValueError(msg)
    if not loss.requires_grad:
        msg = "loss_fn(outputs, y) must be differentiable in the outputs. Got a loss without gradient."
        raise ValueError(msg)
    if not loss.isfinite():
        msg = f"The loss must be finite for its curvature to exist. Got {float(loss.detach())}."
        raise ValueError(msg)
