"""The lazy regime: NTK parameterization, output scale, and what is measured against the constant kernel."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from ntklib import (
    LazySettings,
    constant_kernel_flow,
    decay_rate,
    drift_while_learning,
    empirical_ntk,
    first_stable,
    flatten_kernel,
    forecast_errors,
    gradient_descent,
    gradient_flow,
    infinite_ntk,
    kernel_change,
    kernel_drift,
    lazy_problem,
    linearize,
    mode_rates,
    models,
    plots,
    scale_share,
    seed_exponents,
)
from ntklib.lazy import circle, circle_target, parity_task
from ntklib.training.state import State

SMALL = LazySettings(num_train=8, width=16, activation="erf", bias_std=0.5, lr_fraction=0.5, steps=12, num_measured=4, double=True)


def network(width=16, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return models.NTKMLP(3, [width], 2, generator=generator, dtype=torch.float64, **options)


def states(problem, loop=gradient_descent, **options):
    s = problem.settings
    yield from loop(problem.model, problem.x, problem.y, lr=problem.lr * len(problem.x), steps=s.steps, **options)


@pytest.mark.parametrize("bias_std", [0.0, 0.3])
def test_a_layer_is_the_formula_of_ntk_parameterization(bias_std):
    layer = models.NTKLinear(3, 4, weight_std=1.7, bias_std=bias_std, dtype=torch.float64)
    layer.requires_grad_(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            expected = sum(1.7 / math.sqrt(3) * layer.weight[j, k] * x[i, k] for k in range(3))
            expected = expected + (bias_std * layer.bias[j] if bias_std else 0)
            assert float(layer(x)[i, j]) == pytest.approx(float(expected), rel=1e-12)
    assert (layer.bias is None) == (bias_std == 0)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_the_kernel_of_ntk_parameterization_tends_to_its_infinite_limit(activation):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    limit = infinite_ntk(x, depth=1, activation=activation, bias_std=0.4)
    kernels = torch.stack(
        [empirical_ntk(network(400, seed, activation=activation, bias_std=0.4), x, reduce="trace") / 2 for seed in range(40)]
    )
    mean, sem = kernels.mean(0), kernels.std(0) / math.sqrt(40)
    assert float(((mean - limit).abs() / sem).max()) < 4
    assert float(sem.norm() / limit.norm()) < 0.02


def test_the_kernel_of_a_linear_model_in_ntk_parameterization_is_closed_form():
    model = models.NTKMLP(3, [], 2, weight_std=1.5, bias_std=0.4, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    gram = 1.5**2 / 3 * x @ x.T + 0.4**2
    torch.testing.assert_close(flatten_kernel(empirical_ntk(model, x)), torch.kron(gram, torch.eye(2).double()))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_a_scaled_output_is_centred_and_has_the_kernel_times_the_square(alpha):
    plain, x = network(), torch.randn(4, 3, dtype=torch.float64)
    scaled = models.ScaledOutput(network(), alpha)
    assert float(scaled(x).detach().norm()) == 0
    torch.testing.assert_close(empirical_ntk(scaled, x), alpha**2 * empirical_ntk(plain, x))
    torch.testing.assert_close(models.ScaledOutput(network(), alpha, centered=False)(x), alpha * plain(x))


def test_a_scaled_output_with_the_rate_over_its_square_fits_scaled_targets():
    alpha, lr, x = 4.0, 0.1, torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(5, 2, dtype=torch.float64)
    plain, scaled = network(), models.ScaledOutput(network(), alpha)
    start = plain(x).detach()
    for loop in (
        gradient_descent(plain, x, start + y / alpha, lr=lr, steps=20),
        gradient_descent(scaled, x, y, lr=lr / alpha**2, steps=20),
    ):
        *_, _last = loop
    torch.testing.assert_close(scaled(x), alpha * (plain(x) - start), rtol=1e-9, atol=1e-10)


def test_wrong_networks_are_refused():
    with pytest.raises(ValueError, match="Unknown activation 'rely'"):
        network(activation="rely")
    with pytest.raises(ValueError, match="must be positive. Got \\[3, 0, 2\\]"):
        network(0)
    with pytest.raises(ValueError, match="weight_std must be positive"):
        network(weight_std=-1.0)
    with pytest.raises(ValueError, match="alpha must be positive and finite. Got 0"):
        models.ScaledOutput(network(), 0.0)


def test_kernel_drift_is_the_relative_frobenius_norm():
    k0, k = torch.randn(2, 5, 5, dtype=torch.float64)
    expected = math.sqrt(sum(float(a - b) ** 2 for a, b in zip(k.flatten(), k0.flatten(), strict=True))) / float(k0.norm())
    assert kernel_drift(k0, k) == pytest.approx(expected, rel=1e-12)
    assert kernel_drift(k0, 3 * k0) == pytest.approx(2, rel=1e-12)
    with pytest.raises(ValueError, match="same shape"):
        kernel_drift(k0, k[:2])
    with pytest.raises(ValueError, match="finite"):
        kernel_drift(k0, k * math.inf)


def test_descent_on_the_linearized_network_is_the_discrete_formula_to_rounding():
    p = lazy_problem(SMALL)
    lin = linearize(p.model)
    step = torch.eye(8, dtype=torch.float64) - p.lr * p.kernel_0  # I - lr K
    residual = p.f_0 - p.y
    for _state in gradient_descent(lin, p.x, p.y, lr=p.lr * 8, steps=12):
        torch.testing.assert_close(lin(p.x) - p.y, residual, rtol=1e-12, atol=1e-12)
        residual = step @ residual


def test_gradient_flow_of_the_linearized_network_is_the_exponential():
    p = lazy_problem(SMALL)
    lin = linearize(p.model)
    *_, last = gradient_flow(lin, p.x, p.y, lr=p.lr * 8, steps=4, tol=1e-9)
    expected = p.y + torch.linalg.matrix_exp(-4 * p.lr * p.kernel_0) @ (p.f_0 - p.y)
    assert float((lin(p.x).detach() - expected).norm() / p.y.norm()) < 1e-7  # global error of a local tolerance 1e-9
    assert last.step == 4


def test_the_error_of_descent_against_the_flow_halves_with_the_rate():
    errors = []
    for parts in (1, 2, 4):
        p = lazy_problem(SMALL.but(lr_fraction=0.1))
        lin = linearize(p.model)
        *_, _last = gradient_descent(lin, p.x, p.y, lr=p.lr * 8 / parts, steps=12 * parts)
        exact = constant_kernel_flow(p.kernel_0, p.f_0, p.y, torch.tensor([12 * p.lr]))[0]
        errors.append(float((lin(p.x).detach() - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_a_wide_network_approaches_its_linear_equation_at_the_expected_rate(activation):
    gaps = {}
    for width in (64, 1024):
        values = []
        for seed in range(4):
            p = lazy_problem(SMALL.but(width=width, activation=activation, seed=seed, steps=30))
            *_, last = states(p)
            values.append(p.measure(last)["gap"])
        gaps[width] = np.mean(values)
    slope = math.log(gaps[1024] / gaps[64]) / math.log(16)
    assert -1.2 < slope < -0.5  # -3/4 for ReLU, -1 for erf


@pytest.mark.parametrize("loop", [gradient_descent, gradient_flow])
def test_a_measurement_is_what_it_says(loop):
    dynamics = "flow" if loop is gradient_flow else "descent"
    p = lazy_problem(SMALL.but(dynamics=dynamics, alpha=0.5))
    unit = float(p.y.norm())
    for state in states(p, loop, measure_at=[0, 12]):
        found, f = p.measure(state), p.model(p.x).detach()
        k = flatten_kernel(empirical_ntk(p.model, p.x))
        time = p.lr * state.step
        if loop is gradient_flow:
            transition = lambda a, t=time: torch.linalg.matrix_exp(-t * a)  # noqa: E731
        else:
            transition = lambda a, s=state.step: torch.linalg.matrix_power(torch.eye(8).double() - p.lr * a, s)  # noqa: E731
        lazy, wide = (p.y - transition(a) @ p.y for a in (p.kernel_0, p.limit))
        assert found["time"] == pytest.approx(time, rel=1e-12)
        assert found["residual"] == pytest.approx(float((f - p.y).norm()) / unit, rel=1e-9)
        assert found["predicted"] == pytest.approx(float((lazy - p.y).norm()) / unit, rel=1e-9)
        assert found["gap"] == pytest.approx(float((f - lazy).norm()) / unit, rel=1e-6, abs=1e-12)
        assert found["limit_gap"] == pytest.approx(float((f - wide).norm()) / unit, rel=1e-6, abs=1e-12)
        assert found["drift"] == pytest.approx(float((k - p.kernel_0).norm() / p.kernel_0.norm()), rel=1e-9, abs=1e-15)
        assert found["growth"] == pytest.approx(float(k.norm() / p.kernel_0.norm()), rel=1e-9)
        assert found["distance"] == pytest.approx(1 - float((k * p.kernel_0).sum() / k.norm() / p.kernel_0.norm()), abs=1e-12)
        top = float(torch.linalg.eigvalsh(k)[-1])
        assert found["top"] == pytest.approx(top, rel=1e-9)
        assert found["lr_top"] == pytest.approx(p.lr * top / 2, rel=1e-9)
        assert found["least"] == pytest.approx(float(torch.linalg.eigvalsh(k)[0]) / top, rel=1e-6)
    assert found["drift"] > 1e-3  # so that the comparison had something to tell apart


def test_components_add_up_to_the_residual_when_all_are_followed():
    p = lazy_problem(SMALL.but(num_modes=8))
    *_, state = states(p)
    parts = p.components()
    assert sum(m["component"] ** 2 for m in parts) == pytest.approx(p.measure(state)["residual"] ** 2, rel=1e-9)
    eigvals = torch.linalg.eigvalsh(flatten_kernel(empirical_ntk(p.model, p.x))).flip(0)
    assert [m["eigenvalue"] for m in parts] == pytest.approx(eigvals.tolist(), rel=1e-9)


def test_a_forecast_from_a_kernel_that_stays_is_right_and_the_last_one_is_exact():
    memory, p = {}, lazy_problem(SMALL.but(alpha=1e5))
    for state in states(p, measure_at=p.marks):
        memory |= p.forecast(state)
    errors = p.forecast_errors(memory)
    assert list(errors) == p.marks
    assert max(errors.values()) < 1e-4
    narrow, memory = lazy_problem(SMALL.but(alpha=0.2, activation="relu")), {}
    for state in states(narrow, measure_at=narrow.marks):
        memory |= narrow.forecast(state)
    errors = narrow.forecast_errors(memory)
    first = narrow.measure(state)["gap"]  # the forecast from the first kernel is the linear equation of the whole run
    assert errors[0] == pytest.approx(first, rel=1e-9)
    assert errors[12] < 1e-12 < errors[0]


def test_the_residual_norm_falls_at_the_rate_of_its_quadratic_form():
    p = lazy_problem(SMALL.but(activation="erf", alpha=0.3))
    x, y = p.x, p.y
    squares = []
    for state in gradient_flow(p.model, x, y, lr=p.lr * 8 * 1e-3, steps=2, tol=1e-10):
        residual = p.model(x).detach() - y
        squares.append(float(residual.square().sum()))
        if state.step == 1:
            rate = -2 * float(residual.T @ flatten_kernel(empirical_ntk(p.model, x)) @ residual)
    assert (squares[2] - squares[0]) / (2e-3 * p.lr) == pytest.approx(rate, rel=1e-4)


def test_beyond_the_limit_the_linear_equation_diverges_and_the_network_ends_below_it():
    p = lazy_problem(LazySettings(num_train=12, width=64, bias_std=0.5, lr_fraction=1.3, steps=80, num_measured=4, seed=1))
    start = p.lr * float(p.modes[0][0]) / 2
    *_, last = states(p)
    found = p.measure(last)
    assert start > 1 > found["lr_top"]
    assert found["residual"] < 1
    assert not found["predicted"] < 1e3


def test_a_blown_up_state_is_known():
    p = lazy_problem(SMALL)
    assert not p.blown_up(State(1, 1.0, p.model, 1.0, 0.1))
    for loss in (math.nan, math.inf, 1e13):
        assert p.blown_up(State(1, 1.0, p.model, loss, 0.1))


def test_targets_of_a_plane_start_the_residual_in_it():
    p = lazy_problem(SMALL.but(target="plane", angle=0.7, first=2, second=5, num_modes=8))
    parts = [m["component"] for m in p.components()]
    assert parts[1] == pytest.approx(math.cos(0.7), rel=1e-9)
    assert parts[4] == pytest.approx(math.sin(0.7), rel=1e-9)
    assert sum(c**2 for i, c in enumerate(parts) if i not in (1, 4)) < 1e-18
    assert float(p.y.norm()) == pytest.approx(float(circle_target(circle(8)[0], "sine").norm()), rel=1e-12)


def test_tasks_are_as_described():
    gamma, x = circle(6)
    assert float(x[1] @ x[0]) == pytest.approx(math.cos(math.pi / 3))
    assert circle_target(gamma, "sine")[1].item() == pytest.approx(0.5 * math.sin(2 * math.pi / 3))
    mixture = 0.9 * math.sin(2 * math.pi / 3) + 0.7 * math.sin(4 * math.pi / 3 + 1.5708)
    mixture += 0.55 * math.sin(7 * math.pi / 3 + 1.2) + 0.45 * math.sin(11 * math.pi / 3 + 2.0)
    assert circle_target(gamma, "mixture")[1].item() == pytest.approx(mixture)
    with pytest.raises(ValueError, match="Unknown function of the angle 'sinus'"):
        circle_target(gamma, "sinus")
    x, y = parity_task("digits", 20, 3)
    assert x.shape == (20, 64)
    assert x.norm(dim=1).tolist() == pytest.approx([8.0] * 20)
    assert sorted(y.flatten().tolist()) == [-1.0] * 10 + [1.0] * 10


def test_settings_that_make_no_problem_are_refused():
    with pytest.raises(ValueError, match="Unknown target 'sin'"):
        SMALL.but(target="sin")
    with pytest.raises(ValueError, match="Unknown activation 'tanh'"):
        SMALL.but(activation="tanh")
    with pytest.raises(ValueError, match="Unknown dynamics"):
        SMALL.but(dynamics="flux")
    with pytest.raises(ValueError, match="different indices from 1 to n = 8. Got 2 and 9"):
        SMALL.but(target="plane", first=2, second=9)
    with pytest.raises(ValueError, match="Unknown dataset"):
        SMALL.but(task="digit")


def test_a_decay_has_its_rate():
    t = [0.0, 0.5, 2.0]
    assert decay_rate(t, [-3 * math.exp(-1.7 * v) for v in t]) == pytest.approx(1.7, rel=1e-12)
    assert math.isnan(decay_rate(t[:2], [1.0, 1.0]))
    with pytest.raises(ValueError, match="finite and not zero"):
        decay_rate(t, [1.0, 0.0, 1.0])
    table = pd.DataFrame({0: [4.0, 1.0, math.nan], 1: [2.0, math.inf, 0.125]}, index=[1, 2, 16])
    assert seed_exponents(table) == pytest.approx([-2.0, -1.0])
    assert seed_exponents(table.fillna(0.0)) == pytest.approx([-2.0, -1.0])  # a kernel that did not move at all


def test_mode_rates_use_the_times_before_the_drift_and_within_the_span():
    rows = []
    for step, (time, drift) in enumerate([(0.0, 0.0), (0.1, 0.002), (0.2, 0.004), (0.4, 0.008), (0.8, 0.02), (1.6, 0.005)]):
        rows += [(step, "", "time", time), (step, "", "drift", drift)]
        wrong = 5.0 if step >= 4 else 1.0  # what comes after the drift must not count
        for layer, rate in (("1", 10.0), ("2", 2.0)):
            rows.append((step, layer, "component", 0.3 * math.exp(-1.1 * rate * time) * wrong))
            rows.append((step, layer, "eigenvalue", rate if step == 0 else 99.0))
    found = mode_rates(pd.DataFrame(rows, columns=["step", "layer", "quantity", "value"]))
    assert found["points"].to_dict() == {1: 3, 2: 4}  # t <= 0.2 and t <= 0.4
    assert found["error"].tolist() == pytest.approx([0.1, 0.1], rel=1e-9)
    assert found["eigenvalue"].tolist() == [10.0, 2.0]
    assert found["share"].tolist() == pytest.approx([0.3, 0.3])


def long_frame(columns, **more):
    """One run's history from columns of values by step."""
    rows = [(s, q, "", float(v)) for q, values in columns.items() for s, v in values.items()]
    return pd.DataFrame(rows, columns=["step", "quantity", "layer", "value"]).assign(**more)


def test_the_drift_while_learning_is_that_at_the_first_small_residual():
    residual = {0: 1.0, 1: 0.5, 4: 0.09, 9: 0.2, 20: 0.01}
    drift = {0: 0.0, 1: 0.2, 4: 0.3, 9: 0.35, 20: 0.4}
    assert drift_while_learning(long_frame({"residual": residual, "drift": drift})) == pytest.approx(0.75)
    assert drift_while_learning(long_frame({"residual": residual, "drift": drift}), residual=1e-3) == 1


def test_the_share_of_scale_follows_from_drift_and_growth():
    a = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k0 = a @ a.T
    for k in (1.3 * k0, 0.7 * k0 + 0.1 * torch.eye(6).double(), k0 + 2 * torch.eye(6).double(), 1.1 * k0 + torch.eye(6).double()):
        found = scale_share(pd.Series([kernel_drift(k0, k)]), pd.Series([float(k.norm() / k0.norm())]))
        assert found[0] == pytest.approx(kernel_change(k0, k).scale_share, rel=1e-9)


def test_the_first_stable_forecast_comes_after_the_last_unstable_one():
    tops = {0: 1.2, 2: 0.9, 5: 1.1, 7: 0.8, 9: 0.7, 12: 0.6}
    frames = []
    for run, shift in (("a", 0.0), ("b", -0.5), ("c", 1.0)):  # b is never unstable, c always
        frame = long_frame({"lr_top": {s: v + shift for s, v in tops.items()}}, run=run, variant=1, seed=0)
        errors = long_frame({"forecast": dict.fromkeys([12], 0.0)}, run=run, variant=1, seed=0)
        frames += [frame, *(errors.assign(layer=str(s), value=math.nan if s == 0 else s / 10) for s in tops)]
    table = forecast_errors(pd.concat(frames, ignore_index=True))
    assert len(table) == 3 * len(tops)
    assert (table[table["step"] == 0]["error"] == math.inf).all()
    back = first_stable(table)
    assert back[["run", "step", "error"]].to_numpy().tolist() == [["a", 7, 0.7]]
    assert back["top"].tolist() == pytest.approx([0.8])


def test_a_phase_portrait_draws_the_solution_from_the_first_point_of_each_path():
    _, ax = plots.plt.subplots()
    a = np.array([[-0.3, -1.0], [1.0, -0.3]])  # a spiral: x(t) = e^(-0.3 t) R(t) x(0)
    measured = np.array([[1.0, 0.0], [0.5, 0.5]])
    plots.phase_portrait(ax, a, [measured], limit=1.5)
    exact, path = (np.column_stack(line.get_data()) for line in ax.lines[:2])
    np.testing.assert_allclose(path, measured)
    radius, angle = np.hypot(*exact.T), np.unwrap(np.arctan2(exact[:, 1], exact[:, 0]))
    early = angle < 6
    np.testing.assert_allclose(radius[early], np.exp(-0.3 * angle[early]), rtol=1e-9)
    assert angle[-1] > 6
    assert ax.get_xlim() == (-1.5, 1.5)
    plt.close("all")


def test_a_portrait_of_a_plane_without_motion_is_drawn():
    _, ax = plots.plt.subplots()
    plots.phase_portrait(ax, np.zeros((2, 2)), [np.array([[0.5, 0.5]])])
    np.testing.assert_allclose(np.column_stack(ax.lines[0].get_data()), 0.5)
    plt.close("all")


def test_a_value_map_writes_its_numbers_and_what_diverged():
    _, ax = plots.plt.subplots()
    table = pd.DataFrame([[0.5, 0.02], [math.nan, 0.001]], index=[0.25, 4.0], columns=[32, 64])
    plots.value_map(ax, table, "drift", limits=(1e-3, 1), levels=[0.1])
    words = {t.get_position(): t.get_text() for t in ax.texts}
    assert words == {(0, 0): "0.5", (1, 0): "0.02", (0, 1): "div.", (1, 1): "0.001"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.25", "4"]
    borders = {tuple(map(tuple, line.get_data())) for line in ax.lines}  # between 0.5 and 0.02, and div. and 0.001
    assert borders == {((0.5, 0.5), (-0.5, 0.5)), ((0.5, 0.5), (0.5, 1.5))}
    plt.close("all")
