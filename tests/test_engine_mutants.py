"""The tests can fail: mistakes put into the engine are seen, by the comparison with the definition or by the engine itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_case import assert_kernel
from engine_cases import truth
from reference import reduce_by_definition, trace_by_definition
from test_engine_rules import assert_kernels, blocks_by_definition, layer_of

from ntklib.estimators import ntk_trace
from ntklib.kernels import (
    contract,
    evaluate,
    jacobian,
    known,
    ntk_by_layer,
    ntk_diagonal,
    operations,
    reductions,
    streaming,
    uses,
)
from ntklib.kernels.operations import Outer, Rows

Mutant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def nothing_known():
    """What was found out with the right rules says nothing about the wrong ones, and the other way round."""
    known.forget()
    yield
    known.forget()


def outcome(name: str) -> str:
    """What the comparisons of ``test_engine_rules`` say about a case: right, wrong, or an error of the engine."""
    t = truth(name)
    try:
        assert_kernels(name)
        assert_kernels(name, [None], chunk_size=1)
        assert_kernel(ntk_diagonal(t.model, t.x1), blocks_by_definition(t.kernel()))
        assert ntk_trace(t.model, t.x1, normalize=False).mean == pytest.approx(trace_by_definition(t.kernel()), rel=1e-12)
        for layer, part in ntk_by_layer(t.model, t.x1, reduce="trace").items():
            own = [parameter for parameter in t.gradients1 if layer_of(parameter) == layer]
            assert_kernel(part, reduce_by_definition(t.kernel(names=own), "trace"), float(t.kernel().abs().max()))
    except AssertionError:
        return "wrong"
    except (RuntimeError, ValueError):
        return "error"
    return "right"


def changed(owner: object, name: str, change: Callable[[Callable], Callable]) -> Mutant:
    """Replace ``owner.name`` by what ``change`` makes of it."""
    return lambda patch: patch.setattr(owner, name, change(getattr(owner, name)))


def emissions(change: Callable) -> Callable[[Callable], Callable]:
    """Change the factors of an operation."""
    return lambda factors: lambda self, g: ((names, change(factor)) for names, factor in factors(self, g))


def without_bias(factor):
    return replace(factor, bias=False) if isinstance(factor, Outer) else Rows(0 * factor.j)


def forget_ones(single):
    return lambda self, *factors_and_ones: single(self, *factors_and_ones[:-1], False)


def twice(method):
    return lambda self, *args: [method(self, *args), method(self, *args)][0]


def place_untransposed(place):
    def mutant(whole, part, tile, kind, *, symmetric):
        place(whole, part, tile, kind, symmetric=symmetric)
        if kind is None and symmetric and not tile.symmetric and part.shape[0] == part.shape[2]:
            whole[tile.columns, tile.column_outputs, tile.rows, tile.row_outputs] = part

    return mutant


def blind(patch: pytest.MonkeyPatch) -> None:
    """Take the engine's own check away."""
    patch.setattr(streaming, "_disagreeing", lambda *_: frozenset())


def in_small_pieces(mutant: Mutant) -> Mutant:
    return lambda patch: [patch.setattr(reductions, "_ROWS", 2), mutant(patch)][0]


def blindly(mutant: Mutant) -> Mutant:
    return lambda patch: [blind(patch), mutant(patch)][0]


def rank_one_of_anything(g: torch.Tensor):
    w = g.sum((0, 2))
    return w, torch.einsum("nkto,ko->nto", g, w / w.square().sum(0))


def counted_from_the_end(init):
    return lambda self, w, *args, padding_idx=None: init(
        self, w, *args, padding_idx=None if padding_idx is None else padding_idx - len(w)
    )


def other_tokens(factor):
    return replace(factor, given=torch.cat([factor.u[:1], factor.u[1:].flip(-1)]))  # the engine checks itself on the first example


def other_sign(vmap):
    """Change the sign of the gradients that the general method finds."""

    def mutant(function, *args, **options):
        def call(*inputs):
            out = vmap(function, *args, **options)(*inputs)
            return {name: -g for name, g in out.items()} if isinstance(out, dict) else out

        return call

    return mutant


SEEN_BY_TESTS: dict[str, tuple[str, Mutant]] = {
    "a bias is forgotten in the product": ("linear without bias", changed(reductions.Full, "single", forget_ones)),
    "a bias is forgotten in the trace": ("linear without bias", changed(reductions.Trace, "single", forget_ones)),
    "a bias is forgotten in the blocks": ("linear without bias", changed(reductions.Blocks, "single", forget_ones)),
    "a factor 2 in the kernel": ("conv2d", changed(reductions.Full, "rows", twice)),
    "a factor 2 in the trace": ("conv2d", changed(reductions.Trace, "rows", twice)),
    "a factor 2 in the diagonal": ("conv2d", changed(reductions.Diagonal, "rows", twice)),
    "a factor 2 in the norms": ("embedding bag", changed(reductions.Norms, "rows", twice)),
    "no mirror image": ("linear", in_small_pieces(changed(reductions, "mirror", lambda _: lambda *_: None))),
    "a transposed block": ("linear on grids", changed(evaluate, "_place", place_untransposed)),
    "every layer is the first": (
        "linear without bias",
        changed(evaluate, "layers", lambda _: lambda _model, params: dict.fromkeys(params, next(iter(params)).rpartition(".")[0])),
    ),
    "directions of ones": ("linear", changed(evaluate, "directions", lambda f: lambda *args: torch.ones_like(f(*args)))),
    "everything is of rank one": ("conv2d", changed(contract, "rank_one", lambda _: rank_one_of_anything)),
    "an unweighted channel": (
        "pooled head",
        changed(reductions.Diagonal, "channels", lambda f: lambda self, w1, s1, w2, s2: f(self, w1.abs().sqrt(), s1, w2, s2)),
    ),
    "padding counts": (
        "padding index",
        changed(operations.Embedding, "__init__", lambda init: lambda self, *args, **_: init(self, *args)),
    ),
    "a negative padding index": ("negative padding index", changed(operations.Embedding, "__init__", counted_from_the_end)),
    "a bias is not emitted": ("conv2d", blindly(changed(operations.Convolution, "factors", emissions(without_bias)))),
    "weights of a convolution are reversed": (
        "conv2d",
        blindly(changed(operations.Convolution, "pull_back", lambda f: lambda self, g: f(self, g).flip(-1))),
    ),
    "a tied weight is used once": ("module used twice", blindly(changed(streaming, "Counter", lambda _: lambda _names: {}))),
    "a gradient loses its signs": (
        "layer norm",
        changed(operations.Scale, "factors", emissions(lambda factor: Rows(factor.j.abs()))),
    ),
    "tokens change places": ("embedding", changed(operations.Embedding, "factors", emissions(other_tokens))),
    "norms are twice as large": ("linear on sequences", changed(reductions.Norms, "contracted", twice)),
    "uses beside the watched ones do not count": (
        "a parameter as the input of a layer",
        changed(streaming, "_unwatched", lambda _: lambda *_: set()),
    ),
    "batching rules are trusted": ("an operation that vmap runs wrongly", changed(jacobian, "agrees", lambda _: lambda *_: True)),
}


SEEN_BY_THE_ENGINE: dict[str, tuple[str, Mutant]] = {
    "a bias is not emitted": ("conv2d", changed(operations.Convolution, "factors", emissions(without_bias))),
    "a bias of a linear layer is not emitted": ("linear", changed(operations.Linear, "factors", emissions(without_bias))),
    "the input's gradient is reversed": (
        "conv2d",
        changed(operations.Convolution, "pull_back", lambda f: lambda self, g: f(self, g).flip(-1)),
    ),
    "the input's gradient is twice as large": (
        "linear on grids",
        changed(operations.Linear, "pull_back", lambda f: lambda self, g: 2 * f(self, g)),
    ),
    "the stride's rest is forgotten": (
        "conv2d with rows left over",
        changed(operations.Convolution, "pull_back", lambda f: lambda self, g: f(self, g)[..., :-1]),
    ),
    "groups change places": ("groups", changed(operations.Convolution, "_patches", lambda f: lambda self, x: f(self, x).flip(2))),
    "dilation is forgotten": (
        "conv1d",
        changed(uses.operations, "convolution", lambda f: lambda *args: f(*args[:5], 1, *args[6:])),
    ),
    "padding is forgotten": (
        "functional conv2d",
        changed(uses.operations, "convolution", lambda f: lambda *args: f(*args[:4], 0, *args[5:])),
    ),
    "statistics of batch norm are forgotten": (
        "batch norm of images",
        changed(operations.Scale, "pull_back", lambda _: lambda _self, g: g),
    ),
    "outputs change places": (
        "linear on grids",
        changed(operations.Linear, "forward", lambda f: lambda self, x: f(self, x).flip(-1)),
    ),
    "a general gradient has another sign": ("control flow that looks at the data", changed(jacobian, "vmap", other_sign)),
}


@pytest.mark.parametrize("name", SEEN_BY_TESTS)
def test_a_mistake_in_the_engine_makes_the_comparison_with_the_definition_fail(name, monkeypatch):
    case, mutant = SEEN_BY_TESTS[name]
    truth(case)
    mutant(monkeypatch)
    assert outcome(case) == "wrong"


@pytest.mark.parametrize("name", SEEN_BY_THE_ENGINE)
def test_a_mistake_in_a_rule_is_seen_by_the_engine_which_then_does_without_the_rule(name, monkeypatch):
    case, mutant = SEEN_BY_THE_ENGINE[name]
    truth(case)
    mutant(monkeypatch)
    calls = count_calls(monkeypatch)
    assert outcome(case) == "right"
    assert calls, "the mutant was not met"


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect a number whenever the engine's own checks find something."""
    found: list[int] = []

    def noting(check, wrong):
        def wrapper(*args):
            result = check(*args)
            if wrong(result):
                found.append(1)
            return result

        return wrapper

    def general(program):
        return lambda *args: [found.append(1), program(*args)][1]

    monkeypatch.setattr(streaming, "_disagreeing", noting(streaming._disagreeing, bool))
    monkeypatch.setattr(jacobian, "agrees", noting(jacobian.agrees, lambda found: not found))
    monkeypatch.setattr(evaluate, "general_program", general(evaluate.general_program))
    return found
