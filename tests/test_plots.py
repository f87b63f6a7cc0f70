"""Figures show what the tidy frame says."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from ntklib import plots

mpl.use("Agg")


@pytest.fixture
def history():
    """Two complete runs and a diverged one: value = epoch * factor."""
    rows = [
        {
            "run": run,
            "epoch": float(epoch),
            "split": "train",
            "layer": "",
            "quantity": "trace",
            "value": epoch * factor,
            "status": status,
        }
        for run, factor, status in (("a", 1.0, "complete"), ("b", 3.0, "complete"), ("c", 2.0, "diverged"))
        for epoch in range(3)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def ax():
    """Axes of a figure that is closed again."""
    plots.use_style()
    fig, ax = plots.figure()
    yield ax
    plots.plt.close(fig)


def test_seed_curves_draw_mean_band_and_every_run(ax, history):
    plots.seed_curves(ax, history, {"trace": "the trace"}, split="train")
    thick = [line for line in ax.get_lines() if line.get_label() == "the trace"]
    np.testing.assert_allclose(thick[0].get_ydata(), [0.0, 2.0, 4.0])
    assert len(ax.get_lines()) == 4
    band = ax.collections[0].get_paths()[0].vertices
    sem = np.std([2.0, 6.0, 4.0], ddof=1) / np.sqrt(3)
    assert band[:, 1].max() == pytest.approx(4.0 + sem)
    assert ax.get_xlabel() == "epoch"


def test_infinite_values_of_a_diverged_run_leave_the_others_drawn(ax, history):
    history.loc[history["run"] == "c", "value"] = np.inf
    plots.seed_curves(ax, history, {"trace": "the trace"})
    (thick,) = [line for line in ax.get_lines() if line.get_label() == "the trace"]
    np.testing.assert_allclose(thick.get_ydata(), [0.0, 2.0, 4.0])


def test_a_diverged_run_is_marked_where_it_ended(ax, history):
    plots.mark_diverged(ax, history)
    (cross,) = [line for line in ax.get_lines() if line.get_label() == "diverged"]
    assert list(cross.get_xdata()) == [2.0]
    before = len(ax.get_lines())
    plots.mark_diverged(ax, history[history["status"] == "complete"])
    plots.mark_diverged(ax, history.drop(columns="status"))
    assert len(ax.get_lines()) == before


def test_a_kernel_matrix_is_sorted_by_class(ax):
    y = [1, 0, 1, 0]
    kernel = np.equal.outer(y, y).astype(float)
    plots.kernel_matrix(ax, kernel, y)
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), np.kron(np.eye(2), np.ones((2, 2))))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1"]


def test_a_spectrum_is_drawn_against_its_index_from_one(ax):
    plots.spectrum(ax, np.array([4.0, 2.0, 1.0]))
    x, y = ax.get_lines()[0].get_data()
    assert (list(x), list(y)) == ([1, 2, 3], [4.0, 2.0, 1.0])


def test_joined_legends_list_the_entries_of_all_axes(ax, history):
    twin = ax.twinx()
    plots.seed_curves(ax, history, {"trace": "one"})
    plots.seed_curves(twin, history, {"trace": "two"}, first_style=1)
    plots.join_legends(ax, twin)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "two"]


def test_sweep_curves_draw_one_mean_per_value_in_order_and_leave_out_what_was_not_run(ax, history):
    history["lr"] = history["run"].map({"a": 0.1, "b": 0.1, "c": 1.0})
    history.loc[(history["run"] == "a") & (history["epoch"] == 2), "value"] = np.inf
    plots.sweep_curves(ax, history, "trace", "lr", [1.0, 0.1, 0.01], labels=["one", "tenth", "none"])
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert list(lines) == ["one", "tenth"]
    np.testing.assert_allclose(lines["one"], [0.0, 2.0, 4.0])
    np.testing.assert_allclose(lines["tenth"], [0.0, 2.0, 6.0])
    top = [band.get_paths()[0].vertices for band in ax.collections]
    assert top[0][:, 1].max() == pytest.approx(4.0)  # one run: no band
    at_1 = top[1][top[1][:, 0] == 1.0][:, 1]
    assert at_1.max() == pytest.approx(2.0 + np.std([1.0, 3.0], ddof=1) / np.sqrt(2))


def test_sweep_curves_keep_the_split_that_is_asked_for(ax, history):
    history.loc[history["run"] == "b", "split"] = "test"
    plots.sweep_curves(ax, history.assign(kind="k"), "trace", "kind", ["k"], split="test", ordered=False)
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [0.0, 3.0, 6.0])


def test_epochs_have_whole_ticks_and_steps_what_fits(history):
    for x, whole in (("epoch", True), ("step", False)):
        fig, ax = plots.figure()
        plots.seed_curves(ax, history.assign(step=history["epoch"]), {"trace": "the trace"}, x=x)
        ax.set_xlim(0, 1.9)
        assert all(t == round(t) for t in ax.get_xticks()) == whole
        plots.plt.close(fig)
    fig, ax = plots.figure()
    ax.set_xscale("log")
    plots.sweep_curves(ax, history.assign(kind="k", epoch=history["epoch"] + 1), "trace", "kind", ["k"])
    fig.canvas.draw()  # a logarithmic axis has ticks of its own
    plots.plt.close(fig)


def test_panels_with_one_abscissa_name_it_below_only():
    for rows, columns, shared, shown in (
        (2, 2, True, [0, 0, 1, 1]),
        (2, 1, "col", [0, 1]),
        (2, 2, False, [1] * 4),
        (1, 2, True, [1, 1]),
    ):
        fig, axes = plots.figure(rows, columns, sharex=shared)
        for ax in np.reshape(axes, -1):
            ax.set(xlabel="step")
        assert [ax.xaxis.label.get_visible() for ax in np.reshape(axes, -1)] == [bool(s) for s in shown]
        plots.plt.close(fig)


def test_a_legend_without_curves_is_no_warning():
    plots.use_style()
    fig, ax = plots.figure()
    ax.legend()
    plots.plt.close(fig)
