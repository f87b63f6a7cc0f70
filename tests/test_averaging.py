"""Laws of averages of parameters: steps, lags, modes, filters, and the bound on the gradient."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from reference import gradients_by_definition
from torch import nn

from ntklib.averaging import (
    average_path,
    average_speed,
    descent_cosine,
    descent_defect,
    filter_gain,
    gradient_bound,
    mode_average,
    mode_speed,
    probability_error,
    steady_lag,
    training_pairs,
)
from ntklib.data import WeakAndStrong, hide_labels, load
from ntklib.models import MLP, build, calibrate_batch_norm, initialize
from ntklib.random import stream


def averages(path: np.ndarray, tau: float) -> np.ndarray:
    """Updated after the step, by the definition."""
    out = [path[0]]
    for z1 in path[1:]:
        out.append(tau * out[-1] + (1 - tau) * z1)
    return np.array(out)


def printed_averages(path: np.ndarray, tau: float) -> np.ndarray:
    """As the main paper prints the update, z2_{n+1} from z1_n."""
    out = [path[0]]
    for z1 in path[:-1]:
        out.append(tau * out[-1] + (1 - tau) * z1)
    return np.array(out)


def random_path(steps: int = 60, p: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps + 1, p)).cumsum(0)


@pytest.mark.parametrize("tau", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_distance_to_an_average_is_the_length_of_its_last_step(tau, seed):
    path = random_path(seed=seed)
    z2 = averages(path, tau)
    for n in range(1, len(path)):
        distance = float(np.linalg.norm(path[n] - z2[n]))
        assert average_speed(distance, tau) == pytest.approx(np.linalg.norm(z2[n] - z2[n - 1]), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("tau", [0.5, 0.99])
def test_with_the_printed_update_the_factor_of_the_next_step_lacks_the_division_by_tau(tau):
    path = random_path()
    z2 = printed_averages(path, tau)
    for n in range(1, len(path) - 1):
        step = np.linalg.norm(z2[n + 1] - z2[n])
        lag = float(np.linalg.norm(path[n] - z2[n]))
        assert (1 - tau) * lag == pytest.approx(step, rel=1e-10)
        assert average_speed(lag, tau) == pytest.approx(step / tau, rel=1e-10)  # printed in the proof, too large by 1/tau


def test_the_printed_average_is_the_other_one_a_step_late():
    path = random_path()
    assert np.array_equal(average_path(path, 0.9, "before")[1:], average_path(path, 0.9)[:-1])
    np.testing.assert_allclose(average_path(path, 0.9), averages(path, 0.9), rtol=1e-15)
    np.testing.assert_allclose(average_path(path, 0.9, "before"), printed_averages(path, 0.9), rtol=1e-15)


@pytest.mark.parametrize("tau", [0.1, 0.9])
@pytest.mark.parametrize("steps", [1, 5, 400])
def test_the_lag_behind_a_drift_has_the_closed_form(tau, steps):
    path = np.arange(steps + 1.0)
    expected = (1 - tau**steps) * steady_lag(tau)
    assert path[-1] - averages(path, tau)[-1] == pytest.approx(expected, rel=1e-9)
    expected = (1 - tau**steps) * steady_lag(tau, "before")
    assert path[-1] - printed_averages(path, tau)[-1] == pytest.approx(expected, rel=1e-9)


def test_an_average_moves_as_fast_as_a_drift_whatever_its_decay_rate():
    assert [average_speed(steady_lag(tau), tau) for tau in (0.1, 0.9, 0.999)] == pytest.approx([1, 1, 1], rel=1e-12)


@pytest.mark.parametrize("tau", [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
@pytest.mark.parametrize("factor", [Fraction(-9, 10), Fraction(-1, 100), Fraction(0), Fraction(1, 10), Fraction(89, 100),
                                    Fraction(9, 10), Fraction(9001, 10000), Fraction(999, 1000)])  # fmt: skip
def test_the_average_of_a_mode_has_the_closed_form(tau, factor):
    z1 = z2 = Fraction(1)
    for n in range(41):
        got = mode_average(float(factor), float(tau), np.array([n]))
        assert got == pytest.approx(float(z2), rel=1e-12, abs=1e-15), n  # exact rational arithmetic on the right
        moved = tau * z2 + (1 - tau) * factor * z1
        if factor >= 0:
            assert mode_speed(float(factor), float(tau), np.array([n])) == pytest.approx(
                float((z2 - moved) / ((1 - factor) * z2)), rel=1e-9
            )
        z1, z2 = factor * z1, moved


@pytest.mark.parametrize("difference", [1e-6, -1e-6, 1e-12, 0.0])
def test_near_resonance_no_digits_are_lost(difference):
    tau, n = 0.9, 50
    q = tau + difference
    exact = Fraction(tau) ** n + (1 - Fraction(tau)) * Fraction(q) * sum(
        Fraction(q) ** s * Fraction(tau) ** (n - 1 - s) for s in range(n)
    )
    assert mode_average(q, tau, np.array([n]))[0] == pytest.approx(float(exact), rel=1e-13)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.5, 20.0])
def test_in_the_end_the_average_of_a_slow_mode_follows_the_gradient_and_that_of_a_fast_one_its_own_rate(ratio):
    tau = 0.99
    factor = 1 - ratio * (1 - tau)
    speed = mode_speed(factor, tau, np.array([0, 10, 100, 1000, 100000]))
    assert speed[0] == pytest.approx(1 - tau)
    assert speed[-1] == pytest.approx(min(1, 1 / ratio), rel=1e-9)
    assert np.all(np.diff(speed) >= 0)
    assert np.all(speed <= 1)


def test_in_continuous_time_it_is_the_formula_with_two_exponentials():
    """z2 = a/(a - k) e^(-k t) + C e^(-a t) as the step goes to 0: the error halves with it."""
    a, k, t = 0.5, 0.2, 3.0
    flow = a / (a - k) * math.exp(-k * t) + (1 - a / (a - k)) * math.exp(-a * t)
    errors = []
    for per_unit in (1000, 2000):
        h = 1 / per_unit
        errors.append(mode_average(1 - k * h, 1 - a * h, np.array([t * per_unit]))[0] - flow)
    assert abs(errors[1]) < 1e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)


def quadratic(seed: int, top: float, p: int = 6) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(p, p)))
    h = q @ np.diag(np.geomspace(1e-3, 1.0, p)) @ q.T
    return h, rng.normal(size=p), top


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("top", [0.5, 1.0, 1.9])
def test_on_a_quadratic_the_average_takes_gradient_steps_but_for_the_defect(seed, top):
    h, z, lr = quadratic(seed, top)
    tau, path = 0.95, [z]
    for _ in range(200):
        path.append(path[-1] - lr * h @ path[-1])
    z2, start = averages(np.array(path), tau), lr * h @ z
    defect = descent_defect(tau, np.arange(200))
    for n in range(200):
        np.testing.assert_allclose(z2[n + 1], z2[n] - lr * h @ z2[n] + defect[n] * start, rtol=0, atol=1e-13)
        if top <= 1:  # the bound with the learning rate: no mode of the average outruns its gradient step
            assert np.linalg.norm(z2[n + 1] - z2[n]) <= np.linalg.norm(lr * h @ z2[n]) * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["walk", "noise", "alternating", "drift"])
def test_the_summed_squared_speed_falls_with_the_decay_rate_on_every_path_and_horizon(seed, kind):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(80, 3))
    path = {"walk": noise.cumsum(0), "noise": noise, "alternating": (-1.0) ** np.arange(80)[:, None] * np.ones(3),
            "drift": np.arange(80.0)[:, None] * np.ones(3)}[kind]  # fmt: skip
    taus = (0.05, 0.3, 0.8, 0.9, 0.99, 0.999)
    energy = []
    for tau in taus:
        lag = np.linalg.norm(path - averages(path, tau), axis=1)
        energy.append(np.cumsum([average_speed(float(d), tau) ** 2 for d in lag]))
    steps = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1) ** 2]).cumsum()
    for larger, smaller in zip([steps, *energy], energy, strict=False):
        assert np.all(smaller <= larger * (1 + 1e-12))


def test_the_gain_of_the_filter_is_its_transfer_function_and_falls_with_the_decay_rate():
    w = np.linspace(0, math.pi, 50)
    for tau in (0.1, 0.9):
        transfer = (1 - tau) / np.abs(1 - tau * np.exp(-1j * w))
        np.testing.assert_allclose(filter_gain(tau, w), transfer, rtol=1e-12)
    assert np.all(np.diff([filter_gain(tau, w) for tau in (0.1, 0.5, 0.9, 0.999)], axis=0) <= 1e-15)
    assert filter_gain(0.9, np.array([0.0]))[0] == 1


def test_the_gain_is_the_amplitude_of_an_averaged_oscillation():
    tau, w = 0.8, 0.3
    path = np.exp(1j * w * np.arange(400))
    assert abs(averages(path, tau)[-1]) == pytest.approx(filter_gain(tau, np.array([w]))[0], rel=1e-9)


# -- the gradient and its bound --------------------------------------------------------------------------------------------------


def network(kind: str, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = stream(seed, "x")
    if kind == "mlp":
        model, shape = initialize(MLP(6, [7, 5], 4), "he", stream(seed, "init")).double(), (6,)
    else:
        model, shape = build("resnet18", input_shape=(1, 8, 8), num_classes=4, width=1, seed=seed).double(), (1, 8, 8)
    x = torch.randn(9, *shape, generator=generator, dtype=torch.float64)
    calibrate_batch_norm(model, x)
    return model.eval(), x, torch.randint(4, (9,), generator=generator)


@pytest.mark.parametrize("kind", ["mlp", "resnet18"])
@pytest.mark.parametrize("seed", range(4))
def test_gradient_and_factors_are_those_of_the_definition_and_the_bound_holds(kind, seed):
    model, x, y = network(kind, seed)
    jacobians = gradients_by_definition(model, x)  # [n, c, p]
    p = torch.stack([f.exp() / f.exp().sum() for f in model(x).detach()])
    r = p - torch.eye(4, dtype=p.dtype)[y]
    bound = gradient_bound(model, x, y)
    gradient = sum(jacobians[i].T @ r[i] for i in range(9)) / 9
    assert bound.gradient == pytest.approx(float(gradient.norm()), rel=1e-10)
    assert bound.scale == pytest.approx(math.sqrt(float(jacobians.square().sum()) / 9), rel=1e-10)
    assert bound.error == pytest.approx(math.sqrt(float(r.square().sum()) / 9), rel=1e-10)
    assert bound.right == bound.scale * bound.error
    assert 0 < bound.tightness <= 1
    assert all(w.grad is None for w in model.parameters())


@pytest.mark.parametrize("kind", ["mlp", "resnet18"])
def test_the_cosine_with_descent_is_that_of_the_definition(kind):
    model, x, y = network(kind, 3)
    jacobians = gradients_by_definition(model, x)
    r = model(x).detach().softmax(1) - torch.eye(4, dtype=torch.float64)[y]
    gradient = torch.einsum("icp,ic->p", jacobians, r)
    direction = {k: torch.randn(w.shape, generator=stream(1, k), dtype=w.dtype) for k, w in model.named_parameters()}
    d = torch.cat([v.reshape(-1) for v in direction.values()])
    expected = -float(d @ gradient / (d.norm() * gradient.norm()))
    assert descent_cosine(model, x, y, direction) == pytest.approx(expected, rel=1e-9)
    pieces = gradient.split([w.numel() for w in model.parameters()])
    downhill = {k: -3 * g.view_as(w) for (k, w), g in zip(model.named_parameters(), pieces, strict=True)}
    assert descent_cosine(model, x, y, downhill) == pytest.approx(1, rel=1e-9)
    assert math.isnan(descent_cosine(model, x, y, {k: 0 * v for k, v in direction.items()}))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 2.0])
def test_training_pairs_are_labelled_images_and_those_with_a_sure_pseudo_label(threshold):
    images = hide_labels(load("digits", num_train=60, num_test=10), 10)
    augment = WeakAndStrong(images.black, images.white, 1, False, "geometric")
    model = build("mlp", input_shape=images.input_shape, num_classes=10, width=8, init="he").eval()
    x, y = training_pairs(model, images, augment, 30, threshold, 5)
    again, _ = training_pairs(model, images, augment, 30, threshold, 5)
    assert torch.equal(x, again)
    assert torch.equal(y[:30], images.y_labelled.repeat(3))
    chosen = images.x_unlabelled[torch.randperm(50, generator=stream(5, "pairs", "images"))[:30]]
    p = model(augment.weak(chosen, stream(5, "pairs", "weak"))).detach().softmax(1)
    strong = augment.strong(chosen, stream(5, "pairs", "strong"))
    sure = [i for i in range(30) if float(p[i].max()) >= threshold]
    assert len(sure) == {0.1: 30, 2.0: 0}.get(threshold, len(sure))
    assert y[30:].tolist() == [int(p[i].argmax()) for i in sure]
    assert torch.equal(x[30:], strong[sure])


@pytest.mark.parametrize("copies", [1, 5])
def test_the_bound_is_tight_for_two_opposite_outputs_on_one_point(copies):
    """f = (w x, -w x): every J_i is of rank one along (1, -1), as is p - onehot; J_i^T r_i are equal for equal examples."""

    class Opposite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = x @ self.w.T
            return torch.cat([a, -a], dim=1)

    x = torch.tensor([[1.0, 2.0, -0.5]], dtype=torch.float64).repeat(copies, 1)
    assert gradient_bound(Opposite(), x, torch.ones(copies, dtype=torch.long)).tightness == pytest.approx(1, rel=1e-12)
    mixed = gradient_bound(Opposite(), x.repeat(2, 1), torch.tensor([0, 1]).repeat_interleave(copies))
    assert mixed.tightness < 0.8  # the labels pull in opposite directions


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_on_random_networks(seed):
    generator = stream(seed, "net")
    c, n = 2 + seed % 5, 1 + seed % 7
    model = initialize(MLP(3, [int(h) for h in (2 + seed % 4, 3)], c), "he", generator).double()
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(3.0)  # confident, often wrong
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    bound = gradient_bound(model.eval(), x, torch.randint(c, (n,), generator=generator))
    assert bound.gradient <= bound.right * (1 + 1e-12)
    assert bound.error <= math.sqrt(2)


def test_probability_errors_reach_their_limits():
    sure = torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float64)
    assert probability_error(sure, torch.tensor([0])) == pytest.approx(0, abs=1e-12)
    assert probability_error(sure, torch.tensor([2])) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert probability_error(torch.zeros(4, 10), torch.arange(4)) == pytest.approx(math.sqrt(0.9), rel=1e-12)


def test_a_perfect_fit_has_no_gradient_and_no_tightness():
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4000.0, 0.0], [0.0, 0.0]]))
    bound = gradient_bound(model, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert bound.right == bound.gradient == 0
    assert math.isnan(bound.tightness)


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.5, math.nan])
def test_decay_rates_outside_their_range_are_refused(tau):
    n = np.arange(3)
    calls = (
        lambda: average_path(n, tau), lambda: average_speed(1.0, tau), lambda: steady_lag(tau), lambda: mode_average(0.5, tau, n),
        lambda: mode_speed(0.5, tau, n), lambda: descent_defect(tau, n), lambda: filter_gain(tau, n),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="decay rate between 0 and 1, both excluded"):
            call()


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"factor = 1 - lr \* curvature must be in \(-1, 1\).*Got 1"):
        mode_average(1.0, 0.9, np.arange(2))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\).*Got -0.5"):
        mode_speed(-0.5, 0.9, np.arange(2))
    with pytest.raises(ValueError, match="update.*'affter'"):
        steady_lag(0.9, "affter")
    with pytest.raises(ValueError, match="update.*'befor'"):
        average_path(np.arange(3), 0.9, "befor")
    with pytest.raises(ValueError, match="One label per input is required. Got 3 inputs and 2 labels"):
        gradient_bound(nn.Linear(2, 2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="direction must name the 2 trainable parameters of the model. Got 1 names"):
        descent_cosine(nn.Linear(2, 2), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), {"weight": torch.zeros(2, 2)})
