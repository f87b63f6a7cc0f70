"""Laws of the trace and of its estimators."""

import math

import pytest
import torch
from reference import assert_mean, gaussian_variance, ntk_by_definition, rademacher_variance, trace_by_definition

from ntklib import estimators
from ntklib.estimators import ntk_trace
from ntklib.models import MLP, initialize
from ntklib.random import stream

RANDOM = [("perturbation", {"epsilon": 1e-4}), ("jvp", {}), ("output", {})]
FORWARD = RANDOM[:2]  # many draws in one pass


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "data"), dtype=torch.float64)


def net(widths=(5,), *, d: int = 4, c: int = 3, activation: str = "tanh", bias: bool = False) -> MLP:
    return initialize(MLP(d, list(widths), c, activation=activation, bias=bias), "standard", stream(0, "init")).double()


def estimate(model, x, method, num_samples, *, seed=0, normalize=False, **options):
    return ntk_trace(
        model, x, method=method, num_samples=num_samples, generator=stream(seed, "draws"), normalize=normalize, **options
    )


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_exact_trace_is_the_sum_of_squared_gradients(chunk_size):
    model, x = net(bias=True), normal(5, 4)
    result = ntk_trace(model, x, normalize=False, chunk_size=chunk_size)
    assert result.mean == pytest.approx(trace_by_definition(ntk_by_definition(model, x, x)), rel=1e-12)  # reordered sum
    assert (result.sem, result.num_samples, result.variance) == (0, 0, 0)


@pytest.mark.parametrize(("method", "options"), FORWARD)
def test_gaussian_estimators_are_unbiased_with_twice_the_squared_frobenius_norm_as_variance(method, options):
    model, x = net(), normal(8, 4)
    kernel = ntk_by_definition(model, x, x)
    result = estimate(model, x, method, 20_000, **options)
    assert_mean(result.mean, result.sem, trace_by_definition(kernel))  # the bias of epsilon = 1e-4 is of relative order 1e-8
    assert 0.9 < result.variance / gaussian_variance(kernel) < 1.1  # standard deviation of the ratio: about 0.02


def test_the_output_estimator_is_unbiased_with_the_off_diagonal_blocks_as_variance():
    model, x = net(), normal(8, 4)
    kernel = ntk_by_definition(model, x, x)
    result = estimate(model, x, "output", 1200)
    assert_mean(result.mean, result.sem, trace_by_definition(kernel))
    assert 0.9 < result.variance / rademacher_variance(kernel) < 1.1  # standard deviation of the ratio: 0.04


def test_draws_are_taken_in_groups_that_fit_and_add_up(monkeypatch):
    model, x, groups = net(), normal(8, 4), []
    p = sum(w.numel() for w in model.parameters())
    draw = estimators.random_direction
    monkeypatch.setattr(estimators, "DRAW_BUDGET", 8 * p * 1500)
    monkeypatch.setattr(estimators, "random_direction", lambda *args: [groups.append(args[1]), draw(*args)][1])
    result = estimate(model, x, "jvp", 20_000)
    assert groups == [1500] * 13 + [500]
    assert_mean(result.mean, result.sem, trace_by_definition(ntk_by_definition(model, x, x)))


def test_the_bias_of_the_perturbation_of_a_two_layer_linear_network_is_exact():
    # f = A B x: E = Tr K + epsilon^2 c m |X|^2, without higher orders
    n, d, m, c, epsilon = 12, 6, 5, 4, 0.5
    model, x = net([m], d=d, c=c, activation="identity"), normal(n, d)
    trace = trace_by_definition(ntk_by_definition(model, x, x))
    truth = trace + epsilon**2 * c * m * float((x * x).sum())
    result = estimate(model, x, "perturbation", 40_000, epsilon=epsilon)
    assert_mean(result.mean, result.sem, truth)
    assert truth - trace > 100 * result.sem  # the bias is seen


@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_linear_model_the_perturbation_has_no_bias_at_any_epsilon(epsilon, bias):
    model, x = net([], bias=bias), normal(8, 4)
    result = estimate(model, x, "perturbation", 20_000, epsilon=epsilon)
    assert_mean(result.mean, result.sem, 3 * float((x * x).sum() + (8 if bias else 0)))


def test_the_perturbation_tends_to_the_jvp_linearly_in_epsilon_for_the_same_draws():
    model, x = net(), normal(5, 4)
    limit = estimate(model, x, "jvp", 3).mean
    errors = [abs(estimate(model, x, "perturbation", 3, epsilon=epsilon).mean - limit) for epsilon in (2e-4, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)  # the next order is epsilon relative to the first


def test_the_output_estimator_of_a_kernel_with_diagonal_blocks_has_no_variance():
    model, x = net([], bias=True), normal(5, 4)
    result = estimate(model, x, "output", 5)
    assert result.mean == pytest.approx(3 * float((x * x).sum() + 5), rel=1e-12)
    assert result.sem < 1e-12 * result.mean  # rounding


@pytest.mark.parametrize(("method", "options"), RANDOM)
def test_the_same_generator_state_gives_the_same_numbers_and_another_state_others(method, options):
    model, x = net(), normal(5, 4)
    first, again, other = (estimate(model, x, method, 4, seed=seed, **options) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean


@pytest.mark.parametrize(("method", "options"), RANDOM)
def test_without_a_generator_the_global_one_is_used(method, options):
    model, x = net(), normal(5, 4)
    with torch.random.fork_rng([]):
        given = ntk_trace(model, x, method=method, generator=torch.Generator().manual_seed(3), **options)
        torch.manual_seed(3)
        assert ntk_trace(model, x, method=method, **options).mean == given.mean


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize(("method", "options"), RANDOM)
def test_the_chunk_size_does_not_change_an_estimate(method, options, chunk_size):
    model, x = net(), normal(5, 4)
    whole, parts = (estimate(model, x, method, 3, chunk_size=size, **options) for size in (None, chunk_size))
    rel = 1e-9 if method == "perturbation" else 1e-12  # reordered sum, of differences of 1e-4 in the one case
    assert (parts.mean, parts.sem) == pytest.approx((whole.mean, whole.sem), rel=rel)


@pytest.mark.parametrize(("method", "options"), [("exact", {}), *RANDOM])
def test_normalize_divides_by_examples_and_outputs(method, options):
    model, x = net(), normal(5, 4)
    total, mean = (estimate(model, x, method, 3, normalize=normalize, **options) for normalize in (False, True))
    assert (mean.mean, mean.sem) == pytest.approx((total.mean / 15, total.sem / 15), rel=1e-12)  # one more rounding


def test_the_variance_of_a_draw_and_the_standard_error_of_the_mean_fit_the_draws():
    model, x = net(), normal(5, 4)
    generator = stream(0, "draws")
    draws = [ntk_trace(model, x, method="output", generator=generator).mean for _ in range(6)]
    mean = sum(draws) / 6
    variance = sum((draw - mean) ** 2 for draw in draws) / 5
    result = estimate(model, x, "output", 6, normalize=True)
    assert (result.mean, result.variance) == pytest.approx((mean, variance), rel=1e-10)  # a difference of close numbers
    assert result.sem == pytest.approx(math.sqrt(variance / 6), rel=1e-10)


@pytest.mark.parametrize(("method", "options"), RANDOM)
def test_a_single_draw_has_no_standard_error(method, options):
    result = estimate(net(), normal(5, 4), method, 1, **options)
    assert math.isnan(result.sem)
    assert math.isfinite(result.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pertubation"}, "Unknown method 'pertubation'. Did you mean 'perturbation'"),
        ({"method": "perturbation"}, "requires epsilon > 0.*Got epsilon=None"),
        ({"method": "perturbation", "epsilon": 0.0}, "requires epsilon > 0.*Got epsilon=0.0"),
        ({"method": "jvp", "epsilon": 0.1}, "belongs to method='perturbation' only.*method='jvp'"),
        ({"method": "output", "num_samples": 0}, "num_samples must be at least 1. Got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ntk_trace(net(), normal(5, 4), **options)


def orthogonal(model, x, num_samples, **options):
    return estimate(model, x, "output", num_samples, probes="orthogonal", **options)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_as_many_orthogonal_probes_as_outputs_are_exact(chunk_size):
    model, x = net(bias=True), normal(5, 4)
    result = orthogonal(model, x, 3, chunk_size=chunk_size)
    exact = trace_by_definition(ntk_by_definition(model, x, x))
    assert result.mean == pytest.approx(exact, rel=1e-12)  # an orthogonal matrix in float64
    assert result.sem == 0


@pytest.mark.parametrize("num_samples", [1, 2])
def test_fewer_orthogonal_probes_are_unbiased(num_samples):
    model, x = net(), normal(16, 4)
    means = torch.tensor([orthogonal(model, x, num_samples, seed=seed).mean for seed in range(300)], dtype=torch.float64)
    exact = trace_by_definition(ntk_by_definition(model, x, x))
    assert_mean(float(means.mean()), float(means.std()) / math.sqrt(300), exact)


def z_scores(method, num_samples, runs, **options):
    """(mean - truth) / sem of independent runs."""
    model, x = net(), normal(8, 4)
    exact = trace_by_definition(ntk_by_definition(model, x, x))
    results = [estimate(model, x, method, num_samples, seed=seed, **options) for seed in range(runs)]
    return torch.tensor([(result.mean - exact) / result.sem for result in results], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "num_samples", "options"),
    [("jvp", 400, {}), ("perturbation", 400, {"epsilon": 1e-4}), ("output", 40, {})],
)
def test_errors_are_as_large_as_the_standard_error_says(method, num_samples, options):
    z = z_scores(method, num_samples, 150, **options)
    assert abs(float(z.mean())) < 4 / math.sqrt(150)  # mean zero
    assert 0.75 < float(z.std()) < 1.25  # standard deviation one, itself known to 6 %


def test_errors_of_two_orthogonal_probes_are_as_large_as_the_standard_error_says():
    # with two draws z is heavy-tailed; the mean square of the errors against the mean of sem^2 is not
    model, x = net(), normal(8, 4)
    exact = trace_by_definition(ntk_by_definition(model, x, x))
    results = [orthogonal(model, x, 2, seed=seed) for seed in range(300)]
    mean_square = sum((result.mean - exact) ** 2 for result in results) / 300
    assert 0.7 < sum(result.sem**2 for result in results) / 300 / mean_square < 1.4  # each known to about 10 %


def test_the_cost_of_every_method_is_in_forward_passes():
    model, x = net(), normal(5, 4)
    exact = ntk_trace(model, x)
    assert exact.cost == 1 + 3  # one forward pass, and c backward passes to the inputs
    assert estimate(model, x, "output", 2).cost == 1 + 2
    assert orthogonal(model, x, 3).cost == exact.cost  # and the same number
    assert estimate(model, x, "perturbation", 6, epsilon=0.1).cost == 1 + 6
    assert estimate(model, x, "jvp", 6).cost == 3 * 6


@pytest.mark.parametrize(("method", "options"), [("exact", {}), *RANDOM, ("output", {"probes": "orthogonal"})])
def test_naming_parameters_is_freezing_the_others(method, options):
    model, x = net((5, 4), bias=True), normal(5, 4)
    names = [name for name, _ in model.named_parameters()][1:3]
    named = estimate(model, x, method, 2, params=names, **options)
    for name, w in model.named_parameters():
        w.requires_grad_(name in names)
    frozen = estimate(model, x, method, 2, **options)
    assert (named.mean, named.sem) == pytest.approx((frozen.mean, frozen.sem), rel=1e-10)  # the same draws


@pytest.mark.parametrize(("method", "options"), [("exact", {}), *RANDOM, ("output", {"probes": "orthogonal"})])
def test_the_trace_of_an_inner_output_is_that_of_the_network_cut_there(method, options):
    whole = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x = normal(5, 4)
    names = ["0.weight", "0.bias"]
    inner = estimate(whole, x, method, 2, output="1", params=names, **options)
    cut = estimate(whole[:2], x, method, 2, **options)
    assert (inner.mean, inner.sem) == pytest.approx((cut.mean, cut.sem), rel=1e-10)  # the same draws


@pytest.mark.parametrize(("method", "options"), RANDOM)
def test_common_random_numbers_tell_two_checkpoints_apart_far_better(method, options):
    model, x, moved = net(), normal(8, 4), net()
    with torch.no_grad():
        for w in moved.parameters():
            w.mul_(1.01)
    truth = ntk_trace(moved, x, normalize=False).mean - ntk_trace(model, x, normalize=False).mean

    def errors(offset):
        pairs = [
            (estimate(moved, x, method, 1, seed=s + offset, **options), estimate(model, x, method, 1, seed=s, **options))
            for s in range(30)
        ]
        return math.sqrt(sum((a.mean - b.mean - truth) ** 2 for a, b in pairs) / 30)

    assert errors(0) < errors(1000) / 10


def test_one_probe_of_the_outputs_is_far_more_certain_than_one_of_the_weights():
    model, x = net((20,), d=10, c=5), normal(20, 10)
    spread = {method: math.sqrt(estimate(model, x, method, 200, **options).variance) for method, options in RANDOM}
    assert spread["output"] < spread["jvp"] / 10
    assert spread["output"] < spread["perturbation"] / 10
