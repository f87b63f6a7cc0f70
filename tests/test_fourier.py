"""Fourier structure of tables and logits against closed forms and loops."""

import itertools
import math

import pytest
import torch

from ntklib.fourier import (
    cosine_power,
    excluded_logits,
    fourier_basis,
    fourier_power,
    key_frequencies,
    logit_variance,
    progress_losses,
    restricted_logits,
    sum_waves,
)
from ntklib.random import stream

MODULI = [2, 3, 6, 7]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "fourier"), dtype=torch.float64)


def waves(p: int, k: int, function=math.cos) -> torch.Tensor:
    """The array function(2 pi k (a + b - c) / p)."""
    out = torch.zeros(p, p, p, dtype=torch.float64)
    for a, b, c in itertools.product(range(p), repeat=3):
        out[a, b, c] = function(2 * math.pi * k * (a + b - c) / p)
    return out


def coefficient(f: torch.Tensor, u: torch.Tensor) -> float:
    return float((f * u).sum() ** 2 / (u * u).sum())


@pytest.mark.parametrize("p", MODULI)
def test_the_basis_is_orthonormal_and_knows_its_frequencies(p):
    basis, frequencies = fourier_basis(p)
    torch.testing.assert_close(basis @ basis.T, torch.eye(p, dtype=torch.float64), rtol=0, atol=1e-14)
    for row, k in zip(basis, frequencies.tolist(), strict=True):  # the second difference of a wave is a multiple of it
        difference = row.roll(1) + row.roll(-1) - 2 * row
        torch.testing.assert_close(difference, (2 * math.cos(2 * math.pi * k / p) - 2) * row, rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", MODULI)
def test_power_sums_to_the_squared_norm_and_ignores_a_shift_of_the_residues(p):
    table = random(p, 4)
    power = fourier_power(table)
    assert len(power) == p // 2 + 1
    assert float(power.sum()) == pytest.approx(float(table.square().sum()), rel=1e-13)
    torch.testing.assert_close(fourier_power(table.roll(1, 0)), power, rtol=1e-12, atol=1e-13)
    assert float(power[0]) == pytest.approx(float(table.sum(0).square().sum()) / p, rel=1e-12)


def test_a_table_of_one_wave_has_power_at_its_frequency_alone():
    angle = 2 * math.pi * 2 * torch.arange(7, dtype=torch.float64) / 7
    power = fourier_power(torch.stack([3 * angle.cos() + angle.sin(), 2 * angle.sin()], 1))
    torch.testing.assert_close(power, torch.tensor([0, 0, 7 / 2 * (9 + 1 + 4), 0]).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [3, 5, 6])
def test_cosine_power_is_the_projection_on_each_wave(p):
    logits = random(p, p, p)
    expected = [coefficient(logits, waves(p, k)) for k in range(p // 2 + 1)]
    assert cosine_power(logits).tolist() == pytest.approx(expected, rel=1e-11)
    assert float(cosine_power(logits)[1:].sum()) <= logit_variance(logits)


def test_logits_of_one_cosine_are_explained_by_it_and_a_sine_by_none():
    p, k = 7, 3
    logits = 2.5 * waves(p, k) + 4.0  # a constant is invisible to softmax
    power = cosine_power(logits)
    assert float(power[k]) == pytest.approx(2.5**2 * p**3 / 2, rel=1e-12)
    assert float(power[1:].sum()) == pytest.approx(logit_variance(logits), rel=1e-12)
    assert key_frequencies(power) == [k]
    assert float(cosine_power(waves(p, k, math.sin)).max()) < 1e-20


@pytest.mark.parametrize("p", [5, 6])
def test_waves_in_the_sum_are_a_projection_on_functions_of_a_plus_b(p):
    logits = random(p, p, 3)
    for frequencies in ([1], [0, 2], list(range(p // 2 + 1))):
        expected = torch.zeros_like(logits)
        basis, of = fourier_basis(p)
        for row in basis[[k in frequencies for k in of.tolist()]]:
            u = torch.stack([row.roll(-a) for a in range(p)])  # u[a, b] = row[a + b]
            for c in range(3):
                expected[:, :, c] += (logits[:, :, c] * u).sum() / (u * u).sum() * u
        found = sum_waves(logits, frequencies)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(sum_waves(found, frequencies), found, rtol=1e-12, atol=1e-13)


def test_restricted_and_excluded_logits_part_the_logits():
    p, keys = 7, [1, 3]
    logits = random(p, p, p)
    mean = logits.mean((0, 1)).expand_as(logits)
    total = restricted_logits(logits, keys) + excluded_logits(logits, keys)
    torch.testing.assert_close(total, logits + mean, rtol=1e-12, atol=1e-13)
    pure = waves(p, 1) + 0.5 * waves(p, 3)
    torch.testing.assert_close(restricted_logits(pure, keys), pure, rtol=0, atol=1e-13)
    assert float(excluded_logits(pure, keys).abs().max()) < 1e-13
    table = random(p, p)  # a lookup of a alone is no wave in a + b, but for its mean
    lookup = table[:, None].expand(p, p, p)
    torch.testing.assert_close(restricted_logits(lookup, keys), table.mean(0).expand(p, p, p), rtol=0, atol=1e-13)


def test_progress_losses_tell_a_general_solution_from_a_table_of_the_training_pairs():
    p, keys = 7, [2]
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    train, test = pairs[::2], pairs[1::2]
    table = torch.zeros(p, p, p, dtype=torch.float64)
    table[train[:, 0], train[:, 1], train.sum(1) % p] = 40.0
    restricted, excluded = progress_losses(40 * waves(p, 2), keys, train, test)
    others = sum(math.exp(40 * (math.cos(2 * math.pi * 2 * d / p) - 1)) for d in range(1, p))
    assert restricted == pytest.approx(math.log1p(others), rel=1e-9)
    assert excluded == pytest.approx(math.log(p), rel=1e-9)  # nothing is left
    by_heart = progress_losses(table, keys, train, test)
    assert by_heart[0] > 1.0
    assert by_heart[1] < 1e-6


def test_key_frequencies_are_the_fewest_that_hold_the_share():
    power = torch.tensor([100.0, 1.0, 5.0, 0.0, 4.0])
    assert key_frequencies(power, 0.5) == [2]
    assert key_frequencies(power, 0.9) == [2, 4]
    assert key_frequencies(power, 0.91) == [2, 4, 1]
    assert key_frequencies(power, 1.0) == [2, 4, 1]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="p must be at least 2. Got 1"):
        fourier_basis(1)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]. Got 0"):
        key_frequencies(torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="power at a frequency other than 0"):
        key_frequencies(torch.tensor([1.0, 0.0]))
