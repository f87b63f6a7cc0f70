"""Products between the positions of convolutions, from their pixels, are what the definition finds."""

from itertools import product

import pytest
import torch
from convolutions import factor_of
from engine_case import assert_kernel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import ntk_by_definition, reduce_by_definition, trace_by_definition
from small_networks import convolutional

from ntklib import empirical_ntk, ntk_diagonal, ntk_trace
from ntklib.kernels import positions, reductions, winograd
from ntklib.kernels.operations import convolution
from ntklib.kernels.positions import PixelProducts, Products, Windows
from ntklib.kernels.reductions import ACCUMULATORS
from ntklib.random import stream

AXIS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 5),
        "taps": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "before": st.integers(0, 3),
        "after": st.integers(0, 2),
    }
)


def normal(*shape, use="x"):
    return torch.randn(*shape, generator=stream(0, use), dtype=torch.float64)


def seen(x, axes, counts):
    """What every position sees of images ``[n, l, c, *space]``, by loops: ``[n, l * positions, taps * c]``."""
    n, images, c = x.shape[:3]
    u = torch.zeros(n, images, *counts, *(a["taps"] for a in axes), c, dtype=x.dtype)
    for place in product(*map(range, counts)):
        for tap in product(*(range(a["taps"]) for a in axes)):
            pixel = tuple(q + a["dilation"] * b - a["before"] for q, b, a in zip(place, tap, axes, strict=True))
            if all(0 <= p < a["size"] for p, a in zip(pixel, axes, strict=True)):
                u[(slice(None), slice(None), *place, *tap)] = x[(slice(None), slice(None), slice(None), *pixel)]
    return u.flatten(1, 1 + len(axes)).flatten(2)


@settings(deadline=None)
@given(axes=st.lists(AXIS, min_size=1, max_size=3), images=st.integers(1, 2))
def test_products_from_pixels_are_those_of_what_positions_see(axes, images):
    counts = [a["size"] + a["before"] + a["after"] - a["dilation"] * (a["taps"] - 1) for a in axes]
    assume(min(counts) > 0)
    assume(images * torch.Size(counts).numel() <= 200)
    taps, dilation, before, space = (tuple(a[name] for a in axes) for name in ("taps", "dilation", "before", "size"))
    pixels = PixelProducts(Windows(taps, dilation, before, tuple(counts)), space)
    x1, x2 = normal(2, images, 3, *space), normal(3, images, 3, *space, use="y")
    u1, u2 = seen(x1, axes, counts), seen(x2, axes, counts)
    v1, v2 = (x.movedim(2, -1).flatten(1, -2) for x in (x1, x2))
    every = torch.einsum("itd,jsd->itjs", u1, u2)
    assert_kernel(pixels.between(v1, v2), every)
    assert_kernel(Products().between(u1, u2), every)
    both = torch.einsum("itd,isd->its", u1, u2[:2])
    assert_kernel(pixels.paired(v1, v2[:2]), both)
    assert_kernel(Products().paired(u1, u2[:2]), both)


SIZES = [
    {"size": (5, 4)},
    {"size": (4, 3), "images": 2},
    {"size": (9,), "kernel": (5,), "dilation": 2},
    {"size": (5, 4), "kernel": (2, 4), "padding": "same"},  # one more behind than before
]


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("n1", [None, 2])
@pytest.mark.parametrize("cache", [1, 2**18])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_reduction_is_the_same_from_pixels(kind, n1, cache, sizes, monkeypatch, calls_of):
    if n1 is not None and kind in ("blocks", "norms"):
        n1 = 3  # pairs of example n and n
    monkeypatch.setattr(reductions, "_CACHE", cache)
    factor, found = factor_of(6, 3, 4, 5, **sizes), []
    calls = calls_of(positions, "_along")
    for entry in (0.0, 1e9):
        monkeypatch.setattr(positions, "multiply_adds", lambda *_, entry=entry: entry)
        sums = ACCUMULATORS[kind](6, 3, n1, factor.g)
        monkeypatch.setattr(sums, "costs", lambda *_: (1.0, 0.0))
        sums.add(factor)
        found.append((sums.result().clone(), len(calls)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-11)
    assert found[0][1] == found[1][1] > 0  # used the first time, and not again


@pytest.mark.parametrize("reason", ["dearer", "rank one", "unused positions"])
@pytest.mark.parametrize("explicit", [True, False], ids=["tiles", "pixels"])
def test_tiles_and_pixels_are_left_where_another_order_is_cheaper(reason, explicit, monkeypatch):
    factor = factor_of(6, 3, 4, 24, (8, 8), rank_one=reason == "rank one")
    if reason == "unused positions":
        factor.g[:, :, 8:] = 0
    module, name = (winograd, "write_out") if explicit else (positions, "_along")
    monkeypatch.setattr(module, name, lambda *_: pytest.fail("used"))
    monkeypatch.setattr(positions, "multiply_adds", lambda *_: 0.0)
    monkeypatch.setattr(winograd, "gradients_worthwhile", lambda *_: explicit)
    sums, plain = ACCUMULATORS[None](6, 3, None, factor.g), ACCUMULATORS[None](6, 3, None, factor.g)
    cheap = (0.0, 1.0) if explicit else (1.0, 0.0)
    monkeypatch.setattr(sums, "costs", lambda *_: cheap[::-1] if reason == "dearer" else cheap)
    sums.add(factor)
    monkeypatch.setattr(plain, "_windowed", lambda *_: False)
    plain.add(factor)
    torch.testing.assert_close(sums.result(), plain.result(), rtol=1e-11, atol=1e-11)


def test_pixels_are_worthwhile_for_many_channels_and_enough_positions():
    windows = Windows((3, 3), (1, 1), (1, 1), (8, 8))

    def worthwhile(c, t=64, windows=windows, device="cpu"):
        taps = torch.Size(windows.taps).numel()
        return positions.multiply_adds(windows, c, torch.empty(16, 10, t, 1, device=device)) < taps * c

    assert worthwhile(256)
    assert worthwhile(256, device="meta")
    assert worthwhile(64)
    assert not worthwhile(16)
    assert not worthwhile(64, device="meta")  # to add is dearer elsewhere
    assert not worthwhile(256, t=4)  # too few for the additions to begin
    assert not worthwhile(4096, windows=Windows((1, 1), (1, 1), (0, 0), (8, 8)))


def test_fewer_products_may_tip_the_order(calls_of):
    """Of these sizes gradients written out take fewer multiply-adds than plain products between positions, not than from pixels."""
    calls, factor = calls_of(positions, "_along"), factor_of(4, 3, 256, 8, (8, 8))
    sums = ACCUMULATORS["norms"](4, 3, None, factor.g)
    t, d, o = 64, 9 * 256, 8
    explicit, plain = sums.costs(4, 3, t, d, o)
    assert explicit < plain
    assert positions.multiply_adds(factor.windows, 256, factor.g[..., 0, :]) + 3 * o < explicit / (4 * t * t)
    sums.add(factor)
    assert calls


@pytest.mark.parametrize(("stride", "groups"), [((2, 1), 1), ((1, 1), 2)])
def test_positions_with_stride_and_groups_have_no_windows(stride, groups):
    op = convolution(torch.empty(4, 4 // groups, 3, 3), None, ("w", None), stride, 1, 1, groups)
    op.saved = torch.empty(2, 1, 4, 6, 6)
    [(_, factor)] = op.factors(torch.empty(3, 2, 1, 4, -(-6 // stride[0]), 6))
    assert factor.windows is None


LAYERS = {
    "same": torch.nn.Conv2d(4, 3, 3, padding="same"),
    "even kernel": torch.nn.Conv2d(4, 3, (2, 4), padding=(1, 2), bias=False),
    "same, even kernel": torch.nn.Conv2d(4, 3, (2, 4), padding="same"),
    "dilated": torch.nn.Conv2d(4, 3, 3, padding=3, dilation=2),
    "circular": torch.nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_all_kernels_are_the_same_from_pixels(name, monkeypatch, calls_of):
    net, x = convolutional(LAYERS[name], (5, 6))
    monkeypatch.setattr(positions, "multiply_adds", lambda *_: 0.0)
    for accumulator in ACCUMULATORS.values():
        monkeypatch.setattr(accumulator, "costs", lambda *_: (1.0, 0.0))
    calls, kernel = calls_of(positions, "_along"), ntk_by_definition(net, x, x)
    assert_kernel(empirical_ntk(net, x), kernel)
    assert_kernel(empirical_ntk(net, x[:1], x[1:]), kernel[:1, 1:])
    for reduce in ("trace", "diagonal"):
        assert_kernel(empirical_ntk(net, x, reduce=reduce), reduce_by_definition(kernel, reduce))
    assert_kernel(ntk_diagonal(net, x), torch.stack([kernel[i, i] for i in range(len(x))]))
    assert ntk_trace(net, x, normalize=False).mean == pytest.approx(trace_by_definition(kernel), rel=1e-12)
    assert calls
