"""Laws of the distance, angle, velocity and alignments of kernels."""

import inspect
import math

import pytest
import torch
from reference_dynamics import centered_by_loops, cosine_by_loops

from ntklib import similarity
from ntklib.kernels import flatten_kernel
from ntklib.random import stream
from ntklib.similarity import (
    centered_kernel_alignment,
    kernel_alignment,
    kernel_angle,
    kernel_distance,
    kernel_target_alignment,
    kernel_velocity,
    target_alignment,
)
from ntklib.spectra import top_eigenpairs


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


MEASURES = [kernel_distance, kernel_angle, kernel_alignment, centered_kernel_alignment, lambda a, b: kernel_velocity(a, b, 0.5)]


@pytest.mark.parametrize("measure", MEASURES)
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


def features(seed: int, n: int = 5, c: int = 2, p: int = 4) -> torch.Tensor:
    """Make gradients ``[n, c, p]`` that share a mean."""
    return torch.randn(n, c, p, generator=stream(seed, "features"), dtype=torch.float64) + 1


def kernel_of(j: torch.Tensor) -> torch.Tensor:
    return torch.einsum("iap,jbp->ijab", j, j)


def targets(n: int = 5, c: int = 2) -> torch.Tensor:
    return torch.randn(n, c, generator=stream(0, "targets"), dtype=torch.float64)


@pytest.mark.parametrize(("k1", "k2"), PAIRS)
def test_the_alignment_is_the_cosine(k1, k2):
    assert kernel_alignment(k1, k2) == pytest.approx(cosine_by_loops(k1, k2), rel=1e-13)  # reordered sum
    assert kernel_alignment(k1, k2) == pytest.approx(1 - kernel_distance(k1, k2), rel=1e-13)
    assert kernel_alignment(k1, -3 * k1) == pytest.approx(-1, rel=1e-15)
    assert kernel_alignment(k1, 3 * k1) <= 1


@pytest.mark.parametrize("dt", [1e-6, 1e-3, 2.0])
def test_the_velocity_is_that_on_the_unit_sphere_whatever_the_time_step(dt):
    speed = 0.4
    (start, end), (_, middle) = at_angle(speed * dt), at_angle(speed * dt / 2)
    assert kernel_velocity(start, end, dt) == pytest.approx(speed, rel=1e-8)  # rounding 1e-16 / angle
    assert kernel_velocity(start, middle, dt / 2) == pytest.approx(speed, rel=1e-8)
    # the distance over time is not: it falls with the step
    assert kernel_distance(start, end) / dt == pytest.approx(speed**2 * dt / 2, rel=0.06)


@pytest.mark.parametrize("dt", [0.0, -1.0, math.inf, math.nan])
def test_a_time_step_that_is_not_positive_is_refused(dt):
    with pytest.raises(ValueError, match=f"dt must be positive and finite. Got {dt}"):
        kernel_velocity(*PAIRS[0], dt)


@pytest.mark.parametrize("shape", ["outputs", "flat"])
@pytest.mark.parametrize("seed", [0, 1])
def test_centred_alignment_is_the_cosine_of_centred_features(shape, seed):
    j1, j2 = features(seed), features(seed + 10)
    if shape == "flat":
        j1, j2 = j1[:, :1], j2[:, :1]
    k1, k2 = (kernel_of(j) if shape == "outputs" else kernel_of(j)[:, :, 0, 0] for j in (j1, j2))
    ours = centered_kernel_alignment(k1, k2)
    assert ours == pytest.approx(cosine_by_loops(centered_by_loops(k1), centered_by_loops(k2)), rel=1e-12)  # reordered sums
    centred = kernel_of(j1 - j1.mean(0)), kernel_of(j2 - j2.mean(0))
    assert ours == pytest.approx(cosine_by_loops(*centred), rel=1e-12)
    assert abs(ours - kernel_alignment(k1, k2)) > 0.05


def test_centred_alignment_does_not_see_a_mean_and_sums_over_outputs_as_it_centres():
    j1, j2 = features(0), features(1)
    ours = centered_kernel_alignment(kernel_of(j1), kernel_of(j2))
    shift = torch.randn(2, 4, generator=stream(0, "shift"), dtype=torch.float64)  # one vector per output
    assert centered_kernel_alignment(kernel_of(j1 + shift), kernel_of(j2 - 3 * shift)) == pytest.approx(ours, rel=1e-11)
    traces = [torch.einsum("ijaa->ij", kernel_of(j)) for j in (j1, j2)]
    of_centred = [torch.einsum("ijaa->ij", kernel_of(j - j.mean(0))) for j in (j1, j2)]
    assert centered_kernel_alignment(*traces) == pytest.approx(kernel_alignment(*of_centred), rel=1e-12)  # reordered sums
    assert centered_kernel_alignment(traces[0], 5 * traces[0]) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_constant_over_examples_have_no_centred_direction(dtype):
    j = features(0)[:1].expand(5, 2, 4)
    constant = kernel_of(j).to(dtype)
    constant[0, 0] *= 1 + torch.finfo(dtype).eps  # rounding is no variation
    with pytest.raises(ValueError, match="must vary over examples for its centred direction to exist. Got a centred norm of"):
        centered_kernel_alignment(kernel_of(features(1)).to(dtype), constant)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 2, 2), (2, 2, 2, 3), (2, 2, 2)])
def test_what_is_no_kernel_of_one_set_is_not_centred(shape):
    with pytest.raises(ValueError, match=r"must be \[n, n\] or \[n, n, c, c\], of one set with itself. Got"):
        centered_kernel_alignment(torch.ones(shape), torch.ones(shape))


def test_target_alignment_is_the_cosine_with_the_outer_product_of_the_targets():
    kernel, y = kernel_of(features(0)), targets()
    ideal = torch.einsum("ia,jb->ijab", y, y)
    ours = kernel_target_alignment(kernel, y)
    assert ours == pytest.approx(cosine_by_loops(kernel, ideal), rel=1e-12)  # reordered sums
    assert kernel_target_alignment(flatten_kernel(kernel), y.reshape(-1)) == pytest.approx(ours, rel=1e-12)
    assert kernel_target_alignment(7 * ideal, -y) == pytest.approx(1, rel=1e-14)
    assert kernel_target_alignment(-ideal, y) == pytest.approx(-1, rel=1e-14)


def test_target_alignment_of_a_kernel_of_examples_takes_the_sum_over_outputs_of_the_targets():
    kernel, y = torch.einsum("ijaa->ij", kernel_of(features(0))), targets()
    assert kernel_target_alignment(kernel, y) == pytest.approx(cosine_by_loops(kernel, y @ y.T), rel=1e-12)  # reordered sums
    assert kernel_target_alignment(y @ y.T, y) == pytest.approx(1, rel=1e-14)


def test_target_alignment_is_the_mean_of_the_shares_weighted_by_eigenvalues():
    kernel, y = kernel_of(features(0)), targets()
    eigvals, eigvecs = top_eigenpairs(kernel, 10)
    shares = target_alignment(eigvecs, y)
    assert float(shares.sum()) == pytest.approx(1, rel=1e-13)  # a full basis
    assert kernel_target_alignment(kernel, y) == pytest.approx(float(eigvals @ shares / eigvals.norm()), rel=1e-12)
    torch.testing.assert_close(target_alignment(eigvecs[:, :3], -5 * y.reshape(-1)), shares[:3], rtol=1e-13, atol=0)


def test_a_share_is_the_squared_cosine_with_the_eigenvector():
    eigvecs, y = torch.eye(4, 2), torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert target_alignment(eigvecs, y).tolist() == pytest.approx([9 / 25, 0.0], rel=1e-6)  # single precision
    assert target_alignment(eigvecs, y).dtype == torch.float32


@pytest.mark.parametrize("shape", [(7, 7), (3, 3, 2, 2)])
def test_results_do_not_depend_on_the_blocks_that_kernels_are_read_in(shape, monkeypatch):
    n, c = shape[0], (shape[2] if len(shape) == 4 else 1)
    k1, k2 = (kernel_of(features(seed, n, c)) for seed in (0, 1))
    k1, k2 = (k.transpose(2, 3) if len(shape) == 4 else k[:, :, 0, 0] for k in (k1, k2))
    y = targets(n, c) if len(shape) == 4 else targets(n, 1)[:, 0]

    def results() -> list[float]:
        return [*(measure(k1, k2) for measure in MEASURES), kernel_target_alignment(k1, y)]

    whole = results()
    for block in (1, 2 * n * c * c):
        monkeypatch.setattr(similarity, "BLOCK", block)
        assert results() == pytest.approx(whole, rel=1e-13)  # reordered sums


def test_single_precision_kernels_are_compared_in_double_precision():
    k1 = kernel_of(features(0)).float()
    k2 = k1.clone()
    k2[0, 0, 0, 0] *= 1 + 2**-20
    expected = cosine_by_loops(k1, k2)
    assert kernel_alignment(k1, k2) == pytest.approx(expected, rel=1e-15)
    u, v = (k.double() / k.double().norm() for k in (k1, k2))
    assert kernel_distance(k1, k2) == pytest.approx(float((u - v).square().sum() / 2), rel=1e-8)  # rounding over a gap of 1e-7
    assert 0 < kernel_distance(k1, k2) < 1e-13


@pytest.mark.parametrize(
    ("kernel", "y"),
    [
        (torch.eye(6), torch.ones(5)),
        (torch.ones(3, 3, 2, 2), torch.ones(3, 3)),
        (torch.ones(3, 3, 2, 2), torch.ones(6)),
        (torch.ones(3, 2), torch.ones(3)),
        (torch.eye(1), torch.tensor(1.0)),
    ],
)
def test_targets_that_do_not_fit_the_kernel_are_refused(kernel, y):
    with pytest.raises(ValueError, match=r"must be \[n, n, c, c\] and \[n, c\], or \[n, n\] and \[n\] or \[n, c\]. Got"):
        kernel_target_alignment(kernel, y)


@pytest.mark.parametrize(("value", "got"), [(0.0, "0.0"), (math.nan, "nan"), (math.inf, "inf")])
def test_targets_without_a_direction_are_refused(value, got):
    y = torch.full((3,), value)
    for call in (lambda: kernel_target_alignment(torch.eye(3), y), lambda: target_alignment(torch.eye(3), y)):
        with pytest.raises(ValueError, match=f"Targets must be finite and not zero. Got a norm of {got}"):
            call()
    with pytest.raises(ValueError, match="A kernel must be finite and not zero"):
        kernel_target_alignment(torch.zeros(3, 3), torch.ones(3))


def test_vectors_that_are_no_eigenvectors_of_the_targets_size_are_refused():
    with pytest.raises(ValueError, match=r"as many numbers as an eigenvector, 4. Got shape \(3,\)"):
        inspect.unwrap(target_alignment)(torch.eye(4), torch.ones(3))
    with pytest.raises(ValueError, match="must hold unit vectors in columns. Got a column of length 2"):
        target_alignment(2 * torch.eye(4), torch.ones(4))
