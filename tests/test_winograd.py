"""Convolutions of 3 x 3 taps by tiles are what the definition and automatic differentiation find, to rounding."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from convolutions import factor_of, weights
from engine_case import assert_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ntk_by_definition, reduce_by_definition, trace_by_definition
from small_networks import convolutional

from ntklib import empirical_ntk, ntk_diagonal, ntk_trace
from ntklib.kernels import winograd
from ntklib.kernels.blocks import Scratch
from ntklib.kernels.positions import Windows
from ntklib.kernels.reductions import ACCUMULATORS
from ntklib.random import stream

AXIS = st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 3))  # positions, padding before and after


def gradient(shape, weight, before, after, dtype=torch.float64):
    """Output gradients of a padded convolution, and the input gradients of plain autograd."""
    generator = stream(0, "winograd")
    x = torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
    amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    z = torch.nn.functional.conv2d(torch.nn.functional.pad(x, amounts), weight.double())
    g = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(dtype)
    return g, torch.autograd.grad(z, x, g.double())[0]


@settings(deadline=None)
@given(axes=st.tuples(AXIS, AXIS), channels=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_the_transpose_by_tiles_is_the_gradient_of_the_convolution(axes, channels):
    axes = [(max(size, 3 - before - after), before, after) for size, before, after in axes]
    size, before, after = zip(*axes, strict=True)
    w = weights(*channels)
    g, expected = gradient((2, channels[1], *size), w, before, after)
    torch.testing.assert_close(winograd.transposed(g, w, size, before), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("images", "space"), [(1, (32, 32)), (2, (32, 32)), (5, (32, 32)), (2, (80, 76)), (1, (79, 75)), (1, (5, 1200))]
)
def test_images_are_worked_on_a_few_at_a_time(images, space):
    w = weights(64, 64)  # a block has 128 tiles: two small images, so that the last of five is alone, or some rows of a large one
    g, expected = gradient((images, 64, *space), w, (1, 1), (1, 1))
    found = winograd.transposed(g, w, space, (1, 1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_points_keep_rounding_errors_small(monkeypatch):
    w = weights(64, 64).float()
    g, expected = gradient((4, 64, 16, 16), w, (1, 1), (1, 1), torch.float32)

    def error():
        winograd.transforms.cache_clear()
        return float((winograd.transposed(g, w, (16, 16), (1, 1)) - expected).norm() / expected.norm())

    ours = error()
    monkeypatch.setattr(winograd, "_POINTS", np.array([0.0, 1, -1, 2, -2]))
    customary = error()
    monkeypatch.undo()
    winograd.transforms.cache_clear()
    assert ours < 10 * torch.finfo(torch.float32).eps
    assert ours < 0.6 * customary


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "circular"])
def test_kernels_are_the_same_whether_tiles_are_used_or_not(padding, monkeypatch, calls_of):
    mode = {"padding": 1, "padding_mode": "circular"} if padding == "circular" else {"padding": padding}
    net, x = convolutional(torch.nn.Conv2d(4, 3, 3, **mode), (5, 6))
    calls = calls_of(winograd, "transposed")
    for used in (True, False):
        calls.clear()
        monkeypatch.setattr(winograd, "worthwhile", lambda *_, used=used: used)
        assert_kernel(empirical_ntk(net, x), ntk_by_definition(net, x, x))
        assert bool(calls) == used


@pytest.mark.parametrize("change", [{"kernel_size": 5}, {"dilation": 2}, {"stride": 2}, {"groups": 4}, {"padding": 3}], ids=str)
def test_other_convolutions_do_not_go_by_tiles(change, monkeypatch):
    layer = torch.nn.Conv2d(4, 4, **({"kernel_size": 3, "padding": 1} | change))
    net, x = convolutional(layer, (7, 8))
    monkeypatch.setattr(winograd, "worthwhile", lambda *_: True)
    monkeypatch.setattr(winograd, "transposed", lambda *_: pytest.fail("by tiles"))
    assert_kernel(empirical_ntk(net, x, method="structured"), ntk_by_definition(net, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "side"), [(128, 16), (256, 8), (512, 4)])
def test_tiles_are_used_in_the_wide_blocks_of_a_residual_net(channels, side, dtype):
    w, g = torch.empty(channels, channels, 3, 3, dtype=dtype), torch.empty(160, channels, side, side, dtype=dtype)
    assert winograd.worthwhile(g, w, (side, side), (1, 1))
    assert not winograd.worthwhile(g[:1], w, (side, side), (1, 1))  # the taps are prepared for too few images
    assert not winograd.worthwhile(g.to("meta"), w, (side, side), (1, 1))
    assert not winograd.worthwhile(g.bfloat16(), w.bfloat16(), (side, side), (1, 1))
    assert not winograd.worthwhile(g[:, :16], w[:16, :16], (side, side), (1, 1))


def test_narrow_tiles_are_used_where_an_image_stays_in_cache(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    w = torch.empty(64, 64, 3, 3)
    for side, used in ((32, True), (56, False)):
        assert winograd.worthwhile(torch.empty(160, 64, side, side), w, (side, side), (1, 1)) == used
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not winograd.worthwhile(torch.empty(160, 64, 32, 32), w, (32, 32), (1, 1))


def test_only_plain_convolutions_of_three_by_three_taps_go_by_tiles():
    plain = Windows((3, 3), (1, 1), (1, 1), (8, 8))
    assert winograd.fits(plain)
    others = [
        replace(plain, taps=(3, 1)),
        replace(plain, taps=(5, 5)),
        replace(plain, dilation=(1, 2)),
        replace(plain, before=(0, 3)),
    ]
    cubes = Windows((3, 3, 3), (1, 1, 1), (1, 1, 1), (8, 8, 8))
    assert not any(winograd.fits(windows) for windows in [*others, Windows((3,), (1,), (1,), (8,)), cubes])


def test_pairs_of_positions_and_taps_off_the_padding_are_counted():
    for inputs, before, after in product(range(1, 6), range(3), range(3)):
        outputs = inputs + before + after - 2
        pairs = [(q, a) for q in range(outputs) for a in range(3) if 0 <= q + a - before < inputs]
        assert winograd._reached(inputs, outputs, before) == len(pairs)


def assert_gradients(factor):
    """Those by tiles are sums over positions; returns the channels of each block."""
    (padding, _), c, images = factor.windows.before, factor.source.shape[2], factor.source.shape[1]
    x = torch.nn.functional.pad(factor.source, [padding] * 4)
    g = factor.g[..., 0, :].unflatten(2, (images, *factor.windows.positions))  # [n, k, l, rows, columns, o]
    rows, columns = factor.windows.positions
    expected = torch.stack(
        [torch.einsum("nklyxo,nlcyx->nkoc", g, x[..., a : a + rows, b : b + columns]) for a, b in product(range(3), range(3))],
        2,
    )  # [n, k, 9, o, c]
    blocks = [
        j.clone().unflatten(3, (-1, c)) for j in winograd.write_out(factor.source, factor.g[..., 0, :], factor.windows, Scratch(g))
    ]
    torch.testing.assert_close(torch.cat(blocks, 3), expected, rtol=1e-11, atol=1e-11)
    return [j.shape[3] for j in blocks]


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(1, 2),
    images=st.integers(1, 2),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
)
def test_gradients_by_tiles_are_sums_over_positions(size, padding, images, shape):
    n, k, c, o = shape
    factor = factor_of(n, k, c, o, size, padding, images)
    assert_gradients(factor)


def test_gradients_are_written_out_some_channels_at_a_time():
    assert assert_gradients(factor_of(2, 10, 64, 40, (8, 8))) == [32, 8]


@pytest.mark.parametrize("kind", ACCUMULATORS)
@pytest.mark.parametrize("n1", [None, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_every_reduction_is_the_same_by_tiles(kind, n1, size, monkeypatch, calls_of):
    if n1 is not None and kind in ("blocks", "norms"):
        n1 = 3  # pairs of example n and n
    factor = factor_of(6, 3, 4, 24, size)
    calls, found = calls_of(winograd, "write_out"), []
    for used in (True, False):
        monkeypatch.setattr(winograd, "gradients_worthwhile", lambda *_, used=used: used)
        sums = ACCUMULATORS[kind](6, 3, n1, factor.g)
        monkeypatch.setattr(sums, "costs", lambda *_: (0.0, 1.0))
        sums.add(factor)
        found.append(sums.result().clone())
    assert len(calls) == 1
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_gradients_go_by_tiles_where_there_are_many_positions():
    many, few = factor_of(2, 10, 64, 64, (32, 32), dtype=torch.float32), factor_of(2, 10, 64, 64, (8, 8), dtype=torch.float32)
    narrow = factor_of(2, 10, 3, 64, (32, 32), dtype=torch.float32)
    wider = factor_of(2, 10, 64, 64, (32, 32), 2, kernel=(5, 5), dtype=torch.float32)
    for factor, worthwhile in ((many, True), (few, False), (narrow, False), (wider, False)):
        assert winograd.gradients_worthwhile(factor.source, factor.g[..., 0, :], factor.windows) == worthwhile
    assert not winograd.gradients_worthwhile(many.source, many.g[..., 0, :].to("meta"), many.windows)
    assert not winograd.gradients_worthwhile(many.source, many.g[..., 0, :].bfloat16(), many.windows)
    hundred = many.g[:, :1].expand(-1, 100, -1, -1, -1)[..., 0, :]
    assert not winograd.gradients_worthwhile(many.source, hundred, many.windows)  # would not stay in cache
    thousands = many.g[:1, :1, ..., 0, :].expand(10**4, 10, -1, -1)
    assert not winograd.gradients_worthwhile(many.source[:1].expand(10**4, -1, -1, -1, -1), thousands, many.windows)  # no room


def test_gradients_in_single_precision_lose_few_digits():
    factor = factor_of(1, 2, 64, 64, (32, 32))
    single = factor_of(1, 2, 64, 64, (32, 32), dtype=torch.float32)

    def gradients(some):
        blocks = winograd.write_out(some.source, some.g[..., 0, :], some.windows, Scratch(some.g))
        return torch.cat([j.clone().double() for j in blocks], 3)

    exact = gradients(factor)
    assert float((gradients(single) - exact).norm() / exact.norm()) < 10 * torch.finfo(torch.float32).eps


def test_all_kernels_are_the_same_whether_gradients_go_by_tiles_or_not(monkeypatch, calls_of):
    net, x = convolutional(torch.nn.Conv2d(4, 3, 3, padding=1, bias=False), (8, 9), torch.nn.AvgPool2d(2))
    calls, kernel = calls_of(winograd, "write_out"), ntk_by_definition(net, x, x)
    for used in (True, False):
        calls.clear()
        monkeypatch.setattr(winograd, "gradients_worthwhile", lambda *_, used=used: used)
        assert_kernel(empirical_ntk(net, x), kernel)
        assert_kernel(empirical_ntk(net, x, chunk_size=2), kernel)
        assert_kernel(empirical_ntk(net, x[:1], x[1:]), kernel[:1, 1:])
        for reduce in ("trace", "diagonal"):
            assert_kernel(empirical_ntk(net, x, reduce=reduce), reduce_by_definition(kernel, reduce))
        assert_kernel(ntk_diagonal(net, x), torch.stack([kernel[i, i] for i in range(len(x))]))
        assert ntk_trace(net, x, normalize=False).mean == pytest.approx(trace_by_definition(kernel), rel=1e-12)
        assert bool(calls) == used
