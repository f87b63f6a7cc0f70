"""The transpose of a convolution by taps is what automatic differentiation finds, for every stride, padding and dilation."""

import pytest
import torch
from engine_case import assert_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ntk_by_definition
from small_networks import convolutional

from ntklib import empirical_ntk
from ntklib.kernels import taps
from ntklib.random import stream

CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@settings(deadline=None)
@given(
    axes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    ),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_the_transpose_by_taps_is_the_gradient_of_the_convolution(axes, channels):
    axes = [(max(size, d * (k - 1) + 1 - 2 * p), k, s, p, d) for size, k, s, p, d in axes]
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    generator = stream(0, "taps")
    x = torch.randn(2, channels[1], *size, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(*channels, *kernel, generator=generator, dtype=torch.float64)
    z = CONVOLUTIONS[len(axes)](x, w, None, stride, padding, dilation)
    g = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(z, x, g)
    torch.testing.assert_close(taps.transposed(g, w, size, stride, padding, dilation), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_are_the_same_whether_taps_are_used_or_not(stride, monkeypatch, calls_of):
    net, x = convolutional(torch.nn.Conv2d(4, 3, 3, stride, padding=1), (5, 5))
    calls = calls_of(taps, "transposed")
    for many, used in ((1, True), (10**6, False)):
        calls.clear()
        monkeypatch.setattr(taps, "MANY", many)
        assert_kernel(empirical_ntk(net, x), ntk_by_definition(net, x, x))
        assert bool(calls) == used
