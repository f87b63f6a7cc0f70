"""Laws of the measures of a kernel's path: great circles, random walks, cones, planes, steps."""

import inspect
import itertools
import math

import numpy as np
import pytest

from ntklib.cone import (
    angle_speed,
    angles_from_distances,
    angles_to_axis,
    classical_scaling,
    lag_exponent,
    lag_steps,
    mean_by_lag,
    path_lengths,
    phase_boundary,
    power_law,
)
from ntklib.similarity import kernel_angle, kernel_distance


def pairwise(points: np.ndarray, measure) -> np.ndarray:
    import torch

    kernels = torch.as_tensor(points)
    return np.array([[measure(a, b) for b in kernels] for a in kernels])


def circle(angle: np.ndarray, dim: int = 5) -> np.ndarray:
    """Unit vectors on a great circle, in a random plane."""
    plane = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, 2)))[0]
    return np.stack([np.cos(angle), np.sin(angle)], 1) @ plane.T


def walk(steps: int, size: float, dim: int, seed: int = 0) -> np.ndarray:
    """Random walk of small steps in high dimension, normalized."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(size / math.sqrt(dim) * rng.normal(size=(steps, dim)), 0)
    path[:, 0] += 1
    return path / np.linalg.norm(path, axis=1, keepdims=True)


def on_a_cone(opening: float, num: int, dim: int = 60) -> np.ndarray:
    """Axis e_0, and around it opposite pairs of directions at the same angle."""
    around = np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0][:, : num // 2].T
    around = np.concatenate([around, -around])
    out = np.concatenate([np.full((len(around), 1), math.cos(opening)), math.sin(opening) * around], 1)
    return np.random.default_rng(2).permutation(out)


def test_lag_steps_are_equally_spaced_ones_and_powers_of_two_from_the_starts():
    assert lag_steps(20, 8) == [0, 8, 16, 20]
    assert lag_steps(20, 8, [0, 16], 3, [3, 50]) == [0, 1, 2, 3, 4, 8, 16, 17, 18, 20]
    with pytest.raises(ValueError, match="interval must be at least 1. Got 0"):
        lag_steps(20, 0)


def test_angles_follow_from_distances_also_small_ones():
    points = circle(np.array([0.0, 1e-6, 0.3, 1.0]))
    found = angles_from_distances(pairwise(points, kernel_distance))
    np.testing.assert_allclose(found, pairwise(points, kernel_angle), rtol=1e-9, atol=1e-15)  # rounding of 1e-12 in S
    assert found[0, 1] == pytest.approx(1e-6, rel=1e-6)
    assert angles_from_distances(np.array([-1e-17])).tolist() == [0.0]


def test_on_a_great_circle_the_distance_grows_as_the_square_and_the_path_is_straight():
    t = np.arange(17.0)
    points = circle(1e-3 * t)
    s, angle = pairwise(points, kernel_distance), pairwise(points, kernel_angle)
    lags = [1, 2, 4, 8]
    means = mean_by_lag(t, s, lags, 0, 16)
    np.testing.assert_allclose(means, [1 - math.cos(1e-3 * lag) for lag in lags], rtol=1e-8)  # rounding of S
    assert lag_exponent(lags, means) == pytest.approx(2, abs=1e-3)  # the next order is angle^2 / 12
    lengths = path_lengths(angle)
    assert lengths.straightness == pytest.approx(1, rel=1e-9)
    assert lengths.persistence == pytest.approx(4, rel=1e-9)  # 16 equal steps: 16 / sqrt(16)
    np.testing.assert_allclose(angle_speed(2 * t, angle), 5e-4, rtol=1e-9)


def test_a_random_walk_has_exponent_one_and_the_chord_of_a_random_walk():
    t, lags, exponents, ratios = np.arange(129.0), [1, 2, 4, 8, 16], [], []
    for seed in range(4):
        points = walk(129, 1e-2, 2000, seed)
        cosine = np.clip(points @ points.T, -1, 1)
        exponents.append(lag_exponent(lags, mean_by_lag(t, 1 - cosine, lags, 0, 128)))
        ratios.append(path_lengths(np.arccos(cosine)).persistence)
    assert np.mean(exponents) == pytest.approx(1, abs=0.02)  # 4 walks of 2,000 dimensions scatter by 0.005
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_jumps_within_a_cone_have_exponent_zero_and_a_short_chord():
    t, points = np.arange(40.0), on_a_cone(0.2, 40)
    lags = [1, 2, 4, 8]
    assert abs(lag_exponent(lags, mean_by_lag(t, pairwise(points, kernel_distance), lags, 0, 39))) < 0.05
    assert path_lengths(pairwise(points, kernel_angle)).persistence < 0.3  # about 1 / sqrt(39)


def test_the_mean_by_lag_takes_the_pairs_within_the_window_alone():
    t = np.array([0.0, 1.0, 2.0, 4.0])
    s = np.array([[0.0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
    assert mean_by_lag(t, s, [1, 2, 3], 0, 4).tolist() == [2.5, 4.0, 5.0]  # (1 + 4)/2, (2 + 6)/2, 5
    found = mean_by_lag(t, s, [1, 2, 3], 1, 2)
    assert found[0] == 4.0
    assert np.isnan(found[1:]).all()
    assert math.isnan(lag_exponent([1, 2], [0.1, math.nan]))


@pytest.mark.parametrize("opening", [0.1, 0.7])
def test_kernels_on_a_cone_have_its_axis_and_opening(opening):
    cone = on_a_cone(opening, 40)
    first = np.zeros_like(cone[:1])
    first[0, 0], first[0, 1] = math.cos(1.2), math.sin(1.2)
    angle = pairwise(np.concatenate([first, cone]), kernel_angle)
    found = angles_to_axis(angle, range(1, 41))
    np.testing.assert_allclose(found[1:], opening, rtol=1e-9)  # opposite pairs: the mean is along the axis
    assert found[0] == pytest.approx(1.2, rel=1e-9)


def test_the_axis_is_the_mean_of_the_unit_kernels():
    points = walk(12, 0.2, 30)
    axis = points[4:].mean(0)
    expected = [math.acos(u @ axis / np.linalg.norm(axis)) for u in points]
    np.testing.assert_allclose(angles_to_axis(pairwise(points, kernel_angle), np.arange(4, 12)), expected, rtol=1e-10)


def test_points_of_a_sphere_in_a_plane_are_recovered_up_to_rotation():
    points = circle(np.array([0.0, 0.4, 1.0, 1.3, 2.0]))
    place, share = classical_scaling(pairwise(points, kernel_angle))
    assert share == pytest.approx(1, abs=1e-12)
    chords = np.linalg.norm(points[:, None] - points, axis=2)
    np.testing.assert_allclose(np.linalg.norm(place[:, None] - place, axis=2), chords, atol=1e-12)
    assert (place[-1] >= 0).all()


def test_scaling_gives_the_principal_components_and_their_share():
    points = walk(20, 0.3, 8)
    place, share = classical_scaling(pairwise(points, kernel_angle), 2)
    u, sigma, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs(place), abs(u[:, :2] * sigma[:2]), atol=1e-10)
    assert share == pytest.approx(float((sigma[:2] ** 2).sum() / (sigma**2).sum()), rel=1e-10)


def test_the_boundary_of_two_levels_is_found_with_its_ratio_and_uncertainty():
    t, rng = 10.0 * np.arange(40), np.random.default_rng(0)
    level = np.where(t < 120, 0.5, 0.05)
    exact = phase_boundary(t, level[None])
    assert (exact.time, exact.explained) == (120.0, pytest.approx(1, abs=1e-12))
    assert exact.ratio == pytest.approx(10, rel=1e-12)
    assert math.isnan(exact.sem)
    shifted = [np.where(t < 120 + 10 * k, 0.5, 0.05) * np.exp(0.1 * rng.normal(size=40)) for k in (-2, -1, 0, 1, 2)]
    noisy = phase_boundary(t, np.array(shifted))
    assert abs(noisy.time - 120) <= 10
    assert 3 < noisy.sem < 15  # standard error of five times that scatter by 15.8: 7


def test_the_best_split_is_that_of_least_squares_over_all_splits():
    y = np.random.default_rng(3).normal(size=15).cumsum()
    rest = {k: y[:k].var() * k + y[k:].var() * (15 - k) for k in range(2, 14)}
    best = min(rest, key=lambda k: rest[k])
    found = phase_boundary(np.arange(15.0), np.exp(y)[None])
    assert found.time == best
    assert found.explained == pytest.approx(1 - rest[best] / (15 * y.var()), rel=1e-10)


def test_a_steady_fall_is_three_quarters_of_a_step():
    t = np.arange(400.0)
    assert phase_boundary(t, np.exp(-t / 50)[None]).explained == pytest.approx(0.75, abs=1e-3)


def test_a_power_law_is_explained_by_one_and_not_by_two_levels():
    t, rng = np.arange(1.0, 60.0), np.random.default_rng(0)
    slope, share = power_law(t, 3 * t**-0.7)
    assert slope == pytest.approx(-0.7, rel=1e-10)
    assert share == pytest.approx(1, abs=1e-10)
    y = -0.7 * np.log(t) + 0.3 * rng.normal(size=len(t))
    expected = np.corrcoef(np.log(t), y)[0, 1] ** 2
    assert power_law(t, np.exp(y))[1] == pytest.approx(expected, rel=1e-10)
    assert phase_boundary(t, np.exp(y)[None]).explained < expected
    assert power_law(t, np.ones(59)) == (pytest.approx(0, abs=1e-12), 1.0)
    for times, speeds in ((t - 1, t), (t[:2], t[:2]), (t, 0 * t)):
        with pytest.raises(ValueError, match="At least three positive times, and a speed that is positive, are required"):
            inspect.unwrap(power_law)(times, speeds)


def test_a_motionless_end_counts_as_the_smallest_speed():
    speed = np.array([[1.0, 1.0, 1.0, 0.1, 0.0, 0.0]])
    found = phase_boundary(np.arange(6.0), speed)
    assert found.time == 3.0
    assert found.ratio == pytest.approx(10, rel=1e-12)


def test_a_path_without_motion_has_no_straightness():
    lengths = path_lengths(np.zeros((3, 3)))
    assert math.isnan(lengths.straightness)
    assert math.isnan(lengths.persistence)


def test_mistakes_are_refused():
    square = np.zeros((3, 3))
    bare = [inspect.unwrap(f) for f in (angle_speed, path_lengths, angles_to_axis, classical_scaling, phase_boundary)]
    speed, lengths, axis, scaling, boundary = bare
    for call in (lambda: speed(np.arange(2.0), square), lambda: lengths(np.zeros((1, 1))), lambda: lengths(np.zeros((3, 2)))):
        with pytest.raises(ValueError, match="A path must have at least two kernels, one row and column per time"):
            call()
    with pytest.raises(ValueError, match="late must name at least one kernel"):
        axis(square, [])
    with pytest.raises(ValueError, match="dimensions must be between 1 and the 3 kernels. Got 4"):
        scaling(square, 4)
    for bad in (np.zeros((1, 5)), np.ones((1, 4)), -np.ones((1, 5)), np.full((1, 5), math.nan)):
        with pytest.raises(ValueError, match="finite, not negative and not all zero"):
            boundary(np.arange(5.0), bad)


def test_every_pair_of_a_triangle_of_angles_obeys_the_inequality_that_distances_break():
    points = circle(np.array([0.0, 0.5, 1.0]))
    s, angle = pairwise(points, kernel_distance), pairwise(points, kernel_angle)
    assert s[0, 2] > s[0, 1] + s[1, 2]
    assert all(angle[i, k] <= angle[i, j] + angle[j, k] + 1e-12 for i, j, k in itertools.permutations(range(3)))
