"""Which torch functions have a rule, and how their arguments become an operation.

A handler returns ``NotImplemented`` where the rule does not hold; the parameters are then treated without structure.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ntklib.kernels import operations
from ntklib.kernels.activations import Activation, ReLU
from ntklib.kernels.operations import Operation


@runtime_checkable
class Watcher(Protocol):
    """What a handler needs; see ``capture.Watch``."""

    wanted: dict[int, str]
    views: dict[int, tuple[Tensor, Tensor]]

    def plain(self, *tensors: Tensor | None) -> bool: ...
    def depends(self, x: Tensor) -> bool: ...
    def names(self, *params: Tensor | None) -> Any: ...
    def apply(self, x: Tensor, op: Operation) -> Tensor: ...


def _linear(watch: Watcher, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    if id(weight) in watch.views or not watch.plain(weight, bias) or weight.ndim != 2:
        return NotImplemented
    return watch.apply(input, operations.Linear(weight, bias, watch.names(weight, bias)))


def _matmul(watch: Watcher, input: Tensor, other: Tensor) -> Any:
    """Read x W or x W^T as a linear map, with a parameter W on the right."""
    if input.ndim < 1 or id(input) in watch.wanted or id(input) in watch.views:
        return NotImplemented
    if id(other) in watch.views:
        weight = watch.views[id(other)][1]
        return watch.apply(input, operations.Linear(weight, None, watch.names(weight, None)))
    if other.ndim != 2 or not watch.plain(other):
        return NotImplemented
    return watch.apply(input, operations.Linear(other.T, None, watch.names(other, None)))


def _rmatmul(watch: Watcher, other: Tensor, input: Tensor) -> Any:
    return _matmul(watch, input, other)


def _convolution(
    watch: Watcher,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not watch.plain(weight, bias):
        return NotImplemented
    op = operations.convolution(weight, bias, watch.names(weight, bias), stride, padding, dilation, groups)
    return watch.apply(input, op)


def _batch_norm(
    watch: Watcher,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or not watch.plain(weight, bias):
        return NotImplemented
    shape = (-1, *[1] * (input.ndim - 2))
    rstd = torch.rsqrt(running_var + eps)
    return watch.apply(input, operations.Scale(weight, bias, watch.names(weight, bias), shape=shape, mean=running_mean, rstd=rstd))


def _affine(watch: Watcher, x_hat: Tensor, weight: Any, bias: Any, shape: tuple[int, ...]) -> Tensor:
    return watch.apply(x_hat, operations.Scale(weight, bias, watch.names(weight, bias), shape=shape))


def _layer_norm(
    watch: Watcher, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    if not watch.plain(weight, bias):
        return NotImplemented
    return _affine(watch, F.layer_norm(input, normalized_shape, None, None, eps), weight, bias, tuple(normalized_shape))


def _rms_norm(watch: Watcher, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if not watch.plain(weight):
        return NotImplemented
    return _affine(watch, F.rms_norm(input, normalized_shape, None, eps), weight, None, tuple(normalized_shape))


def _group_norm(watch: Watcher, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if not watch.plain(weight, bias):
        return NotImplemented
    return _affine(watch, F.group_norm(input, num_groups, None, None, eps), weight, bias, (-1, *[1] * (input.ndim - 2)))


def _instance_norm(
    watch: Watcher,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return _batch_norm(watch, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if not watch.plain(weight, bias):
        return NotImplemented
    x_hat = F.instance_norm(input, None, None, None, None, True, momentum, eps)
    return _affine(watch, x_hat, weight, bias, (-1, *[1] * (input.ndim - 2)))


def _embedding(
    watch: Watcher,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if id(weight) in watch.views or max_norm is not None or scale_grad_by_freq or not watch.plain(weight):
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return watch.apply(input, operations.Embedding(weight, None, watch.names(weight, None), padding_idx=padding_idx))


def activation(watch: Watcher, function: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Apply one of ``ACTIVATIONS``, if its argument depends on what is watched and is not overwritten."""
    x, *rest = args if args else (options.get("input"),)
    if not isinstance(x, Tensor) or not watch.depends(x):
        return NotImplemented
    options = {name: value for name, value in options.items() if name not in ("input", "inplace") or value is True}
    if any(value is True or isinstance(value, Tensor) for value in (*rest, *options.values())):
        return NotImplemented
    return watch.apply(x, ReLU() if function in _RELU else Activation(lambda z: function(z, *rest, **options)))


_RELU: set[Any] = {F.relu, torch.relu, Tensor.relu}
ACTIVATIONS: set[Any] = _RELU | {
    F.gelu, F.silu, F.mish, F.softplus, F.elu, F.selu, F.celu, F.leaky_relu, F.tanh, F.sigmoid,
    torch.tanh, torch.sigmoid, torch.erf, Tensor.tanh, Tensor.sigmoid, Tensor.erf,
}  # fmt: skip
HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
}
TRANSPOSED = {torch.t, Tensor.t, *(vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT"))}
