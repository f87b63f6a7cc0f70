"""One door from ``nn.Module`` to a pure function f(params, x)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ntklib.checks import check_rows_independent
from ntklib.text import check_known

Params = dict[str, Tensor]
Model = Callable[[Params, Tensor], Tensor]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``: same parameters, plain names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class _Reached(Exception):
    """Carries an inner module's output out of a forward pass."""


def _places(model: nn.Module) -> dict[str, str]:
    """For every place of a parameter or buffer, the name of its tensor.

    Tied tensors have several places and the first one's name. A module that is used twice is one module: its places count once
    (``functional_call`` left to find them itself would put the wrong tensors back in the end).
    """
    names: dict[int, str] = {}
    places: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False)]:
            places[name] = names.setdefault(id(tensor), name)
    return places


def _call(model: nn.Module, tensors: Params, x: Tensor, output: str | None) -> Tensor:
    """Outputs ``[n, c]`` with these parameters and buffers in place of the module's own; those of ``output``, flattened."""
    if output is None:
        out = torch.func.functional_call(model, tensors, (x,), tie_weights=False)
    else:

        def leave(_module: nn.Module, _args: object, out: object) -> None:
            raise _Reached(out)

        handle = model.get_submodule(output).register_forward_hook(leave)
        try:
            torch.func.functional_call(model, tensors, (x,), tie_weights=False)
            msg = f"output={output!r} must be used in the forward pass. Got a pass that never called it."
            raise ValueError(msg)
        except _Reached as reached:
            out = reached.args[0]
        finally:
            handle.remove()
        out = out.flatten(1) if isinstance(out, Tensor) and out.ndim > 1 else out
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        msg = f"The model must return outputs of shape [n, c] with n = {len(x)}. Got {got}."
        raise ValueError(msg)
    return out


def functional_model(
    model: nn.Module, *, output: str | None = None, params: Iterable[str] | None = None, independent: bool = True
) -> tuple[Model, Params]:
    r"""Return the pure function f(params, x) of a module and its current trainable parameters.

    Trainable means ``requires_grad``; frozen parameters and buffers are constants of the function. Tied weights appear once.
    The module itself (mode, parameters, buffers, gradients) and the inputs are never changed by calls of the returned function.

    Args:
        model: A module whose rows do not interact (see ``check_rows_independent``), ``[n, *input] -> [n, c]``.
        output: Name of an inner module whose output, flattened to ``[n, c]``, is f (its first call in a forward pass).
        params: Names of the trainable parameters to differentiate; the others are constants. Default: all.
        independent: Require that rows do not interact.

    Returns:
        ``f`` and ``params``, a dict from parameter name to a detached view of the parameter.

    Raises:
        ValueError: If rows interact, no parameter is trainable or a name is unknown. The returned ``f`` raises it when the output
            is not ``[n, c]``.
    """
    model = unwrap(model)
    if independent:
        check_rows_independent(model)
    trainable = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
    if not trainable:
        msg = "The model must have at least one trainable parameter. Got none with requires_grad=True."
        raise ValueError(msg)
    names = list(trainable) if params is None else list(params)
    for name in names:
        check_known("trainable parameter", name, trainable)
    inner = [name for name, _ in model.named_modules() if name]
    if output is not None:
        check_known("module", output, inner)
    constants = {name: w.detach() for name, w in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    places = _places(model)
    chosen = {name: w for name, w in trainable.items() if name in names}
    if not chosen:
        msg = "params must name at least one trainable parameter. Got none."
        raise ValueError(msg)

    def f(params: Params, x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}  # a module may count its calls in a buffer
        tensors = {**constants, **copies, **params}
        x = x.clone()  # a module may work in place
        return _call(model, {place: tensors[name] for place, name in places.items()}, x, output)

    return f, chosen
