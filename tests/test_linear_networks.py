"""Deep linear networks obey the laws of full-matrix gradient descent, term by term and step by step."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference_linear import curvature_sum, descend, hessian, step_matrix

from ntklib import FactorizationSettings, TaskSettings, empirical_ntk, flatten_kernel, sharpness
from ntklib import linear_curvature as curvature
from ntklib import linear_networks as linear
from ntklib.period_doubling import mode_sharpness, second_doubling, two_period_orbit

S = np.array([3.0, 2.0, 0.7])
DEPTHS = (2, 3, 4)


def layers_of(depth, seed=0, r=3):
    """Random singular values per layer, [L, r]."""
    return np.random.default_rng(seed).uniform(0.5, 1.6, (depth, r))


def half_sum(f, y):
    return ((f - y) ** 2).sum() / 2


def matrices(layers):
    return [torch.diag(torch.from_numpy(w.copy())) for w in layers]


@pytest.mark.parametrize("depth", DEPTHS)
def test_matrix_descent_is_gradient_descent_by_autograd(depth):
    draw = np.random.default_rng(depth)
    weights, target = draw.normal(size=(depth, 2, 3, 3)) * 0.6, draw.normal(size=(3, 3))
    lr = np.array([0.02, 0.05])
    final = linear.last(linear.matrix_descent(weights, target, lr, 7), 1)[0]
    for b in range(2):
        expected = descend([torch.from_numpy(w[b]) for w in weights], torch.from_numpy(target), lr[b], 7)
        np.testing.assert_allclose(final[:, b], torch.stack(expected).numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("depth", DEPTHS)
def test_aligned_descent_is_gradient_descent_of_diagonal_matrices(depth):
    layers, lr = layers_of(depth), 0.03
    layers[-1] = 0  # the source's start: no division by a layer
    final = linear.last(linear.aligned_descent(layers[:, None], S, np.array([lr]), 9), 1)[0, :, 0]
    expected = descend(matrices(layers), torch.diag(torch.from_numpy(S)), lr, 9)
    for got, w in zip(final, expected, strict=True):
        np.testing.assert_allclose(np.diag(got), w.numpy(), rtol=1e-12, atol=1e-13)


def test_full_matrices_in_other_singular_bases_take_the_same_singular_values():
    q = [np.linalg.qr(np.random.default_rng(k).normal(size=(3, 3)))[0] for k in range(4)]  # V*, Q_2, Q_3, U*
    layers = linear.aligned_start(S, 3, 0.3)
    weights = np.stack([q[k + 1] @ np.diag(layers[k]) @ q[k].T for k in range(3)])[:, None]
    target = q[3] @ np.diag(S) @ q[0].T
    lr = np.array([0.9 * 2 / mode_sharpness(3.0, 3)])
    full = linear.last(linear.matrix_descent(weights, target, lr, 400), 1)[0, :, 0]
    aligned = linear.last(linear.aligned_descent(layers[:, None], S, lr, 400), 1)[0, :, 0]
    found = np.linalg.svd(full[2] @ full[1] @ full[0], compute_uv=False)
    np.testing.assert_allclose(found, aligned.prod(0), rtol=1e-11)


@pytest.mark.parametrize("depth", DEPTHS)
def test_product_of_others_leaves_one_layer_out(depth):
    layers = layers_of(depth)
    layers[0, 1] = 0
    for k in range(depth):
        expected = np.prod([w for m, w in enumerate(layers) if m != k], axis=0)
        np.testing.assert_allclose(linear.product_of_others(layers)[k], expected, rtol=1e-14)


def test_divergence_is_nan_and_touches_no_other_learning_rate():
    start = linear.aligned_start(S, 3, 0.1, (2,))
    lrs = np.array([0.05, 5.0])
    values, sharp = linear.sweep_learning_rates(start, S, lrs, 2000, 4)
    assert np.isnan(values[:, 1]).all()
    assert np.isnan(sharp[:, 1]).all()
    np.testing.assert_allclose(values[:, 0], np.tile(S, (4, 1)), rtol=1e-10)
    np.testing.assert_allclose(sharp[:, 0], mode_sharpness(3.0, 3), rtol=1e-3)
    assert (sharp[:, 0] > mode_sharpness(3.0, 3)).all()  # the gap of the start is left, so the minimum is a little sharper


def test_last_keeps_the_last_points_in_order():
    points = iter([np.array([float(k)]) for k in range(5)])
    assert linear.last(points, 3).ravel().tolist() == [2, 3, 4]
    assert linear.last(iter([np.array([7.0])]), 1).ravel().tolist() == [7]


@pytest.mark.parametrize("depth", DEPTHS)
def test_hessian_eigenvalues_at_an_aligned_point_are_those_of_autograd(depth):
    layers = layers_of(depth)
    expected = torch.linalg.eigvalsh(hessian(matrices(layers), torch.diag(torch.from_numpy(S)))).flip(0)
    found = curvature.aligned_hessian_eigenvalues(np.stack([layers, 2 * layers], 1), S)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-10, atol=1e-10)
    assert found.shape == (2, depth * 9)


@pytest.mark.parametrize("depth", DEPTHS)
def test_curvature_at_the_balanced_minimum_is_that_of_kernel_and_hessian(depth):
    found = np.sort(curvature.minimum_curvature(S, depth).ravel())
    expected = np.sort([curvature_sum(a, b, depth) for a in S for b in S])
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    weights = matrices(curvature.balanced(S, depth))
    eigenvalues = torch.linalg.eigvalsh(hessian(weights, torch.diag(torch.from_numpy(S))))
    np.testing.assert_allclose(eigenvalues[-9:].numpy(), found, rtol=1e-10)
    assert eigenvalues[:-9].abs().max() < 1e-10
    net = linear.factorization_network(torch.stack(weights).numpy())
    kernel = flatten_kernel(empirical_ntk(net, torch.eye(3, dtype=torch.float64)))
    np.testing.assert_allclose(torch.linalg.eigvalsh(kernel).numpy(), found, rtol=1e-10)


def test_mixing_curvature_is_the_quotient_and_lies_between_the_two_modes():
    for depth in range(2, 7):
        mu = curvature.minimum_curvature(S, depth)
        assert mu[0, 1] == pytest.approx((9 - 4) / (3 ** (2 / depth) - 2 ** (2 / depth)), rel=1e-13)
        assert mu[1, 1] < mu[0, 1] < mu[0, 0]


def test_network_applies_the_layers_in_order():
    weights = np.random.default_rng(0).normal(size=(3, 4, 4))
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.numpy() @ (weights[2] @ weights[1] @ weights[0]).T
    np.testing.assert_allclose(linear.factorization_network(weights)(x).detach().numpy(), expected, rtol=1e-12)


def test_balanced_minimum_is_the_flattest():
    draw = np.random.default_rng(1)
    for _ in range(20):
        tilt = draw.normal(size=(3, 1))
        layers = 2.0 ** (1 / 3) * np.exp(tilt - tilt.mean())
        found = curvature.aligned_hessian_eigenvalues(layers, np.array([2.0]))[0]
        assert found == pytest.approx(4 * (1 / layers**2).sum(), rel=1e-10)
        assert found > mode_sharpness(2.0, 3)


@pytest.mark.parametrize("depth", [2, 3])
def test_transverse_multiplier_is_that_of_the_steps_of_gradient_descent(depth):
    s, lr = np.array([3.0, 2.8]), 1.12 * 2 / mode_sharpness(3.0, depth)
    orbit = np.stack([curvature.balanced(s, depth)] * 2)
    orbit[:, :, 0] = np.array(two_period_orbit(lr, 3.0, depth))[:, None]
    target = torch.diag(torch.from_numpy(s))
    product = step_matrix(matrices(orbit[1]), target, lr) @ step_matrix(matrices(orbit[0]), target, lr)
    grid = torch.arange(depth * 4).reshape(depth, 2, 2)
    mixing = torch.cat([grid[:, 0, 1], grid[:, 1, 0]])
    expected = torch.linalg.eigvals(product[mixing][:, mixing]).abs().max()
    assert float(curvature.transverse_multiplier(orbit, s, lr, 0, 1)) == pytest.approx(float(expected), rel=1e-6)
    assert product[mixing][:, grid[:, 0, 0]].abs().max() == 0  # decoupled from the modes


def test_mixing_threshold_of_two_layers_is_that_of_the_minimum_and_precedes_the_second_mode():
    s = np.array([10.0, 9.5])
    assert curvature.transverse_threshold(s, 2) == pytest.approx(2 / curvature.minimum_curvature(s, 2)[0, 1], rel=1e-5)
    for depth in (2, 3, 4, 6):
        threshold = curvature.transverse_threshold(s, depth)
        assert 2 / curvature.minimum_curvature(s, depth)[0, 1] < threshold * (1 + 1e-5)
        assert threshold < 2 / mode_sharpness(9.5, depth)
    assert math.isnan(curvature.transverse_threshold(np.array([10.0, 6.0]), 3))  # beyond the second doubling
    assert second_doubling(10.0, 3) < 2 / curvature.minimum_curvature(np.array([10.0, 6.0]), 3)[0, 1]


def test_noise_leaves_the_aligned_set_only_beyond_the_mixing_threshold():
    s = np.array([10.0, 9.0])
    lrs = curvature.transverse_threshold(s, 3) * np.array([0.98, 1.02])
    diagonal, off = linear.perturbed_sweep(s, lrs, depth=3, init_scale=0.1, perturbation=1e-6, steps=4000, keep=8, seed=1)
    assert off[0] < 1e-6
    assert not off[1] < 1e-2  # large, or nan
    assert linear.oscillation_range(diagonal)[0, 1] < 1e-8  # the second mode is at rest below


@pytest.mark.parametrize("depth", DEPTHS)
def test_gap_follows_its_factor_at_every_step(depth):
    path = np.stack(list(linear.aligned_descent(layers_of(depth)[:, None], S, np.array([0.06]), 6)))[:, :, 0]
    for before, after in pairwise(path):
        factor = linear.gap_factor(before, S, 0.06, 0, depth - 1)
        np.testing.assert_allclose(
            linear.balancing_gap(after, 0, depth - 1), linear.balancing_gap(before, 0, depth - 1) * factor, rtol=1e-9, atol=1e-14
        )


def test_gradient_flow_keeps_gaps_and_is_the_limit_of_small_steps():
    layers = layers_of(3)
    t = np.linspace(0, 3, 7)
    flow = linear.aligned_flow(layers, S, t)
    gaps = np.stack([linear.balancing_gap(point, 0, 2) for point in flow])
    np.testing.assert_allclose(gaps, np.tile(gaps[0], (7, 1)), atol=1e-11)
    errors = []
    for lr in (0.01, 0.005):
        path = linear.last(linear.aligned_descent(layers[:, None], S, np.array([lr]), round(0.5 / lr)), 1)[0, :, 0]
        errors.append(np.abs(path - flow[1]).max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order


def test_two_layer_flow_has_its_logistic_solution():
    start = np.full((2, 1), 0.1)
    t = np.linspace(0, 2, 9)
    expected = 3 / (1 + (3 / 0.01 - 1) * np.exp(-6 * t))
    np.testing.assert_allclose(linear.aligned_flow(start, np.array([3.0]), t).prod(1)[:, 0], expected, rtol=1e-10)


def test_simulated_threshold_is_two_over_the_sharpness():
    assert linear.threshold_by_simulation(3.0, 3, 0.1, steps=4000) == pytest.approx(2 / mode_sharpness(3.0, 3), rel=1e-3)
    assert math.isnan(linear.threshold_by_simulation(3.0, 3, 1e-3, steps=1))


def test_diagonal_network_descends_its_loss_and_knows_its_sharpness():
    draw = np.random.default_rng(0)
    x, y, u, v = draw.normal(size=(4, 6)), draw.normal(size=4), draw.normal(size=6), draw.normal(size=6)
    theta = torch.from_numpy(np.concatenate([u, v])).requires_grad_()

    def loss(w):
        return ((torch.from_numpy(x) @ (w[:6] * w[6:]) - torch.from_numpy(y)) ** 2).mean() / 2

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    *_, (u1, v1) = linear.diagonal_descent(u, v, x, y, 0.1, 1)
    np.testing.assert_allclose(np.concatenate([u1, v1]), (theta - 0.1 * gradient).detach().numpy(), rtol=1e-12)
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta.detach()))[-1]
    assert linear.diagonal_sharpness(u, v, x, y) == pytest.approx(float(expected), rel=1e-10)


def test_one_mode_sharpness_is_the_sum_of_inverse_squares():
    layers = np.array([0.5, 2.0, 3.0])
    assert linear.one_mode_sharpness(layers, 3.0) == pytest.approx(9 * (4 + 1 / 4 + 1 / 9), rel=1e-10)


def test_sharpness_of_the_network_is_the_largest_aligned_eigenvalue():
    layers = layers_of(3)
    net = linear.factorization_network(np.stack([np.diag(w) for w in layers]))
    data = (torch.eye(3, dtype=torch.float64), torch.diag(torch.from_numpy(S)))
    assert float(sharpness(net, half_sum, data)[0]) == pytest.approx(curvature.aligned_hessian_eigenvalues(layers, S)[0], rel=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear.aligned_start(S, 1, 0.1), r"depth must be at least 2 layers\. Got 1"),
        (lambda: linear.aligned_start(S, 3, 0.0), r"init_scale must be positive.*Got 0\.0"),
        (lambda: curvature.balanced(np.array([1.0, -2.0]), 3), r"finite and not negative, at least one\. Got \[1\.0, -2\.0\]"),
        (lambda: linear.padded([3.0, 2.0, 1.0], 2), r"dim must be at least 3, the number of singular values given\. Got 2"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


GOOD = {
    "depth": 3, "targets": [2.0, 1.0], "dim": 3, "init_scale": 0.1, "lr_low": 0.9, "lr_high": 1.2, "num_lr": 3, "steps": 9,
    "keep": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 1}, r"depth must be at least 2\. Got 1"),
        ({"targets": [1.0, 0.0]}, r"targets\.1 must be greater than 0\. Got 0\.0"),
        ({"lr_low": 1.3}, r"lr_low must be below lr_high = 1\.2\. Got 1\.3"),
        ({"dim": 1}, r"dim must be at least 2\. Got 1"),
        ({"targets": [1.0] * 4}, r"dim must be at least 4, the number of singular values in targets\. Got 3"),
        ({"keep": 10}, r"keep must be at most steps = 9\. Got 10"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    assert FactorizationSettings(**GOOD).targets == (2.0, 1.0)
    with pytest.raises(ValueError, match=message):
        FactorizationSettings(**{**GOOD, **change})


def test_a_task_needs_two_classes():
    with pytest.raises(ValueError, match=r"num_classes must be at least 2\. Got 1"):
        TaskSettings(dataset="digits", num_classes=1, num_train=4, width=2, lr=0.1, steps=1)
