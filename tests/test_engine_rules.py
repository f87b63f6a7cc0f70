"""Every way of using a parameter, by every public function and in every size of chunk, against gradients by definition."""

from collections.abc import Sequence

import pytest
import torch
from engine_case import assert_kernel
from engine_cases import CASES, truth
from engine_operations import OPERATIONS
from reference import reduce_by_definition, trace_by_definition

from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, evaluate, ntk_by_layer, ntk_diagonal
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.plan import Plan
from ntklib.kernels.streaming import Structured

REDUCTIONS = (None, "trace", "diagonal")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, about the model
every_case = pytest.mark.parametrize("name", CASES)
SOME = [
    "pooled head",
    "groups",
    "batch norm of images",
    "embedding",
    "cross attention",
    "module used twice",
    "lstm",
    "unused parameters",
]


def assert_kernels(
    name: str, reductions: Sequence[str | None] = REDUCTIONS, *, sets: Sequence[bool] = (False, True), **options
) -> None:
    """Kernels of one set and of two, in full and reduced, are those of the definition."""
    t = truth(name)
    for cross in sets:
        for reduce in reductions:
            found = empirical_ntk(t.model, t.x1, t.x2 if cross else None, reduce=reduce, **options)
            assert_kernel(found, reduce_by_definition(t.kernel(cross=cross), reduce))


def blocks_by_definition(kernel: torch.Tensor) -> torch.Tensor:
    return torch.stack([kernel[i, i] for i in range(len(kernel))])


@every_case
def test_kernels_hold_the_inner_products_of_gradients(name):
    assert_kernels(name)


@every_case
def test_kernels_by_the_general_method_are_the_same(name):
    assert_kernels(name, [None], method="jacobian")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 2, "method": "jacobian"}])
def test_kernels_do_not_depend_on_the_chunk_size(name, options):
    assert_kernels(name, **options)


def in_small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "make_plan", lambda *_args, **_options: Plan(examples=2, outputs=2, needed=0))


@every_case
def test_kernels_do_not_depend_on_how_examples_and_outputs_are_divided(name, monkeypatch):
    in_small_tiles(monkeypatch)
    if name in SOME:
        assert_kernels(name)
    else:
        assert_kernels(name, [None], sets=[False])
    t = truth(name)
    assert_kernel(ntk_diagonal(t.model, t.x1), blocks_by_definition(t.kernel()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_pass_through_operations_without_parameters(name):
    t = OPERATIONS[name].truth()  # as many examples as outputs: batching rules that mix the two up are wrong without an error
    for method in ("auto", "jacobian"):
        assert_kernel(empirical_ntk(t.model, t.x1, method=method), t.kernel())


@every_case
def test_blocks_and_the_exact_trace_are_those_of_the_kernel(name):
    t = truth(name)
    assert_kernel(ntk_diagonal(t.model, t.x1), blocks_by_definition(t.kernel()))
    exact = trace_by_definition(t.kernel())
    assert ntk_trace(t.model, t.x1, normalize=False, chunk_size=2).mean == pytest.approx(exact, rel=1e-12)  # reordered sum


def layer_of(parameter: str) -> str:
    """The module that a parameter belongs to; a parametrized weight's is the one with the parametrization."""
    if ".parametrizations." in parameter:
        return parameter.split(".parametrizations.")[0]
    return parameter.rsplit(".", 1)[0]


@every_case
def test_every_layer_has_the_kernel_of_its_own_parameters_and_layers_sum_to_the_whole(name):
    t = truth(name)
    owners = [layer_of(parameter) for parameter in t.gradients1]
    for cross, reduce in [(False, None), (True, None), (False, "diagonal"), (True, "trace")]:
        scale = float(t.kernel(cross=cross).abs().max())
        parts = ntk_by_layer(t.model, t.x1, t.x2 if cross else None, reduce=reduce)
        assert list(parts) == list(dict.fromkeys(owners))
        for layer, part in parts.items():
            own = [parameter for parameter in t.gradients1 if layer_of(parameter) == layer]
            assert_kernel(part, reduce_by_definition(t.kernel(cross=cross, names=own), reduce), scale)
        assert_kernel(torch.stack(list(parts.values())).sum(0), reduce_by_definition(t.kernel(cross=cross), reduce), scale)


@every_case
def test_only_parameters_without_a_rule_are_written_out(name):
    case, t = CASES[name], truth(name)
    with prepared(Request(t.model, t.x1, None, None)) as (program, _, _):
        assert isinstance(program, Structured) == case.streams
        if isinstance(program, Structured):
            assert sorted(program.leaves) == sorted(case.leaves)
