"""The playground's instruments against definitions, and its panels: what a slider does."""

import math
from types import SimpleNamespace

import IPython
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from ntklib import chapters, data, models, period_doubling, playground, progress, two_layer
from ntklib.playground import instruments, panel
from ntklib.playground.__main__ import ARGUMENTS, start_of

ipywidgets = pytest.importorskip("ipywidgets")
SMALL = chapters.complete_preset("playground", "smoke")


def jacobian(model, x):
    """Gradients of all outputs by autograd, one at a time: [n c, p]."""
    rows = []
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def test_the_trace_is_that_of_a_network_trained_by_hand():
    width, lr, decay, scale, seed, n, steps = 6, 0.1, 0.02, 1.5, 3, 20, 5
    found = playground.trace_along_training(width, lr, decay, scale, seed, num_train=n, num_probe=4, steps=steps)
    images = data.load("digits", num_train=n, num_test=n)
    model = models.build("mlp", input_shape=images.input_shape, num_classes=10, width=width, seed=seed)
    velocity = [torch.zeros_like(w) for w in model.parameters()]
    with torch.no_grad():
        for w in model.parameters():
            w *= scale
    traces, train, test = [], [], []
    for _ in range(steps + 1):
        traces.append(float(jacobian(model, images.x_train[:4]).square().sum()) / (4 * 10))
        train.append(float((model(images.x_train).argmax(1) == images.y_train).double().mean()))
        test.append(float((model(images.x_test).argmax(1) == images.y_test).double().mean()))
        loss = nn.functional.cross_entropy(model(images.x_train), images.y_train)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for w, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + decay * w)
                w -= lr * v
    assert found.step.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.trace, traces, rtol=1e-4)  # float32, sums in another order
    np.testing.assert_allclose(found.train, train)
    np.testing.assert_allclose(found.test, test)
    assert not found.diverged


def test_a_diverged_run_ends_at_its_last_finite_state():
    found = playground.trace_along_training(8, 50.0, 5.0, 4.0, 0, num_train=20, num_probe=4, steps=60)
    assert found.diverged
    assert found.step[-1] < 60
    assert np.isfinite(found.trace).all()


@pytest.mark.parametrize(("activation", "steps"), [("relu", 0), ("erf", 3), ("tanh", 2)])
def test_the_spectrum_is_that_of_the_products_of_gradients(activation, steps):
    width, depth, seed, n = 5, 2, 1, 12
    found = playground.kernel_spectrum(width, depth, activation, steps, seed, num_train=n)
    images = data.load("digits", num_train=n, num_test=n)
    x, y = images.x_train.double(), torch.tensor([1.0 if label % 2 == 0 else -1.0 for label in images.y_train], dtype=torch.float64)
    net = models.NTKMLP(64, [width] * depth, 1, activation=activation, generator=instruments.stream(seed, "init"), dtype=x.dtype)
    kernel = jacobian(net, x) @ jacobian(net, x).T
    lr = n / float(torch.linalg.eigvalsh(kernel)[-1])
    for _ in range(steps):
        loss = ((net(x)[:, 0] - y) ** 2).sum() / (2 * n)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for w, g in zip(net.parameters(), gradients, strict=True):
                w -= lr * g
    kernel = jacobian(net, x) @ jacobian(net, x).T
    eigvals = torch.linalg.eigvalsh(kernel).flip(0).numpy()
    np.testing.assert_allclose(found.eigvals, eigvals, rtol=1e-8, atol=1e-10 * eigvals[0])
    p = eigvals / eigvals.sum()
    expected = [math.exp(-sum(v * math.log(v) for v in p if v > 0)), 1 / np.square(p).sum(), 1 / p[0]]
    np.testing.assert_allclose(found.ranks, expected, rtol=1e-6)
    assert found.step == steps
    assert np.isnan(found.limit_ranks).all() == (activation == "tanh")


def test_wide_networks_come_near_the_limit_that_is_drawn():
    distance = [
        np.mean([playground.kernel_spectrum(width, 1, "relu", 0, seed, num_train=10).limit_distance for seed in range(6)])
        for width in (16, 1024)
    ]
    assert 4 < distance[0] / distance[1] < 16  # 8, the square root of the ratio of widths, up to noise


def hessian_top(q, w, x, y):
    def loss(v):
        return ((v[0] * torch.from_numpy(x) @ v[1:] - torch.from_numpy(y)) ** 2).sum() / 2

    flat = torch.from_numpy(np.concatenate([[q], w]))
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


def test_the_sharpness_of_one_unit_is_that_of_the_automatic_hessian():
    draw = np.random.default_rng(0)
    x, y, q, w = draw.normal(size=(5, 3)), draw.normal(size=5), draw.normal(size=4), draw.normal(size=(4, 3))
    expected = [hessian_top(a, b, x, y) for a, b in zip(q, w, strict=True)]
    np.testing.assert_allclose(playground.one_unit_sharpness(q, w, x, y), expected, rtol=1e-10)


@pytest.mark.parametrize("readout", [0.5, 2.0])
def test_the_edge_path_follows_descent_by_hand(readout):
    lr, top, seed = 0.8, 3.0, 2
    found = playground.edge_path(lr, readout, top, seed, num_inputs=4, dim=5, steps=6)
    x, y = two_layer.dominant_inputs(4, 5, top, 0.7, seed)
    best = two_layer.flattest_readout(x, y)
    assert found.least == pytest.approx(two_layer.minimum_sharpness(x, y, best))
    assert found.edge == pytest.approx(found.least / lr)
    theta = np.linalg.pinv(x) @ y
    size, end = np.linalg.norm(theta), readout * best
    q, w = math.sqrt(0.01 * size + max(end - size**2 / end, 0)), math.sqrt(0.01 * size + max(size**2 / end - end, 0)) * theta / size
    assert two_layer.flow_readout(q, w, x, y) == pytest.approx(end)
    for t in range(7):
        residual = q * x @ w - y
        kernel = np.outer(x @ w, x @ w) + q**2 * x @ x.T
        assert found.loss[t] == pytest.approx((residual**2).sum() / 2, rel=1e-9)
        assert found.alignment[t] == pytest.approx(y @ kernel @ y / np.linalg.norm(kernel) / (y @ y), rel=1e-9)
        assert found.sharpness[t] == pytest.approx(hessian_top(q, w, x, y), rel=1e-9)
        q, w = q - 2 / found.edge * (w @ x.T @ residual), w - 2 / found.edge * q * (x.T @ residual)


def test_small_steps_end_where_gradient_flow_is_said_to_end():
    found = playground.edge_path(0.02, 2.0, 3.0, 0, steps=20_000)
    assert found.sharpness[-1] == pytest.approx(found.flow, rel=0.01)
    assert found.loss[-1] < 1e-6


def test_the_edge_holds_the_sharpness_and_raises_alignment():
    flow, edge = playground.edge_path(0.1, 2.0, 5.0, steps=3000), playground.edge_path(0.9, 2.0, 5.0, steps=1000)
    assert edge.flow > 1.1 * edge.edge
    assert edge.sharpness[-1] == pytest.approx(edge.edge, rel=0.03)
    assert edge.alignment[-1] > flow.alignment[-1] + 0.05
    gone = playground.edge_path(0.8, 0.25, 5.0)
    assert gone.diverged
    assert np.isfinite(gone.loss).all()


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_map_is_descent_on_equal_layers_for_any_target(depth):
    target, unit = 7.0, 1.05
    edge = 2 / period_doubling.mode_sharpness(target, depth)
    layers = torch.full((depth,), 0.3 * target ** (1 / depth), dtype=torch.float64)
    path = []
    for _ in range(20):
        path.append(float(layers[0]) / target ** (1 / depth))
        layers = layers.requires_grad_()
        (gradient,) = torch.autograd.grad((layers.prod() - target) ** 2 / 2, layers)
        layers = (layers - unit * edge * gradient).detach()
    np.testing.assert_allclose(playground.map_orbit(unit, depth, 0.3, steps=19).path, path, rtol=1e-9)


def test_periods_are_those_of_the_cascade():
    cascade = [d.lr / (2 / period_doubling.mode_sharpness(1.0, 3)) for d in period_doubling.doublings(1.0, 3, 4)]
    middles = [0.8, *(np.array(cascade[:-1]) + np.array(cascade[1:])) / 2]
    assert [playground.map_orbit(float(lr), 3, 0.2).period for lr in middles] == [1, 2, 4, 8]
    low, up = period_doubling.two_period_orbit(1.1 * 2 / 3, 1.0, 3)
    assert sorted(playground.map_orbit(1.1, 3, 0.2, steps=500).path[-2:]) == pytest.approx([low, up])
    assert playground.map_orbit(1.5, 3, 0.2).period == 0
    assert playground.map_orbit(1.6, 6, 1.2).period == -1
    assert np.isnan(playground.map_orbit(1.6, 6, 1.2).path[-1])


def test_the_diagram_holds_the_ends_of_the_paths():
    unit, kept = playground.bifurcation(3, 0.9, 1.2, num_lr=4, steps=600, keep=2)
    for k, lr in enumerate(unit):
        path = playground.map_orbit(float(lr), 3, 0.9, steps=600).path
        np.testing.assert_allclose(kept[:, k], path[-2:], rtol=1e-6)


def start(name, **changes):
    return start_of(name, SMALL) | changes


@pytest.mark.parametrize("name", playground.INSTRUMENTS)
def test_a_slider_moves_the_picture_and_reset_brings_the_first_one_back(name):
    chosen = playground.Panel(name, **start(name))
    figure, first, words = chosen.picture.figure, chosen.html(), chosen.words
    assert chosen.widget.children[1].value == first
    for slider in chosen.inputs.values():
        before = chosen.output.value
        slider.value = next(value for _, value in slider.options if value != slider.value)
        assert chosen.output.value != before
    assert chosen.picture.figure is figure
    assert chosen.words != words
    assert f'alt="{words}"' in first
    chosen.button.click()
    assert chosen.output.value == first
    assert chosen.values == chosen.start


@pytest.mark.parametrize("name", playground.INSTRUMENTS)
def test_no_label_reaches_past_the_edge_of_the_picture(name):
    chosen = playground.Panel(name, **start(name))
    chosen.html()
    figure, renderer = chosen.picture.figure, chosen.picture.figure.canvas.get_renderer()
    for ax in figure.axes:
        for label in (ax.xaxis.label, ax.yaxis.label):
            if label.get_text():
                box = label.get_window_extent(renderer)
                assert figure.bbox.x0 + 2 <= box.x0, label.get_text()  # pixels, for what is set outside of the box
                assert box.x1 <= figure.bbox.x1, label.get_text()
                assert figure.bbox.y0 <= box.y0, label.get_text()


@pytest.mark.parametrize("name", playground.INSTRUMENTS)
def test_kept_pixels_show_what_a_fresh_picture_shows(name):
    moved = playground.Panel(name, **start(name))
    _ = moved.widget
    for slider in moved.inputs.values():
        values = [value for _, value in slider.options]
        slider.value = values[-2]
    moved.picture.forget()
    assert moved.picture.png() == playground.Panel(name, **moved.values).picture.png()


def test_a_value_met_before_is_not_computed_again(monkeypatch):
    chosen = playground.Panel("edge", **start("edge"))
    _ = chosen.widget
    chosen.inputs["top"].value = 3.0
    monkeypatch.setattr(chosen, "instrument", SimpleNamespace(compute=None))
    chosen.inputs["top"].value = SMALL["top"]
    with pytest.raises(TypeError, match="not callable"):
        chosen.inputs["top"].value = 2.0


def test_starting_values_of_any_size_get_a_place_on_their_slider():
    chosen = playground.Panel("edge", **start("edge", lr=0.333, top=50.0))
    _ = chosen.widget
    values = [value for _, value in chosen.inputs["lr"].options]
    assert chosen.inputs["lr"].value == 0.333
    assert values == sorted(values)
    assert chosen.inputs["top"].options[-1] == ("50", 50.0)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="Unknown instrument 'edeg'.*edge"):
        playground.Panel("edeg")
    with pytest.raises(ValueError, match="requires a starting value for every control. Missing: lr, seed."):
        playground.Panel("edge", readout=1.0, top=2.0)
    with pytest.raises(ValueError, match=r"Unknown activation 'rlu'.*relu"):
        playground.INSTRUMENTS["spectrum"].controls[2].options("rlu")


def test_sliders_appear_only_where_there_is_a_person(monkeypatch):
    monkeypatch.delenv(progress.FILE, raising=False)
    shell = lambda answers: SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=answers))  # noqa: E731
    for shell_now, live in ((None, False), (SimpleNamespace(), False), (shell(False), False), (shell(True), True)):
        monkeypatch.setattr(IPython, "get_ipython", lambda shell_now=shell_now: shell_now)
        assert panel.is_live() == live
        monkeypatch.setattr(IPython.display, "display", (shown := []).append)
        playground.show("map", **start("map"))
        assert [type(s).__name__ for s in shown] == (["VBox", "Javascript"] if live else ["Image"])
    monkeypatch.setenv(progress.FILE, "events")
    assert not panel.is_live()


def test_the_chapter_passes_every_control_from_a_parameter():
    cells = nbformat.read(chapters.notebook_path("playground"), 4).cells
    calls = [c.source for c in cells if "playground.show(" in c.source]
    assert len(calls) == len(ARGUMENTS) == len(playground.INSTRUMENTS)
    for (name, arguments), source in zip(ARGUMENTS.items(), calls, strict=True):
        passed = {}
        exec(source, {"playground": SimpleNamespace(show=lambda kind, passed=passed, **v: passed.update(v, kind=kind)), **SMALL})
        assert passed.pop("kind") == name
        assert passed == start_of(name, SMALL)
        assert {c.name for c in playground.INSTRUMENTS[name].controls} <= arguments.keys()


def test_starting_values_are_on_the_sliders_at_the_default_preset():
    values = chapters.default_parameters("playground")
    for name, instrument in playground.INSTRUMENTS.items():
        for control in instrument.controls:
            assert start_of(name, values)[control.name] in control.values, control.name
