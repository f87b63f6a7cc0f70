"""Tiles cover a kernel once, directions select the outputs of a tile, and plans keep to the memory that they are given."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntklib.kernels.plan import Plan, directions, make_plan, tiles
from ntklib.kernels.streaming import Program

PROGRAM = Program(
    f=lambda _, x: x,
    params={"w": torch.zeros(50)},
    c=7,
    like=torch.empty(0, 7),
    size=1000,
    size_k=400,
    kept=1000,
    kept_k=400,
    largest=50,
    cost_k=1.0,
    emissions=1,
)


def covered(plan, n1, n2, c, kind):
    """How often each entry [row, output, column, output] is given by a tile or by its mirror image."""
    count = torch.zeros(n1, c, n1 if n2 is None else n2, c, dtype=torch.int64)
    for t in tiles(plan, n1, n2, c, kind):
        count[t.rows, t.row_outputs, t.columns, t.column_outputs] += 1
        if n2 is None and not t.symmetric:
            count[t.columns, t.column_outputs, t.rows, t.row_outputs] += 1
    return count


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.integers(1, 7), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 5), st.integers(1, 8), st.integers(1, 6))
def test_tiles_give_every_entry_of_the_full_kernel_once(n1, n2, c, examples, outputs):
    assert bool((covered(Plan(examples, outputs, 0), n1, n2, c, None) == 1).all())


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.integers(1, 7), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 5), st.integers(1, 8), st.integers(1, 6))
def test_reductions_take_every_pair_of_examples_once_per_output(n1, n2, c, examples, outputs):
    for kind in ("trace", "diagonal"):
        diagonal = covered(Plan(examples, outputs, 0), n1, n2, c, kind).diagonal(dim1=1, dim2=3)
        assert bool((diagonal == 1).all())


@pytest.mark.parametrize("kind", ["blocks", "norms"])
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_blocks_and_norms_take_every_example_with_itself_once(kind, outputs):
    count = covered(Plan(2, outputs, 0), 5, None, 5, kind)
    own = count.diagonal(dim1=0, dim2=2)  # [c, c, n]
    own = own if kind == "blocks" else own.diagonal(dim1=0, dim2=1)
    assert bool((own == 1).all())


def test_directions_are_rows_of_the_identity_and_zero_where_a_tile_has_fewer_outputs():
    tile = next(t for t in tiles(Plan(2, 3, 0), 2, None, 5, None) if not t.symmetric)  # outputs 0-2 of rows, 3-4 of columns
    v = directions(tile, 5, torch.empty(0, dtype=torch.float64))
    expected = torch.zeros(3, 4, 5, dtype=torch.float64)
    for k in range(3):
        expected[k, :2, k] = 1
    for k in range(2):
        expected[k, 2:, 3 + k] = 1
    assert torch.equal(v, expected)


def plan(n, kind, **options):
    return make_plan(PROGRAM, n, None, kind, **{"layers": 1, "chunk_size": None, "max_memory": None, **options})


def test_what_fits_is_done_in_one_tile():
    assert len(list(tiles(plan(20, None), 20, None, 7, None))) == 1


@pytest.mark.parametrize("kind", [None, "trace", "diagonal", "blocks", "norms"])
@pytest.mark.parametrize("limit", [100_000, 300_000, 1_000_000])
def test_a_plan_keeps_to_the_memory_that_it_is_given(kind, limit):
    chosen = plan(40, kind, max_memory=limit + 4 * 40 * 40 * 49)
    assert chosen.needed <= limit + 4 * 40 * 40 * 49
    assert chosen.examples >= 1
    assert chosen.outputs >= 1


def test_more_memory_never_gives_smaller_chunks():
    sizes = [plan(400, "trace", max_memory=limit).examples for limit in (1_000_000, 2_000_000, 8_000_000, 64_000_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_thousands_of_outputs_are_taken_in_parts():
    many = replace(PROGRAM, c=100_000, like=torch.empty(0, 100_000))
    chosen = make_plan(many, 4, None, "norms", layers=1, chunk_size=None, max_memory=8_000_000)
    assert 1 <= chosen.outputs < 100_000
    assert chosen.needed <= 8_000_000


def test_a_result_that_cannot_fit_is_refused_with_the_bytes():
    with pytest.raises(ValueError, match=r"1,960,000 bytes. Got 1,000 bytes available. Take fewer examples"):
        plan(100, None, max_memory=1000)
    with pytest.raises(ValueError, match="the result alone"):
        plan(10**7, None)


def test_a_chunk_of_the_callers_choice_is_kept():
    assert plan(40, None, chunk_size=3).examples == 3
    for name in ("chunk_size", "max_memory"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1. Got 0."):
            plan(40, None, **{name: 0})
