"""Laws of the Hessian of a loss and of its largest eigenvalues."""

import pytest
import torch
from reference import flatten_by_definition, ntk_by_definition
from reference_spectra import hessian_by_definition, hessian_product_by_definition
from torch import nn
from torch.nn import functional

from ntklib import spectra
from ntklib.curvature import hessian_operator, sharpness
from ntklib.models import MLP, ResNet, calibrate_batch_norm, initialize
from ntklib.random import stream

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order
EIGENVALUES = {"rel": 1e-9}  # residual 3.7e-11 of the largest, over eigenvalues of its size


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "data"), dtype=torch.float64)


def labels(n: int, c: int) -> torch.Tensor:
    return torch.randint(c, (n,), generator=stream(0, "labels"))


def mlp(widths=(4,), *, d: int = 5, c: int = 3, activation: str = "tanh", **options) -> nn.Module:
    return initialize(MLP(d, list(widths), c, activation=activation, **options), "standard", stream(0, "init")).double()


def half_mean_square(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (outputs - y).square().sum() / (2 * len(y))


def half_square(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (outputs - y).square().sum() / 2


LOSSES = {
    "half mean square": (half_mean_square, lambda: normal(6, 3, seed=1)),
    "cross entropy": (functional.cross_entropy, lambda: labels(6, 3)),
    "cross entropy module": (nn.CrossEntropyLoss(reduction="sum"), lambda: labels(6, 3)),
}


def dense(operator) -> torch.Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


@pytest.fixture(params=LOSSES)
def case(request):
    """Make a network, a loss, data, and the Hessian by definition."""
    loss_fn, make_y = LOSSES[request.param]
    model, x, y = mlp(), normal(6, 5), make_y()
    return model, loss_fn, (x, y), hessian_by_definition(model, lambda: loss_fn(model(x), y))


def test_the_operator_is_the_matrix_of_second_derivatives(case):
    model, loss_fn, data, hessian = case
    operator = hessian_operator(model, loss_fn, data)
    assert (tuple(operator.shape), operator.dtype) == (tuple(hessian.shape), torch.float64)
    torch.testing.assert_close(dense(operator), hessian, **ROUNDING)
    v = normal(len(hessian), seed=2)
    torch.testing.assert_close(operator @ v, hessian @ v, **ROUNDING)


@pytest.mark.parametrize("lanczos", [False, True])
def test_sharpness_is_the_largest_eigenvalue_of_the_hessian(case, lanczos, monkeypatch):
    model, loss_fn, data, hessian = case
    if lanczos:
        monkeypatch.setattr(spectra, "DENSE_OPERATOR", 0)
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    for k in (1, 4):
        eigvals = sharpness(model, loss_fn, data, k)
        assert eigvals.shape == (k,)
        assert eigvals.tolist() == pytest.approx(exact[:k].tolist(), **EIGENVALUES)
    assert torch.equal(sharpness(model, loss_fn, data, 4), eigvals)  # reproducible


def test_a_residual_network_with_batch_norm_in_eval_mode_has_a_hessian():
    model = initialize(ResNet("resnet18", in_channels=1, num_classes=2, width=1), "he", stream(0, "init")).double()
    calibrate_batch_norm(model, normal(12, 1, 8, 8, seed=2)).eval()
    x, y = normal(3, 1, 8, 8), labels(3, 2)
    v = normal(sum(w.numel() for w in model.parameters()), seed=3)
    expected = hessian_product_by_definition(model, lambda: functional.cross_entropy(model(x), y), v)
    product = hessian_operator(model, functional.cross_entropy, (x, y)) @ v
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))  # long sums


def test_batches_combine_by_mean_or_sum():
    model, x, y = mlp(), normal(7, 5), normal(7, 3, seed=1)
    batches = [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])]
    modules = [(nn.MSELoss(), None), (nn.MSELoss(reduction="sum"), None)]
    for loss_fn, reduction in [(half_mean_square, "mean"), (half_square, "sum"), *modules]:
        whole = dense(hessian_operator(model, loss_fn, (x, y)))
        for data in (batches, iter(batches), [[x[:4], y[:4]], *batches[1:]]):
            torch.testing.assert_close(dense(hessian_operator(model, loss_fn, data, reduction=reduction)), whole, **ROUNDING)
    wrong = dense(hessian_operator(model, half_mean_square, batches, reduction="sum"))
    assert (wrong - dense(hessian_operator(model, half_mean_square, (x, y)))).abs().max() > 0.1


def test_the_scale_is_that_of_the_loss_as_given():
    model, data = mlp(), (normal(6, 5), normal(6, 3, seed=1))
    mean = sharpness(model, half_mean_square, data, 2)
    torch.testing.assert_close(sharpness(model, half_square, data, 2), 6 * mean, rtol=1e-9, atol=0)
    mean_of_outputs = 2 / 3 * mean  # nn.MSELoss averages over n c, without 1/2
    torch.testing.assert_close(sharpness(model, nn.MSELoss(), data, 2), mean_of_outputs, rtol=1e-9, atol=0)


def test_the_sharpness_of_linear_regression_is_that_of_its_kernel_over_n():
    model, x, y = mlp([], bias=True), normal(8, 5), normal(8, 3, seed=1)
    kernel = flatten_by_definition(ntk_by_definition(model, x, x))
    exact = torch.linalg.eigvalsh(kernel).flip(0) / 8
    assert sharpness(model, half_mean_square, (x, y), 4).tolist() == pytest.approx(exact[:4].tolist(), **EIGENVALUES)


@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_gradient_descent_is_stable_up_to_two_over_the_sharpness(factor, stable):
    model, x, y = mlp([], c=1), normal(8, 5), normal(8, 1, seed=1)
    lr = factor * 2 / float(sharpness(model, half_mean_square, (x, y))[0])
    losses = []
    for _ in range(2000):
        loss = half_mean_square(model(x), y)
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for w, g in zip(model.parameters(), grads, strict=True):
                w -= lr * g
    assert (losses[-1] < losses[0]) == stable  # off by 1 %, modes grow by 1.01^2000 = 4e8 or vanish


def test_at_a_saddle_the_positive_eigenvalues_come_first():
    # f = w2 w1 x at w = 0: the Hessian of (f - 1)^2 / 2 in (w1, w2) is [[0, -x], [-x, 0]]
    model = mlp([1], d=1, c=1, activation="identity", bias=False)
    with torch.no_grad():
        for w in model.parameters():
            w.zero_()
    one = torch.ones(1, 1, dtype=torch.float64)
    assert sharpness(model, half_square, (3 * one, one), 2).tolist() == pytest.approx([3, -3], rel=1e-12)


def test_the_hessian_of_some_parameters_is_a_block(case):
    model, loss_fn, data, hessian = case
    names = [name for name, _ in model.named_parameters()]
    sizes = [w.numel() for w in model.parameters()]
    block = hessian[: sum(sizes[:2]), : sum(sizes[:2])]
    torch.testing.assert_close(dense(hessian_operator(model, loss_fn, data, params=names[:2])), block, **ROUNDING)
    for w in list(model.parameters())[2:]:
        w.requires_grad_(False)
    torch.testing.assert_close(dense(hessian_operator(model, loss_fn, data)), block, **ROUNDING)


def test_later_training_does_not_move_the_operator():
    model, data = mlp(), (normal(6, 5), normal(6, 3, seed=1))
    operator = hessian_operator(model, half_square, data)
    before = dense(operator)
    with torch.no_grad():
        for w in model.parameters():
            w += 1
    assert torch.equal(dense(operator), before)


def test_measuring_leaves_model_gradients_and_random_numbers_as_they_were():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).double()
    x, y = normal(6, 5), labels(6, 3)
    functional.cross_entropy(model(x), y).backward()
    model.eval()[0].train()  # a module whose mode does not matter
    model[3].bias.requires_grad_(False)
    tensors = {**model.state_dict(), **{f"grad of {name}": w.grad for name, w in model.named_parameters()}}
    before = {name: value.clone() for name, value in tensors.items()}
    flags = [[m.training for m in model.modules()], [w.requires_grad for w in model.parameters()]]
    state = torch.get_rng_state()
    with torch.no_grad():  # as inside an evaluation
        sharpness(model, functional.cross_entropy, (x, y))
    assert [name for name, value in before.items() if not torch.equal(value, tensors[name])] == []
    assert [[m.training for m in model.modules()], [w.requires_grad for w in model.parameters()]] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_networks_have_a_sharpness_near_that_in_float64():
    data = normal(6, 5), normal(6, 3, seed=1)
    exact = sharpness(mlp([40]), half_mean_square, data, 2)
    single = sharpness(mlp([40]).float(), half_mean_square, tuple(part.float() for part in data), 2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=0)  # sums of some hundred terms at 1e-7


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.MSELoss(reduction="none"), r"must return a scalar tensor. Got shape \(6, 3\). Take the mean or the sum"),
        (lambda outputs, _: float(outputs.detach().sum()), "must return a scalar tensor. Got float"),
        (lambda outputs, y: (outputs.argmax(1) == y.argmax(1)).double().mean(), "must be differentiable in the outputs"),
        (lambda outputs, _: outputs.sum() / 0, "must be finite for its curvature to exist. Got .*(inf|nan)"),
    ],
)
def test_losses_without_a_hessian_are_refused(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        sharpness(mlp(), loss_fn, (normal(6, 5), normal(6, 3, seed=1)))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((normal(6, 5), normal(5, 3)), {}, "same number of examples, at least one. Got 6 and 5"),
        ((normal(0, 5), normal(0, 3)), {}, "at least one. Got 0 and 0"),
        ([], {}, "at least one batch. Got none"),
        ([normal(6, 5)], {}, r"a pair of tensors \(x, y\) or batches .*Got Tensor for a batch"),
        ([(normal(6, 5), normal(6, 3))] * 2, {}, "2 batches need reduction='mean' or 'sum'.*Got none"),
        ([(normal(6, 5), normal(6, 3))], {"reduction": "means"}, "Unknown reduction 'means'. Did you mean 'mean'"),
        ((normal(6, 5), normal(6, 3)), {"k": 100}, "k must be from 1 to m = 39.*Got 100"),
    ],
)
def test_data_and_options_that_do_not_fit_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        sharpness(mlp(), half_mean_square, data, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp().requires_grad_(False), "at least one trainable parameter"),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double(), "must be in eval mode"),
    ],
)
def test_models_without_a_function_of_their_parameters_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        sharpness(model, half_mean_square, (normal(6, 5), normal(6, 3)))
