"""Laws of random features of the kernel, and of the estimates made from them."""

import copy
import math
from functools import partial

import pytest
import torch
from reference import assert_mean, assert_sample_mean, flatten_by_definition, gradients_by_definition, ntk_by_definition
from reference_spectra import (
    distance_by_definition,
    frobenius_inner_product,
    jackknife_by_loops,
    shared_pair_mean,
    u_statistic_by_loops,
    u_statistic_variance,
)
from torch import nn

from ntklib import operator as operators
from ntklib import sketch as sketches
from ntklib.models import MLP, ResNet, calibrate_batch_norm, initialize
from ntklib.random import stream
from ntklib.sketch import ntk_sketch, sketched_frobenius_norm, sketched_inner_product, sketched_kernel_distance

ROUNDING = {"rtol": 1e-11, "atol": 1e-11}  # sums of up to a few hundred float64 terms in another order


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "data"), dtype=torch.float64)


def mlp(widths=(6,), *, d: int = 5, c: int = 3, activation: str = "tanh", **options) -> nn.Module:
    return initialize(MLP(d, list(widths), c, activation=activation, **options), "standard", stream(0, "init")).double()


def moved(model: nn.Module, distance: float) -> nn.Module:
    """Return a checkpoint at some distance from the model."""
    model, generator = copy.deepcopy(model), stream(0, "move")
    with torch.no_grad():
        for w in model.parameters():
            w += distance * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    return model


class Constant(nn.Module):
    """f(x) = w, whose Jacobian is the identity."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(p, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(len(x), -1)


def draws(p: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    """Return the draws ``[p, q]`` themselves."""
    return ntk_sketch(Constant(p), torch.zeros(1, 1), num_samples=num_samples, seed=seed)


class Pair:
    """Two checkpoints on the same examples: Jacobians and kernels by definition, and sketches from fresh draws."""

    def __init__(self, distance: float) -> None:
        x = normal(8, 5)
        models = mlp(), moved(mlp(), distance)
        self.j1, self.j2 = (gradients_by_definition(m, x).flatten(0, 1) for m in models)
        self.k1, self.k2 = (flatten_by_definition(ntk_by_definition(m, x, x)) for m in models)

    def sketch(self, q: int, generator: torch.Generator, shared: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        draw = partial(torch.randn, self.j1.shape[1], q, generator=generator, dtype=torch.float64)
        z = draw()
        return self.j1 @ z, self.j2 @ (z if shared else draw())


@pytest.fixture(scope="module")
def far():
    return Pair(1.0)


def resnet() -> nn.Module:
    model = ResNet("resnet18", in_channels=2, num_classes=2, width=2)
    initialize(model, "he", stream(0, "init")).double()
    return calibrate_batch_norm(model, normal(12, 2, 8, 8, seed=2)).eval()


@pytest.mark.parametrize(("model", "x"), [(mlp([4, 3]), normal(4, 5)), (resnet(), normal(2, 2, 8, 8))])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_features_are_the_jacobian_times_the_draws(model, x, chunk_size):
    jacobian = gradients_by_definition(model, x).flatten(0, 1)
    phi = ntk_sketch(model, x, num_samples=7, seed=3, chunk_size=chunk_size)
    expected = jacobian @ draws(jacobian.shape[1], 7, seed=3)
    torch.testing.assert_close(phi, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))


def test_draws_are_standard_normal_and_independent():
    z = draws(400, 500)
    bound = 4 / math.sqrt(z.numel())  # four standard errors
    assert abs(float(z.mean())) < bound
    assert abs(float(z.square().mean()) - 1) < bound * math.sqrt(2)
    assert abs(float((z**4).mean()) - 3) < bound * math.sqrt(96)  # E z^8 - (E z^4)^2 = 105 - 9
    overlaps = (z.T @ z / 400).triu(1)
    assert abs(float(overlaps.sum())) < 4 * math.sqrt(500 * 499 / 2 / 400)
    assert abs(float((z * draws(400, 500, seed=1)).mean())) < bound  # of another seed


def test_a_draw_depends_on_seed_and_place_only(monkeypatch):
    model, x = mlp(), normal(6, 5)
    state = torch.get_rng_state()
    phi = ntk_sketch(model, x, num_samples=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(ntk_sketch(model, x, num_samples=9, seed=1), phi[:, :9], **ROUNDING)
    assert (ntk_sketch(model, x, num_samples=9, seed=2) - phi[:, :9]).abs().max() > 1
    monkeypatch.setattr(operators, "MAX_COLUMNS", 3)
    torch.testing.assert_close(ntk_sketch(model, x, num_samples=20, seed=1), phi, **ROUNDING)
    monkeypatch.setattr(operators, "PARAMETERS", 1)
    torch.testing.assert_close(ntk_sketch(model, x, num_samples=20, seed=1), phi, **ROUNDING)


def test_features_of_some_parameters_and_of_inner_outputs_are_those_of_their_jacobians():
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(4, 5)
    jacobian = gradients_by_definition(net, x).flatten(0, 1)
    torch.testing.assert_close(
        ntk_sketch(net, x, num_samples=5, params=["2.weight", "2.bias"]), jacobian[:, 24:] @ draws(10, 5), **ROUNDING
    )
    inner = gradients_by_definition(net[:2], x).flatten(0, 1)
    torch.testing.assert_close(ntk_sketch(net, x, num_samples=5, output="1", params=["0.weight", "0.bias"]), inner @ draws(24, 5))


def test_sketching_leaves_the_model_as_it_was():
    model, x = resnet(), normal(2, 2, 8, 8)
    model(x).sum().backward()
    tensors = {**model.state_dict(), **{f"grad of {name}": w.grad for name, w in model.named_parameters()}}
    before = {name: value.clone() for name, value in tensors.items()}
    phi = ntk_sketch(model, x, num_samples=2)
    assert not phi.requires_grad
    assert [name for name, value in before.items() if not torch.equal(value, tensors[name])] == []


def test_the_mean_of_outer_products_of_features_is_the_kernel():
    model, x = mlp(c=2), normal(3, 5)
    kernel = flatten_by_definition(ntk_by_definition(model, x, x))
    phi = ntk_sketch(model, x, num_samples=20_000)
    for i, j in ((0, 0), (5, 5), (0, 1), (2, 4)):
        samples = phi[i] * phi[j]  # variance K_ii K_jj + K_ij^2
        sem = float(samples.std()) / math.sqrt(20_000)
        assert abs(float(samples.mean() - kernel[i, j])) < 4 * sem
        assert sem < 0.012 * float(torch.sqrt(kernel[i, i] * kernel[j, j]))


@pytest.mark.parametrize("shared", [True, False])
def test_the_inner_product_is_unbiased(far, shared):
    generator = stream(int(shared), "z")
    pairs = [far.sketch(60, generator, shared) for _ in range(3000)]
    for left, right, a, b in ((0, 1, far.k1, far.k2), (0, 0, far.k1, far.k1)):
        samples = torch.tensor([sketched_inner_product(pair[left], pair[right]).mean for pair in pairs])
        assert_sample_mean(samples, frobenius_inner_product(a, b))


@pytest.mark.parametrize("q", [4, 40])
def test_the_variance_is_that_of_a_u_statistic_of_order_two(far, q):
    generator, count = stream(q, "z"), 4000
    samples = torch.tensor([sketched_inner_product(phi, phi).mean for phi, _ in (far.sketch(q, generator) for _ in range(count))])
    ratio = float(samples.var()) / u_statistic_variance(far.k1, q)
    assert 0.8 < ratio < 1.2  # standard deviation of the ratio: 0.08 with the heavy tail of q = 4, 0.03 with q = 40


@pytest.mark.parametrize("name", ["inner product", "norm", "distance"])
def test_standard_errors_are_the_spread_of_the_estimates(far, name):
    estimate, truth = {
        "inner product": (sketched_inner_product, frobenius_inner_product(far.k1, far.k2)),
        "norm": (lambda phi, _: sketched_frobenius_norm(phi), math.sqrt(frobenius_inner_product(far.k1, far.k1))),
        "distance": (sketched_kernel_distance, distance_by_definition(far.k1, far.k2)),
    }[name]
    generator = stream(0, "z")
    results = [estimate(*far.sketch(150, generator)) for _ in range(600)]
    means = torch.tensor([r.mean for r in results])
    sems = torch.tensor([r.sem for r in results])
    assert 0.9 < float(sems.square().mean().sqrt() / means.std()) < 1.2  # conservative; deviation of the ratio: 0.03
    covered = sum(abs(r.mean - truth) < 2 * r.sem for r in results) / len(results)
    assert 0.91 < covered < 0.99  # 0.955 for a normal distribution, standard deviation 0.01
    assert {r.num_samples for r in results} == {150}
    assert_mean(float(means.mean()), float(means.std()) / math.sqrt(600), truth)


def test_the_bias_of_ratio_and_root_is_removed_to_the_next_order(far):
    q, generator, count = 16, stream(0, "z"), 6000
    norm, distance = math.sqrt(frobenius_inner_product(far.k1, far.k1)), distance_by_definition(far.k1, far.k2)
    plain, corrected = [], []
    for _ in range(count):
        phi, other = far.sketch(q, generator)
        u = [sketched_inner_product(*pair).mean for pair in ((phi, other), (phi, phi), (other, other))]
        plain.append([math.sqrt(u[1]) / norm - 1, 1 - u[0] / math.sqrt(u[1] * u[2]) - distance])
        corrected.append([sketched_frobenius_norm(phi).mean / norm - 1, sketched_kernel_distance(phi, other).mean - distance])
    bias, rest = torch.tensor(plain), torch.tensor(corrected)
    sem = rest.std(0) / math.sqrt(count)
    assert (bias.mean(0).abs() > 5 * sem).all()  # seen without the correction
    assert (rest.mean(0).abs() < 0.35 * bias.mean(0).abs() + 4 * sem).all()


def test_estimates_are_the_loops_they_are_defined_by(far):
    phi, other = far.sketch(9, stream(0, "z"))
    u12, u11, u22 = (partial(u_statistic_by_loops, *pair) for pair in ((phi, other), (phi, phi), (other, other)))
    cases = {
        sketched_inner_product(phi, other): u12,
        sketched_frobenius_norm(phi): lambda j: math.sqrt(u11(j)),
        sketched_kernel_distance(phi, other): lambda j: 1 - u12(j) / math.sqrt(u11(j) * u22(j)),
    }
    for result, statistic in cases.items():
        mean, sem = jackknife_by_loops(statistic, 9)
        assert (result.mean, result.sem) == pytest.approx((mean, sem), rel=1e-10)
        assert result.num_samples == 9
    assert sketched_inner_product(phi, other).mean == pytest.approx(u12(None), rel=1e-12)  # unbiased: nothing to correct


def test_pairs_of_the_same_draw_and_products_of_gram_matrices_estimate_something_else(far):
    # the two mistakes that the docstring warns of, with the means that it states
    truth = frobenius_inner_product(far.k1, far.k2)
    phi, other = far.sketch(40_000, stream(0, "z"))
    same = (phi * other).sum(0).square()
    expected = shared_pair_mean(far.j1, far.j2)
    assert_sample_mean_within(same, expected, 0.01)
    assert abs(expected - truth) > 0.25 * truth
    grams = (phi[:, ::2] * phi[:, 1::2]).sum(0) * (other[:, ::2] * other[:, 1::2]).sum(0)
    in_parameters = frobenius_inner_product(far.j1.T @ far.j1, far.j2.T @ far.j2)
    assert_sample_mean_within(grams, in_parameters, 0.05)
    assert abs(in_parameters - truth) > 0.25 * truth


def assert_sample_mean_within(samples: torch.Tensor, truth: float, relative: float) -> None:
    sem = float(samples.std()) / math.sqrt(len(samples))
    assert sem < relative * abs(truth)
    assert abs(float(samples.mean()) - truth) < 4 * sem


def test_equal_kernels_are_at_distance_zero_and_scale_does_not_count(far):
    phi, other = far.sketch(20, stream(0, "z"))
    for factor in (1.0, 1e-3, -7.0):
        result = sketched_kernel_distance(phi, factor * phi)
        assert (result.mean, result.sem) == pytest.approx((0, 0), abs=1e-13)  # rounding of 1 - 1
        scaled, plain = sketched_kernel_distance(factor * phi, other), sketched_kernel_distance(phi, other)
        assert (scaled.mean, scaled.sem) == pytest.approx((plain.mean, plain.sem), rel=1e-9)
        norm, scaled_norm = sketched_frobenius_norm(phi), sketched_frobenius_norm(factor * phi)
        assert (scaled_norm.mean, scaled_norm.sem) == pytest.approx((factor**2 * norm.mean, factor**2 * norm.sem), rel=1e-9)


def test_order_of_examples_and_of_draws_does_not_matter(far, monkeypatch):
    phi, other = far.sketch(20, stream(0, "z"))
    rows, columns = (torch.randperm(k, generator=stream(0, "order")) for k in phi.shape)
    plain = sketched_kernel_distance(phi, other)
    for cut in (2**15, 5):
        monkeypatch.setattr(sketches, "ROWS", cut)
        permuted = sketched_kernel_distance(phi[rows][:, columns], other[rows][:, columns])
        assert (permuted.mean, permuted.sem) == pytest.approx((plain.mean, plain.sem), rel=1e-10)


@pytest.mark.parametrize(("distance", "least"), [(0.1, 3), (0.01, 100), (0.001, 10_000)])
def test_common_draws_measure_small_distances(distance, least):
    # measured with 64 draws: the error falls 4, 300 and 30 000 times
    near, generator, q = Pair(distance), stream(0, "z"), 64
    truth = distance_by_definition(near.k1, near.k2)
    common = torch.tensor([sketched_kernel_distance(*near.sketch(q, generator)).mean for _ in range(200)])
    apart = torch.tensor([sketched_kernel_distance(*near.sketch(q, generator, shared=False)).mean for _ in range(200)])
    assert float((apart - truth).square().mean().sqrt()) > least * float((common - truth).square().mean().sqrt())
    assert abs(float(common.mean()) - truth) < 4 * float(common.std()) / math.sqrt(200)
    assert float(common.std()) < 0.4 * truth  # relative error 1/sqrt(q) times a constant, at every distance


def test_checkpoints_with_one_seed_share_their_draws():
    x, near = normal(8, 5), Pair(0.01)
    phi, other = (ntk_sketch(m, x, num_samples=400, seed=5) for m in (mlp(), moved(mlp(), 0.01)))
    truth, result = distance_by_definition(near.k1, near.k2), sketched_kernel_distance(phi, other)
    assert result.sem < 0.2 * truth
    assert abs(result.mean - truth) < 4 * result.sem
    foreign = sketched_kernel_distance(phi, ntk_sketch(moved(mlp(), 0.01), x, num_samples=400, seed=6))
    assert foreign.sem > 20 * result.sem


def test_the_root_of_the_inner_product_of_the_whole_pipeline_is_the_norm():
    model, x = mlp([20]), normal(10, 5)
    kernel = flatten_by_definition(ntk_by_definition(model, x, x))
    result = sketched_frobenius_norm(ntk_sketch(model, x, num_samples=1500, seed=2))
    truth = math.sqrt(frobenius_inner_product(kernel, kernel))
    assert result.sem < 0.02 * truth
    assert abs(result.mean - truth) < 4 * result.sem


def test_float32_features_give_float32_sketches_and_float64_estimates():
    model, x = mlp(), normal(6, 5)
    phi = ntk_sketch(model.float(), x.float(), num_samples=50)
    assert phi.dtype == torch.float32
    double, single = sketched_inner_product(phi.double(), phi.double()), sketched_inner_product(phi, phi)
    assert (single.mean, single.sem) == (double.mean, double.sem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1. Got 0"),
        ({"num_samples": 2, "chunk_size": 0}, "chunk_size must be at least 1. Got 0"),
        ({"num_samples": 2, "seed": -1}, "must be a non-negative integer. Got -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ntk_sketch(mlp(), normal(4, 5), **options)


def test_models_whose_rows_interact_are_refused():
    with pytest.raises(ValueError, match="must be in eval mode"):
        ntk_sketch(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)).double(), normal(4, 5), num_samples=2)


@pytest.mark.parametrize(
    ("phi2", "message"),
    [
        (normal(6, 5), r"must be \[n c, q\] of the same shape. Got \(6, 4\) and \(6, 5\)"),
        (normal(6, 4, 1), r"Got \(6, 4\) and \(6, 4, 1\)"),
        (torch.full((6, 4), math.nan), "must be finite. Got nan or infinity"),
    ],
)
@pytest.mark.parametrize("estimate", [sketched_inner_product, sketched_kernel_distance])
def test_sketches_that_do_not_fit_are_refused(estimate, phi2, message):
    with pytest.raises(ValueError, match=message):
        estimate(normal(6, 4), phi2)


def test_too_few_draws_and_zero_kernels_are_refused():
    with pytest.raises(ValueError, match="at least 3 draws. Got num_samples = 2"):
        sketched_frobenius_norm(normal(6, 2))
    with pytest.raises(ValueError, match=r"must not be zero.*Got squared norms \S+ and 0"):
        sketched_kernel_distance(normal(6, 4), torch.zeros(6, 4))
