"""Responses to weight noise of any size, against networks that are perturbed by hand."""

import copy
import math

import pytest
import torch
from reference import assert_mean, gradients_by_definition, ntk_by_definition, trace_by_definition
from torch import nn

from ntklib import (
    batch_trace,
    layer_rms,
    ntk_by_layer,
    ntk_trace,
    perturbation_response,
    plateau,
    relu_response,
    response_ratio,
    trace_by_layer,
)
from ntklib.directions import random_direction
from ntklib.models import MLP, calibrate_batch_norm, initialize
from ntklib.random import stream

EPSILONS = [0.0, 1e-3, 0.3, -0.3]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "data"), dtype=torch.float64)


def net(widths=(5,), *, d: int = 4, c: int = 3, activation: str = "tanh", bias: bool = True, seed: int = 0) -> MLP:
    return initialize(MLP(d, list(widths), c, activation=activation, bias=bias), "standard", stream(seed, "init")).double()


def convolutional(x: torch.Tensor) -> nn.Module:
    """Two convolutions with batch normalisation, calibrated on ``x``, in eval mode; dropout that must stay off."""
    layers = [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    return calibrate_batch_norm(initialize(model, "standard", stream(0, "init")).double(), x).eval()


def training_mode(model: nn.Module) -> nn.Module:
    """The function of training mode: batch normalisation by the batch, no dropout."""
    changed = copy.deepcopy(model).train()
    for module in changed.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return changed


def responses_by_hand(model, x, epsilon, num, scale=lambda _: 1.0):
    """Add the noise to a copy's parameters, one draw at a time."""
    params = {k: w.detach() for k, w in model.named_parameters()}
    directions = random_direction(params, num, stream(1, "draws"))
    found = []
    for r in range(num):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, w in moved.named_parameters():
                w += epsilon * scale(name) * directions[name][r]
            found.append((moved(x) - copy.deepcopy(model)(x)).square().mean() / epsilon**2)
    return torch.stack(found)


@pytest.mark.parametrize("epsilon", [1e-3, 0.3, -0.3])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_a_response_is_the_change_of_the_outputs_of_a_network_with_noisy_weights(epsilon, batch_statistics):
    x = normal(6, 2, 5, 5)
    model = convolutional(x)
    found = perturbation_response(
        model, x, [epsilon], num_samples=4, batch_statistics=batch_statistics, generator=stream(1, "draws")
    )
    by_hand = responses_by_hand(training_mode(model) if batch_statistics else model, x, epsilon, 4)
    assert found.shape == (1, 4)
    torch.testing.assert_close(found[0], by_hand, rtol=1e-8, atol=0)  # differences of 1e-3


def test_relative_noise_is_in_units_of_the_root_mean_square_of_each_layer():
    model, x = net((5, 6)), normal(7, 4)
    rms = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            values = [v for w in layer.parameters() for v in w.flatten().tolist()]
            rms[name] = math.sqrt(sum(v**2 for v in values) / len(values))
    assert layer_rms(model) == pytest.approx(rms, rel=1e-12)
    found = perturbation_response(model, x, [0.3], num_samples=4, relative=True, generator=stream(1, "draws"))
    by_hand = responses_by_hand(model, x, 0.3, 4, lambda name: rms[name.rpartition(".")[0]])
    torch.testing.assert_close(found[0], by_hand, rtol=1e-12, atol=0)


def test_the_rows_are_the_estimators_of_the_trace_with_the_same_draws():
    model, x = net(), normal(5, 4)
    found = perturbation_response(model, x, [1e-2, 0.0], num_samples=6, generator=stream(1, "draws"))
    for row, options in zip(found, ({"method": "perturbation", "epsilon": 1e-2}, {"method": "jvp"}), strict=True):
        estimate = ntk_trace(model, x, num_samples=6, generator=stream(1, "draws"), **options)
        assert float(row.mean()) == pytest.approx(estimate.mean, rel=1e-12)
        assert float(row.var()) == pytest.approx(estimate.variance, rel=1e-10)


@pytest.mark.parametrize("how", [{}, {"relative": True}, {"batch_statistics": True}])
def test_the_limit_is_approached_quadratically_by_mirrored_noise(how):
    x = normal(6, 2, 5, 5)
    model = convolutional(x)
    model[2] = nn.Tanh()  # a smooth network
    T = perturbation_response(model, x, [0.0, 2e-3, -2e-3, 1e-3, -1e-3], num_samples=3, generator=stream(1, "draws"), **how)
    errors = [(T[i] + T[i + 1]) / 2 - T[0] for i in (1, 3)]
    torch.testing.assert_close(
        errors[0] / errors[1], torch.full_like(T[0], 4.0), rtol=0.02, atol=0
    )  # the next order: 1e-3^2 larger


def test_the_mean_of_the_limit_under_relative_noise_is_the_weighted_trace():
    model, x = net((5, 6)), normal(7, 4)
    shares, rms = trace_by_layer(model, x), layer_rms(model)
    draws = perturbation_response(model, x, [0.0], num_samples=40_000, relative=True, generator=stream(1, "draws"))[0]
    assert_mean(float(draws.mean()), float(draws.std()) / 200, sum(rms[k] ** 2 * shares[k] for k in shares))


def test_the_weighted_trace_does_not_change_when_a_layer_is_scaled_and_the_next_one_undoes_it():
    model, x = net((5,), activation="relu", bias=False), normal(7, 4)

    def weighted():
        return sum(layer_rms(model)[k] ** 2 * v for k, v in trace_by_layer(model, x).items())

    before, plain = weighted(), ntk_trace(model, x).mean
    with torch.no_grad():
        model.layers[1].weight *= 3
        model.layers[3].weight /= 3
    assert weighted() == pytest.approx(before, rel=1e-12)
    assert ntk_trace(model, x).mean != pytest.approx(plain, rel=0.1)


def jacobian_of_training_mode(model, x):
    """``[n c, p]`` by one backward pass per output of the module itself."""
    changed = training_mode(model)
    rows = []
    for output in changed(x).flatten():
        grads = torch.autograd.grad(output, list(changed.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_the_trace_with_batch_statistics_is_that_of_the_jacobian_of_training_mode():
    x = normal(6, 2, 5, 5)
    model = convolutional(x)
    exact = float(jacobian_of_training_mode(model, x).square().sum())
    assert batch_trace(model, x, normalize=False) == pytest.approx(exact, rel=1e-12)
    assert batch_trace(model, x) == pytest.approx(exact / 18, rel=1e-12)
    assert abs(batch_trace(model, x) / ntk_trace(model, x).mean - 1) > 0.1  # another function


def test_the_limit_with_batch_statistics_is_the_derivative_of_training_mode():
    x = normal(6, 2, 5, 5)
    model = convolutional(x)
    params = {k: w.detach() for k, w in model.named_parameters()}
    z = random_direction(params, 3, stream(1, "draws"))
    flat = torch.cat([d.reshape(3, -1) for d in z.values()], dim=1)
    by_hand = (jacobian_of_training_mode(model, x) @ flat.T).square().mean(0)
    found = perturbation_response(model, x, [0.0], num_samples=3, batch_statistics=True, generator=stream(1, "draws"))[0]
    torch.testing.assert_close(found, by_hand, rtol=1e-11, atol=0)


def test_without_batch_normalisation_batch_statistics_change_nothing():
    model, x = net(), normal(5, 4)
    assert batch_trace(model, x) == pytest.approx(ntk_trace(model, x).mean, rel=1e-12)
    plain, batch = (
        perturbation_response(model, x, EPSILONS, batch_statistics=b, generator=stream(1, "draws")) for b in (False, True)
    )
    assert torch.equal(plain, batch)


@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_left_as_it_was(training):
    x = normal(6, 2, 5, 5)
    model = convolutional(x).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch_trace(model, x)
    perturbation_response(model, x, EPSILONS, num_samples=2, batch_statistics=True)
    assert all(m.training == training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())
    assert model[1].track_running_stats


def test_traces_by_layer_are_those_of_the_kernels_by_layer():
    model, x = net((5, 6)), normal(7, 4)
    gradients, start = gradients_by_definition(model, x), 0
    shares = trace_by_layer(model, x, normalize=False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            stop = start + sum(w.numel() for w in layer.parameters())
            assert shares[name] == pytest.approx(float(gradients[:, :, start:stop].square().sum()), rel=1e-12)
            start = stop
    assert list(shares) == list(ntk_by_layer(model, x))
    assert sum(trace_by_layer(model, x).values()) == pytest.approx(ntk_trace(model, x).mean, rel=1e-12)


def test_the_ratio_of_the_two_layer_linear_network_follows_its_bias_law():
    # f = A B x: E T = Tr K + epsilon^2 c m |X|^2, without higher orders
    n, d, m, c = 12, 6, 5, 4
    model, x = net([m], d=d, c=c, activation="identity", bias=False), normal(n, d)
    trace = trace_by_definition(ntk_by_definition(model, x, x)) / (n * c)
    epsilons = [0.5, 0.1, 0.02]
    ratios, sems = response_ratio(model, x, epsilons, trace, num_samples=20_000, generator=stream(1, "draws"))
    for epsilon, ratio, sem in zip(epsilons, ratios.tolist(), sems.tolist(), strict=True):
        law = epsilon**2 * m * float(x.square().sum()) / n / trace
        assert abs(ratio - 1 - law) < 4 * sem
        assert sem < 0.02 * law  # the control variate sees a bias of any size this well


def test_the_control_variate_changes_no_mean_and_removes_scatter():
    model, x = net(), normal(8, 4)
    trace = ntk_trace(model, x).mean
    ratio, sem = response_ratio(model, x, [1e-2], trace, num_samples=500, generator=stream(1, "draws"))
    plain = ntk_trace(model, x, method="perturbation", epsilon=1e-2, num_samples=20_000, generator=stream(2, "draws"))
    assert abs(float(ratio) - plain.mean / trace) < 4 * plain.sem / trace
    assert float(sem) < 0.01 * plain.sem * math.sqrt(20_000 / 500) / trace


def test_without_a_trace_the_ratio_is_to_the_mean_of_the_limit():
    model, x = net(), normal(8, 4)
    draws = perturbation_response(model, x, [0.0, 0.3, -0.3], num_samples=7, generator=stream(1, "draws"))
    ratio, sem = response_ratio(model, x, [0.3], num_samples=7, generator=stream(1, "draws"))
    assert float(ratio) == pytest.approx(float((draws[1] + draws[2]).mean() / 2 / draws[0].mean()), rel=1e-12)
    change = ((draws[1] + draws[2]) / 2 - draws[0]) / draws[0].mean()
    assert float(sem) == pytest.approx(float(change.std()) / math.sqrt(7), rel=1e-12)
    assert response_ratio(model, x, [0.3], num_samples=1)[1].isnan().all()


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 3.0])
def test_the_response_of_relu_units_is_its_integral(epsilon):
    u = torch.tensor([-2.0, -0.3, -0.01, 0.01, 0.4, 1.5], dtype=torch.float64)
    s = torch.tensor([1.0, 2.0, 0.5, 0.5, 1.0, 3.0], dtype=torch.float64)
    g = torch.linspace(-9, 9, 180_001, dtype=torch.float64)
    weight = torch.exp(-g.square() / 2) / math.sqrt(2 * math.pi)
    change = (u[:, None] + epsilon * s[:, None] * g).relu() - u[:, None].relu()
    integral = torch.trapezoid(change.square() * weight, g, dim=1) / epsilon**2
    torch.testing.assert_close(relu_response(u, s, epsilon), integral, rtol=1e-6, atol=1e-9)  # the kink on the grid


@pytest.mark.parametrize("t", [0.05, 0.3, 2.0])
def test_the_response_of_relu_units_with_gaussian_inputs_has_the_closed_mean(t):
    u = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    mean = float(torch.trapezoid(relu_response(u, torch.ones_like(u), t) * weight, u))
    assert mean == pytest.approx(0.5 * (1 - 2 * (t - math.atan(t)) / (math.pi * t**2)), rel=1e-6)  # the grid at 0


def test_a_relu_layer_has_the_bias_of_its_kinks():
    # f = max(0, W x) with Gaussian weights: one layer, whose outputs are the units
    n, d, c, epsilon = 40, 50, 30, 0.05
    model, x = nn.Sequential(nn.Linear(d, c, bias=False), nn.ReLU()).double(), normal(n, d)
    initialize(model, "he", stream(0, "init"))
    u = x @ model[0].weight.detach().T
    law = float(relu_response(u.flatten(), x.norm(dim=1, keepdim=True).expand_as(u).flatten(), epsilon).mean())
    trace = ntk_trace(model, x).mean
    ratio, sem = response_ratio(model, x, [epsilon], trace, num_samples=4000, generator=stream(1, "draws"))
    assert abs(float(ratio) - law / trace) < 4 * float(sem)
    assert float(sem) < 0.05 * (1 - law / trace)  # the bias is seen


@pytest.mark.parametrize(
    ("ratios", "ends"),
    [
        ([1.0, 1.09, 0.95, 0.7, 1.05], (1e-5, 1e-3)),
        ([3.0, 1.09, 0.95, 0.7, 1.05], (1e-4, 1e-3)),
        ([0.85, 1.0, 1.2, 0.95, 1.12], (1e-4, 1e-4)),  # equal lengths: the smaller epsilon
        ([math.nan, 0.5, 1.5, math.inf, 1.11], (math.nan, math.nan)),
    ],
)
def test_the_plateau_is_the_longest_row_of_good_epsilons(ratios, ends):
    epsilons = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert plateau(epsilons, ratios) == pytest.approx(ends, nan_ok=True)
    assert plateau(epsilons[::-1], ratios[::-1]) == pytest.approx(ends, nan_ok=True)


def test_frozen_parameters_receive_no_noise():
    model, x = net(), normal(5, 4)
    for name, w in model.named_parameters():
        w.requires_grad_(name == "layers.3.bias")
    found = perturbation_response(model, x, [0.3], num_samples=2000, generator=stream(1, "draws"), normalize=False)
    assert list(layer_rms(model)) == ["layers.3"]
    assert float(found.mean()) == pytest.approx(15, rel=0.1)  # sem 2 %


def test_without_a_generator_the_global_one_is_used_and_moves_on():
    model, x = net(), normal(5, 4)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        first, second = (perturbation_response(model, x, [0.1]) for _ in range(2))
        given = perturbation_response(model, x, [0.1], generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, given)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: perturbation_response(m, x, []), r"epsilons must be one or more finite numbers. Got \[\]"),
        (lambda m, x: perturbation_response(m, x, [math.inf]), r"one or more finite numbers. Got \[inf\]"),
        (lambda m, x: perturbation_response(m, x, [0.1], num_samples=0), "num_samples must be at least 1. Got 0"),
        (lambda m, x: perturbation_response(m, x[:0], [0.1]), "x must hold at least one example"),
        (lambda m, x: perturbation_response(m.train(), x, [0.1]), "must be in eval mode"),
        (lambda m, x: response_ratio(m, x, [0.1, 0.0], num_samples=2), r"epsilons must be greater than 0. Got \[0.1, 0.0\]"),
        (lambda *_: plateau([0.1, 0.2], [1.0]), "one ratio for each epsilon. Got 1 for 2"),
        (lambda m, x: batch_trace(m, x * math.nan), "x must be finite"),
    ],
)
def test_mistakes_are_named(call, message):
    x = normal(6, 2, 5, 5)
    with pytest.raises(ValueError, match=message):
        call(convolutional(x), x)
