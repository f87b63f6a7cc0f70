"""What a model and its inputs must be before anything is differentiated."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from ntklib.text import check_known

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


def check_inputs(x: Tensor, name: str) -> None:
    """Raise unless ``x`` holds examples of finite numbers."""
    if not isinstance(x, Tensor):
        msg = f"{name} must be a tensor. Got {type(x).__name__}."
        raise TypeError(msg)
    if x.ndim == 0 or len(x) == 0:
        msg = f"{name} must hold at least one example. Got shape {tuple(x.shape)}."
        raise ValueError(msg)
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        msg = f"{name} must be finite. Got {int((~torch.isfinite(x)).sum())} entries that are nan or infinite."
        raise ValueError(msg)


def check_pair(x1: Tensor, x2: Tensor) -> None:
    """Raise unless both inputs have the same example shape, dtype and device."""
    if x1.shape[1:] != x2.shape[1:]:
        msg = f"x1 and x2 must share the input shape. Got {tuple(x1.shape)} and {tuple(x2.shape)}."
        raise ValueError(msg)
    if (x1.dtype, x1.device) != (x2.dtype, x2.device):
        msg = f"x1 and x2 must share dtype and device. Got {x1.dtype} on {x1.device} and {x2.dtype} on {x2.device}."
        raise ValueError(msg)


def check_draws(method: str, known: Collection[str], epsilon: float | None, num_samples: int) -> None:
    """Raise unless the method of an estimate by random draws is known, and step and number of draws fit it."""
    check_known("method", method, known)
    if method == "perturbation" and not (epsilon is not None and epsilon > 0):
        msg = f"method='perturbation' requires epsilon > 0 (the main paper uses 0.01). Got epsilon={epsilon}."
        raise ValueError(msg)
    if method != "perturbation" and epsilon is not None:
        msg = f"epsilon belongs to method='perturbation' only. Got epsilon={epsilon} with method={method!r}."
        raise ValueError(msg)
    if num_samples < 1:
        msg = f"num_samples must be at least 1. Got {num_samples}."
        raise ValueError(msg)


def check_model(f: Callable[[dict[str, Tensor], Tensor], Tensor], params: dict[str, Tensor], x: Tensor) -> None:
    """Raise unless the model is real, takes the inputs, draws no random numbers, keeps rows apart and returns ``[n, c]``, c > 0."""
    like = next(iter(params.values()))
    for name, w in params.items():
        if not w.is_floating_point():
            msg = f"Trainable parameters must be real. Got {name!r} of {w.dtype}."
            raise ValueError(msg)
    if x.device != like.device:
        msg = f"Inputs must be on the device of the parameters, {like.device}. Got {x.device}."
        raise ValueError(msg)
    try:
        with torch.no_grad():
            before = _random_state(x.device)
            alone = f(params, x[:1])
            if not torch.equal(before, _random_state(x.device)):
                msg = "The model must be deterministic. Got a forward pass that draws random numbers in eval mode."
                raise ValueError(msg)
            together = f(params, x[:2])
    except RuntimeError as error:
        if x.dtype != like.dtype:
            msg = f"Inputs must have a dtype that the model takes; its parameters are {like.dtype}. Got {x.dtype}."
            raise ValueError(msg) from error
        raise
    if alone.shape[1] == 0 or not alone.is_floating_point():
        msg = f"The model must return at least one real output. Got shape {tuple(alone.shape)} of {alone.dtype}."
        raise ValueError(msg)
    difference, size = float((together[:1] - alone).abs().max()), float(alone.abs().max())
    tolerance = 10 * torch.finfo(alone.dtype).eps ** 0.5
    if difference > tolerance * size and difference > tolerance * _terms(f, params, x[:2], together):
        msg = f"The rows of a batch must not interact. Got an output that another example changes by {difference:.1e}."
        raise ValueError(msg)


def _terms(f: Callable[[dict[str, Tensor], Tensor], Tensor], params: dict[str, Tensor], x: Tensor, out: Tensor) -> float:
    """Size of what outputs are sums of, even where these cancel to rounding errors: how fast they change with the parameters."""
    step, count, moved = 1e-3, 0, {}
    for name, w in params.items():  # every number by a share of its own
        share = torch.cos(torch.arange(count, count + w.numel(), device=w.device)).view_as(w)
        moved[name], count = w * (1 + step * share), count + w.numel()
    with torch.no_grad():
        return float((f(moved, x) - out).abs().max()) / step


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
