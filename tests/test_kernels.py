"""Laws of the exact empirical NTK."""

import pytest
import torch
from reference import (
    assert_sample_mean,
    deep_linear_kernel,
    flatten_by_definition,
    ntk_by_definition,
    reduce_by_definition,
    trace_by_definition,
)
from torch import nn

from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, flatten_kernel, ntk_diagonal
from ntklib.kernels.empirical import METHODS
from ntklib.models import MLP, ResNet, calibrate_batch_norm, initialize
from ntklib.random import stream

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order
REDUCTIONS = [None, "trace", "diagonal"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "data"), dtype=torch.float64)


def mlp(widths=(4, 3), *, d: int = 5, c: int = 3, scheme: str = "standard", seed: int = 0, **options) -> nn.Module:
    return initialize(MLP(d, list(widths), c, **options), scheme, stream(seed, "init")).double()


def resnet() -> nn.Module:
    model = ResNet("resnet18", in_channels=2, num_classes=2, width=2)
    initialize(model, "he", stream(0, "init")).double()
    return calibrate_batch_norm(model, normal(12, 2, 8, 8, seed=2)).eval()


MODELS = {
    "relu": lambda: mlp(),
    "relu without bias": lambda: mlp(bias=False),
    "tanh": lambda: mlp(activation="tanh"),
    "tanh without bias": lambda: mlp(activation="tanh", bias=False),
    "resnet": resnet,
}


@pytest.fixture(params=MODELS)
def case(request):
    """Make a model with two sets of inputs of different size."""
    shape = (2, 8, 8) if request.param == "resnet" else (5,)
    return MODELS[request.param](), normal(4, *shape), normal(3, *shape, seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_the_kernel_holds_the_inner_products_of_gradients(case, method):
    model, x1, x2 = case
    for other in (None, x2):
        exact = ntk_by_definition(model, x1, x1 if other is None else other)
        atol = 1e-12 * float(exact.abs().max())
        for reduce in REDUCTIONS:
            kernel = empirical_ntk(model, x1, other, reduce=reduce, method=method)
            torch.testing.assert_close(kernel, reduce_by_definition(exact, reduce), rtol=1e-12, atol=atol)


def test_the_diagonal_holds_the_blocks_of_one_example(case):
    model, x, _ = case
    exact = ntk_by_definition(model, x, x)
    blocks = torch.stack([exact[i, i] for i in range(len(x))])
    for chunk_size in (None, 1, 3):
        diagonal = ntk_diagonal(model, x, chunk_size=chunk_size)
        torch.testing.assert_close(diagonal, blocks, rtol=1e-12, atol=1e-12 * float(blocks.abs().max()))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_the_chunk_size_does_not_matter(chunk_size, reduce):
    model, x1, x2 = mlp(), normal(5, 5), normal(4, 5, seed=1)
    for other in (None, x2):
        whole = empirical_ntk(model, x1, other, reduce=reduce)
        torch.testing.assert_close(empirical_ntk(model, x1, other, reduce=reduce, chunk_size=chunk_size), whole, **ROUNDING)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_the_kernel_of_one_set_is_symmetric_to_the_last_bit_and_positive_semidefinite(case, chunk_size):
    model, x, _ = case
    kernel = empirical_ntk(model, x, chunk_size=chunk_size)
    assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
    eigvals = torch.linalg.eigvalsh(flatten_by_definition(kernel))
    assert eigvals.min() > -1e-12 * eigvals.max()  # rounding of the largest
    for reduce in ("trace", "diagonal"):
        reduced = empirical_ntk(model, x, reduce=reduce, chunk_size=chunk_size)
        assert torch.equal(reduced, reduced.transpose(0, 1))


def test_eigenvalues_sum_to_the_trace(case):
    model, x, _ = case
    total = float(torch.linalg.eigvalsh(flatten_kernel(empirical_ntk(model, x))).sum())
    assert total == pytest.approx(trace_by_definition(ntk_by_definition(model, x, x)), rel=1e-12)
    assert total == pytest.approx(ntk_trace(model, x, normalize=False).mean, rel=1e-12)


def test_the_flat_kernel_is_example_major():
    kernel = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    assert torch.equal(flatten_kernel(kernel).double(), flatten_by_definition(kernel.double()))


def test_parameters_add_up_and_frozen_ones_do_not_count():
    model, x = mlp(), normal(4, 5)
    names = [name for name, _ in model.named_parameters()]
    parts = []
    for free in (names[:3], names[3:]):
        for name, w in model.named_parameters():
            w.requires_grad_(name in free)
        parts.append(empirical_ntk(model, x))
        torch.testing.assert_close(parts[-1], ntk_by_definition(model, x, x), **ROUNDING)
    torch.testing.assert_close(parts[0] + parts[1], empirical_ntk(model.requires_grad_(True), x), **ROUNDING)


def test_a_tied_weight_counts_once():
    shared = nn.Linear(1, 1, bias=False).double()
    x, w = normal(3, 1), float(shared.weight.detach())
    kernel = empirical_ntk(nn.Sequential(shared, shared), x)  # f = w^2 x, df/dw = 2 w x
    torch.testing.assert_close(kernel[:, :, 0, 0], 4 * w**2 * x @ x.T, **ROUNDING)


@pytest.mark.parametrize(
    "measure",
    [
        empirical_ntk,
        lambda model, x: empirical_ntk(model, x[:1], x, reduce="trace"),
        ntk_diagonal,
        ntk_trace,
        lambda model, x: ntk_trace(model, x, method="jvp"),
        lambda model, x: ntk_trace(model, x, method="output"),
        lambda model, x: ntk_trace(model, x, method="perturbation", epsilon=0.1),
    ],
)
def test_measuring_leaves_the_model_as_it_was(measure):
    def content(model: nn.Module) -> tuple[list[bool], dict[str, torch.Tensor]]:
        tensors = {**model.state_dict(), **{f"grad of {name}": w.grad for name, w in model.named_parameters()}}
        return [m.training for m in model.modules()], {name: v.clone() for name, v in tensors.items()}

    model, x = resnet(), normal(2, 2, 8, 8)
    model(x).sum().backward()
    model.stem[2].train()  # a module whose mode does not matter
    modes, tensors = content(model)
    measure(model, x)
    modes_after, tensors_after = content(model)
    assert modes_after == modes
    assert [name for name, v in tensors.items() if not torch.equal(v, tensors_after[name])] == []
    assert all(w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_kernel_of_a_homogeneous_network_scales_with_the_weights(hidden, scale):
    model, x = mlp([6] * hidden, bias=False), normal(4, 5)
    kernel = empirical_ntk(model, x)
    with torch.no_grad():
        for w in model.parameters():
            w *= scale
    torch.testing.assert_close(empirical_ntk(model, x), scale ** (2 * hidden) * kernel, **ROUNDING)


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_of_a_linear_model_is_the_gram_matrix_of_its_inputs(bias):
    x, c = normal(4, 5), 3
    kernel = empirical_ntk(mlp([], c=c, bias=bias), x)
    gram = x @ x.T + (1.0 if bias else 0.0)
    torch.testing.assert_close(flatten_kernel(kernel), torch.kron(gram, torch.eye(c, dtype=x.dtype)), **ROUNDING)


def test_the_kernel_of_a_two_layer_linear_network_has_the_closed_form():
    model, x = mlp([4], activation="identity", bias=False), normal(6, 5)
    b, a = (w.detach() for w in model.parameters())
    expected = torch.kron(x @ b.T @ b @ x.T, torch.eye(3, dtype=x.dtype)) + torch.kron(x @ x.T, a @ a.T)
    torch.testing.assert_close(flatten_kernel(empirical_ntk(model, x)), expected, **ROUNDING)


@pytest.mark.parametrize("widths", [(4, 6), (3, 5, 4)])
def test_the_kernel_of_a_deep_linear_network_is_a_sum_over_layers(widths):
    model, x = mlp(widths, activation="identity", bias=False), normal(4, 5)
    expected = deep_linear_kernel(x, [w.detach() for w in model.parameters()])
    torch.testing.assert_close(empirical_ntk(model, x), expected, **ROUNDING)


@pytest.mark.parametrize(("widths", "bias", "seeds"), [((120, 160), False, 420), ((240,), True, 150)])
def test_the_expected_kernel_of_he_initialized_relu_networks_is_exact_at_finite_width(widths, bias, seeds):
    # E K(x, x) = |x|^2 (1 + sum of widths / d), plus 1 per layer with biases; the mean over an orthonormal basis is less noisy
    d = 16
    x = torch.eye(d, dtype=torch.float64)
    nets = (mlp(widths, d=d, c=1, scheme="he", bias=bias, seed=seed) for seed in range(seeds))
    samples = torch.stack([ntk_diagonal(net, x).mean() for net in nets])
    assert_sample_mean(samples, 1 + sum(widths) / d + (len(widths) + 1 if bias else 0))


def test_float32_networks_give_float32_kernels_near_the_float64_ones():
    model, x = mlp(), normal(4, 5)
    kernel = empirical_ntk(model, x)
    single = empirical_ntk(model.float(), x.float())
    torch.testing.assert_close(single, kernel.float(), rtol=1e-4, atol=1e-5)  # sums of some 50 terms of size 1 at 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "jacobien"}, "Unknown method 'jacobien'. Did you mean 'jacobian'"),
        ({"reduce": "trase"}, "Unknown reduction 'trase'. Did you mean 'trace'"),
        ({"x2": normal(3, 6)}, r"share the input shape. Got \(4, 5\) and \(3, 6\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1. Got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        empirical_ntk(mlp(), normal(4, 5), **options)


@pytest.mark.parametrize("measure", [empirical_ntk, ntk_diagonal, ntk_trace])
def test_batch_normalisation_in_training_mode_is_refused(measure):
    with pytest.raises(ValueError, match="must be in eval mode"):
        measure(resnet().train(), normal(2, 2, 8, 8))
