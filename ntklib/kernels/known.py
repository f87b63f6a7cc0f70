"""What earlier calls found out about a model, kept for the next call on a model that is built in the same way.

Finding out how to stream a model takes a forward and a backward pass in Python, which for small networks is as long as the kernel
itself, and training loops ask again at every checkpoint. The answer does not depend on the values of the parameters, only on what
the forward pass does with them.
"""

import types
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntklib.functional import Params, unwrap
from ntklib.kernels.capture import Use

KEPT = 256  # models
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# what every module has, besides its own attributes
_OURS = {*vars(nn.Module()), "_parameters", "_buffers", "_modules"}
_COUNTERS = ("num_batches_tracked",)  # buffers that change at every step and that evaluation does not read


@dataclass(frozen=True)
class Structure:
    """How a model uses its parameters; see ``streaming.Structured``."""

    c: int
    dtype: torch.dtype
    size: int
    size_k: int
    kept: int
    kept_k: int
    largest: int
    cost_k: float
    emissions: int
    leaves: frozenset[str]
    uses: tuple[Use, ...]


_known: OrderedDict[Hashable, Structure] = OrderedDict()


def recall(key: Hashable | None) -> Structure | None:
    """The structure of a model with this fingerprint, if one was seen."""
    if key is None or key not in _known:
        return None
    _known.move_to_end(key)
    return _known[key]


def remember(key: Hashable | None, structure: Structure) -> None:
    """Keep a structure; the one that was not asked for longest makes room."""
    if key is not None:
        _known[key] = structure
        _known.move_to_end(key)
        if len(_known) > KEPT:
            _known.popitem(last=False)


def forget(key: Hashable | None = None) -> None:
    """Drop one structure, or all."""
    if key is None:
        _known.clear()
    else:
        _known.pop(key, None)


def fingerprint(model: nn.Module, output: str | None, params: Params, x: Tensor) -> Hashable | None:
    """Everything that the forward pass of a model can depend on, except the numbers in its parameters and floating-point buffers.

    Returns:
        Equal values for models that do the same with their parameters; ``None`` where that cannot be known, because a module has
        hooks or attributes that are not plain values.
    """
    model = unwrap(model)
    try:
        modules = tuple((name, _module(module)) for name, module in model.named_modules())
    except _NotPlainError:
        return None
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shared = tuple((name, first.setdefault(id(t), name), *_tensor(name, t)) for name, t in tensors)
    inputs = (tuple(x.shape[1:]), x.dtype, x.device, x.is_contiguous())
    return modules, shared, inputs, output, tuple(params), torch.get_default_dtype()


class _NotPlainError(Exception):
    pass


def _module(module: nn.Module) -> Hashable:
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise _NotPlainError
    own = ((name, _plain(value)) for name, value in sorted(vars(module).items()) if name not in _OURS)
    return type(module), type(module).forward, module.training, tuple(own)


def _plain(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, types.BuiltinFunctionType) or (isinstance(value, types.FunctionType) and value.__closure__ is None):
        return value
    raise _NotPlainError


def _tensor(name: str, t: Tensor) -> tuple[Hashable, ...]:
    switch = not t.is_floating_point() and t.numel() <= 16 and not name.endswith(_COUNTERS)  # a forward pass may branch on it
    return tuple(t.shape), t.dtype, t.device, t.requires_grad, tuple(t.flatten().tolist()) if switch else None
