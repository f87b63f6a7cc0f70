"""Operations whose per-example gradients have structure: forward, gradient with respect to the input, and factors of the Jacobian.

Inside this module the example axis is physical: inputs are ``[n, *shape]`` and gradients ``[K, n, *shape]``, K being the number of
output directions that are pulled back at once. Factors are example-major, ``[n, K, ...]``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntklib.kernels import taps, winograd
from ntklib.kernels.positions import Windows


@dataclass(frozen=True)
class Outer:
    """Per-example gradients J[n,k,g,o,d] = sum_t G[n,k,t,g,o] U[n,t,g,d] of a weight.

    Attributes:
        given: U, ``[n, t, groups, d]``; None if it is made from ``source`` when it is needed.
        g: Gradients of the outputs, ``[n, k, t, groups, o]``.
        bias: Whether the bias of the same operation counts too (its U is 1).
        source: What U can be made from, ``[n, ...]``; None for U itself.
        remake: Makes U from ``source``, or from rows of it.
        relative: Whether the last axis of U counts what occurs in this pass, so that U of two passes must be made by ``remake``.
        windows: Of a convolution without stride and groups, what the positions of ``g`` see of ``source``.
    """

    given: Tensor | None
    g: Tensor
    bias: bool = False
    source: Tensor | None = None
    remake: Callable[[Tensor], Tensor] | None = None
    relative: bool = False
    windows: Windows | None = None

    @cached_property
    def u(self) -> Tensor:
        """Inputs, ``[n, t, groups, d]``."""
        if self.given is None:
            assert self.remake is not None
            assert self.source is not None
            return self.remake(self.source)
        return self.given


def inputs_of(factor: Outer) -> Tensor:
    """U with a last axis that means the same in every pass."""
    if factor.relative and factor.remake is not None and factor.source is not None:
        return factor.remake(factor.source)
    return factor.u


@dataclass(frozen=True)
class Rows:
    """Per-example gradients written out, ``j[n, k, p]``."""

    j: Tensor


Factor = Outer | Rows
Emission = tuple[tuple[str, ...], Factor]  # names of the parameters that a factor accounts for


@dataclass(eq=False)
class Operation(ABC):
    """One use of parameters in a forward pass, z = op(x; weight, bias).

    Attributes:
        weight: The weight, a constant here; None where the operation has none.
        bias: The bias, or None.
        names: Names of (weight, bias) as far as their gradients are wanted, None otherwise.
    """

    weight: Tensor | None
    bias: Tensor | None
    names: tuple[str | None, str | None]
    saved: Tensor = field(init=False)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Outputs z for inputs ``[n, *shape]``; keeps what the factors need."""

    @abstractmethod
    def pull_back(self, g: Tensor) -> Tensor:
        """Gradient with respect to the input, ``[K, n, *shape]``, of gradients with respect to the output."""

    @abstractmethod
    def factors(self, g: Tensor) -> Iterator[Emission]:
        """Factors of the wanted parameters' Jacobian."""

    def _outer(self, factor: Outer) -> Iterator[Emission]:
        """Factors of a weight and a bias that act alike at every position t, from that of the weight."""
        weight, bias = self.names
        if weight is not None and bias is not None and same_owner(weight, bias):
            yield (weight, bias), replace(factor, bias=True)
            return
        if weight is not None:
            yield (weight,), factor
        if bias is not None:
            yield (bias,), Rows(factor.g.sum(2).flatten(2))


def same_owner(a: str, b: str) -> bool:
    """Whether two parameters belong to the same module."""
    return "." in a and a.rpartition(".")[0] == b.rpartition(".")[0]


def _examples_first(g: Tensor) -> Tensor:
    return g.transpose(0, 1)  # [K, n, ...] -> [n, K, ...]


class Linear(Operation):
    """z = x W^T + b on the last axis of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        self.saved = x.detach()
        return F.linear(x, self.weight, self.bias)  # pyright: ignore[reportArgumentType]

    def pull_back(self, g: Tensor) -> Tensor:
        return g @ self.weight  # pyright: ignore[reportOperatorIssue]

    def factors(self, g: Tensor) -> Iterator[Emission]:
        g = _examples_first(g)
        n, k, o = len(g), g.shape[1], g.shape[-1]
        u = self.saved.reshape(n, -1, 1, self.saved.shape[-1])
        yield from self._outer(Outer(u, g.reshape(n, k, -1, 1, o)))


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # of a batch of images and of volumes


@dataclass(eq=False)
class Convolution(Operation):
    """Convolution over the last ``len(stride)`` axes, any groups; padding is a list of (before, after)."""

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def _kernel(self) -> tuple[int, ...]:
        assert self.weight is not None
        return tuple(self.weight.shape[2:])

    @property
    def _before(self) -> tuple[int, ...]:
        return tuple(before for before, _ in self.padding)

    def _windows(self, positions: tuple[int, ...]) -> Windows | None:
        """What these positions of the outputs see, without stride and groups."""
        if self.groups > 1 or set(self.stride) != {1}:
            return None
        return Windows(self._kernel, self.dilation, self._before, positions)

    def _flat(self, x: Tensor, lead: int) -> Tensor:
        """Join the ``lead`` first axes to one batch axis, channels innermost in memory (the fastest layout for oneDNN)."""
        x = x.flatten(0, lead - 1)
        return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim]) if x.ndim in _CHANNELS_LAST else x

    def _padded(self, x: Tensor) -> Tensor:
        """Inputs ``[n, *lead, channels, *space]`` as a padded batch ``[n * lead, channels, *space]``."""
        flat = self._flat(x, x.ndim - len(self.stride) - 1)
        amounts = [amount for pair in reversed(self.padding) for amount in pair]
        return F.pad(flat, amounts) if any(amounts) else flat

    def forward(self, x: Tensor) -> Tensor:
        self.saved = x.detach()
        dims = len(self.stride)
        lead = x.ndim - dims - 1
        if all(before == after for before, after in self.padding):
            flat, inside = self._flat(x, lead), self._before
        else:
            flat, inside = self._padded(x), (0,) * dims
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        z = convolve(flat, self.weight, self.bias, self.stride, inside, self.dilation, self.groups)
        return torch.ops.aten._unsafe_view(z, [*x.shape[:lead], *z.shape[1:]])  # not a view: may be changed in place

    def pull_back(self, g: Tensor) -> Tensor:
        # the transpose of a convolution
        assert self.weight is not None
        space, lead = tuple(self.saved.shape[-len(self.stride) :]), g.ndim - len(self.stride) - 1
        flat, windows = self._flat(g, lead), self._windows(tuple(g.shape[lead + 1 :]))
        if windows is not None and winograd.fits(windows) and winograd.worthwhile(flat, self.weight, space, self._before):
            out = winograd.transposed(flat, self.weight, space, self._before)
        elif taps.worthwhile(flat, self.weight, self.groups):
            out = taps.transposed(flat, self.weight, space, self.stride, self._before, self.dilation)
        else:
            out = self._transposed(flat, self.weight, space)
        return out.unflatten(0, g.shape[:lead])

    def _transposed(self, g: Tensor, weight: Tensor, space: tuple[int, ...]) -> Tensor:
        """By the library; output_padding restores the rows that a stride leaves over."""
        dims = len(self.stride)
        inside = tuple(min(pair) for pair in self.padding)  # the rest is cut off below
        sizes = zip(space, g.shape[2:], self.stride, self._kernel, self.dilation, self.padding, strict=True)
        full = [(h + sum(p), (t - 1) * s + (k - 1) * d + 1) for h, t, s, k, d, p in sizes]
        rest = tuple(h - reached for h, reached in full)
        transpose: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        if all(before == after for before, after in self.padding):
            return transpose(g, weight, None, self.stride, inside, rest, self.groups, self.dilation)
        out = transpose(g, weight, None, self.stride, 0, rest, self.groups, self.dilation)
        for axis, ((before, _), h) in enumerate(zip(self.padding, space, strict=True)):
            out = out.narrow(2 + axis, before, h)
        return out

    def _patches(self, inputs: Tensor) -> Tensor:
        """What each output position sees of the inputs ``[n, *lead, channels, *space]``: ``[n, t, groups, d]``.

        With groups, positions are innermost in memory.
        """
        dims, n = len(self.stride), len(inputs)
        x = self._padded(inputs)
        x = x.contiguous() if self.groups > 1 else x
        for axis, (k, s, d) in enumerate(zip(self._kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, (k - 1) * d + 1, s)[..., ::d]  # [b, channels, *positions, *kernel]
        x = x.unflatten(1, (self.groups, -1)).unflatten(0, (n, -1))  # [n, lead, groups, channels, *positions, *kernel]
        space, kernel = range(4, 4 + dims), range(4 + dims, 4 + 2 * dims)
        size = math.prod(self._kernel) * x.shape[3]
        if self.groups == 1:
            return x.permute(0, 1, *space, 2, *kernel, 3).reshape(n, -1, 1, size)
        return x.permute(0, 2, *kernel, 3, 1, *space).reshape(n, self.groups, size, -1).permute(0, 3, 1, 2)

    def factors(self, g: Tensor) -> Iterator[Emission]:
        dims = len(self.stride)
        g = _examples_first(g)
        (n, k), positions = g.shape[:2], tuple(g.shape[-dims:])
        g = g.movedim(-dims - 1, -1).reshape(n, k, -1, self.groups, g.shape[-dims - 1] // self.groups)
        yield from self._outer(Outer(None, g, source=self.saved, remake=self._patches, windows=self._windows(positions)))


@dataclass(eq=False)
class Scale(Operation):
    """z = x_hat * weight + bias, where weight and bias are broadcast against one example.

    With ``mean`` and ``rstd`` (batch normalisation in eval mode) x_hat = (x - mean) rstd, else x_hat = x.
    """

    shape: tuple[int, ...] = ()  # of weight and bias, against one example's axes
    mean: Tensor | None = None
    rstd: Tensor | None = None

    def _align(self, w: Tensor) -> Tensor:
        return w.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.rstd is not None:
            x = (x - self._align(self.mean)) * self._align(self.rstd)
        self.saved = x.detach()
        if self.bias is None:
            return x * self._align(self.weight) if self.weight is not None else x.clone()
        if self.weight is None:
            return x + self._align(self.bias)
        return torch.addcmul(self._align(self.bias), x, self._align(self.weight))

    def pull_back(self, g: Tensor) -> Tensor:
        scale = self._align(self.weight) if self.weight is not None else None
        if self.rstd is not None:
            scale = self._align(self.rstd) if scale is None else scale * self._align(self.rstd)
        return g if scale is None else g * scale

    def factors(self, g: Tensor) -> Iterator[Emission]:
        g, x = _examples_first(g), self.saved
        first = g.ndim - len(self.shape)
        reduced = [*range(2, first), *(first + i for i, m in enumerate(self.shape) if m == 1)]
        size = math.prod(g.shape[first + i] for i, m in enumerate(self.shape) if m != 1)
        j = g.new_empty(2, *g.shape[:2], size)
        block = max(1, _CACHE // max(1, g[0].numel()))
        for i in range(0, len(g), block):  # small enough to stay in cache
            part = g[i : i + block]
            for row, value in ((0, part * x[i : i + block, None]), (1, part)):
                if self.names[row] is not None:
                    j[row, i : i + block] = (value.sum(reduced) if reduced else value).flatten(2)
        for name, rows in zip(self.names, j, strict=True):
            if name is not None:
                yield (name,), Rows(rows)


_CACHE = 2**17  # numbers that are worth working on at a time


@dataclass(eq=False)
class Embedding(Operation):
    """z = W[x], rows of a table."""

    padding_idx: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.saved = x.detach()
        return F.embedding(x, self.weight)  # pyright: ignore[reportArgumentType]

    def pull_back(self, g: Tensor) -> Tensor:
        return g  # never called: indices have no gradient

    def factors(self, g: Tensor) -> Iterator[Emission]:
        tokens, place = self.saved.flatten(1).unique(return_inverse=True)
        u = self._one_hot(place, tokens, g.dtype)  # [n, t, 1, distinct tokens]
        dtype = g.dtype
        g = _examples_first(g)

        def remake(x: Tensor) -> Tensor:
            every = torch.arange(len(self.weight), device=x.device)  # pyright: ignore[reportArgumentType]
            return self._one_hot(x.flatten(1), every, dtype)

        g = g.reshape(*g.shape[:2], -1, 1, g.shape[-1])
        yield (str(self.names[0]),), Outer(u, g, source=self.saved, remake=remake, relative=True)

    def _one_hot(self, place: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Which of ``tokens`` stands at each position, ``[n, t, 1, len(tokens)]``; none where it is padding."""
        u = F.one_hot(place, len(tokens)).to(dtype)
        if self.padding_idx is not None:
            u[..., tokens == self.padding_idx] = 0
        return u[:, :, None]


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (int(value),) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def convolution_padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Padding (before, after) of every axis from what ``F.conv*`` accepts; "same" puts the odd one after."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _tuple(padding, len(kernel)))


def convolution(
    weight: Tensor, bias: Tensor | None, names: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Convolution:
    """The operation of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d`` with these arguments."""
    dims = weight.ndim - 2
    if weight.ndim in _CHANNELS_LAST:
        weight = weight.contiguous(memory_format=_CHANNELS_LAST[weight.ndim])
    dilated = _tuple(dilation, dims)
    pads = convolution_padding(padding, tuple(weight.shape[2:]), dilated)
    return Convolution(weight, bias, names, stride=_tuple(stride, dims), padding=pads, dilation=dilated, groups=groups)
