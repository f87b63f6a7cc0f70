"""One door from ``nn.Module`` to a pure function f(params, x)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Params = dict[str, Tensor]
Model = Callable[[Params, Tensor], Tensor]

# in training mode these modules draw random masks
_STOCHASTIC = (nn.modules.dropout._DropoutNd,)


def check_rows_independent(model: nn.Module) -> None:
    """Raise when one example's output could depend on another example or on chance.

    The Jacobian of one example is defined only if the rows of a batch do not interact. Batch normalisation in training mode
    normalises with statistics of the batch, so its rows do; dropout in training mode is random.

    Args:
        model: The module that a kernel or a trace is about to differentiate.

    Raises:
        ValueError: If a batch-normalisation module uses batch statistics, or a dropout module is in training mode.
    """
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.running_mean is None and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
                msg = f"The rows of a batch must not interact. Got {where} without running statistics: it always uses the batch's."
                raise ValueError(msg)
            if module.training and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
                msg = (
                    f"The model must be in eval mode, so that the rows of a batch do not interact. Got {where} in training mode. "
                    "Call model.eval() first (and ntklib.models.calibrate_batch_norm if its running statistics are not set yet)."
                )
                raise ValueError(msg)
        elif isinstance(module, _STOCHASTIC) and module.training:
            msg = f"The model must be deterministic. Got {where} in training mode. Call model.eval() first."
            raise ValueError(msg)


def functional_model(model: nn.Module) -> tuple[Model, Params]:
    r"""Return the pure function f(params, x) of a module and its current trainable parameters.

    Trainable means ``requires_grad``; frozen parameters and buffers are constants of the function. Tied weights appear once.
    The module itself (mode, parameters, buffers, gradients) is never changed by calls of the returned function.

    Args:
        model: A module whose rows do not interact (see ``check_rows_independent``), ``[n, *input] -> [n, c]``.

    Returns:
        ``f`` and ``params``, a dict from parameter name to a detached view of the parameter.

    Raises:
        ValueError: If rows interact, or no parameter is trainable. The returned ``f`` raises it when the output is not ``[n, c]``.
    """
    check_rows_independent(model)
    params = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
    if not params:
        msg = "The model must have at least one trainable parameter. Got none with requires_grad=True."
        raise ValueError(msg)
    constants = {name: w.detach() for name, w in model.named_parameters() if not w.requires_grad}
    constants |= {name: b.detach() for name, b in model.named_buffers()}

    def f(params: Params, x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**constants, **params}, (x,))
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            msg = f"The model must return outputs of shape [n, c] with n = {len(x)}. Got {got}."
            raise ValueError(msg)
        return out

    return f, params


def flatten_params(params: Params) -> Float[Tensor, " p"]:
    """Concatenate parameters to one vector, in the order of the dict (p = number of scalars)."""
    return torch.cat([w.reshape(-1) for w in params.values()])


def unflatten_params(vector: Tensor, like: Params) -> Params:
    """Split ``[..., p]`` into parameters shaped like ``like``, keeping leading axes (inverse of ``flatten_params``)."""
    pieces = vector.split([w.numel() for w in like.values()], dim=-1)
    return {k: v.reshape(*v.shape[:-1], *w.shape) for (k, w), v in zip(like.items(), pieces, strict=True)}
