"""From a request to kernels: check it, choose a program and a plan, go through the tiles."""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.checks import check_inputs, check_model, check_pair
from ntklib.functional import Model, Params, functional_model, unwrap
from ntklib.kernels.blocks import Scratch
from ntklib.kernels.contract import Accumulator
from ntklib.kernels.gather import Gathered
from ntklib.kernels.known import fingerprint
from ntklib.kernels.operations import Emission
from ntklib.kernels.plan import Plan, Tile, directions, make_plan, pass_size, tiles, with_smaller_chunks
from ntklib.kernels.reductions import ACCUMULATORS, Norms
from ntklib.kernels.streaming import Program, general_program, settings, structured_program
from ntklib.progress import FILE
from ntklib.text import check_known

METHODS = ("auto", "structured", "jacobian")


@dataclass(frozen=True)
class Request:
    """What the caller of a public function asked for; see ``empirical_ntk``. ``kind`` is a key of ``reductions.ACCUMULATORS``."""

    model: nn.Module
    x1: Tensor
    x2: Tensor | None
    kind: str | None
    method: str = "auto"
    output: str | None = None
    params: Iterable[str] | None = None
    chunk_size: int | None = None
    max_memory: int | None = None
    tf32: bool = False
    progress: bool = True
    by_layer: bool = False


@contextmanager
def prepared(request: Request) -> Iterator[tuple[Program, Tensor, Tensor | None]]:
    """Check a request, then yield its program and inputs, in the settings in which they are to be used.

    Raises:
        ValueError: As ``empirical_ntk``.
    """
    check_known("method", request.method, METHODS)
    params = None if request.params is None else list(request.params)
    check_inputs(request.x1, "x1")
    if request.x2 is not None:
        check_inputs(request.x2, "x2")
        check_pair(request.x1, request.x2)
    with settings(tf32=request.tf32), unchanged(request.model):
        f, chosen = functional_model(request.model, output=request.output, params=params)
        x1 = _usable(request.x1)
        check_model(f, chosen, x1)
        key = fingerprint(request.model, request.output, chosen, x1)
        yield choose_program(f, chosen, x1, request.method, key), x1, None if request.x2 is None else _usable(request.x2)


def evaluate(request: Request) -> dict[str, Tensor]:
    """Kernels by layer, or one kernel under the name ``""``.

    Raises:
        ValueError: As ``empirical_ntk``.
    """
    with prepared(request) as (program, x1, x2):
        keys = layers(request.model, program.params) if request.by_layer else dict.fromkeys(program.params, "")
        n2 = None if x2 is None else len(x2)
        count = len(set(keys.values()))
        options = {"layers": count, "chunk_size": request.chunk_size, "max_memory": request.max_memory}
        plan = make_plan(program, len(x1), n2, request.kind, **options)

        def attempt(plan: Plan) -> dict[str, Tensor]:
            return _assemble(program, plan, x1, x2, request.kind, keys, request.progress)

        with torch.no_grad():
            return with_smaller_chunks(attempt, plan, max(len(x1), n2 or 0), x1.device)


def square_norms_along(
    program: Program, x: Tensor, v: Tensor, *, chunk_size: int | None = None, max_memory: int | None = None
) -> Float[Tensor, "n q"]:
    r"""Squared norms :math:`\lVert J_i^T v_{iq} \rVert^2` of the gradients along output directions.

    Args:
        program: How gradients are streamed, from ``prepared``.
        x: Inputs, ``[n, *input]``.
        v: Directions of every example, ``[n, q, c]``.
        chunk_size: Examples worked on at a time.
        max_memory: Bytes that the work may take.
    """
    n, q, _ = v.shape
    plan = make_plan(replace(program, c=q), n, None, "norms", layers=1, chunk_size=chunk_size, max_memory=max_memory)

    def attempt(plan: Plan) -> Tensor:
        norms = v.new_zeros(n, q)
        for i in range(0, n, plan.examples):
            for j in range(0, q, plan.outputs):
                part = v[i : i + plan.examples, j : j + plan.outputs]
                sums = Norms(len(part), part.shape[1], None, program.like)
                program.stream(x[i : i + plan.examples], part.transpose(0, 1), _adder(sums))
                norms[i : i + plan.examples, j : j + plan.outputs] = sums.result()
        return norms

    with torch.no_grad():
        return with_smaller_chunks(attempt, plan, n, x.device)


def _adder(sums: Accumulator) -> Callable[[Emission], None]:
    return lambda emission: sums.add(emission[1])


def choose_program(f: Model, params: Params, x: Tensor, method: str, key: Hashable | None = None) -> Program:
    """The program that streams layers, or the general one if asked for or if the model allows no other."""
    if method == "jacobian":
        return general_program(f, params, x)
    try:
        return structured_program(f, params, x, key)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if method == "structured":
            msg = f"method='structured' requires a model that can be streamed; method='jacobian' takes any. Got: {error}"
            raise ValueError(msg) from error
        return general_program(f, params, x)


def _assemble(
    program: Program, plan: Plan, x1: Tensor, x2: Tensor | None, kind: str | None, keys: dict[str, str], progress: bool
) -> dict[str, Tensor]:
    """Go through the tiles and put them in their places."""
    n2 = None if x2 is None else len(x2)
    todo = list(tiles(plan, len(x1), n2, program.c, kind))
    names = list(dict.fromkeys(keys.values()))
    whole: dict[str, Tensor] = {}
    with _bar(len(todo) * program.emissions, enabled=progress) as tick:
        for tile in todo:
            parts = _tile(program, tile, x1, x2, kind, keys, names, tick)
            if len(todo) == 1:
                return {name: _shaped(part, kind) for name, part in parts.items()}
            for name, part in parts.items():
                if name not in whole:
                    whole[name] = part.new_zeros(_stored(kind, len(x1), n2 or len(x1), program.c))
                _place(whole[name], part, tile, kind, symmetric=x2 is None)
    return {name: _shaped(kernel, kind) for name, kernel in whole.items()}


def _tile(
    program: Program,
    tile: Tile,
    x1: Tensor,
    x2: Tensor | None,
    kind: str | None,
    keys: dict[str, str],
    names: list[str],
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    v = directions(tile, program.c, program.like)
    x = x1[tile.rows] if tile.symmetric else torch.cat([x1[tile.rows], (x1 if x2 is None else x2)[tile.columns]])
    split = None if tile.symmetric else tile.rows.stop - tile.rows.start
    scratch = Scratch(program.like)
    sums = {name: ACCUMULATORS[kind](len(x), len(v), split, program.like, scratch) for name in names}

    def visit(emission: Emission) -> None:
        sums[keys[emission[0][0]]].add(emission[1])
        tick()

    size = pass_size(program, len(x), len(v))
    if size == len(x):
        program.stream(x, v, visit)
    else:
        gathered = Gathered(len(x), lambda names: sums[keys[names[0]]])
        for i in range(0, len(x), size):
            program.stream(x[i : i + size], v[:, i : i + size], gathered.visitor(slice(i, min(len(x), i + size))))
        for emission in gathered.factors():
            visit(emission)
    return {name: accumulator.result() for name, accumulator in sums.items()}


def _stored(kind: str | None, n1: int, n2: int, c: int) -> tuple[int, ...]:
    return {None: (n1, c, n2, c), "trace": (n1, n2), "diagonal": (n1, n2, c), "blocks": (n1, c, c), "norms": (n1, c)}[kind]


def _place(whole: Tensor, part: Tensor, tile: Tile, kind: str | None, *, symmetric: bool) -> None:
    """Put a tile's kernel, and its mirror image if the whole is symmetric, where they belong."""
    i, a, j, b = tile.rows, tile.row_outputs, tile.columns, tile.column_outputs
    ka, kb = a.stop - a.start, b.stop - b.start
    if kind is None:
        whole[i, a, j, b] = part[:, :ka, :, :kb]
        if symmetric and not tile.symmetric:
            whole[j, b, i, a] = part[:, :ka, :, :kb].permute(2, 3, 0, 1)
    elif kind == "trace":
        whole[i, j] += part
        if symmetric and i != j:
            whole[j, i] += part.T
    elif kind == "diagonal":
        whole[i, j, a] = part
        if symmetric and i != j:
            whole[j, i, a] = part.transpose(0, 1)
    elif kind == "blocks":
        whole[i, a, b] = part[:, :ka, :kb]
        if not tile.symmetric:
            whole[i, b, a] = part[:, :ka, :kb].mT
    else:
        whole[i, a] = part


def _shaped(kernel: Tensor, kind: str | None) -> Tensor:
    return kernel.transpose(1, 2) if kind is None else kernel  # [n1, c, n2, c] in memory: flattening copies nothing


def layers(model: nn.Module, params: Params) -> dict[str, str]:
    """For every parameter the name of its module; parameters of the model itself keep their own."""
    owners = {name: name.rpartition(".")[0] or name for name in params}
    inside = [name for name, _ in unwrap(model).named_modules()]

    def home(owner: str) -> str:  # a parametrized weight belongs to the module that it parametrizes
        return owner.partition(".parametrizations")[0] if ".parametrizations" in owner else owner

    return {name: home(owner) if owner in inside else owner for name, owner in owners.items()}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Raise if the work inside changes a parameter; random generators are put back as they were."""
    versions = {name: w._version for name, w in model.named_parameters()}
    failure: RuntimeError | None = None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else ()):
        try:
            yield
        except RuntimeError as error:  # autograd refuses some changes
            failure = error
    for name, w in model.named_parameters():
        if w._version != versions[name]:
            msg = f"The model must not change its parameters in a forward pass. Got a change of {name!r}."
            raise ValueError(msg) from failure
    if failure is not None:
        raise failure


def _usable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x.detach()


@contextmanager
def _bar(total: int, *, enabled: bool) -> Iterator[Callable[[], None]]:
    if not enabled or os.environ.get(FILE):
        yield lambda: None
        return
    from tqdm.std import tqdm  # text, not a widget

    with tqdm(total=total, desc="kernel", unit=" layers", delay=5, leave=False) as bar:

        def tick() -> None:
            bar.update()

        yield tick
