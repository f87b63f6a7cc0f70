"""The map of one balanced mode: its threshold, its orbit, its doublings, against high precision and exact algebra."""

import math

import mpmath
import numpy as np
import pytest
import sympy

from ntklib import linear_networks as linear
from ntklib import period_doubling as doubling

CASES = [(2, 5.0), (3, 10.0), (4, 0.5), (6, 3.0)]


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_map_is_the_gradient_step_of_equal_layers_and_its_derivative_is_symbolic(depth):
    rho, s, lr = sympy.symbols("rho s eta", positive=True)
    layers = sympy.symbols(f"a0:{depth}", positive=True)
    loss = (sympy.prod(layers) - s) ** 2 / 2
    step = layers[0] - lr * sympy.diff(loss, layers[0])
    step = step.subs(dict.fromkeys(layers, rho))
    values = {rho: 1.3, s: 2.0, lr: 0.11}
    assert doubling.scalar_step(1.3, 2.0, 0.11, depth) == pytest.approx(float(step.subs(values)), rel=1e-14)
    assert doubling.scalar_multiplier(1.3, 2.0, 0.11, depth) == pytest.approx(float(sympy.diff(step, rho).subs(values)), rel=1e-13)


@pytest.mark.parametrize(("depth", "s"), CASES)
def test_threshold_is_two_over_the_sharpness(depth, s):
    assert doubling.threshold_of_fixed_point(s, depth) == pytest.approx(2 / (depth * s ** (2 - 2 / depth)), rel=1e-14)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_closed_orbit_is_an_orbit_by_exact_algebra(depth):
    z, s = sympy.Rational(6, 5), sympy.Rational(3)
    power = s * (1 + z ** (depth - 1)) / (1 + z ** (2 * depth - 1))  # rho_1^L
    low = power ** sympy.Rational(1, depth)
    lr = (z - 1) / ((s - power) * low ** (depth - 2))
    assert sympy.simplify(low + lr * (s - power) * low ** (depth - 1) - z * low) == 0
    assert sympy.simplify(z * low + lr * (s - z**depth * power) * (z * low) ** (depth - 1) - low) == 0
    found = doubling.orbit_of_ratio(1.2, 3.0, depth)
    assert [float(v) for v in found] == pytest.approx([float(low), float(z * low), float(lr)], rel=1e-13)


@pytest.mark.parametrize(("depth", "s"), CASES)
def test_orbit_closes_after_two_steps_and_attracts_below_the_second_doubling(depth, s):
    edge, second = 2 / doubling.mode_sharpness(s, depth), doubling.second_doubling(s, depth)
    for part in (0.1, 0.5, 0.9):
        lr = edge + part * (second - edge)
        low, up = doubling.two_period_orbit(lr, s, depth)
        assert 0 < low < s ** (1 / depth) < up < (2 * s) ** (1 / depth)
        assert doubling.scalar_step(low, s, lr, depth) == pytest.approx(up, rel=1e-12)
        assert doubling.scalar_step(up, s, lr, depth) == pytest.approx(low, rel=1e-12)
        rho = low * 1.01
        for _ in range(4000):
            rho = doubling.scalar_step(rho, s, lr, depth)
        assert min(abs(rho - low), abs(rho - up)) < 1e-9 * up
        for value in (low, up):
            assert abs(doubling.orbit_residual(value, s, lr, depth)) < 1e-12
            assert abs(doubling.orbit_residual(value, s, lr, depth, factor=float(depth))) > 1e-3


def test_two_layers_have_their_explicit_orbit_multiplier_and_gap_factor():
    s, lr = 5.0, 0.21
    low, up = doubling.two_period_orbit(lr, s, 2)
    root = math.sqrt(s + 3 / lr), math.sqrt(s - 1 / lr)
    assert [low, up] == pytest.approx([(root[0] - root[1]) / 2, (root[0] + root[1]) / 2], rel=1e-13)
    product = doubling.scalar_multiplier(low, s, lr, 2) * doubling.scalar_multiplier(up, s, lr, 2)
    assert product == pytest.approx(9 - 2 * (1 + lr * s) ** 2, rel=1e-12)
    assert doubling.orbit_gap_factor(lr, s, 2) == pytest.approx(3 - 2 * lr * s, rel=1e-12)
    assert doubling.second_doubling(s, 2) * s == pytest.approx(math.sqrt(5) - 1, rel=1e-14)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_gap_on_the_orbit_shrinks_by_its_factor(depth):
    s = 4.0
    lr = 1.1 * 2 / doubling.mode_sharpness(s, depth)
    layers = np.full((depth, 1, 1), doubling.two_period_orbit(lr, s, depth)[0])
    layers[0] *= 1 + 1e-6
    path = linear.last(linear.aligned_descent(layers, np.array([s]), np.array([lr]), 2), 3)
    gaps = [float(linear.balancing_gap(point, 0, 1)[0, 0]) for point in path]
    assert gaps[2] / gaps[0] == pytest.approx(doubling.orbit_gap_factor(lr, s, depth), rel=1e-4)


@pytest.mark.parametrize(("depth", "onset"), [(2, 1.0), (3, 3 / 11), (4, 1 / 8)])
def test_orbit_opens_like_a_square_root(depth, onset):
    s, delta = 2.0, 1e-6
    low, up = doubling.two_period_orbit(2 / doubling.mode_sharpness(s, depth) * (1 + delta), s, depth)
    assert (up - low) ** 2 / s ** (2 / depth) / delta == pytest.approx(onset, rel=1e-3)


def test_second_doubling_agrees_with_the_cascade_and_with_high_precision():
    with mpmath.workdps(30):
        s, third = mpmath.mpf(10), mpmath.mpf(1) / 3

        def excess(z):
            low = (s * (1 + z**2) / (1 + z**5)) ** third
            lr = (z - 1) / ((s - low**3) * low)
            slopes = [1 + lr * (2 * s * rho - 5 * rho**4) for rho in (low, z * low)]
            return slopes[0] * slopes[1] + 1, lr

        z = mpmath.findroot(lambda z: excess(z)[0], 1.35)
        expected = float(excess(z)[1])
    assert doubling.second_doubling(10.0, 3) == pytest.approx(expected, rel=1e-13)
    assert doubling.doublings(10.0, 3, 2)[1].lr == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_every_doubling_has_a_closed_orbit_of_multiplier_minus_one(depth):
    cascade = doubling.doublings(3.0, depth, 6)
    assert [d.period for d in cascade] == [1, 2, 4, 8, 16, 32]
    for d in cascade:
        rho, multiplier = d.rho, 1.0
        orbit = []
        for _ in range(d.period):
            multiplier *= doubling.scalar_multiplier(rho, 3.0, d.lr, depth)
            rho = doubling.scalar_step(rho, 3.0, d.lr, depth)
            orbit.append(rho)
        assert rho == pytest.approx(d.rho, rel=1e-10)
        assert multiplier == pytest.approx(-1, abs=1e-8)
        assert np.diff(sorted(orbit)).min(initial=1) > 1e-4  # the full period, not a fraction of it
    ratios = doubling.interval_ratios(cascade)
    assert ratios[3] == pytest.approx(4.669201609, rel=1e-3)
    assert abs(ratios[3] - 4.669201609) < abs(ratios[1] - 4.669201609)


@pytest.mark.parametrize("depth", [2, 3])
def test_newton_takes_the_derivatives_of_the_iterated_map(depth):
    rho, lr = sympy.symbols("rho eta")
    x = rho
    for _ in range(2):
        x = x + lr * (2 - x**depth) * x ** (depth - 1)
    at = {rho: sympy.Rational(11, 10), lr: sympy.Rational(1, 5)}
    expected = [x, sympy.diff(x, rho), sympy.diff(x, lr), sympy.diff(x, rho, 2), sympy.diff(x, rho, lr)]
    found = doubling._iterate(1.1, 0.2, 2.0, depth, 2)
    assert list(found) == pytest.approx([float(e.subs(at)) for e in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: doubling.mode_sharpness(0.0, 3), r"at least 2 layers and a finite positive target\. Got depth 3 and s = 0\.0"),
        (lambda: doubling.mode_sharpness(1.0, 1), r"at least 2 layers and a finite positive target\. Got depth 1"),
        (lambda: doubling.orbit_of_ratio(0.9, 1.0, 3), r"z = rho_2 / rho_1 must be at least 1\. Got 0\.9"),
        (lambda: doubling.two_period_orbit(0.01, 5.0, 3), r"only above the threshold lr = 0\.0779\d+\. Got 0\.01"),
        (lambda: doubling.doublings(1.0, 3, 9), r"count must be between 1 and 8.*Got 9"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
