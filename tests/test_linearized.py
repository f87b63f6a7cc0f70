"""Laws of training under a constant kernel."""

import inspect

import pytest
import torch
from reference import flow_by_runge_kutta, one_hot_by_loops, summed_loss_descent

from ntklib.kernels import empirical_ntk
from ntklib.linearized import constant_kernel_flow
from ntklib.models import MLP, initialize
from ntklib.random import stream
from ntklib.training import gradient_descent

N, D, C = 4, 6, 3


def normal(*shape: int, use: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, use), dtype=torch.float64)


def linear() -> MLP:
    return initialize(MLP(D, [], C), "standard", stream(0, "init")).double()


@pytest.fixture
def case():
    """Make a positive definite kernel that mixes examples and outputs, outputs at time 0 and targets."""
    model = initialize(MLP(D, [16], C, activation="tanh"), "standard", stream(0, "init")).double()
    x = normal(N, D)
    return empirical_ntk(model, x), model(x).detach(), normal(N, C, use="y")


def test_the_flow_is_the_solution_of_its_differential_equation(case):
    times = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    exact = torch.stack([flow_by_runge_kutta(*case, float(t), 2000) for t in times])
    torch.testing.assert_close(constant_kernel_flow(*case, times), exact, rtol=0, atol=1e-9)  # (h |K|)^4 with h |K| < 0.01


def test_descent_on_a_linear_model_is_the_discrete_flow_of_its_kernel():
    model, x, y, lr, steps = linear(), normal(N, D), normal(N, C, use="y"), 0.05, 200
    w, b = (p.detach() for p in model.parameters())
    expected = summed_loss_descent(w, b, x, y, lr, steps)
    flow = constant_kernel_flow(empirical_ntk(model, x), expected[0], y, lr * torch.arange(steps + 1, dtype=torch.float64), lr=lr)
    torch.testing.assert_close(flow, expected, rtol=1e-10, atol=1e-10)  # 200 steps of rounding


def test_descent_on_the_mean_loss_takes_time_and_rate_divided_by_the_examples():
    model, x, labels, lr, steps = linear(), normal(N, D), torch.tensor([0, 2, 1, 2]), 0.3, 50
    kernel, f_0 = empirical_ntk(model, x), model(x).detach()
    expected = torch.stack([state.model(x).detach() for state in gradient_descent(model, x, labels, lr=lr, steps=steps)])
    times = lr * torch.arange(steps + 1, dtype=torch.float64)
    flow = constant_kernel_flow(kernel, f_0, one_hot_by_loops(labels, C), times / N, lr=lr / N)
    torch.testing.assert_close(flow, expected, rtol=1e-10, atol=1e-10)  # 50 steps of rounding


@pytest.mark.parametrize("lr", [None, 0.01])
def test_the_flow_starts_at_the_outputs_and_ends_at_the_targets(case, lr):
    kernel, f_0, y = case
    start, end = constant_kernel_flow(kernel, f_0, y, torch.tensor([0.0, 1e6], dtype=torch.float64), lr=lr)
    torch.testing.assert_close(start, f_0, rtol=1e-12, atol=1e-12)  # through the eigenbasis and back
    torch.testing.assert_close(end, y, rtol=1e-12, atol=1e-12)


def test_what_the_kernel_does_not_see_stays():
    u = torch.tensor([0.6, 0.8], dtype=torch.float64)
    kernel = torch.outer(u, u)[:, :, None, None]  # two examples, one output, rank one
    f_0, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    end = constant_kernel_flow(kernel, f_0, y, torch.tensor([1e3], dtype=torch.float64))[0]
    torch.testing.assert_close(end, f_0 - (u @ f_0) * u[:, None], rtol=1e-12, atol=1e-12)


def test_descent_tends_to_the_flow_and_the_error_halves_with_the_rate(case):
    t = torch.tensor([1.0], dtype=torch.float64)
    flow = constant_kernel_flow(*case, t)
    errors = [float((constant_kernel_flow(*case, t, lr=lr) - flow).norm()) for lr in (2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)  # the next order is lr |K|


def test_a_rate_above_twice_the_inverse_of_the_largest_eigenvalue_diverges(case):
    kernel, f_0, y = case
    largest = float(torch.linalg.eigvalsh(kernel.transpose(1, 2).reshape(N * C, N * C)).max())
    below, above = (
        constant_kernel_flow(kernel, f_0, y, torch.tensor([200 * lr], dtype=torch.float64), lr=lr)[0]
        for lr in (1.9 / largest, 2.1 / largest)
    )
    assert (below - y).norm() < (f_0 - y).norm() < (above - y).norm()


@pytest.mark.parametrize("lr", [0.0, -0.1])
def test_a_rate_that_is_not_positive_is_refused(case, lr):
    with pytest.raises(ValueError, match=f"lr must be positive. Got {lr}"):
        constant_kernel_flow(*case, torch.zeros(1, dtype=torch.float64), lr=lr)


@pytest.mark.parametrize("flat", ["kernel", "targets"])
def test_shapes_that_do_not_fit_are_refused(case, flat):
    kernel, f_0, y = case
    kernel, y = (kernel[:-1], y) if flat == "kernel" else (kernel, y[:, :-1])
    with pytest.raises(ValueError, match=r"must be \[n, n, c, c\], \[n, c\] and \[n, c\]. Got"):
        inspect.unwrap(constant_kernel_flow)(kernel, f_0, y, torch.zeros(1, dtype=torch.float64))  # before any type checker
