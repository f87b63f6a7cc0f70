"""Stream the factors of every parameter's Jacobian through one backward pass."""

import sys
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntklib.functional import Model, Params
from ntklib.kernels import known
from ntklib.kernels.capture import CaptureError, Survey, Use, Visit, Watch, lift
from ntklib.kernels.gather import kept_numbers
from ntklib.kernels.jacobian import jacobian
from ntklib.kernels.known import Structure
from ntklib.kernels.operations import Emission, Outer, Rows
from ntklib.kernels.reductions import Norms

TOLERANCE = 1e4  # of the check against autograd, in units of the dtype's rounding error


@dataclass(frozen=True)
class Program:
    """How per-example gradients are obtained; here by writing all of them out (``torch.func``), the general method.

    Attributes:
        f: The model as a function f(params, x).
        params: Parameters whose gradients are wanted.
        c: Number of outputs.
        like: Dtype and device of the outputs (an empty tensor).
        size: Numbers that one example needs, besides ``size_k`` for every output direction.
        size_k: See ``size``.
        kept: Numbers that the factors of one example are kept in, besides ``kept_k`` for every output direction.
        kept_k: See ``kept``.
        largest: Numbers of the largest parameter, whose gradients may be written out in blocks.
        cost_k: Multiply-adds to pull one output direction back and take its squared norm, in units of a forward pass.
        emissions: How often ``stream`` calls ``visit``.
    """

    f: Model
    params: Params
    c: int
    like: Tensor
    size: int
    size_k: int
    kept: int
    kept_k: int
    largest: int
    cost_k: float
    emissions: int

    def stream(self, x: Tensor, v: Tensor, visit: Visit) -> None:
        """Call ``visit`` with (names, factor) until every wanted parameter's gradients along ``v`` are accounted for.

        Args:
            x: Inputs, ``[n, *input]``.
            v: Output directions, ``[K, n, c]``.
            visit: Takes one emission.
        """
        for name, j in jacobian(self.f, self.params, x, v.transpose(0, 1)).items():
            visit(((name,), Rows(j)))


@dataclass(frozen=True)
class Structured(Program):
    """Streams layers: one forward pass on all examples, one backward pass on all output directions.

    Attributes:
        leaves: Names of parameters without structure: only their per-example gradients are written out.
        uses: The operations met in the forward pass.
        key: Fingerprint under which the structure was found again; None if it was found out in this call.
    """

    leaves: frozenset[str]
    uses: tuple[Use, ...]
    key: Hashable | None = None

    def stream(self, x: Tensor, v: Tensor, visit: Visit) -> None:
        with torch.enable_grad():
            tracked = _tracked(self.params, self.leaves)
            out, root, notes = watched(self.f, tracked, self.leaves, x, visit, measure=False)
        if tuple(notes.uses) == self.uses and not notes.unruled and not _unwatched(out, tracked):
            pull_back(out, root, v)
        elif self.key is not None:  # the fingerprint has missed something
            known.forget(self.key)
            structured_program(self.f, self.params, x).stream(x, v, visit)
        else:
            msg = "The model's forward pass differs from call to call."
            raise CaptureError(msg)


@contextmanager
def settings(*, tf32: bool = False) -> Iterator[None]:
    """Gradients on, automatic mixed precision off, compiled parts run as written, full precision unless ``tf32``."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching rule")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(_precision("tf32" if tf32 else "ieee"))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _precision(value: str) -> Iterator[None]:
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = value
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


def watched(
    f: Model, params: Params, leaves: frozenset[str], x: Tensor, visit: Visit, *, measure: bool = True
) -> tuple[Tensor, Tensor, Survey]:
    """Outputs ``[n, c]``, the root that every watched operation hangs on, and notes of the forward pass."""
    root = torch.zeros((), dtype=next(iter(params.values())).dtype, device=x.device, requires_grad=True)
    wanted = {id(w): name for name, w in params.items() if name not in leaves}
    notes: list[Survey] = []

    def one_example(x_i: Tensor, every: Tensor) -> Tensor:
        lifted = {name: lift(params[name], name, every, root, visit) for name in params if name in leaves}
        with Watch(wanted, every, root, visit, measure=measure) as watch:
            out = f({**params, **lifted}, x_i[None])[0]
        notes.append(watch.notes)
        return out

    out = vmap(one_example)(x, torch.zeros(len(x), device=x.device))
    notes[0].c = out.shape[1]
    return out, root, notes[0]


def pull_back(out: Tensor, root: Tensor, v: Tensor) -> None:
    """Pull output directions ``[K, n, c]`` back through every watched operation."""
    if not out.requires_grad:  # no wanted parameter is used
        return

    def direction(v: Tensor) -> Tensor:
        torch.autograd.grad(out, root, v, allow_unused=True)
        return v.sum()

    vmap(direction)(v)


def general_program(f: Model, params: Params, x: Tensor) -> Program:
    """The program that writes out all gradients."""
    with torch.no_grad():
        out = f(params, x[:1])
    p = sum(w.numel() for w in params.values())
    cost_k = 2.0  # backpropagation to inputs and to parameters
    return Program(f, params, out.shape[1], out[:0], 2 * p, 2 * p, 0, 2 * p, 0, cost_k, len(params))


def _tracked(params: Params, leaves: frozenset[str]) -> Params:
    """Parameters that leave a trace in the graph wherever they are used without being watched."""
    return {name: w if name in leaves else w.detach().requires_grad_() for name, w in params.items()}


def structured_program(f: Model, params: Params, x: Tensor, key: Hashable | None = None) -> Structured:
    """Find out how to stream the layers of a model, and check on one example that the gradients are autograd's.

    Args:
        f: The model as a function f(params, x).
        params: Parameters whose gradients are wanted.
        x: Inputs, ``[n, *input]``.
        key: Fingerprint of the model: what was found out under the same one is not found out again.

    Raises:
        CaptureError: If they are not, or the model cannot be run under ``vmap``.
    """
    structure = known.recall(key)
    if structure is None:
        structure = _find_structure(f, params, x)
        known.remember(key, structure)
        key = None
    like = torch.empty(0, structure.c, dtype=structure.dtype, device=x.device)
    costs = {name: getattr(structure, name) for name in ("size", "size_k", "kept", "kept_k", "largest", "cost_k", "emissions")}
    return Structured(f, params, structure.c, like, **costs, leaves=structure.leaves, uses=structure.uses, key=key)


def _find_structure(f: Model, params: Params, x: Tensor) -> Structure:
    leaves: frozenset[str] = frozenset()
    while True:
        emissions: list[Emission] = []
        tracked = _tracked(params, leaves)
        out, root, notes = watched(f, tracked, leaves, x[:1], emissions.append)
        counts = Counter(name for _, names in notes.uses for name in names if name is not None)
        wrong = notes.unruled | {name for name, count in counts.items() if count > 1} | _unwatched(out, tracked)
        if not wrong:
            v = torch.cos(torch.arange(1.0, notes.c + 1, device=x.device)).to(out.dtype)
            pull_back(out, root, v[None, None])
            wrong = _disagreeing(f, params, x[:1], v, emissions)
        if not wrong:
            return _structure(params, leaves, notes, emissions, out.detach()[:0])
        if wrong <= leaves:
            msg = f"The gradients of {sorted(wrong)} are not autograd's."
            raise CaptureError(msg)
        leaves |= wrong


def _structure(params: Params, leaves: frozenset[str], notes: Survey, emissions: list[Emission], like: Tensor) -> Structure:
    outer = [factor for _, factor in emissions if isinstance(factor, Outer)]
    shapes = [(*factor.u.shape[1:], factor.g.shape[-1]) for factor in outer]  # t, groups, d, o
    forward = max(1, sum(t * groups * d * o for t, groups, d, o in shapes))
    norms = Norms(1, 1, None, like)
    contraction = sum(groups * min(*norms.costs(1, 1, t, d, o)) if t > 1 else 0 for t, groups, d, o in shapes)
    written = sum(params[name].numel() for name in leaves)
    kept, kept_k = (sum(numbers) for numbers in zip((0, 0), *(kept_numbers(factor) for _, factor in emissions), strict=True))
    return Structure(
        notes.c,
        like.dtype,
        size=notes.activations + max((factor.u.numel() for factor in outer), default=0),
        size_k=4 * notes.widest + 2 * written,
        kept=kept,
        kept_k=kept_k,
        largest=max((params[name].numel() for names, _ in emissions for name in names), default=0),
        cost_k=1.0 + contraction / forward,
        leaves=leaves,
        uses=tuple(notes.uses),
        emissions=len(emissions),
    )


def _unwatched(out: Tensor, params: Params) -> set[str]:
    """Names of parameters that the graph of the outputs reaches: used beside what is watched, on whichever examples it matters."""
    names = {id(w): name for name, w in params.items()}
    found: set[str] = set()
    seen: set[Any] = set()
    todo: list[Any] = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(names.get(id(getattr(node, "variable", None)), ""))  # where a graph ends, it names the tensor
            todo += [before for before, _ in node.next_functions]
    return found - {""}


def _disagreeing(f: Model, params: Params, x: Tensor, v: Tensor, emissions: list[Emission]) -> frozenset[str]:
    """Names of parameters whose squared gradient norm, by the factors, is not what plain autograd finds."""
    leaf = {name: w.detach().requires_grad_() for name, w in params.items()}
    out = f(leaf, x)[0]
    if not out.requires_grad:
        return frozenset(name for names, _ in emissions for name in names)
    grads = torch.autograd.grad(out, list(leaf.values()), v, allow_unused=True)
    truth = {name: 0.0 if g is None else float(g.square().sum()) for name, g in zip(leaf, grads, strict=True)}
    scale = sum(truth.values())
    tolerance = TOLERANCE * max(torch.finfo(w.dtype).eps for w in (out, *params.values()))
    found: dict[tuple[str, ...], float] = {(name,): 0.0 for name in params}
    with torch.no_grad():
        for names, factor in emissions:
            norms = Norms(1, 1, None, out)
            norms.add(factor)
            found[names] = float(norms.total)
    for names in [names for names in found if len(names) > 1]:
        for name in names:
            found.pop((name,), None)
    wrong: set[str] = set()
    for names, value in found.items():
        expected = sum(truth[name] for name in names)
        if not abs(value - expected) <= tolerance * (expected + 1e-6 * scale):
            wrong.update(names)
    return frozenset(wrong)
