"""Laws of the distance and angle between kernels."""

import math

import pytest
import torch

from ntklib.random import stream
from ntklib.similarity import kernel_angle, kernel_distance


def psd(seed: int, n: int = 6, rank: int = 3) -> torch.Tensor:
    factor = torch.randn(n, rank, generator=stream(seed, "factor"), dtype=torch.float64)
    return factor @ factor.T


PAIRS = [(psd(2 * seed), psd(2 * seed + 1)) for seed in range(5)]


def at_angle(theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a pair of kernels of lengths 1 and 7 at the angle theta."""
    u, v = torch.zeros(2, 3, 3, dtype=torch.float64)
    u[0, 1], v[2, 2] = 1, 1
    return u, 7 * (math.cos(theta) * u + math.sin(theta) * v)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 3.0, 1e9])
def test_positive_multiples_are_at_distance_zero(factor):
    assert kernel_distance(PAIRS[0][0], factor * PAIRS[0][0]) < 1e-14  # squares of rounding errors
    assert kernel_angle(PAIRS[0][0], factor * PAIRS[0][0]) < 1e-14


@pytest.mark.parametrize(("k1", "k2"), PAIRS)
def test_the_distance_is_one_minus_the_cosine(k1, k2):
    cosine = sum(float(a * b) for a, b in zip(k1.reshape(-1), k2.reshape(-1), strict=True)) / float(k1.norm() * k2.norm())
    assert kernel_distance(k1, k2) == pytest.approx(1 - cosine, rel=1e-12)  # reordered sum
    assert kernel_distance(k1, k2) == kernel_distance(k2, k1)
    assert kernel_angle(k1, k2) == kernel_angle(k2, k1)
    assert 0 < kernel_distance(k1, k2) < 1  # positive semidefinite with a common direction


def test_orthogonal_projections_are_at_distance_one_and_opposite_kernels_at_distance_two():
    a, b = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert kernel_distance(a, b) == pytest.approx(1, rel=1e-15)
    assert kernel_distance(a, -a) == pytest.approx(2, rel=1e-15)


@pytest.mark.parametrize(("k1", "k2"), PAIRS)
def test_distance_and_norms_give_the_squared_difference(k1, k2):
    n1, n2 = float(k1.norm()), float(k2.norm())
    expected = (n1 - n2) ** 2 + 2 * kernel_distance(k1, k2) * n1 * n2
    assert float((k1 - k2).square().sum()) == pytest.approx(expected, rel=1e-12)  # reordered sum


@pytest.mark.parametrize("theta", [1e-7, 1e-5, 0.01, 1.0, math.pi / 2, 2.0, 3.0])
def test_the_angle_is_accurate_from_tiny_to_obtuse(theta):
    k1, k2 = at_angle(theta)
    assert kernel_angle(k1, k2) == pytest.approx(theta, rel=1e-6 if theta < 1e-3 else 1e-13)  # rounding 1e-16 / theta
    # at 1e-7 the distance, 5e-15, keeps the accuracy that 1 - cosine has lost
    assert kernel_distance(k1, k2) == pytest.approx(2 * math.sin(theta / 2) ** 2, rel=1e-6 if theta < 1e-3 else 1e-12)


@pytest.mark.parametrize(("k1", "k2"), PAIRS)
def test_the_angle_is_the_arc_cosine_of_one_minus_the_distance(k1, k2):
    assert kernel_angle(k1, k2) == pytest.approx(math.acos(1 - kernel_distance(k1, k2)), rel=1e-12)  # away from 0 and pi


def test_angles_obey_the_triangle_inequality_where_distances_do_not():
    kernels = [k for pair in PAIRS for k in pair]
    for a in kernels:
        for b in kernels:
            for c in kernels:
                assert kernel_angle(a, c) <= kernel_angle(a, b) + kernel_angle(b, c) + 1e-14  # rounding
    (a, b), (_, c) = at_angle(0.5), at_angle(1.0)
    assert kernel_angle(a, c) == pytest.approx(kernel_angle(a, b) + kernel_angle(b, c), rel=1e-12)  # along a great circle
    assert kernel_distance(a, c) > 1.8 * (kernel_distance(a, b) + kernel_distance(b, c))


@pytest.mark.parametrize("measure", [kernel_distance, kernel_angle])
@pytest.mark.parametrize(
    ("k2", "message"),
    [
        (torch.zeros(6, 6), "finite and not zero.*norm 0.0"),
        (torch.full((6, 6), math.nan), "finite and not zero.*norm nan"),
        (torch.eye(5), r"same shape. Got \(6, 6\) and \(5, 5\)"),
    ],
)
def test_kernels_without_a_direction_or_of_other_shape_are_refused(measure, k2, message):
    with pytest.raises(ValueError, match=message):
        measure(psd(0), k2)
