"""Laws of top eigenpairs and of summaries of spectra."""

import math

import numpy as np
import pytest
import torch
from reference import flatten_by_definition, ntk_by_definition
from reference_spectra import orthogonal, spectral_summaries_by_loops, with_spectrum

from ntklib import spectra
from ntklib.models import MLP, initialize
from ntklib.operator import NTKOperator
from ntklib.random import stream
from ntklib.spectra import (
    condition_number,
    effective_dimension,
    effective_rank,
    participation_ratio,
    stable_rank,
    top_eigenpairs,
)

RESIDUAL = {"rtol": 0, "atol": 1e-10}  # eigenvalues of size 1 with residual 3.7e-11, the default tolerance in float64
SUMMARIES = {
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "effective_dimension": lambda spectrum: effective_dimension(spectrum, 0.3),
    "condition_number": condition_number,
}
SPECTRA = {
    "geometric": [0.7**i for i in range(30)],
    "repeated": [1.0] * 4 + [0.5] * 5 + [0.1] * 21,
    "low rank": [3.0, 2.0, 1.0] + [0.0] * 27,
    "indefinite": [1.0 - 0.07 * i for i in range(30)],
    "negative": [-0.1 * i for i in range(1, 31)],
    "one value": [-2.0] * 30,
}


class Products:
    """An operator that is no tensor: shape, dtype and products, counted."""

    def __init__(self, a: torch.Tensor) -> None:
        self.a, self.columns = a, 0

    @property
    def shape(self) -> torch.Size:
        return self.a.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        self.columns += v.numel() // len(v)
        return self.a @ v


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "matrix"), dtype=torch.float64)


@pytest.fixture
def iterative(monkeypatch):
    """Lanczos for every operator, however small."""
    monkeypatch.setattr(spectra, "DENSE_OPERATOR", 0)


@pytest.fixture(params=["dense", "lanczos on a matrix", "operator"])
def path(request, monkeypatch):
    """One of the three ways to eigenpairs, as a function of the matrix."""
    if request.param != "dense":
        monkeypatch.setattr(spectra, "DENSE", 0)
        monkeypatch.setattr(spectra, "DENSE_OPERATOR", 0)
    return Products if request.param == "operator" else lambda a: a


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3])
def test_top_eigenpairs_are_those_the_matrix_was_made_of(path, name, k):
    a, q = with_spectrum(SPECTRA[name], stream(0, "q"))
    eigvals, eigvecs = top_eigenpairs(path(a), k)
    exact = torch.tensor(sorted(SPECTRA[name], reverse=True)[:k], dtype=torch.float64)
    scale = max(map(abs, SPECTRA[name]))
    torch.testing.assert_close(eigvals / scale, exact / scale, **RESIDUAL)
    torch.testing.assert_close(eigvecs.T @ eigvecs, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)  # orthonormal
    torch.testing.assert_close(a @ eigvecs / scale, eigvecs * eigvals / scale, **RESIDUAL)
    if name in ("geometric", "indefinite"):
        overlap = (q[:, :k] * eigvecs).sum(0).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-12)  # square of residual / gap


def test_nothing_else_than_the_largest_eigenvalues_is_found_when_they_repeat(monkeypatch):
    # a Krylov space holds one vector of each eigenspace: Lanczos alone misses up to 9 of these 10 copies
    monkeypatch.setattr(spectra, "DENSE", 0)
    factor = random(60, 20)
    gram = factor @ factor.T
    exact = torch.linalg.eigvalsh(gram).flip(0).repeat_interleave(10)
    kernel = torch.kron(gram, torch.eye(10, dtype=torch.float64))
    for k in (2, 5, 12, 30):
        eigvals, eigvecs = top_eigenpairs(Products(kernel), k)
        torch.testing.assert_close(eigvals / exact[0], exact[:k] / exact[0], **RESIDUAL)
        assert torch.linalg.matrix_rank(eigvecs) == k


def test_all_eigenpairs_rebuild_the_matrix():
    a, _ = with_spectrum(SPECTRA["indefinite"], stream(0, "q"))
    for case in (a, Products(a)):
        eigvals, eigvecs = top_eigenpairs(case, 30)
        torch.testing.assert_close(eigvecs @ torch.diag(eigvals) @ eigvecs.T, a, rtol=0, atol=1e-13)  # rounding


def test_eigenvalues_follow_shift_scale_and_rotation(path):
    a, _ = with_spectrum(SPECTRA["geometric"], stream(0, "q"))
    eye, rotation = torch.eye(30, dtype=torch.float64), orthogonal(30, stream(1, "q"))
    eigvals, eigvecs = top_eigenpairs(path(a), 3)
    torch.testing.assert_close(top_eigenpairs(path(2 * a - 3 * eye), 3)[0], 2 * eigvals - 3, **RESIDUAL)
    turned, turned_vecs = top_eigenpairs(path(rotation @ a @ rotation.T / 2 + (rotation @ a @ rotation.T).T / 2), 3)
    torch.testing.assert_close(turned, eigvals, **RESIDUAL)
    overlap = (turned_vecs * (rotation @ eigvecs)).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-12)


def test_the_entry_of_largest_magnitude_is_positive(path):
    a, _ = with_spectrum(SPECTRA["geometric"], stream(0, "q"))
    eigvecs = top_eigenpairs(path(a), 5)[1]
    for v in eigvecs.T:
        assert max(v.tolist(), key=abs) > 0
    flip = torch.diag(torch.tensor([1.0, -1.0] * 15, dtype=torch.float64))
    for v, w in zip(eigvecs.T, top_eigenpairs(path(flip @ a @ flip), 5)[1].T, strict=True):
        assert max(w.tolist(), key=abs) > 0
        assert abs(float(w @ flip @ v)) == pytest.approx(1, rel=1e-12)


@pytest.mark.usefixtures("iterative")
def test_the_start_is_a_function_of_the_seed_alone():
    a, _ = with_spectrum([0.95**i for i in range(200)], stream(0, "q"))
    state = torch.get_rng_state()
    first = top_eigenpairs(Products(a), 3)
    np.random.default_rng().standard_normal(3)
    again, other = top_eigenpairs(Products(a), 3), top_eigenpairs(Products(a), 3, seed=1)
    assert all(torch.equal(u, v) for u, v in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    torch.testing.assert_close(first[0], other[0], **RESIDUAL)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("iterative")
def test_products_are_far_fewer_than_rows():
    a, _ = with_spectrum([0.8**i for i in range(400)], stream(0, "q"))
    operator = Products(a)
    top_eigenpairs(operator, 4)
    assert operator.columns < 150


def test_zero_and_single_matrices_have_eigenpairs(path):
    eigvals, eigvecs = top_eigenpairs(path(torch.zeros(20, 20)), 2)
    assert torch.equal(eigvals, torch.zeros(2))
    torch.testing.assert_close(eigvecs.T @ eigvecs, torch.eye(2))
    eigvals, eigvecs = top_eigenpairs(torch.tensor([[-3.0]]), 1)
    assert (eigvals.item(), eigvecs.item()) == (-3, 1)


@pytest.fixture(scope="module")
def kernel_case():
    """Make a network, inputs, and their kernel by definition."""
    model = initialize(MLP(5, [6], 3, activation="tanh"), "standard", stream(0, "init")).double()
    x = random(8, 5)
    return model, x, ntk_by_definition(model, x, x)


@pytest.mark.usefixtures("iterative")
def test_kernel_matrix_and_operator_have_the_same_eigenpairs(kernel_case):
    model, x, kernel = kernel_case
    flat = flatten_by_definition(kernel)
    exact = torch.from_numpy(np.linalg.eigvalsh(flat.numpy())[::-1].copy())
    for a in (kernel, flat, NTKOperator(model, x)):
        eigvals, eigvecs = top_eigenpairs(a, 4)
        torch.testing.assert_close(eigvals / exact[0], exact[:4] / exact[0], **RESIDUAL)
        torch.testing.assert_close(flat @ eigvecs / exact[0], eigvecs * eigvals / exact[0], **RESIDUAL)


@pytest.mark.usefixtures("iterative")
def test_float32_operators_give_float32_eigenpairs_beyond_the_rank_too():
    factor = random(300, 4).float()
    kernel = factor @ factor.T
    eigvals, eigvecs = top_eigenpairs(Products(kernel), 6)
    exact = torch.linalg.eigvalsh(factor.double().T @ factor.double()).flip(0)
    assert (eigvals.dtype, eigvecs.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(eigvals[:4].double() / exact[0], exact / exact[0], rtol=0, atol=1e-6)  # rounding of products
    assert eigvals[4:].abs().max() < 1e-5 * exact[0]


@pytest.mark.usefixtures("iterative")
def test_a_residual_or_a_number_of_restarts_that_is_not_enough_is_an_error():
    a, _ = with_spectrum([1 - 1e-6 * i for i in range(300)], stream(0, "q"))
    with pytest.raises(RuntimeError, match=r"at most tol \* 1, tol=1.0e-18. Got .*e-1\d. Use float64 or a larger tol"):
        top_eigenpairs(a, 3, tol=1e-18)
    with pytest.raises(RuntimeError, match=r"must converge to tol=3.7e-11 in 1 restarts. Got 0 of 3 pairs. Take a larger tol"):
        top_eigenpairs(Products(a), 3, max_restarts=1)


@pytest.mark.parametrize(
    ("a", "k", "error", "message"),
    [
        (torch.eye(3), 0, ValueError, "k must be from 1 to m = 3, the size of the matrix. Got 0"),
        (torch.eye(3), 4, ValueError, "k must be from 1 to m = 3.*Got 4"),
        (torch.ones(3, 4), 1, ValueError, r"must be \[m, m\], or a kernel \[n, n, c, c\] of one set. Got shape \(3, 4\)"),
        (torch.ones(2, 3, 2, 2), 1, ValueError, r"Got shape \(2, 3, 2, 2\)"),
        (torch.ones(0, 0), 1, ValueError, r"Got shape \(0, 0\)"),
        (Products(torch.ones(3, 4)), 1, ValueError, r"Got shape \(3, 4\)"),
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            1,
            ValueError,
            r"must be symmetric, to a relative 2.4e-05. Got an asymmetry of 2.5e-01",
        ),
        (torch.tensor([[1.0, math.nan], [math.nan, 4.0]]), 1, ValueError, "must be finite. Got nan or infinity"),
        (torch.full((2, 2), math.inf), 1, ValueError, "must be finite. Got nan or infinity"),
        (Products(random(200, 200)), 1, ValueError, "must be symmetric, to a relative 3.7e-11"),
        (Products(torch.full((200, 200), math.nan)), 1, ValueError, "must be finite"),
        (torch.eye(3, dtype=torch.int64), 1, TypeError, "must hold torch floating-point numbers. Got Tensor of torch.int64"),
        (np.eye(3), 1, TypeError, "must hold torch floating-point numbers. Got ndarray of float64"),
    ],
)
def test_what_has_no_top_eigenpairs_is_refused(a, k, error, message):
    with pytest.raises(error, match=message):
        top_eigenpairs(a, k)


@pytest.mark.parametrize("name", ["geometric", "repeated", "low rank"])
@pytest.mark.parametrize("quantity", SUMMARIES)
def test_summaries_of_eigenvalues_and_of_kernels_are_the_sums_they_are_defined_by(name, quantity):
    eigvals = SPECTRA[name]
    expected = spectral_summaries_by_loops(eigvals, ridge=0.3)[quantity]
    a, _ = with_spectrum(eigvals, stream(0, "q"))
    kernel = a.reshape(10, 3, 10, 3).transpose(1, 2)  # [n, n, c, c]
    shuffled = torch.tensor(eigvals, dtype=torch.float64)[torch.randperm(30, generator=stream(0, "order"))]
    tolerance = 1e-9 if quantity == "condition_number" else 1e-11  # eigenvalues to 1e-15 of the largest, which is 4e4 the smallest
    for spectrum in (shuffled, a, kernel):
        assert SUMMARIES[quantity](spectrum) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_ranks_are_ordered_and_do_not_see_the_scale(seed, scale):
    eigvals = random(20, seed=seed).exp() * scale
    ranks = [stable_rank(eigvals), participation_ratio(eigvals), effective_rank(eigvals)]
    assert 1 < ranks[0] < ranks[1] < ranks[2] < 20
    unscaled = eigvals / scale
    assert ranks == pytest.approx([stable_rank(unscaled), participation_ratio(unscaled), effective_rank(unscaled)], rel=1e-12)
    assert effective_dimension(eigvals, 0.3 * scale) == pytest.approx(effective_dimension(unscaled, 0.3), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_eigenvalues_are_counted(rank):
    eigvals = torch.tensor([2.5] * rank + [0.0] * (8 - rank))
    for count in (stable_rank, participation_ratio, effective_rank):
        assert count(eigvals) == pytest.approx(rank, rel=1e-12)
    assert effective_dimension(eigvals, 2.5) == pytest.approx(rank / 2, rel=1e-12)
    assert condition_number(eigvals) == (1 if rank == 8 else math.inf)


def test_the_stable_rank_is_that_of_the_jacobian():
    jacobian = random(6, 40)
    expected = float(jacobian.square().sum() / torch.linalg.matrix_norm(jacobian, 2) ** 2)
    assert stable_rank(jacobian @ jacobian.T) == pytest.approx(expected, rel=1e-12)


def test_the_effective_dimension_is_a_trace_and_falls_from_the_rank_to_zero():
    factor = random(12, 5)
    kernel = factor @ factor.T
    for ridge in (1e-3, 1.0, 50.0):
        inverse = torch.linalg.inv(kernel + ridge * torch.eye(12, dtype=torch.float64))
        assert effective_dimension(kernel, ridge) == pytest.approx(float((kernel @ inverse).trace()), rel=1e-10)
    values = [effective_dimension(kernel, 10.0**power) for power in range(-6, 9)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(5, abs=1e-5)
    assert values[-1] == pytest.approx(float(kernel.trace()) / 1e8, rel=1e-5)


def test_a_kernel_and_its_inverse_have_the_same_condition_number():
    a, _ = with_spectrum([10.0, 3.0, 1.0, 0.1], stream(0, "q"))
    assert condition_number(a) == pytest.approx(100, rel=1e-11)
    assert condition_number(torch.linalg.inv(a)) == pytest.approx(100, rel=1e-11)
    assert condition_number(torch.tensor([1.0, 1e-20], dtype=torch.float64)) == math.inf


def test_rounding_below_zero_is_taken_as_zero():
    factor = random(40, 3).float()
    assert participation_ratio(factor @ factor.T) == pytest.approx(participation_ratio(factor.T @ factor), rel=1e-5)
    assert effective_rank(torch.tensor([1.0, -1e-9, 1.0])) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("summary", SUMMARIES.values())
@pytest.mark.parametrize(
    ("spectrum", "error", "message"),
    [
        (torch.zeros(4), ValueError, "must be finite and not zero. Got 4 eigenvalues from 0 to 0"),
        (torch.zeros(0), ValueError, "must be finite and not zero. Got 0 eigenvalues"),
        (torch.tensor([1.0, math.nan]), ValueError, "must be finite and not zero"),
        (torch.tensor([1.0, -0.5]), ValueError, "must be positive semidefinite. Got eigenvalues from -0.5 to 1"),
        (-torch.eye(3), ValueError, "must be positive semidefinite. Got eigenvalues from -1 to -1"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, "must be symmetric"),
        (torch.ones(2, 3), ValueError, r"must be \[m, m\]"),
        (torch.arange(3), TypeError, "must hold torch floating-point numbers"),
    ],
)
def test_what_has_no_spectrum_of_a_kernel_is_refused(summary, spectrum, error, message):
    with pytest.raises(error, match=message):
        summary(spectrum)


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.inf])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    with pytest.raises(ValueError, match=f"ridge must be positive and finite. Got {ridge}"):
        effective_dimension(torch.ones(3), ridge)
