"""Laws of target modes, of the parts of a change of alignment, of matched losses and of runs at the edge of stability."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from ntklib import kernel_target_alignment
from ntklib.alignment import (
    TargetModes,
    alignment_change,
    at_loss,
    block_bootstrap,
    network_modes,
    target_modes,
)
from ntklib.edge import (
    METHODS,
    NETWORKS,
    EdgeSettings,
    edge_loop,
    edge_measures,
    edge_network,
    edge_task,
    edge_windows,
    matched,
    table_of,
)
from ntklib.models import MLP
from ntklib.plots import plt, rate_curves
from ntklib.random import stream
from ntklib.runs import Run
from ntklib.training import half_mse
from ntklib.training.losses import one_hot


def kernel_and_targets(seed=0, n=9, c=1):
    generator = stream(seed, "alignment")
    j, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (6, c))
    return j @ j.T, y


@pytest.mark.parametrize("c", [1, 3])
def test_target_modes_give_the_alignment_of_the_definition(c):
    kernel, y = kernel_and_targets(c=c)
    modes = target_modes(kernel, y)
    ideal = y @ y.T
    expected = float((kernel * ideal).sum()) / float(kernel.norm() * ideal.norm())
    assert modes.alignment == pytest.approx(expected, rel=1e-12)
    assert modes.alignment == pytest.approx(kernel_target_alignment(kernel, y), rel=1e-12)
    assert float(modes.shares.sum()) == pytest.approx(1, rel=1e-12)
    assert modes.top(9) == pytest.approx(1, rel=1e-12)
    assert (modes.eigvals.diff() <= 0).all()


def test_shares_follow_a_known_basis():
    basis = torch.linalg.qr(torch.randn(4, 4, generator=stream(3, "basis"), dtype=torch.float64))[0]
    kernel = basis @ torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64)) @ basis.T
    y = (basis @ torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))[:, None]
    modes = target_modes(kernel, y)
    torch.testing.assert_close(modes.eigvals, torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(modes.shares, torch.tensor([0.04, 0.16, 0.09, 0.01], dtype=torch.float64) / 0.3)
    assert modes.top(2) == pytest.approx(2 / 3, rel=1e-12)


@pytest.mark.parametrize("c", [1, 3])
def test_the_parts_of_a_change_add_up_and_vanish_with_their_cause(c):
    (k1, y), (k2, _) = kernel_and_targets(0, c=c), kernel_and_targets(1, c=c)
    before, after = target_modes(k1, y), target_modes(k2, y)
    change = alignment_change(before, after)
    assert change.total == pytest.approx(after.alignment - before.alignment, abs=1e-14)
    assert alignment_change(after, before).eigenvectors == pytest.approx(-change.eigenvectors, rel=1e-12)
    moved = TargetModes(before.eigvals + 1, before.shares, before.factor)
    assert alignment_change(before, moved).eigenvectors == 0
    turned = TargetModes(3 * before.eigvals, after.shares, before.factor)
    assert alignment_change(before, turned).eigenvalues == pytest.approx(0, abs=1e-15)


def test_the_parts_of_a_change_are_those_of_the_formula():
    before = TargetModes(torch.tensor([4.0, 3.0]).double(), torch.tensor([0.2, 0.8], dtype=torch.float64))
    after = TargetModes(torch.tensor([3.0, 3.0]).double(), torch.tensor([0.6, 0.4], dtype=torch.float64))
    r = 1 / math.sqrt(2)
    change = alignment_change(before, after)
    assert change.eigenvalues == pytest.approx(0.4 * (r - 0.8) + 0.6 * (r - 0.6), rel=1e-12)
    assert change.eigenvectors == pytest.approx((r + 0.8) / 2 * 0.4 - (r + 0.6) / 2 * 0.4, rel=1e-12)


def test_mistaken_kernels_and_pairs_are_named():
    kernel, y = kernel_and_targets()
    with pytest.raises(ValueError, match=r"must be \[n, n\] and \[n, c\]. Got \(9, 9\) and \(8, 1\)"):
        target_modes(kernel, y[:8])
    with pytest.raises(ValueError, match="finite and not zero. Got norms 0.0"):
        target_modes(0 * kernel, y)
    with pytest.raises(ValueError, match="same examples and targets. Got 9 and 8"):
        alignment_change(target_modes(kernel, y), target_modes(kernel[:8, :8], y[:8]))
    with pytest.raises(ValueError, match="one length and level be positive. Got 1, 2 and 0.1"):
        at_loss([1.0], [1.0, 2.0], 0.1)


def test_a_diverging_network_has_no_modes():
    x, y = torch.randn(5, 3, generator=stream(0, "x")), torch.ones(5, 1)
    net = MLP(3, [4], 1)
    assert isinstance(network_modes(net, x, y), TargetModes)
    for factor in (1e30, math.nan):
        with torch.no_grad():
            for w in net.parameters():
                w.mul_(factor)
        assert network_modes(net, x, y) is None


def test_values_at_a_loss_are_interpolated_in_its_logarithm():
    assert at_loss([1.0, 0.1, 0.5, 0.01], [0.0, 1.0, 2.0, 3.0], 10**-0.5) == pytest.approx(0.5)
    assert at_loss([1.0, 0.1], [5.0, 7.0], 0.1) == 7
    assert at_loss([0.05, 0.01], [5.0, 7.0], 0.1) == 5
    assert math.isnan(at_loss([1.0, 0.2], [5.0, 7.0], 0.1))
    assert math.isnan(at_loss([1.0, 0.05], [math.nan, 7.0], 0.1))


def test_the_bootstrap_covers_the_mean_and_widens_with_dependence():
    draw = np.random.default_rng(1)
    covered, widths = 0, {}
    for _ in range(60):
        rows = draw.standard_normal((80, 1)) + 0.3
        low, high = block_bootstrap([rows], lambda r: r.mean(), block=4, draws=200)
        covered += low <= 0.3 <= high
    assert covered >= 48  # 95 % of 60 is 57; blocks of a short series cover a little less
    slow = np.repeat(draw.standard_normal((40, 1)), 10, axis=0)
    for block in (1, 20):
        low, high = block_bootstrap([slow], lambda r: r.mean(), block=block)
        widths[block] = high - low
    assert widths[20] > 1.8 * widths[1]
    assert all(map(math.isnan, block_bootstrap([], lambda r: r.mean(), block=3)))
    assert block_bootstrap([np.ones((5, 1))], lambda r: r.mean(), block=9) == (1.0, 1.0)


# -- runs at the edge ----------------------------------------------------------------------------------------------------------


def settings(**more):
    values = {"dataset": "digits", "network": "tanh", "width": 8, "num_train": 12, "lr": 0.1, "steps": 6, "stop_at": 0.01}
    return EdgeSettings(**{**values, "device": "cpu", **more})


@pytest.mark.parametrize("targets", ["parity", "classes"])
def test_the_targets_of_a_task_are_those_of_its_labels(targets):
    task = edge_task(settings(targets=targets))
    labels = edge_task(settings(targets="classes")).y_train.argmax(1)
    for y, label in zip(task.y_train.tolist(), labels.tolist(), strict=True):
        assert y == ([1.0 if label % 2 == 0 else -1.0] if targets == "parity" else [float(label == k) for k in range(10)])


def test_half_mse_takes_targets_in_place_of_labels():
    outputs, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    assert torch.equal(half_mse(outputs, labels), half_mse(outputs, one_hot(labels, 3, torch.float64)))
    y = torch.ones(4, 3, dtype=torch.float64)
    by_hand = sum((outputs[i, j] - 1) ** 2 for i in range(4) for j in range(3)) / 8
    torch.testing.assert_close(half_mse(outputs, y), by_hand)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_the_task_s_outputs_and_repeats_by_seed(network):
    s = settings(network=network, targets="classes")
    task = edge_task(s)
    one, two = edge_network(s, task), edge_network(s, task)
    assert one(task.x_train).shape == (12, 10)
    assert torch.equal(one(task.x_train), two(task.x_train))
    assert not torch.equal(one(task.x_train), edge_network(s.but(seed=1), task)(task.x_train))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_parts_add_up(method, tmp_path):
    s = settings(method=method, batch_size=4, every=2, hessian=method == "descent")
    task = edge_task(s)
    model = edge_network(s, task)
    loop, inputs, more = edge_loop(s, model, task)
    with Run("test", s, root=tmp_path) as run:
        for state in run.states(loop, *inputs, **more):
            run.log(state, **edge_measures(state, task, s, run.memory))
    table = table_of(run.history)
    assert run.status == "complete"
    assert list(table.index) == ([0, 3, 6] if method == "sgd" else [0, 2, 4, 6])
    change = table["by_eigenvalues"] + table["by_eigenvectors"]
    np.testing.assert_allclose(change.iloc[1:], table["kta"].diff().iloc[1:], atol=1e-12)
    assert ("mean_loss" in table) == (method == "central")
    if method == "descent":  # without a residual the Hessian is the kernel over n; here they are near
        assert table["sharpness"].iloc[-1] == pytest.approx(table["top"].iloc[-1], rel=0.3)


def history(rows):
    frame = pd.DataFrame(rows).melt(id_vars="step", var_name="quantity")
    return frame.assign(layer="")


def test_windows_are_regular_and_begin_at_the_edge():
    rows = {
        "step": [0, 2, 4, 6, 8, 9], "loss": [1.0] * 6, "top": [1.0, 9.0, 10.0, 12.0, 9.0, 9.5],
        "kta": [0.1, 0.2, 0.3, 0.5, 0.4, 0.45],
        "by_eigenvalues": [math.nan, 0.1, 0.0, 0.1, 0.1, 0.0], "by_eigenvectors": [math.nan, 0.0, 0.1, 0.1, -0.2, 0.05],
    }  # fmt: skip
    found = edge_windows(history(rows), lr=0.2, every=2)  # the edge is at top = 10
    np.testing.assert_allclose(found, [[0.2, 0.2, 0.1, 0.1], [-0.3, -0.1, 0.1, -0.2]], atol=1e-12)
    assert edge_windows(history({k: v for k, v in rows.items() if k[:2] != "by"}), 0.2, 2).shape == (0, 4)


def test_values_are_matched_at_the_level_of_a_history():
    rows = {"step": [0, 1], "loss": [1.0, 0.01], "kta": [0.2, 0.4]}
    assert matched(history(rows), 0.1, "kta") == pytest.approx(0.3)
    assert math.isnan(matched(history(rows), 0.1, "leading"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "tanhh"}, "Unknown network 'tanhh'. Did you mean 'tanh'"),
        ({"targets": "one"}, "Unknown targets 'one'"),
        ({"method": "flows"}, "Unknown method 'flows'. Did you mean 'flow'"),
        ({"batch_size": 13}, "batch_size must be at most num_train = 12. Got 13"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_rates_without_a_value_are_crosses():
    frame = pd.DataFrame({"lr": [0.1, 0.1, 0.2, 0.2], "seed": [0, 1, 0, 1], "kta": [1.0, 3.0, 4.0, math.nan]})
    _, ax = plt.subplots()
    rate_curves(ax, frame, "kta", "name")
    assert list(ax.lines[-1].get_xdata()) == [0.2]
    means = ax.containers[0].lines[0].get_ydata()
    assert list(means) == [2, 4]
    plt.close("all")


def test_two_panels_of_rate_curves_keep_their_width():
    rows = [{"lr": lr, "seed": seed, "kta": lr * (seed + 1)} for lr in (0.02, 0.05, 0.1, 0.2) for seed in (0, 1)]
    fig, axes = plt.subplots(1, 2, layout="constrained")
    for ax in axes:
        for style, name in enumerate("abc"):
            rate_curves(ax, pd.DataFrame(rows), "kta", name, style=style)
    fig.canvas.draw()  # matplotlib warns, here an error, when what is drawn leaves no room for the axes
    assert all(ax.get_window_extent().width > 0.35 * fig.bbox.width for ax in axes)
    plt.close(fig)
