"""Watch a forward pass: see every use of a parameter, with the example axis known, and pull output directions back through it.

The model is evaluated on one example at a time under ``torch.func.vmap``, so the example axis is known at every operation, however
the model reshapes, transposes or reuses its tensors. A parameter that is used once, by an operation with a rule, becomes an
``Operation``; every other wanted parameter becomes a ``Leaf``, whose gradient autograd computes, whatever is done to it.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ntklib.kernels.operations import Emission, Operation, Rows
from ntklib.kernels.uses import ACTIVATIONS, HANDLERS, TRANSPOSED, activation

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
Visit = Callable[[Emission], None]
Use = tuple[str, tuple[str | None, str | None]]  # kind of operation, names of its wanted weight and bias


class CaptureError(RuntimeError):
    """A model does something that this way of looking cannot follow."""


class Leaf(Operation):
    """A parameter given to every example as its own copy: any use of it is seen, and no structure."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._unsafe_view(x, x.shape)  # the same memory, but to autograd not a view of the parameter

    def pull_back(self, g: Tensor) -> Tensor:
        return g

    def factors(self, g: Tensor) -> Iterator[Emission]:
        yield (str(self.names[0]),), Rows(g.transpose(0, 1).reshape(g.shape[1], g.shape[0], -1))


class _Lifted(torch.autograd.Function):
    """An operation met inside the vmap over examples; its vmap rule runs it on the whole batch."""

    @staticmethod
    def forward(x: Tensor, every: Tensor, root: Tensor, op: Operation, visit: Visit) -> Tensor:  # pyright: ignore
        msg = f"{type(op).__name__} was reached outside the vmap over examples."
        raise CaptureError(msg)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, every: Tensor, root: Tensor, op: Operation, visit: Visit) -> Any:
        n = info.batch_size
        x = x.expand(n, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return _Batched.apply(x, root, op, visit), 0


class _Batched(torch.autograd.Function):
    """The operation on a batch; its backward sees the gradient of every output direction at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, op: Operation, visit: Visit) -> Tensor:  # pyright: ignore
        ctx.op, ctx.visit = op, visit
        ctx.set_materialize_grads(False)
        return op.forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:  # the outputs do not depend on this
            return None, None, None, None
        needed = ctx.needs_input_grad[0]
        gx = _Pulled.apply(g, ctx.op, ctx.visit, needed)
        return gx if needed else None, None, None, None


class _Pulled(torch.autograd.Function):
    """Gradient with respect to an operation's input; its vmap rule sees ``[K, n, ...]``."""

    @staticmethod
    def forward(g: Tensor, op: Operation, visit: Visit, needed: bool) -> Tensor:  # pyright: ignore
        msg = f"The gradient of {type(op).__name__} does not depend on the output direction."
        raise CaptureError(msg)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, op: Operation, visit: Visit, needed: bool) -> Any:
        g = g.movedim(in_dims[0], 0)
        for emission in op.factors(g):
            visit(emission)
        return (op.pull_back(g), 0) if needed else (g, 0)


def lift(w: Tensor, name: str, every: Tensor, root: Tensor, visit: Visit) -> Tensor:
    """Give every example its own copy (no memory) of a parameter; its per-example gradient is visited."""
    return _Lifted.apply(w, every, root, Leaf(w, None, (name, None)), visit)  # pyright: ignore[reportReturnType]


@dataclass
class Survey:
    """What a forward pass does with the parameters, and how large its tensors are (numbers per example)."""

    c: int = 0
    uses: list[Use] = field(default_factory=list)
    unruled: set[str] = field(default_factory=set)  # used by something without a rule
    activations: int = 0  # numbers that the forward pass keeps, at most
    widest: int = 0  # numbers of the largest tensor


class Watch(TorchFunctionMode):
    """Replaces operations on ``wanted`` parameters by ``_Lifted`` ones and takes notes."""

    def __init__(self, wanted: dict[int, str], every: Tensor, root: Tensor, visit: Visit, *, measure: bool = True) -> None:
        super().__init__()
        self.measure = measure
        self.wanted, self.every, self.root, self.visit = wanted, every, root, visit
        self.views: dict[int, tuple[Tensor, Tensor]] = {}  # id of W.T -> (W.T, W)
        self.notes = Survey()
        self.places: dict[int, Tensor] = {}  # by address, so that views do not count twice; held, so that no address comes again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = [t for t in _tensors((args, kwargs)) if id(t) in self.wanted or id(t) in self.views]
        if touched:
            out = self._dispatch(func, args, kwargs, touched)
        else:
            out = activation(self, func, args, kwargs) if func in ACTIVATIONS else NotImplemented
            out = func(*args, **kwargs) if out is NotImplemented else out
        if self.measure:
            for t in _tensors(out):
                self._measure(t)
        return out

    def _measure(self, t: Tensor) -> None:
        inner = _physical(t)
        place = inner.untyped_storage().data_ptr()
        if place not in self.places and t.is_floating_point():
            self.places[place] = inner
            self.notes.activations += t.numel()
            self.notes.widest = max(self.notes.widest, t.numel())

    def _dispatch(self, func: Any, args: Any, kwargs: Any, touched: list[Tensor]) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            out = handler(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in TRANSPOSED and len(args) == 1 and id(args[0]) in self.wanted and args[0].ndim == 2 and not kwargs:
            view = func(*args)
            self.views[id(view)] = (view, args[0])
            return view
        if isinstance(func, types.FunctionType) and func.__module__ == F.__name__:
            with self:  # look inside what is written in Python, such as attention
                return _without_dispatch(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if any(True for _ in _tensors(out)):
            for t in touched:
                self.notes.unruled.add(self.wanted[id(self.views.get(id(t), (t, t))[1])])
        return out

    def plain(self, *tensors: Tensor | None) -> bool:
        """Whether these are None or constants without an example axis."""
        return not any(t is not None and _functorch.is_functorch_wrapped_tensor(t) for t in tensors)

    def depends(self, x: Tensor) -> bool:
        """Whether this has an example axis and depends on what is watched."""
        return not self.plain(x) and _physical(x).requires_grad

    def names(self, *params: Tensor | None) -> Any:
        """Names of those whose gradient is wanted."""
        return tuple(self.wanted.get(id(p)) if p is not None else None for p in params)

    def apply(self, x: Tensor, op: Operation) -> Tensor:
        """Run an operation on the whole batch, with its gradients watched."""
        self.notes.uses.append((type(op).__name__, op.names))
        return _Lifted.apply(x, self.every, self.root, op, self.visit)  # pyright: ignore[reportReturnType]


def _physical(t: Tensor) -> Tensor:
    """The tensor behind all vmaps."""
    while _functorch.is_batchedtensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def _without_dispatch(func: types.FunctionType) -> types.FunctionType:
    """The same function, which runs its body instead of handing itself to a mode."""
    names = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    inner = types.FunctionType(
        func.__code__,
        {**func.__globals__, **dict.fromkeys(names, lambda *_: False)},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
