"""The margin machinery: optimality conditions, closed forms and laws of homogeneous networks, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.svm import SVC

from ntklib import data, models
from ntklib.margin import (
    block_means,
    homogeneity,
    kink_share,
    margin_growth,
    rescale_layers,
    tangent_features,
    tangent_margin,
)
from ntklib.random import stream
from ntklib.settings import MarginSettings
from ntklib.svm import svm_dual
from ntklib.training import log_logistic_loss, normalized_descent

DOUBLE = torch.float64


def labels(n):
    return torch.tensor([1.0, -1.0] * n, dtype=DOUBLE)[:n]


def features(n, p, seed=0):
    return torch.randn(n, p, generator=stream(seed, "features"), dtype=DOUBLE)


def network(depth=2, *, d=6, width=7, bias=False, activation="relu", c=1, seed=0):
    net = models.MLP(d, [width] * (depth - 1), c, bias=bias, activation=activation)
    return models.initialize(net, "standard", stream(seed, "init")).double().eval()


# -- the support vector machine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [3, 8, 40])
def test_the_dual_optimum_meets_the_conditions_of_optimality(p, seed):
    y, phi = labels(12), features(12, p, seed)
    phi[:, 0] += 4 * y  # separable, of rank below n for p < 12
    solution = svm_dual(phi @ phi.T, y)
    u = (solution.alpha * y) @ phi
    margins = y * (phi @ u)
    assert solution.separable
    assert float(solution.alpha.min()) >= 0
    assert float(margins.min()) >= 1 - 1e-9
    assert float((solution.alpha * (margins - 1)).abs().max()) <= 1e-9 * float(solution.alpha.sum())
    assert solution.kkt_residual < 1e-9
    assert abs(solution.gap) < 1e-9
    assert solution.optimum == pytest.approx(float(u @ u) / 2, rel=1e-9)
    assert solution.margin == pytest.approx(float((margins / u.norm()).min()), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_primal_solved_by_another_method_has_the_same_optimum(seed):
    y, phi = labels(10), features(10, 6, seed)
    phi[:, 0] += 3 * y
    signed = (phi * y[:, None]).numpy()
    constraint = {"type": "ineq", "fun": lambda u: signed @ u - 1, "jac": lambda _: signed}
    start = np.eye(6)[0] / signed[:, 0].min() if signed[:, 0].min() > 0 else np.ones(6)
    options = {"ftol": 1e-14, "maxiter": 500}
    found = minimize(lambda u: u @ u / 2, start, jac=lambda u: u, constraints=constraint, method="SLSQP", options=options)
    assert found.success
    assert svm_dual(phi @ phi.T, y).optimum == pytest.approx(found.fun, rel=1e-7)


def test_a_machine_with_a_constant_feature_is_close_to_one_with_a_bias():
    y, phi = labels(20), features(20, 4)
    phi[:, 0] += 4 * y
    with_bias = SVC(kernel="precomputed", C=1e8, tol=1e-10).fit((phi @ phi.T).numpy(), y.numpy())
    u = with_bias.dual_coef_[0] @ phi.numpy()[with_bias.support_]
    large = 1e4  # a large constant feature makes a bias free of charge
    assert svm_dual(phi @ phi.T + large**2, y).optimum == pytest.approx(u @ u / 2, rel=1e-4)


@pytest.mark.parametrize(("x", "n_plus", "n_minus"), [(2.5, 4, 4), (0.1, 1, 6)])
def test_a_block_kernel_has_the_optimum_of_the_source_whatever_the_trace(x, n_plus, n_minus):
    y = torch.cat([torch.ones(n_plus), -torch.ones(n_minus)]).double()
    kernel = x * (y[:, None] == y).double()
    solution = svm_dual(kernel, y)
    assert solution.optimum == pytest.approx(1 / x, rel=1e-12)
    assert solution.margin / math.sqrt(float(kernel.trace()) / len(y)) == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert block_means(kernel, y) == pytest.approx((1.0, 0.0), abs=1e-15)


@pytest.mark.parametrize(("b", "c"), [(0.6, 0.3), (0.9, 0.0), (0.5, -0.2)])
def test_an_exchangeable_kernel_has_equal_dual_variables(b, c):
    n = 8
    y = labels(n)
    same = y[:, None] == y
    kernel = same.double() * (b - c) + c + (1 - b) * torch.eye(n, dtype=DOUBLE)
    solution = svm_dual(kernel, y)
    margin_of_ones = 1 + (n / 2 - 1) * b - n / 2 * c
    assert solution.optimum == pytest.approx(n / (2 * margin_of_ones), rel=1e-12)
    torch.testing.assert_close(solution.alpha, torch.full((n,), 1 / margin_of_ones, dtype=DOUBLE))
    assert block_means(kernel, y) == pytest.approx((b, c), rel=1e-12)


def test_two_parallel_features_of_unlike_labels_are_not_separable():
    y = torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE)
    phi = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    solution = svm_dual(phi @ phi.T, y)
    assert not solution.separable
    assert solution.optimum == math.inf
    assert solution.margin == 0
    torch.testing.assert_close(solution.alpha, torch.tensor([2 / 3, 1 / 3, 0.0], dtype=DOUBLE))
    torch.testing.assert_close((solution.alpha * y) @ phi, torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("seed", range(10))
def test_lower_bounds_of_the_optimum_hold_for_random_kernels(seed):
    y, phi = labels(9), features(9, 12, seed)
    kernel = phi @ phi.T
    optimum = svm_dual(kernel, y).optimum
    assert optimum >= 1 / (2 * float(kernel.diagonal().min())) * (1 - 1e-12)
    assert optimum * float(kernel.trace()) / 9 >= 0.5
    assert optimum >= 81 / (2 * float(y @ kernel @ y)) * (1 - 1e-12)


def test_scaling_a_kernel_scales_the_optimum_inversely():
    y, phi = labels(8), features(8, 20)
    kernel = phi @ phi.T
    one = svm_dual(kernel, y)
    for c in (1e-12, 1e12):
        other = svm_dual(c * kernel, y)
        assert other.optimum * c == pytest.approx(one.optimum, rel=1e-10)
        torch.testing.assert_close(other.alpha * c, one.alpha, rtol=1e-9, atol=1e-12)


def test_bad_kernels_and_labels_are_errors():
    y, eye = labels(3), torch.eye(3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"\[n, n\] with one label per example. Got \(3, 3\) and 2 labels"):
        svm_dual(eye, y[:2])
    with pytest.raises(ValueError, match=r"must be \+1 or -1. Got 0"):
        svm_dual(eye, y.abs() - 1)
    with pytest.raises(ValueError, match="finite with a positive trace. Got a mean diagonal of 0"):
        svm_dual(0 * eye, y)
    with pytest.raises(ValueError, match="finite"):
        svm_dual(eye * math.inf, y)
    with pytest.raises(ValueError, match="symmetric. Got a difference of 1.0e"):
        svm_dual(eye + torch.eye(3, dtype=DOUBLE).roll(1, 0), y)
    with pytest.raises(ValueError, match="positive semidefinite. Got an eigenvalue of -0.9"):
        svm_dual(eye - 1.9 * torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE)), y)
    with pytest.raises(ValueError, match=r"Both labels must occur, one of them twice. Got 3 of \+1 and 0 of -1"):
        block_means(eye, y.abs())


# -- networks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_networks_without_biases_are_homogeneous_and_others_are_not(depth, activation):
    x = features(9, 6)
    found = homogeneity(network(depth, activation=activation), x)
    assert found.degree == pytest.approx(depth, rel=1e-12)
    assert found.residual < 1e-13
    assert homogeneity(network(depth, bias=True), x).residual > 1e-2
    assert homogeneity(network(depth, activation="tanh"), x).residual > 1e-4


def test_tangent_features_are_the_gradients():
    net, x = network(3), features(4, 6)
    phi, w = tangent_features(net, x)
    for i in range(4):
        gradients = torch.autograd.grad(net(x[i : i + 1])[0, 0], list(net.parameters()))
        torch.testing.assert_close(phi[i], torch.cat([g.flatten() for g in gradients]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(w, torch.cat([w.detach().flatten() for w in net.parameters()]))
    with pytest.raises(ValueError, match="one output, whose sign is the class. Got 3 outputs"):
        tangent_features(network(c=3), x)


@pytest.mark.parametrize("depth", [2, 3])
def test_tangent_margin_follows_its_definitions(depth):
    net, x = network(depth, width=20), features(8, 6)
    y = torch.sign(net(x)[:, 0]).detach()
    y[0] *= 1 if len(set(y.tolist())) == 2 else -1
    phi, w = tangent_features(net, x)
    kernel = phi @ phi.T
    solution = svm_dual(kernel, y)
    u = (solution.alpha * y) @ phi
    smallest = float((y * net(x)[:, 0]).min().detach())
    found = tangent_margin(net, x, y, degree=depth)
    assert found.trace == pytest.approx(float(phi.square().sum()) / 8, rel=1e-12)
    assert found.scale_free_trace == pytest.approx(found.trace / float(w.norm()) ** (2 * depth - 2), rel=1e-12)
    assert found.normalized_margin == pytest.approx(smallest / float(w.norm()) ** depth, rel=1e-12)
    assert found.optimum_ratio == pytest.approx(solution.optimum * found.trace, rel=1e-12)
    assert found.radius_margin == pytest.approx(solution.margin / math.sqrt(found.trace), rel=1e-12)
    assert found.cosine == pytest.approx(float(w @ u / (w.norm() * u.norm())), rel=1e-12)
    assert found.attained == pytest.approx(float((y * (phi @ w)).min() / w.norm()) / solution.margin, rel=1e-10)
    assert found.mean_bound == pytest.approx(64 / (2 * float(y @ kernel @ y)) * found.trace, rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_margin_and_trace_are_tied_by_an_identity_and_bounds(depth):
    net, x = network(depth, width=30), features(8, 6)
    y = torch.sign(net(x)[:, 0]).detach()
    y = y if len(set(y.tolist())) == 2 else labels(8)
    found = tangent_margin(net, x, y, degree=depth)
    right = found.attained**2 * found.scale_free_trace / (2 * found.optimum_ratio)
    assert (depth * found.normalized_margin) ** 2 == pytest.approx(right, rel=1e-10)
    assert found.attained <= found.cosine + 1e-12 <= 1 + 2e-12
    assert 0.5 <= found.mean_bound <= found.optimum_ratio * (1 + 1e-12)
    f = net(x)[:, 0].detach()
    assert found.trace * 8 >= depth**2 * float(f @ f) / found.norm**2 * (1 - 1e-12)


def test_a_network_that_tells_no_examples_apart_has_infinite_optimum_and_no_margin():
    net = network(bias=True)
    for w in net.parameters():
        torch.nn.init.zeros_(w)
    torch.nn.init.ones_(net.layers[3].bias)  # f = 1 and K = 1 everywhere
    found = tangent_margin(net, features(6, 6), labels(6), degree=2)
    assert found.trace == pytest.approx(1)
    assert found.optimum == found.optimum_ratio == found.mean_bound == math.inf
    assert found.svm_margin == found.radius_margin == 0
    assert math.isnan(found.attained)
    assert math.isnan(found.cosine)


@pytest.mark.parametrize("depth", [2, 3])
def test_multiplying_all_weights_changes_the_trace_and_no_direction(depth):
    net, x, y = network(depth), features(8, 6), labels(8)
    one, c = tangent_margin(net, x, y, degree=depth), 3.0
    other = tangent_margin(rescale_layers(net, [c] * depth), x, y, degree=depth)
    assert other.trace == pytest.approx(c ** (2 * depth - 2) * one.trace, rel=1e-12)
    for name in ("scale_free_trace", "normalized_margin", "optimum_ratio", "radius_margin", "attained", "cosine", "within"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9), name


def test_rescaling_layers_against_each_other_raises_the_trace_and_keeps_the_function():
    net, x, y = network(2), features(8, 6), labels(8)
    other = rescale_layers(net, [10.0, 0.1])
    torch.testing.assert_close(other(x), net(x), rtol=1e-12, atol=1e-14)
    assert tangent_margin(other, x, y, degree=2).trace > tangent_margin(net, x, y, degree=2).trace


def test_rescaling_takes_one_positive_factor_per_weight_and_leaves_the_model_alone():
    net = network(2)
    before = [w.clone() for w in net.parameters()]
    other = rescale_layers(net, [2.0, 3.0])
    for w, old, new, c in zip(net.parameters(), before, other.parameters(), [2.0, 3.0], strict=True):
        assert torch.equal(w, old)
        torch.testing.assert_close(new, c * old)
    for factors in ([2.0], [2.0, 0.0]):
        with pytest.raises(ValueError, match="2 positive numbers, one per parameter of the model. Got"):
            rescale_layers(net, factors)


def test_the_share_of_kinks_counts_pairs_at_right_angles():
    weight = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1e-3, 0.0]], dtype=DOUBLE)  # the third is too small to count
    x = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2e-3, 1.0]], dtype=DOUBLE)
    assert kink_share(weight, x) == 1 / 6
    assert kink_share(weight, x, tolerance=1e-2) == 2 / 6
    assert kink_share(1e-7 * weight, 1e5 * x) == 1 / 6
    wide, many = features(400, 50, 1), features(400, 50, 2)
    assert kink_share(wide, many, tolerance=0.01) == pytest.approx(0.01 * math.sqrt(2 * 50 / math.pi), rel=0.05)


def test_the_growth_adds_up():
    x, y = features(8, 6), labels(8)
    net = network(3, width=12)
    fitted = [
        vars(tangent_margin(s.model, x, y, degree=3)) for s in normalized_descent(net, x, y, lr=0.1, steps=200, measure_at=[100])
    ]
    growth = margin_growth(fitted[0], fitted[-1], degree=3)
    assert growth.trace == pytest.approx(growth.norm + growth.scale_free_trace, rel=1e-10)
    assert growth.margin == pytest.approx(growth.attained + growth.trace_part + growth.geometry, rel=1e-8)
    assert growth.trace_part == growth.scale_free_trace / 2
    assert growth.norm == pytest.approx(4 * math.log(fitted[-1]["norm"] / fitted[0]["norm"]), rel=1e-12)
    with pytest.raises(ValueError, match="must be positive, all examples on their right side. Got -"):
        margin_growth(fitted[-1] | {"normalized_margin": -1.0}, fitted[-1], degree=3)


# -- training ------------------------------------------------------------------------------------------------------------------


def test_the_logarithm_of_the_loss_is_right_where_the_loss_is_a_number():
    outputs = torch.tensor([[-3.0], [0.0], [2.0], [60.0]], dtype=DOUBLE)
    y = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=DOUBLE)
    direct = math.log(sum(math.log1p(math.exp(-q)) for q in (-3.0, 0.0, 2.0, 60.0)) / 4)
    assert float(log_logistic_loss(outputs, y)) == pytest.approx(direct, rel=1e-14)


@pytest.mark.parametrize("q", [39.0, 41.0, 5000.0])
def test_the_logarithm_of_a_vanishing_loss_and_its_gradient_keep_their_digits(q):
    outputs = torch.tensor([[q], [-q - 1]], dtype=DOUBLE, requires_grad=True)
    value = log_logistic_loss(outputs, labels(2))
    (gradient,) = torch.autograd.grad(value, outputs)
    assert float(value.detach()) == pytest.approx(-q + math.log((1 + math.exp(-1)) / 2), rel=1e-13)
    share = 1 / (1 + math.exp(-1))  # of the first example in the loss
    torch.testing.assert_close(gradient[:, 0], torch.tensor([-share, 1 - share], dtype=DOUBLE), rtol=1e-12, atol=0)


def test_one_step_is_the_formula():
    net, x, y = network(), features(6, 6), labels(6)
    before = [w.detach().clone() for w in net.parameters()]
    loss = torch.nn.functional.softplus(-y * net(x)[:, 0]).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    eta = 0.2 * loss.detach() / sum(g.square().sum() for g in gradients)
    states = [(s.loss, s.lr) for s in normalized_descent(net, x, y, lr=0.2, steps=1)]
    assert states[0] == pytest.approx((float(loss.detach()), float(eta)), rel=1e-12)
    for w, old, g in zip(net.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(w.detach(), old - eta * g, rtol=1e-12, atol=1e-15)


def test_a_step_lowers_the_logarithm_of_the_loss_by_lr_up_to_its_square():
    x, y = features(6, 6), labels(6)
    errors = []
    for lr in (1e-3, 5e-4):
        net = network(activation="identity")
        logs = [math.log(s.loss) for s in normalized_descent(net, x, y, lr=lr, steps=1)]
        errors.append(logs[0] - logs[1] - lr)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


def test_the_loss_falls_below_the_smallest_float_and_the_margin_grows():
    x, y = features(8, 6), labels(8)
    net = network(width=30)
    marks = range(0, 2001, 250)
    margins, logs = [], []
    for s in normalized_descent(net, x, y, lr=0.5, steps=2000, measure_at=marks):
        logs.append(-float(log_logistic_loss(s.model(x), y).detach()))
        margins.append(tangent_margin(s.model, x, y, degree=2).normalized_margin)
    assert s.loss == 0.0
    assert not s.diverged
    assert logs[-1] > 800
    assert all(b > a for a, b in itertools.pairwise(margins[1:]))


def test_a_smooth_homogeneous_network_comes_to_the_solution_of_the_machine():
    x, y = features(8, 6), labels(8)
    x[:, 0] += 2 * y
    net = network(activation="identity", width=5)
    cosines = [
        tangent_margin(s.model, x, y, degree=2).cosine
        for s in normalized_descent(net, x, y, lr=0.5, steps=2500, measure_at=[100, 600, 2500])
    ]
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[-1] > 0.998


def test_a_resumed_run_takes_the_same_steps():
    x, y = features(8, 6), labels(8)
    whole = list(normalized_descent(network(), x, y, lr=0.1, steps=20))
    half = next(s for s in normalized_descent(network(), x, y, lr=0.1, steps=20) if s.step == 9)
    checkpoint = (9, {k: v.clone() for k, v in half.tensors().items()})
    rest = list(normalized_descent(network(seed=5), x, y, lr=0.1, steps=20, resume=checkpoint))
    assert [s.step for s in rest] == list(range(10, 21))
    assert [s.loss for s in rest] == [s.loss for s in whole[10:]]


def test_a_dead_network_diverges_at_once_and_bad_labels_are_an_error():
    x, y = features(4, 6), labels(4)
    net = network()
    torch.nn.init.zeros_(net.layers[3].weight)
    torch.nn.init.zeros_(net.layers[1].weight)
    (state,) = normalized_descent(net, x, y, lr=0.1, steps=10)
    assert state.diverged
    with pytest.raises(ValueError, match=r"must be \+1 or -1. Got 0"):
        next(normalized_descent(network(), x, y.clamp(min=0), lr=0.1, steps=1))


def test_two_classes_are_balanced_seeded_and_signed():
    images = data.load("digits")
    x, y = data.two_classes(images.x_train, images.y_train, (3, 8), 20, seed=1)
    assert x.shape == (20, 1, 8, 8)
    assert x.dtype == DOUBLE
    assert y.sum() == 0
    rows = {tuple(a.flatten().tolist()): int(b) for a, b in zip(images.x_train, images.y_train, strict=True)}
    assert [rows[tuple(a.flatten().tolist())] for a in x.float()] == [3 if s > 0 else 8 for s in y]
    again, other = (data.two_classes(images.x_train, images.y_train, (3, 8), 20, seed=s)[0] for s in (1, 2))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    with pytest.raises(ValueError, match="two classes must differ. Got 3 and 3"):
        data.two_classes(images.x_train, images.y_train, (3, 3), 20)
    with pytest.raises(ValueError, match="The number of examples must be between 1 and"):
        data.two_classes(images.x_train, images.y_train, (3, 8), 2000)


def test_settings_take_homogeneous_activations_only():
    values = {"dataset": "digits", "classes": (0, 1), "num_train": 8, "width": 4, "lr": 0.1, "steps": 1}
    assert MarginSettings(**values).depth == 2
    with pytest.raises(ValueError, match="activation"):
        MarginSettings(**values, activation="tanh")
