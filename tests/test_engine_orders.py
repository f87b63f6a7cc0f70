"""Every order in which factors can be contracted gives what the written-out gradients give."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from engine_case import assert_kernel
from engine_cases import truth
from hypothesis import given
from hypothesis import strategies as st
from reference import reduce_by_definition
from test_plan import PROGRAM
from torch.utils._python_dispatch import TorchDispatchMode

from ntklib.kernels import blocks, contract, empirical_ntk, evaluate, ntk_diagonal, positions, reductions
from ntklib.kernels.capture import CaptureError
from ntklib.kernels.gather import Gathered
from ntklib.kernels.operations import Factor, Outer, Rows
from ntklib.kernels.plan import pass_size
from ntklib.kernels.reductions import ACCUMULATORS, Full
from ntklib.random import stream

ORDERS = {"explicit": (0.0, 1.0), "contracted": (1.0, 0.0), "by cost": None}
K, N = 3, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "factor"), dtype=torch.float64)


def outer(t: int, groups: int, *, bias: bool = False) -> Outer:
    return Outer(normal(N, t, groups, 4), normal(N, K, t, groups, 2, seed=1), bias)


FACTORS: dict[str, Factor] = {
    "rows": Rows(normal(N, K, 4)),
    "one position": outer(1, 1),
    "one position and bias": outer(1, 1, bias=True),
    "positions": outer(3, 1),
    "positions and bias": outer(3, 1, bias=True),
    "groups": outer(3, 2),
    "groups and bias": outer(3, 2, bias=True),
    "groups at one position": outer(1, 2, bias=True),
    "rank one": Outer(normal(N, 3, 1, 4), (normal(K, 1, 2, seed=1) * normal(N, 1, 3, 2, seed=2))[:, :, :, None], bias=True),
    "rank one in many channels": Outer(normal(N, 3, 1, 4), (normal(K, 1, 40, seed=1) * normal(N, 1, 3, 40, seed=2))[:, :, :, None]),
    "rank one with a dead channel": Outer(
        normal(N, 3, 1, 4), (normal(K, 1, 2, seed=1) * torch.tensor([0.0, 1.0]) * normal(N, 1, 3, 2, seed=2))[:, :, :, None]
    ),
}

for some, places in (("one position", [1]), ("some positions", [0, 2]), ("no position", [])):
    kept = torch.zeros(3).double().index_fill_(0, torch.tensor(places, dtype=torch.int64), 1.0)[:, None, None]
    FACTORS[f"{some} used"] = Outer(normal(N, 3, 1, 4), normal(N, K, 3, 1, 2, seed=1) * kept, bias=True)
    FACTORS[f"{some} used, with groups"] = Outer(normal(N, 3, 2, 4), normal(N, K, 3, 2, 2, seed=1) * kept, bias=True)
unused_once = normal(N, K, 3, 1, 2, seed=1)
unused_once[0, :, 1] = 0
FACTORS["a position unused by the first example"] = Outer(normal(N, 3, 1, 4), unused_once)


def written_out(factor: Factor) -> torch.Tensor:
    """The gradients ``[n, k, p]`` by loops over what the factor's definition sums."""
    if isinstance(factor, Rows):
        return factor.j
    n, t, groups, d = factor.u.shape
    o = factor.g.shape[-1]
    weight = torch.zeros(n, K, groups, o, d, dtype=torch.float64)
    bias = torch.zeros(n, K, groups, o, dtype=torch.float64)
    for i, k, s, group, a in product(range(n), range(K), range(t), range(groups), range(o)):
        weight[i, k, group, a] += factor.g[i, k, s, group, a] * factor.u[i, s, group]
        bias[i, k, group, a] += factor.g[i, k, s, group, a]
    return torch.cat([weight.flatten(2), bias.flatten(2)], 2) if factor.bias else weight.flatten(2)


def expected(kind: str | None, j1: torch.Tensor, j2: torch.Tensor) -> torch.Tensor:
    kernel = torch.einsum("iap,jbp->ijab", j1, j2)
    if kind == "blocks":
        return torch.stack([kernel[i, i] for i in range(len(j1))])
    if kind == "norms":
        return torch.stack([kernel[i, i].diagonal() for i in range(len(j1))])
    reduced = reduce_by_definition(kernel, kind)
    return reduced.transpose(1, 2) if kind is None else reduced  # example-major


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """Contract in this order, in pieces as small as they get."""
    for accumulator in ACCUMULATORS.values() if ORDERS[request.param] else ():
        monkeypatch.setattr(accumulator, "costs", lambda *_: ORDERS[request.param])
    monkeypatch.setattr(blocks, "BUDGET", 1)
    monkeypatch.setattr(reductions, "_ROWS", 2)
    monkeypatch.setattr(reductions, "_CACHE", 1)
    monkeypatch.setattr(contract, "_BEGIN", 0)
    monkeypatch.setattr(positions, "multiply_adds", lambda *_: 0.0)  # products of pixels wherever there are windows
    return request.param


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("seen", [True, False], ids=["rank one is looked for", "rank one is not looked for"])
def test_factors_contract_to_products_of_their_gradients(kind, name, seen, monkeypatch):
    if not seen:
        monkeypatch.setattr(contract, "rank_one", lambda _: None)
    factor, j = FACTORS[name], written_out(FACTORS[name])
    for n1 in (None, 2):
        n2 = {None: N, 2: 4}[n1]
        paired = kind in ("blocks", "norms")  # compare the first set, example by example, with a second of the same size
        first, second = (j, j) if n1 is None else (j[:2], j[2:n2] if paired else j[2:])
        part = factor if n1 is None or not paired else cut(factor, slice(n2))
        sums = ACCUMULATORS[kind](N if part is factor else n2, K, n1, j)
        for _ in range(2):
            sums.add(part)
        assert_kernel(sums.result(), 2 * expected(kind, first, second))


@pytest.mark.parametrize(("o", "d"), [(16, 27), (16, 9), (32, 48), (5, 27), (16, 160)])
@pytest.mark.parametrize("gathered", [True, False], ids=["gradients are kept", "gradients in blocks"])
@pytest.mark.parametrize("n1", [None, 2])
def test_gradients_in_single_precision_are_the_same_whichever_axis_is_last(o, d, gathered, n1, monkeypatch):
    monkeypatch.setattr(blocks, "BUDGET", 2**15)  # the larger ones in several blocks
    exact = Outer(normal(N, 40, 1, d), normal(N, K, 40, 1, o, seed=1), bias=True)
    single = Outer(exact.u.float(), exact.g.float(), bias=True)
    sums = Full(N, K, n1, single.u)
    monkeypatch.setattr(sums, "costs", lambda *_: ORDERS["explicit"])
    if gathered:
        whole = Gathered(N, lambda _: sums)
        for part in (slice(0, 2), slice(2, N)):
            whole.visitor(part)((("w",), cut(single, part)))
        [(_, single)] = whole.factors()
    sums.add(single)
    j = torch.cat([torch.einsum("ntgd,nktgo->nkgdo", exact.u, exact.g).flatten(2), exact.g.sum(2).flatten(2)], 2)
    kernel = expected(None, j, j) if n1 is None else expected(None, j[:2], j[2:])
    assert (sums.result() - kernel).norm() <= 1e-5 * kernel.norm()


def cut(factor: Factor, part: slice) -> Factor:
    return Rows(factor.j[part]) if isinstance(factor, Rows) else Outer(factor.u[part], factor.g[part], factor.bias)


@given(o=st.integers(1, 600), d=st.integers(1, 6000), room=st.integers(0, 200_000))
def test_blocks_of_gradients_fit_in_their_memory_and_are_even(o, d, room):
    channels, inputs = blocks._block_shape(o, d, room)
    assert 1 <= channels <= o
    assert channels == o or channels % 64 == 0
    assert 1 <= inputs <= d
    assert channels * inputs <= max(room, min(o, 64))  # 64 channels of one input at least
    if inputs < d and room >= 16 * channels:
        assert inputs % 16 == 0
    least = -(-d // max(1, room // channels))
    assert least <= -(-d // inputs) <= 2 * least


def test_positions_that_no_output_depends_on_are_found():
    found = {name: blocks.used_positions(FACTORS[name].g) for name in FACTORS if isinstance(FACTORS[name], Outer)}
    used = {name: where.tolist() for name, where in found.items() if where is not None}
    assert used["one position used"] == [1]
    assert used["some positions used"] == used["some positions used, with groups"] == [0, 2]
    assert used["no position used"] == [0]  # one at least is kept
    assert found["positions"] is None
    both = blocks.used_positions(FACTORS["one position used"].g, FACTORS["some positions used"].g)
    assert both is not None
    assert both.tolist() == [0, 1, 2]


def test_gradients_of_rank_one_are_recognised_and_others_are_not():
    split = contract.rank_one(FACTORS["rank one"].g[..., 0, :])
    assert split is not None
    assert_kernel(split[0][None, :, None] * split[1][:, None], FACTORS["rank one"].g[..., 0, :])
    nearly = FACTORS["rank one"].g[..., 0, :].clone()
    nearly[-1, 0, 0, 0] *= 1 + 1e-9  # in the last example, so that a look at the first does not tell
    assert contract.rank_one(nearly) is None
    assert contract.rank_one(FACTORS["positions"].g[..., 0, :]) is None


class Counter(TorchDispatchMode):
    """Counts the operations that are carried out inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("t", [1, 2])
def test_depthwise_convolutions_take_no_more_operations_for_more_channels(kind, t):
    counts = []
    for channels in (8, 64):
        factor = Outer(normal(N, t, channels, 25), normal(N, K, t, channels, 1, seed=1))
        sums = ACCUMULATORS[kind](N, K, None, factor.u)
        with Counter() as counter:
            sums.add(factor)
        counts.append(counter.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("t", "d", "o", "groups", "written"), [(64, 2, 2, 1, True), (2, 64, 64, 1, False), (2, 64, 64, 2, True)])
def test_the_order_that_takes_less_is_chosen(t, d, o, groups, written, monkeypatch):
    """Many positions and few channels, the reverse, and the reverse in groups, which are few enough to be written out together."""
    called = []
    for name in ("write_out", "write_out_groups"):
        monkeypatch.setattr(contract, name, lambda *_, name=name: called.append(name) or iter(()))
    Full(N, K, None, normal(1)).add(Outer(normal(N, t, groups, d), normal(N, K, t, groups, o, seed=1)))
    assert called == (["write_out" + "_groups" * (groups > 1)] if written else [])


NETWORKS = ["self attention", "residual net", "modular addition transformer"]
SEVERAL = [
    "linear on grids",
    "conv1d",
    "conv2d",
    "conv3d",
    "reflect padding",
    "groups",
    "depthwise",
    "global pooling",
    "padding index",
]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", [*SEVERAL, *NETWORKS])
def test_kernels_of_networks_do_not_depend_on_the_order(name):
    t = truth(name)
    for cross in (False, True):
        for reduce in (None, "diagonal", "trace"):
            found = empirical_ntk(t.model, t.x1, t.x2 if cross else None, reduce=reduce)
            assert_kernel(found, reduce_by_definition(t.kernel(cross=cross), reduce))
    kernel = t.kernel()
    assert_kernel(ntk_diagonal(t.model, t.x1), torch.stack([kernel[i, i] for i in range(len(kernel))]))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "name", [*SEVERAL, "linear", "self attention", "residual net", "modular addition transformer", "module used twice"]
)
def test_kernels_of_networks_do_not_depend_on_how_many_examples_pass_at_a_time(name, size, monkeypatch):
    monkeypatch.setattr(evaluate, "pass_size", lambda *_: size)
    t = truth(name)
    for cross in (False, True):
        for reduce in (None, "diagonal", "trace"):
            found = empirical_ntk(t.model, t.x1, t.x2 if cross else None, reduce=reduce)
            assert_kernel(found, reduce_by_definition(t.kernel(cross=cross), reduce))


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("few", [True, False], ids=["gradients are kept", "inputs and output gradients are kept"])
@pytest.mark.usefixtures("order")
def test_factors_put_together_from_passes_are_whole(name, few):
    factor = FACTORS[name]
    if few and isinstance(factor, Outer):  # as many positions again, so that gradients are fewer numbers
        factor = Outer(factor.u.repeat(1, 12, 1, 1), factor.g.repeat(1, 1, 12, 1, 1), factor.bias)
    sums = Full(N, K, None, written_out(FACTORS[name]))
    gathered = Gathered(N, lambda _: sums)
    for part in (slice(0, 2), slice(2, N)):
        gathered.visitor(part)((("w",), cut(factor, part)))
    for _, whole in gathered.factors():
        sums.add(whole)
    j = written_out(factor)
    assert_kernel(sums.result(), expected(None, j, j))


def test_a_backward_pass_that_differs_from_call_to_call_is_an_error():
    gathered = Gathered(4, lambda _: Full(4, K, None, normal(1)))
    gathered.visitor(slice(0, 2))((("w",), Rows(normal(2, K, 4))))
    with pytest.raises(CaptureError, match="differs from call to call"):
        gathered.visitor(slice(2, 4))((("v",), Rows(normal(2, K, 4))))


def test_few_examples_pass_at_a_time_where_their_factors_are_small_beside_the_networks_tensors():
    program = replace(PROGRAM, size=10, size_k=10**6, kept=5, kept_k=10**5)
    assert pass_size(program, 64, 10) == 3  # 128 MiB of 4 bytes, a million of them in each of ten directions
    assert pass_size(program, 3, 10) == 3
    assert pass_size(program, 4, 10) == 2  # two passes as even as can be
    assert pass_size(replace(program, kept_k=6 * 10**5), 64, 10) == 64
    assert pass_size(replace(program, like=torch.empty(0, 7, device="meta")), 64, 10) == 64
