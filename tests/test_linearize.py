"""Laws of linearized networks."""

import copy
import io

import pytest
import torch
from reference import deep_linear_kernel, gradients_by_definition, one_hot_by_loops
from reference_dynamics import Attention, Shared, taylor_by_gradients
from small_networks import FLOAT64, C, D, N, linear, mlp, normal
from torch import nn

from ntklib.data.datasets import Dataset
from ntklib.kernels import empirical_ntk
from ntklib.linearized import constant_kernel_flow, continue_linearized, linearize
from ntklib.models import MLP, build, calibrate_batch_norm, initialize
from ntklib.random import stream
from ntklib.training import gradient_descent, sgd


def resnet() -> nn.Module:
    model = build("resnet18", input_shape=(2, 8, 8), num_classes=C, width=2).double()
    return calibrate_batch_norm(model, normal(16, 2, 8, 8, use="calibration")).eval()


def module(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Make a small network of each kind, and inputs."""
    generator = stream(0, name)
    match name:
        case "mlp":
            return mlp(), normal(N, D)
        case "resnet":
            return resnet(), normal(N, 2, 8, 8)
        case "attention":
            return Attention(generator).double().eval(), normal(N, 3, 4)
        case _:
            return Shared(generator).double().eval(), normal(N, 4)


MODULES = ["mlp", "resnet", "attention", "shared"]


@torch.no_grad()
def moved(lin: nn.Module, size: float, use: str = "move") -> nn.Module:
    """Copy a module with its trainable parameters moved at random."""
    lin = copy.deepcopy(lin)
    generator = stream(0, use)
    for w in lin.parameters():
        w += size * torch.randn(w.shape, generator=generator, **FLOAT64) if w.requires_grad else 0
    return lin


@pytest.mark.parametrize("name", MODULES)
def test_the_linearized_model_is_the_taylor_polynomial_of_the_model(name):
    model, x = module(name)
    lin = linearize(model)
    torch.testing.assert_close(lin(x), model(x), rtol=1e-12, atol=1e-12)  # attention in other operations
    away = moved(lin, 0.3)
    change = [w.detach() - v.detach() for w, v in zip(away.parameters(), lin.parameters(), strict=True) if w.requires_grad]
    torch.testing.assert_close(away(x), taylor_by_gradients(model, x, change), rtol=1e-11, atol=1e-11)  # reordered sums


@pytest.mark.parametrize("name", MODULES)
def test_the_linearized_model_is_affine_in_its_parameters(name):
    model, x = module(name)
    lin = linearize(model)
    a, b, c = (moved(lin, 0.3, use) for use in ("a", "b", "c"))
    with torch.no_grad():
        for w, u, v in zip(c.parameters(), a.parameters(), b.parameters(), strict=True):
            w.copy_(3 * u - 2 * v if w.requires_grad else w)
    torch.testing.assert_close(c(x), 3 * a(x) - 2 * b(x), rtol=1e-12, atol=1e-11)  # reordered sums of size 3


@pytest.mark.parametrize("name", MODULES)
def test_its_kernel_is_that_of_the_model_where_it_was_linearized_and_stays(name):
    model, x = module(name)
    lin, kernel = linearize(model), empirical_ntk(model, x)
    for each in (lin, moved(lin, 0.5)):
        torch.testing.assert_close(empirical_ntk(each, x), kernel, rtol=1e-11, atol=1e-11 * float(kernel.abs().max()))  # reordered
    assert (empirical_ntk(moved(model, 0.5), x) - kernel).norm() > 0.1 * kernel.norm()


def test_the_model_leaves_its_linearization_as_the_square_of_the_distance():
    model, x = module("mlp")
    lin = linearize(model)
    errors = [float((moved(lin, size)(x) - moved(model, size)(x)).detach().norm()) for size in (2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)  # the next order is the distance, 1e-3


def test_a_linear_model_is_its_own_linearization():
    model, x = linear(), normal(N, D)
    torch.testing.assert_close(moved(linearize(model), 0.5)(x), moved(model, 0.5)(x), rtol=1e-13, atol=1e-13)  # reordered


def test_a_deep_linear_network_has_the_kernel_of_the_closed_form_for_ever():
    model = initialize(MLP(D, [5, 4], C, activation="identity", bias=False), "standard", stream(0, "init")).double()
    x, weights = normal(N, D), [w.detach() for w in model.parameters()]
    away = moved(linearize(model), 0.5)
    torch.testing.assert_close(empirical_ntk(away, x), deep_linear_kernel(x, weights), rtol=1e-12, atol=1e-12)  # reordered


def test_gradients_of_a_linearized_model_are_the_jacobian_at_the_start_times_its_own_loss_gradient():
    model, x = module("resnet")
    lin = moved(linearize(model), 0.1)
    residual = lin(x) - normal(N, C, use="y")
    (residual.square().sum() / 2).backward()
    gradient = torch.cat([w.grad.reshape(-1) for w in lin.parameters()])
    expected = torch.einsum("iap,ia->p", gradients_by_definition(model, x), residual.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))  # reordered


def test_names_and_saved_tensors_are_those_of_the_model_and_the_point_of_expansion():
    model, x = module("resnet")
    lin = moved(linearize(model), 0.1)
    assert [name for name, _ in lin.named_parameters()] == [name for name, _ in model.named_parameters()]
    fresh = linearize(resnet())
    fresh.load_state_dict(lin.state_dict())
    assert torch.equal(fresh(x), lin(x))
    model.load_state_dict(lin.state_dict(), strict=False)
    assert torch.equal(model.head.weight, lin.head.weight)
    assert set(lin.state_dict()) - set(model.state_dict()) == {f"theta_0.{name}" for name, _ in model.named_parameters()}


def test_the_linearized_model_follows_conversions_and_copies():
    model, x = module("resnet")
    lin = moved(linearize(model.float()).double(), 0.1)
    assert lin(x).dtype == torch.float64
    torch.testing.assert_close(copy.deepcopy(lin).float()(x.float()).double(), lin(x), rtol=1e-3, atol=1e-4)  # single precision
    assert all(w.device.type == "meta" for w in copy.deepcopy(lin).to("meta").state_dict().values())
    torch.save(lin, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), lin(x))
    again = linearize(lin)
    assert again is not lin
    assert torch.equal(again(x), lin(x))


def test_frozen_parameters_stay_and_the_model_is_left_as_it_was():
    model, x = module("mlp")
    model.layers[1].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    lin = linearize(model)
    frozen = lin.layers.get_submodule("1").bias
    assert not frozen.requires_grad
    lin(x).sum().backward()
    frozen.requires_grad_(True)  # too late: f is not linear in it
    lin(x).sum().backward()
    assert frozen.grad is None
    frozen.requires_grad_(False)
    torch.testing.assert_close(empirical_ntk(lin, x), empirical_ntk(model, x), rtol=1e-12, atol=1e-12)  # reordered
    moved(lin, 1.0)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())


def test_batch_statistics_are_refused_and_training_mode_changes_nothing():
    model, x = module("resnet")
    lin = linearize(model)
    expected = lin(x)
    lin.train()
    assert torch.equal(calibrate_batch_norm(lin, 3 * x)(x), expected)
    with pytest.raises(ValueError, match="must be in eval mode, so that the rows of a batch do not interact"):
        linearize(model.train())


def test_a_model_with_a_part_of_the_reserved_name_is_refused():
    model = nn.Module()
    model.theta_0 = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must have no part named 'theta_0'"):
        linearize(model)


def test_descent_on_a_linearized_network_is_the_discrete_flow_of_its_kernel():
    model, x, labels, lr, steps = mlp(), normal(N, D), torch.tensor([0, 2, 1, 2]), 0.3, 60
    x_test = normal(5, D, use="test")
    kernel, cross = empirical_ntk(model, x), empirical_ntk(model, x_test, x)
    f_0, f_test_0, y = model(x).detach(), model(x_test).detach(), one_hot_by_loops(labels, C)
    states = [
        (state.model(x).detach(), state.model(x_test).detach())
        for state in gradient_descent(linearize(model), x, labels, lr=lr, steps=steps)
    ]
    times = lr / N * torch.arange(steps + 1, **FLOAT64)
    train = constant_kernel_flow(kernel, f_0, y, times, lr=lr / N)
    test = constant_kernel_flow(kernel, f_0, y, times, lr=lr / N, k_test_train=cross, f_test_0=f_test_0)
    torch.testing.assert_close(train, torch.stack([f for f, _ in states]), rtol=1e-10, atol=1e-10)  # 60 steps of rounding
    torch.testing.assert_close(test, torch.stack([f for _, f in states]), rtol=1e-10, atol=1e-10)


def test_stochastic_descent_trains_a_linearized_network_with_batch_normalisation():
    model, x = module("resnet")
    y = torch.arange(N) % C
    lin = linearize(model)
    data = Dataset("random", x, y, x, y, C)
    losses = [state.loss for state in sgd(lin, data, lr=0.01, batch_size=2, epochs=8)]
    assert losses[-1] < losses[1]
    torch.testing.assert_close(empirical_ntk(lin, x), empirical_ntk(model, x), rtol=1e-11, atol=1e-9)  # reordered


@pytest.mark.parametrize("name", MODULES)
def test_the_centred_model_is_the_linearized_one_without_the_constant(name):
    model, x = module(name)
    lin, centered = moved(linearize(model), 0.3), moved(linearize(model, centered=True), 0.3)
    torch.testing.assert_close(centered(x), lin(x) - model(x), rtol=1e-11, atol=1e-11)  # reordered
    assert not linearize(model, centered=True)(x).any()
    copied = linearize(centered)
    assert copied.centered
    assert torch.equal(copied(x), centered(x))


def test_the_centred_model_flows_as_its_kernel_from_zero():
    model, x, labels, lr = mlp(), normal(N, D), torch.tensor([0, 2, 1, 2]), 0.3
    states = [s.model(x).detach() for s in gradient_descent(linearize(model, centered=True), x, labels, lr=lr, steps=20)]
    y = one_hot_by_loops(labels, C)
    times = lr / N * torch.arange(21, **FLOAT64)
    expected = constant_kernel_flow(empirical_ntk(model, x), torch.zeros_like(y), y, times, lr=lr / N)
    torch.testing.assert_close(torch.stack(states), expected, rtol=1e-10, atol=1e-10)  # 20 steps of rounding


def test_a_linearized_model_is_not_centred_afterwards():
    with pytest.raises(ValueError, match=r"must be centred when it is linearized. Got a linearized model: call linearize\(model"):
        linearize(linearize(mlp()), centered=True)


def flow_by_runge_kutta(lin: nn.Module, x: torch.Tensor, y: torch.Tensor, time: float, steps: int) -> torch.Tensor:
    """Outputs after the gradient flow of half the summed squares, by the classical method of fourth order in the parameters."""
    params = list(lin.parameters())
    start = torch.nn.utils.parameters_to_vector(params).detach()

    def velocity(w):
        torch.nn.utils.vector_to_parameters(w, params)
        gradients = torch.autograd.grad((lin(x) - y).square().sum() / 2, params)
        return -torch.cat([g.reshape(-1) for g in gradients])

    w, h = start, time / steps
    for _ in range(steps):
        a = velocity(w)
        b = velocity(w + h / 2 * a)
        c = velocity(w + h / 2 * b)
        w = w + h / 6 * (a + 2 * b + 2 * c + velocity(w + h * c))
    torch.nn.utils.vector_to_parameters(w, params)
    return lin(x).detach()


def test_in_the_limit_of_small_steps_training_is_the_flow_of_the_constant_kernel():
    model, x, y, time = mlp(), normal(N, D), normal(N, C, use="y"), 0.5
    kernel, f_0 = empirical_ntk(model, x), model(x).detach()
    expected = constant_kernel_flow(kernel, f_0, y, torch.tensor([time], **FLOAT64))[0]
    found = flow_by_runge_kutta(linearize(model), x, y, time, 200)  # (lambda h)^4 is below 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert (expected - f_0).norm() > 0.1


def small_data(x: torch.Tensor) -> Dataset:
    y = torch.arange(len(x)) % C
    return Dataset("random", x, y, x, y, C)


def test_a_linear_model_goes_on_linearized_as_it_would_have_gone_on():
    """A linear model is its own linearization, so batches, learning rates and velocities must be the same ones."""
    model, x = linear(), normal(8, 1, 2, 3)
    data, options = small_data(x), {"lr": 0.1, "momentum": 0.9, "batch_size": 2, "epochs": 6, "schedule": "cosine"}
    for state in sgd(model, data, **options, measure_at={7}):
        if state.step == 7:
            before = copy.deepcopy(model.state_dict())
            lin, checkpoint = continue_linearized(state)
            *_, last = sgd(lin, data, **options, measure_at=(), resume=checkpoint)
            assert last.step == 24
            assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
            centered, again = continue_linearized(state, centered=True)
            assert again[0] == 7
            assert centered.centered
    torch.testing.assert_close(lin(x), model(x), rtol=1e-12, atol=1e-12)  # reordered sums over 17 steps


def test_a_network_goes_on_linearized_with_its_velocity():
    model, x = mlp(), normal(8, 1, 2, 3)
    data, options = small_data(x), {"lr": 0.1, "momentum": 0.9, "batch_size": 4, "epochs": 3}
    for state in sgd(model, data, **options, measure_at={3}):
        if state.step == 3:
            lin, checkpoint = continue_linearized(state)
            first = next(sgd(lin, data, **options, measure_at={4}, resume=checkpoint))
            ahead = [w.detach().clone() for w in first.model.parameters()]
            break
    for state in sgd(fresh := mlp(), data, **options, measure_at={4}):
        if state.step == 4:
            theirs = [w.detach().clone() for w in fresh.parameters()]
    # at its first step the linearized network has the gradient of the network
    for ours, other in zip(ahead, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
