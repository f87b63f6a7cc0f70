"""What the chapters on grokking and semi-supervised learning judge, on made-up histories whose answers are told by hand."""

import math

import numpy as np
import pytest
from cells import Cells, made_up

STEPS = (0, 10, 20, 50, 100, 200, 400)
FITS = (0.1, 0.5, 0.99, 1, 1, 1, 1)  # training accuracy: fitted at 20
GROKS = (0, 0.1, 0.2, 0.4, 0.99, 1, 1)  # test accuracy: general at 100


def curve(*values, steps=STEPS):
    return dict(zip(steps, values, strict=True))


def grokked(seed, train, test, loss=(4, 3, 2, 1, 1, 1, 1), general=GROKS, **more):
    curves = {
        ("accuracy", "train"): FITS, ("accuracy", "test"): general, ("trace", "train"): train, ("trace", "test"): test,
        ("loss", "train"): loss, **{(quantity, "train"): values for quantity, values in more.items()},
    }  # fmt: skip
    return made_up({k: curve(*v) for k, v in curves.items()}, seed=seed)


# modular addition


def test_times_and_growth_of_the_trace_of_modular_addition():
    test = (1, 1, 2, 3, 9.8, 10, 10)  # settles at 100, grows by 4.9
    ended = [
        grokked(0, (1, 2, 4, 6, 8, 10, 10.5), test),  # settles at 200, grows by 2; ranks 1 2 3 from fit to generalization
        grokked(1, (1, 2, 5, 4, 6, 6, 6), test),  # settles at 100, grows by 1.2; ranks 2 1 3
    ]
    found = Cells("grokking_modular_addition", ended=ended).run("def milestones", 'judge("A7"')
    assert found["A7"] == pytest.approx([1.5, 1.0, 1.6, 4.9, 0.75])


def test_peak_floor_and_learning_rates_of_modular_addition():
    loss = (4, 0.3, 0.11, 0.1, 0.1, 0.1, 0.1)  # within a factor e of its last value from 20 on
    rising = [v + 1 for v in STEPS]
    early = grokked(0, (1, 2, 8, 6, 4, 4, 4), rising, loss)  # peak at 20, where the test accuracy is 0.2; falls to a half
    late = grokked(0, (1, 2, 4, 6, 8, 10, 5), rising, loss)  # peak at 200, where it is 1; falls to a half
    cells = Cells("grokking_modular_addition", ended=[early], results=[early], control=[late])
    found = cells.run("def milestones", "late = [r for r", 'judge("N70"')
    assert found["N71"] == pytest.approx([0.2 - 1])
    assert found["N70"] == pytest.approx([(20 / 20 + 200 / 20) / 2, 0.5])


LIKENESS = {
    "trace": (1, 3, 2, 4, 5, 6, 7), "distance": (20, 10, 30, 40, 60, 50, 70), "norm": (7, 6, 5, 4, 3, 2, 1.5),
}  # fmt: skip


def alike(chapter, *cells):
    more = {f"{q}_perturbation": LIKENESS[q] for q in ("trace", "distance")}
    run = grokked(0, LIKENESS["trace"], LIKENESS["trace"], norm=LIKENESS["norm"], distance=LIKENESS["distance"], **more)
    return Cells(chapter, ended=[run]).run("def milestones", *cells)


def spearman(a, b):
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    n, square = len(a), sum((ranks[0] - ranks[1]) ** 2)
    return 1 - 6 * square / (n * (n * n - 1))


def test_trace_and_distance_are_correlated_over_all_steps_and_from_the_fit_on():
    found = alike("grokking_modular_addition", "whole = [alike(r)", 'judge("N72"')
    assert found["A9"] == pytest.approx([spearman(LIKENESS["trace"], LIKENESS["distance"])])
    assert found["N72"] == pytest.approx([spearman(LIKENESS["trace"][2:], LIKENESS["distance"][2:])])
    assert found["A9"] != pytest.approx(found["N72"])


# digits


def test_times_moves_and_shares_of_the_trace_on_digits():
    general = (0, 0.1, 0.2, 0.4, 0.79, 0.795, 0.8)  # within a point of its best from 100 on
    ended = [
        grokked(0, (90, 60, 40, 20, 10, 5, 5.2), (90, 60, 40, 30, 20, 10, 10), general=general),  # both settle at 200
        grokked(1, (90, 60, 40, 20, 10, 10, 10), (90, 60, 40, 30, 20, 20, 20), general=general),  # at 100
    ]
    found = Cells("grokking_mnist", ended=ended).run("def milestones", 'judge("A8"', 'judge("N85"')
    assert found["A8"] == pytest.approx([1.5, 1.5, math.log(4), math.log(2)])
    assert found["N85"] == pytest.approx([(0.52 + 0.5) / 2])


def test_the_exponent_of_the_trace_in_the_norm_is_that_between_fit_and_saturation():
    norm = np.array((50, 40, 30, 20, 10, 10, 10))
    train = np.where(np.array(STEPS) < 20, norm**4, norm**1.5)
    train[5:] = 1  # after saturation, at 100, it falls by itself
    layers = {("layer_norm", "", str(i)): curve(*norm) for i in (1, 2, 3)}
    run = grokked(0, tuple(train), tuple(train), norm=tuple(norm))
    history = made_up(layers).history.assign(seed=0)
    cells = Cells("grokking_mnist", ended=[run], history=history)
    assert cells.run("def milestones", 'judge("N80"')["N80"] == pytest.approx([1.5])


def test_controls_are_judged_by_their_late_move_their_accuracy_and_their_trend():
    still = grokked(0, (90, 60, 40, 20, 10, 8, 4), (1,) * 7, general=(0, 0, 0, 0, 0, 0.1, 0.25))
    plain = grokked(0, (2, 9, 9, 9, 9, 9, 6), (1,) * 7)
    found = Cells("grokking_mnist", ended=[plain], still=[still], plain=[plain]).run("def milestones", 'judge("N83"', 'judge("N84"')
    assert found["N83"] == pytest.approx([math.log(2), 0.25])  # from step 200 on
    assert found["N84"] == pytest.approx([math.log(3)])


# FixMatch

AT = (0, 10, 50, 100)
KINDS = ("labelled", "weak", "strong", "pseudo")


def traced(labels, seed, accuracy, *traces, start=0):
    """A run with a trace per kind of image; that of pseudo-labelled ones begins later."""
    curves = {
        ("trace", kind): dict(list(zip(AT, values, strict=True))[start if kind == "pseudo" else 0 :])
        for kind, values in zip(KINDS, traces, strict=False)
    }
    curves[("accuracy", "test")] = curve(0.1, 0.2, 0.3, accuracy, steps=AT)
    return made_up(curves, steps=100, num_labels=labels, seed=seed)


@pytest.fixture
def semi_supervised():
    falling = ((4, 2, 6, 8), (4, 2, 6, 10), (2, 1, 3, 5), (9, 1.5, 3, 4))
    rising = ((2, 2, 6, 8), (4, 5, 6, 8), (2, 2, 3, 8), (9, 1.5, 3, 4))
    known = {
        ("fix", 40): traced(40, 0, 0.9, *falling, start=1), ("fix", 400): traced(400, 0, 0.95, *rising, start=1),
        ("plain", 40): traced(40, 0, 0.7, *((4, 4, 4, 4), (4, 4, 4, 20), (4, 4, 4, 5))),
        ("plain", 400): traced(400, 0, 0.94, *((4, 4, 4, 4),) * 3),
    }  # fmt: skip
    fix, supervised = ({n: [(kind, n)] for n in (40, 400)} for kind in ("fix", "plain"))
    return Cells("fixmatch", known=known, fix=fix, supervised=supervised, augmented={40: [("plain", 400)]}, counts=[40, 400])


def test_fall_rise_and_spread_of_the_four_traces(semi_supervised):
    found = semi_supervised.run("def traces(result)", 'judge("A10"')
    # spread at a tenth 2 / 1 and 5 / 1.5, at the end 10 / 4 and 8 / 4; the second run has traces that never fall
    assert found["A10"] == pytest.approx([(2.5 / 2 + 2 / (5 / 1.5)) / 2, 0.1, 0.5])


def test_neighbouring_traces_are_compared_at_the_end_and_with_supervised_training(semi_supervised):
    found = semi_supervised.run("def traces(result)", 'judge("A10"', 'judge("A11"', "pairs = [(known", 'judge("N92"', 'judge("N94"')
    assert found["A11"] == pytest.approx([math.log(10 / 8), math.log(2), math.log(2)])
    ours, theirs = [math.log(0.8), math.log(2)], [math.log(0.2), math.log(4)]  # at 40 labels; at 400 the traces are equal
    assert found["N92"][:2] == pytest.approx([(a - b) / 2 for a, b in zip(ours, theirs, strict=True)])
    assert found["N94"] == pytest.approx([(math.log(2) - math.log(2) + 0 - math.log(2)) / 2])  # last minus first of weak / strong


def test_gains_are_paired_differences_of_the_last_accuracy(semi_supervised):
    cells = ("def traces(result)", 'judge("A10"', 'judge("A11"', "pairs = [(known", "def last(result", 'judge("N90"', 'judge("N91"')
    found = semi_supervised.run(*cells, 'judge("N93"')
    assert found["N90"] == pytest.approx([0.2, 0.2 - 0.01])
    assert found["N91"] == pytest.approx([0.9 - 0.94])
    assert found["N93"] == pytest.approx([math.log(10 / 20)])


# averages

NAMES = ["0.9", "0.97", "0.99"]


def averaged(seed, **quantities):
    """A run with curves (steps 0, 25, 50, 100) per decay rate: accuracy of all three and of training, the others from 25 on."""
    at = (0, 25, 50, 100)
    curves = {}
    for quantity, rows in quantities.items():
        if quantity == "accuracy":
            layers, split, steps = ["0", *NAMES], "test", at
        else:
            layers, split, steps = NAMES, "train", at[1:]
        curves |= {(quantity, split, layer): curve(*row, steps=steps) for layer, row in zip(layers, rows, strict=True)}
    return made_up(curves, steps=100, seed=seed)


def averages_of(*runs):
    labels = {"0": "in training"} | {n: n for n in NAMES}
    return Cells("ema", ended={"FixMatch": list(runs), "labels alone": list(runs)}, names=NAMES, labels=labels)


def test_gains_of_longer_averages_are_paired_differences_of_their_best_accuracies():
    a = averaged(0, accuracy=[(0, 0.1, 0.2, 0.3), (0, 0.5, 0.6, 0.4), (0, 0.1, 0.9, 0.8), (0, 0.1, 0.2, 0.7)])
    b = averaged(1, accuracy=[(0, 0.1, 0.2, 0.3), (0, 0.5, 0.6, 0.5), (0, 0.1, 0.5, 0.4), (0, 0.1, 0.2, 0.7)])
    found = averages_of(a, b).run("def accuracies", 'judge("A12"')
    assert found["A12"] == pytest.approx([((0.9 - 0.6) + (0.5 - 0.6)) / 2, ((0.7 - 0.9) + (0.7 - 0.5)) / 2])


def test_bounds_orders_and_cosines_are_counted_over_steps_and_averages():
    run = averaged(
        0, ratio=[(9, 3, 1), (9, 2, 2), (1, 1, 3)],  # after a quarter: falls with tau at 50, not at 100
        printed=[(0.5, 2, 1), (0.1, 0.2, 0.3), (3, 0.4, 0.6)], scaled=[(0.5, 2, 2), (2, 2, 2), (2, 2, 1)],
        tightness=[(0.1, 0.2, 0.3), (0.1, 0.7, 0.3), (0.1, 0.2, 0.3)], cosine=[(0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0.7, 0.8, 0.9)],
    )  # fmt: skip
    found = averages_of(run).run("def table_of(result", "def share(result", 'judge("N104"', 'judge("N105"')
    assert found["N103"] == pytest.approx([0.5])
    assert found["A13"] == pytest.approx([7 / 9, 2 / 9, 0.7])
    assert found["N104"] == pytest.approx([0.5, 0.5])
    assert found["N105"] == pytest.approx([0.5, 0.2])
