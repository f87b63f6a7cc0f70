"""Rise and plateau of curves with known answers."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from ntklib.phases import (
    first_time,
    partial_rank_correlation,
    rank_correlation,
    rise_and_plateau,
    smallest_rank_correlation,
)


def test_an_exponential_rise_to_a_plateau_is_measured_exactly():
    epoch = np.arange(11)
    value = np.exp(0.3 * np.minimum(epoch, 5))
    accuracy = np.minimum(epoch / 5, 1.0)
    found = rise_and_plateau(epoch, value, accuracy)
    assert found.t_star == 5
    assert found.spearman == pytest.approx(1.0)
    assert found.slope_before == pytest.approx(0.3, rel=1e-12)
    assert found.slope_ratio == pytest.approx(0.0, abs=1e-12)


def test_a_fall_has_rank_correlation_minus_one_and_a_steady_rise_has_slope_ratio_one():
    epoch, accuracy = np.arange(9), np.minimum(np.arange(9) / 4, 1.0)
    assert rise_and_plateau(epoch, np.exp(-0.2 * epoch), accuracy).spearman == pytest.approx(-1.0)
    assert rise_and_plateau(epoch, np.exp(0.2 * epoch), accuracy).slope_ratio == pytest.approx(1.0, rel=1e-12)


def test_t_star_is_the_first_epoch_within_the_slack():
    assert rise_and_plateau([0, 1, 2, 3], [1, 2, 3, 3], [0.1, 0.994, 0.996, 1.0]).t_star == 2


def test_what_cannot_be_measured_is_nan():
    found = rise_and_plateau([0, 1, 2], [1, 2, 3], [0.2, 0.5, 1.0])
    assert math.isnan(found.slope_after)
    assert math.isnan(rise_and_plateau([0, 1, 2], [1, 2, 3], [1.0, 1.0, 1.0]).slope_ratio)


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match="same length, at least 2. Got 2, 1 and 2"):
        rise_and_plateau([0, 1], [1], [0, 1])
    with pytest.raises(ValueError, match="positive and finite. Got -1"):
        rise_and_plateau([0, 1], [1, -1], [0, 1])


def test_curves_that_order_the_times_alike_correlate_fully_and_the_worst_pair_counts():
    up, steep, down = [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 10.0, 100.0], [4.0, 3.0, 2.0, 1.0]
    assert smallest_rank_correlation([up, steep]) == pytest.approx(1.0)
    assert smallest_rank_correlation([up, steep, down]) == pytest.approx(-1.0)
    swapped = [1.0, 3.0, 2.0, 4.0]  # 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 6 * 2 / 60
    assert smallest_rank_correlation([up, swapped, steep]) == pytest.approx(0.8)
    assert math.isnan(smallest_rank_correlation([up, [1.0] * 4]))


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([[1.0, 2.0]], "At least two curves of one length are required. Got 1"),
        ([[1.0, 2.0], [1.0, 2.0, 3.0]], r"Got 2 of lengths \[2, 3\]"),
        ([[1.0, math.inf], [1.0, 2.0]], "must be finite.*leave diverged runs out"),
    ],
)
def test_curves_that_cannot_be_ranked_are_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        smallest_rank_correlation(curves)


def test_the_first_time_is_that_of_the_first_value_at_the_threshold():
    assert first_time([0, 5, 7], [0.1, 0.99, 0.5], 0.99) == 5
    assert math.isnan(first_time([0, 5], [0.1, 0.2], 0.3))
    with pytest.raises(ValueError, match="same length. Got 2 and 1"):
        first_time([0, 5], [0.1], 0.3)


def test_the_partial_rank_correlation_is_that_of_residuals_of_ranks():
    generator = np.random.default_rng(0)
    c = generator.normal(size=40)
    a, b = c + generator.normal(size=40), np.exp(c + generator.normal(size=40))
    rank = [np.argsort(np.argsort(v)).astype(float) for v in (a, b, c)]
    residual = [r - np.polyval(np.polyfit(rank[2], r, 1), rank[2]) for r in rank[:2]]
    assert partial_rank_correlation(a, b, c) == pytest.approx(np.corrcoef(*residual)[0, 1], rel=1e-10)
    assert math.isnan(partial_rank_correlation(a, b, a))
    with pytest.raises(ValueError, match=r"Three finite sequences of one length.*Got lengths \[40, 40, 2\]"):
        partial_rank_correlation(a, b, [1, 2])


def test_rank_correlation_is_spearmans_without_what_is_not_finite():
    a, b = np.random.default_rng(0).integers(0, 8, (2, 30)).astype(float)
    assert rank_correlation(a.tolist(), b.tolist()) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation([1.0, 2.0, math.nan, 3.0], [1.0, 2.0, 0.0, 3.0]) == pytest.approx(1)
    assert math.isnan(rank_correlation([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
