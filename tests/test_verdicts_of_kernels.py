"""What the chapters on the edge of stability, the lazy regime and the cone judge, on made-up histories told by hand."""

import math
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from cells import Cells, made_up

mpl.use("Agg")


# edge of stability


class Edge(NamedTuple):
    """What the cells read of a run's settings."""

    lr: float
    seed: int


def descended(kta, top=(1.0, 1.0, 1.0), by_eigenvectors=0.5, loss=(1.0, 0.2, 0.05)):
    """Three measured steps; at a loss of 0.1, half-way in its logarithm, a quantity is the mean of its last two values."""
    at, parts = (0, 4, 8), np.diff(kta)
    curves = {
        ("loss", ""): loss, ("kta", ""): kta, ("leading", ""): [1 - v for v in kta], ("top", ""): top,
        ("by_eigenvalues", ""): [math.nan, *((1 - by_eigenvectors) * parts)],
        ("by_eigenvectors", ""): [math.nan, *(by_eigenvectors * parts)],
    }  # fmt: skip
    return made_up({k: {t: v for t, v in zip(at, values, strict=True) if v == v} for k, values in curves.items()}, kta=kta, top=top)


@pytest.fixture
def edge():
    known = {
        Edge(0.1, 0): descended((0, 0.2, 0.4), (1, 30, 20)), Edge(0.2, 0): descended((0, 0.1, 0.3), (1, 4, 3)),
        Edge(0.4, 0): descended((0.1, 0.4, 0.6), (1, 6, 5), by_eigenvectors=0.7),
        Edge(0.1, 1): descended((0, 0.1, 0.1), (1, 30, 20)), Edge(0.2, 1): descended((0, 0.2, 0.2), (1, 4, 3)),
        Edge(0.4, 1): descended((0.1, 0.2, 0.4), (1, 6, 5), by_eigenvectors=0.6),
        Edge(0.0, 0): descended((0, 0.2, 0.3), by_eigenvectors=0.2), Edge(0.0, 1): descended((0.1, 0.1, 0.1)),
    }  # fmt: skip
    rates = (0.1, 0.2, 0.4)
    descents = {lr: [Edge(lr, seed) for seed in (0, 1)] for lr in rates}
    flows = {"flow": [Edge(0.0, 0), Edge(0.0, 1)]}
    return Cells(
        "eos_alignment", known=known, descents=descents, flows=flows, lrs=list(rates), level=0.1, num_seeds=2, todo=list(known),
        detail=0.1, seeds_run=[], BLOCK=10,
    )  # fmt: skip


def test_alignment_at_equal_loss_is_ranked_and_compared_with_gradient_flow(edge):
    found = edge.run("def ends(each", "def trend(frame", 'judge("N110"')
    # at the loss of 0.1: 0.3 0.2 0.5 (ranks 2 1 3) and 0.1 0.2 0.3; gradient flow 0.25 and 0.1
    assert found["B1"] == pytest.approx([(0.5 + 1) / 2, min(0.5 - 0.25, 0.3 - 0.1)])
    assert found["B2"] == pytest.approx([-(0.5 + 1) / 2, -0.25])  # the share of five is one minus that, here
    assert found["N110"] == pytest.approx([0.3 / 0.25 - 1])


def test_swings_are_around_the_edge_over_the_last_half_of_runs_that_met_it(edge):
    found = edge.run("def swings(result")
    # lr lambda / 2: 1.5 and 1 at 0.1, never beyond 1 at 0.2, 1.2 and 1 at 0.4: medians 1.25 and 1.1
    assert found["B7"] == pytest.approx([(0.25 + 0.1) / 2])


def test_parts_of_the_gain_add_up_and_that_of_the_eigenvectors_is_relative_to_gradient_flow(edge):
    found = edge.run("def parts(result", 'judge("N112"')
    assert found["N111"][0] < 1e-15
    first = (0.7 * 0.5 - 0.2 * 0.3) / (0.5 - 0.3)  # changes of KTA 0.5 and 0.3
    second = (0.6 * 0.3 - 0.5 * 0) / (0.3 - 0)
    assert found["N112"] == pytest.approx([(first + second) / 2])


def test_windows_are_correlated_with_the_fall_of_the_sharpness(edge):
    windows = np.array([[-3, 3, 0, -3], [-1, 2, 0, -2], [2, -1, 0, -1], [1, 1, 0, -2.5]], dtype=float)  # change of sharpness first
    far = windows[:, [0, 3, 2, 1]]
    edge.names |= {"at_edge": {0.1: [windows], 0.4: [far]}, "block_bootstrap": lambda *_, **__: (0.1, 0.9)}
    found = edge.run("def follows(column")
    assert found["B3"] == pytest.approx([1, 0.1])
    assert found["N113"] == pytest.approx([-0.8, 0.1])  # ranks 4 3 1 2 of the fall, 1 3 4 2 of the part
    assert found["N115"] == pytest.approx([-0.8, 1])


def test_errors_of_the_central_flow_are_the_larger_of_the_two_rates(edge):
    edge.names["known"] |= {
        ("c", 0.1, 0): descended((0, 0, 0.33)), ("c", 0.4, 0): descended((0, 0, 0.4)), ("c", 0.4, 1): descended((0, 0, 0.3)),
    }  # fmt: skip

    class Central(NamedTuple):
        kind: str
        lr: float
        seed: int

    central = {0.1: [Central("c", 0.1, 0)], 0.4: [Central("c", 0.4, 0), Central("c", 0.4, 1)]}
    edge.names |= {"central": central, "todo": []}
    # final KTA at the loss 0.3 (lr 0.1) and 0.5, 0.3 (lr 0.4): errors 0.1 and 0.2 for the first seed, 0 for the second
    assert edge.run("def last_alignment")["N114"] == pytest.approx([0.1])


def test_the_least_rank_correlation_over_architectures_counts_and_that_of_stochastic_descent(edge):
    def frame(*rows):
        return pd.DataFrame(rows, columns=["lr", "seed", "kta", "leading"]).astype({"kta": float, "leading": float})

    rising = frame((0.1, 0, 1, 3), (0.2, 0, 2, 2), (0.4, 0, 3, 1))
    mixed = frame((0.1, 0, 1, 1), (0.2, 0, 3, 3), (0.4, 0, 2, 2), (0.1, 1, 1, 1), (0.2, 1, 2, 2), (0.4, 1, 3, 3))
    edge.names |= {"elsewhere": {"a": rising, "b": mixed}, "todo": []}
    assert edge.run("def ends(each", "def trend(frame", "lowest = []")["B5"] == pytest.approx([0.75, -1])
    edge.names |= {"variants": lambda *_: edge.names["descents"], "distinct": lambda _: list(edge.names["known"])[:6]}
    edge.names |= {"sweep": lambda _, todo: [edge.names["known"][s] for s in todo], "train": None, "base": None}
    assert edge.run("noisy = variants(")["B6"] == pytest.approx([(0.5 + 1) / 2])


# lazy regime


def at_end(values, **more):
    """Rows of the last step: one per variant and seed of each quantity, ``{quantity: {variant: (seed 0, seed 1)}}``."""
    rows = [
        {"run": f"{v}-{seed}", "step": 9, "quantity": q, "variant": v, "seed": seed, "layer": "", "value": value, **more}
        for q, table in values.items() for v, each in table.items() for seed, value in enumerate(each)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def powers(first, second, at=(4, 16, 64)):
    return {m: (2 * m**first, 3 * m**second) for m in at}


def lazy(**given):
    cells = Cells("lazy_regime", num_seeds=2, num_map_seeds=2, NAMES={"relu": "ReLU", "erf": "erf"}, all_runs={}, **given)
    cells.names["base"] = type("Base", (), {"but": lambda self, **_: self})()
    return cells


def test_exponents_are_slopes_per_seed_at_the_last_step():
    relu = {"drift": powers(-0.7, -0.5), "limit_gap": powers(-0.4, -0.6)}
    erf = {"drift": powers(-1.0, -0.8), "limit_gap": powers(-0.2, -0.2)}
    frames = [
        at_end(frame | {"distance": powers(-1, -1), "gap": powers(-1, -1)})
        for frame in (relu, erf, {"drift": powers(-1, -1), "limit_gap": powers(-1, -1)})
    ]
    frames[0] = pd.concat([frames[0].assign(step=3, value=7.0), frames[0]])  # what was before the last step does not count
    cells = lazy()
    given = iter(frames)
    cells.run("def run_all(settings")
    cells.names["spread"] = lambda *_, **__: next(given)
    found = cells.run("laws = {\n", 'judge("C2"', 'judge("N120"')
    assert found["C2"] == pytest.approx([-0.6])
    assert found["N120"] == pytest.approx([-0.6, -0.9, (-0.4 - 0.2 - 0.6 - 0.2) / 4])
    given = iter([at_end({"drift": powers(-0.5, -0.7)}), at_end({"drift": powers(-1.1, -0.9)})])
    found = cells.run("scale_laws = {", 'judge("N121"')
    assert (found["C5"], found["N121"]) == (pytest.approx([-1.0]), pytest.approx([-0.6]))


def test_rates_are_compared_with_the_first_eigenvalue_and_flows_must_not_grow():
    t = np.linspace(0, 1, 20)

    def decaying(error, share):
        curves = {("time", ""): t, ("drift", ""): 0 * t}
        for layer, (eigenvalue, wrong, part) in {"1": (2.0, 0.01, 0.5), "2": (1.0, error, share)}.items():
            curves |= {
                ("component", "", layer): part * np.exp(-eigenvalue * (1 + wrong) * t),
                ("eigenvalue", "", layer): 0 * t + eigenvalue,
            }
        return made_up({k: dict(enumerate(v)) for k, v in curves.items()}, error=error)

    runs = [decaying(-0.03, 0.4), decaying(0.5, 0.05)]  # a direction with less than a tenth of the residual does not count
    images = type("Images", (), {"but": lambda self, **_: self})()
    cells = lazy(images=images, run_all=lambda _: runs)
    assert cells.run("fits = [mode_rates(")["C3"] == pytest.approx([(0.03 + 0.01) / 2], rel=1e-6)
    flows = [
        made_up({("least", ""): {0: 0.5, 1: 0.2}, ("residual", ""): {0: 4.0, 1: 2.0, 2: 1.9}, ("drift", ""): {2: 0.1}}, name=1),
        made_up({("least", ""): {0: 0.5, 1: 0.3}, ("residual", ""): {0: 4.0, 1: 3.0, 2: 3.3}, ("drift", ""): {2: 0.1}}, name=2),
    ]
    cells.names |= {"run_all": lambda _: flows, "modes": []}
    assert cells.run("flows = run_all(")["C4"] == pytest.approx([0.2, 0.1])


def test_the_map_beyond_the_limit_is_fitted_at_the_plain_output_scale():
    index = pd.MultiIndex.from_product([[0.5, 1.5], [4, 16], [1.0, 4.0]], names=["rate", "width", "alpha"])
    final = pd.DataFrame(1.0, index=index, columns=[0, 1])
    final.loc[(1.5, 16, 1.0)] = [16 / 4, 4 / 16]  # exponents 1 and -1; at the other scale 0
    final.loc[(1.5, 16, 1.0), 0] = 4.0**0.5
    top = pd.Series(0.5, index=index)
    top[1.5, 4, 4.0] = 1.3
    cells = lazy(final=final, drifts=final.mean(axis=1), top=top, map_scales=[1.0, 4.0], map_rates=[0.5, 1.5])
    assert cells.run("unit = min(map_scales")["N122"] == pytest.approx([(0.5 - 1) / 2, 1.3])


def test_drift_while_there_is_something_to_learn():
    def run(variant, seed, drift):
        rows = {"residual": (1, 0.2, 0.09, 0.01), "drift": drift, "growth": (1, 1, 1, 1.0)}
        return pd.DataFrame([
            {"run": f"{variant}{seed}", "step": t, "quantity": q, "variant": variant, "seed": seed, "value": v}
            for q, values in rows.items() for t, v in enumerate(values)
        ])  # fmt: skip

    frames = {name: pd.concat([run(4, 0, (0, 1, 3, 4)), run(4, 1, (0, 1, 2, 4))]) for name in ("ReLU", "erf")}
    cells = lazy(by_width=frames)
    cells.run("def run_all(settings")
    assert cells.run("curves = {name: by_width")["N123"] == pytest.approx([(3 / 4 + 2 / 4) / 2])


# cone


SPEEDS = [0.2] * 2 + [0.05] * 8 + [0.01] * 10
THETA = np.concatenate([[0], np.cumsum(SPEEDS)])


@pytest.fixture
def cone():
    """Kernels that turn on a circle, one per step, so that their distances are 1 - cos; Phase II from step 10 on."""
    curves = {("distance", "full", str(i)): {j: 1 - math.cos(THETA[j] - THETA[i]) for j in range(i + 1, 21)} for i in range(20)}
    curves |= {
        ("accuracy", "linearized"): {0: 0.5, 5: 0.6, 12: 0.9, 16: 0.8}, ("accuracy", "test"): {0: 0.1, 20: 0.95},
        ("trace", "train"): {t: 1.0 if t < 20 else 3.0 for t in range(21)}, ("norm", "train"): dict.fromkeys(range(21), 1.0),
        ("floor", "train"): {20: 1e-9},
    }  # fmt: skip
    run = made_up(curves, interval=1, seed=0)
    runs = {"few images": [run], "small steps": [run], "other": []}
    cells = Cells("cone_effect", num_lags=2, other_model="other", runs=runs, main=[run], controls=["few images", "small steps"])
    cells.run("def path(result, spaced", "def boundary(group")
    cells.names["begin"] = {"few images": 10, "small steps": 18}
    return cells


def test_the_speed_of_the_first_tenth_is_compared_with_that_of_the_last_half(cone):
    assert cone.names["verdicts"].measured["D1"] == pytest.approx([20], rel=1e-6)
    late = 1 - math.cos(0.01)
    assert cone.run("def above_floor")["D2"] == pytest.approx([math.log10(late / 1e-9)], rel=1e-6)


def test_confinement_compares_halves_of_phase_two_and_exponents_of_both_phases(cone):
    found = cone.run("def by_lag(result", "def plateau(result", "def persistence(result")

    def exponent(first, last):
        means = [np.mean([1 - math.cos(THETA[t + lag] - THETA[t]) for t in range(first, last - lag + 1)]) for lag in (1, 2)]
        return math.log(means[1] / means[0]) / math.log(2)

    assert found["D3"] == pytest.approx([10 / 5, exponent(0, 10) - exponent(10, 20)], rel=1e-6)
    assert exponent(10, 20) == pytest.approx(2, abs=1e-3)
    assert found["N130"] == pytest.approx([math.sqrt(10), math.sqrt(2)], rel=1e-6)  # straight: n steps over sqrt(n)


def test_the_opening_is_relative_to_the_angle_of_the_initial_kernel(cone):
    centre = (THETA[10] + THETA[20]) / 2
    assert cone.run("def to_axis(result", "_, angle, late = to_axis(r)")["D4"] == pytest.approx([0.05 / centre], rel=1e-4)
    cone.run("shares = [cone.classical_scaling")
    assert cone.names["verdicts"].measured["N131"] == pytest.approx([math.log10(3)])


def test_switching_is_ranked_and_its_gains_are_in_points(cone):
    found = cone.run("def ends(result, split", 'judge("D6"')
    assert found["D5"] == pytest.approx([0.8, 40])
    assert found["D6"] == pytest.approx([5])
