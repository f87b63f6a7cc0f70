"""The transpose of a 3 x 3 convolution by tiles is what automatic differentiation finds, to the rounding of its dtype."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntklib import empirical_ntk
from ntklib.kernels import winograd
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


def weights(o, i):
    return torch.randn(o, i, 3, 3, generator=stream(0, "winograd weights"), dtype=torch.float64)


@settings(deadline=None)
@given(axes=st.tuples(AXIS, AXIS), channels=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_the_transpose_by_tiles_is_the_gradient_of_the_convolution(axes, channels):
    axes = [(max(size, 3 - before - after), before, after) for size, before, after in axes]
    size, before, after = zip(*axes, strict=True)
    w = weights(*channels)
    g, expected = gradient((2, channels[1], *size), w, before, after)
    torch.testing.assert_close(winograd.transposed(g, w, size, before), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_images_are_worked_on_a_few_at_a_time(images):
    w = weights(64, 64)  # two images of 64 tiles in a block: the last of five is alone
    g, expected = gradient((images, 64, 32, 32), w, (1, 1), (1, 1))
    found = winograd.transposed(g, w, (32, 32), (1, 1))
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
def test_kernels_are_the_same_whether_tiles_are_used_or_not(padding, monkeypatch):
    torch.manual_seed(0)
    mode = {"padding": 1, "padding_mode": "circular"} if padding == "circular" else {"padding": padding}
    convolutions = [torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 3, **mode)]
    net = torch.nn.Sequential(*convolutions, torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.LazyLinear(2)).double()
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    net(x)
    calls, plain = [], winograd.transposed
    monkeypatch.setattr(winograd, "transposed", lambda *args: calls.append(args) or plain(*args))
    kernels = []
    for used in (True, False):
        calls.clear()
        monkeypatch.setattr(winograd, "worthwhile", lambda *_, used=used: used)
        kernels.append(empirical_ntk(net, x))
        assert bool(calls) == used
    torch.testing.assert_close(*kernels, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "side"), [(128, 16), (256, 8), (512, 4)])
def test_tiles_are_used_in_the_wide_blocks_of_a_residual_net(channels, side, dtype):
    w, g = torch.empty(channels, channels, 3, 3, dtype=dtype), torch.empty(160, channels, side, side, dtype=dtype)
    assert winograd.worthwhile(g, w, (side, side), (1, 1))
    assert not winograd.worthwhile(g[:1], w, (side, side), (1, 1))  # the taps are prepared for too few images
    assert not winograd.worthwhile(g.to("meta"), w, (side, side), (1, 1))
    assert not winograd.worthwhile(g.bfloat16(), w.bfloat16(), (side, side), (1, 1))
    assert not winograd.worthwhile(g[:, :16], w[:16, :16], (side, side), (1, 1))


def test_only_plain_convolutions_of_three_by_three_taps_go_by_tiles():
    plain = {"stride": (1, 1), "before": (1, 1), "dilation": (1, 1), "groups": 1}
    w = torch.empty(2, 2, 3, 3)
    assert winograd.fits(w, **plain)
    changes = [{"stride": (2, 1)}, {"before": (0, 3)}, {"dilation": (1, 2)}, {"groups": 2}]
    assert not any(winograd.fits(w, **(plain | change)) for change in changes)
    assert not any(winograd.fits(torch.empty(2, 2, *kernel), **plain) for kernel in [(3,), (3, 1), (5, 5), (3, 3, 3)])


def test_pairs_of_positions_and_taps_off_the_padding_are_counted():
    for inputs, before, after in product(range(1, 6), range(3), range(3)):
        outputs = inputs + before + after - 2
        pairs = [(q, a) for q in range(outputs) for a in range(3) if 0 <= q + a - before < inputs]
        assert winograd._reached(inputs, outputs, before) == len(pairs)
