"""Laws of training under a constant kernel."""

import inspect

import pytest
import torch
from reference import flow_by_runge_kutta, one_hot_by_loops, summed_loss_descent
from reference_dynamics import feature_descent, ridge_regression
from small_networks import FLOAT64, C, D, N, linear, mlp, normal

from ntklib.kernels import empirical_ntk, flatten_kernel
from ntklib.linearized import constant_kernel_flow, kernel_regression
from ntklib.models import MLP, initialize
from ntklib.operator import NTKOperator
from ntklib.random import stream
from ntklib.training import gradient_descent


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
    with pytest.raises(ValueError, match=r"must be \[n, n, c, c\] \(or \[n c, n c\] or \[n, n\]\), \[n, c\] and \[n, c\]. Got"):
        inspect.unwrap(constant_kernel_flow)(kernel, f_0, y, torch.zeros(1, dtype=torch.float64))  # before any type checker


@pytest.fixture
def features():
    """Make Jacobians of few parameters, ``[n, c, p]`` and ``[m, c, p]``, outputs at time 0 and targets."""
    return (
        normal(N, C, 30) / 5,
        normal(5, C, 30, use="test") / 5,
        normal(N, C, use="f"),
        normal(5, C, use="f_test"),
        normal(N, C, use="y"),
    )


def kernels(j: torch.Tensor, j_test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.einsum("iap,jbp->ijab", j, j), torch.einsum("iap,jbp->ijab", j_test, j)


@pytest.mark.parametrize("lr", [1e-3, 0.2, 0.9])
def test_test_predictions_are_those_of_descent_in_parameters_at_stable_and_unstable_rates(features, lr):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j, j_test)
    assert torch.linalg.eigvalsh(flatten_kernel(kernel)).max() * 0.9 > 2
    train, test = feature_descent(j, j_test, f_0, f_test_0, y, lr, 40)
    times = lr * torch.arange(41, **FLOAT64)
    ours = constant_kernel_flow(kernel, f_0, y, times, lr=lr)
    torch.testing.assert_close(ours, train, rtol=1e-10, atol=1e-11 * float(train.abs().max()))  # rounding grows with the outputs
    ours = constant_kernel_flow(kernel, f_0, y, times, lr=lr, k_test_train=cross, f_test_0=f_test_0)
    torch.testing.assert_close(ours, test, rtol=1e-10, atol=1e-11 * float(test.abs().max()))


@pytest.mark.parametrize("lr", [None, 0.05])
def test_predictions_at_the_training_inputs_are_their_outputs(features, lr):
    j, _, f_0, _, y = features
    kernel, t = kernels(j, j)[0], torch.tensor([0.0, 0.5, 20.0], **FLOAT64)
    test = constant_kernel_flow(kernel, f_0, y, t, lr=lr, k_test_train=kernel, f_test_0=f_0)
    torch.testing.assert_close(test, constant_kernel_flow(kernel, f_0, y, t, lr=lr), rtol=1e-12, atol=1e-12)  # reordered


@pytest.mark.parametrize("lr", [None, 1e-3])
@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e-3])
def test_where_the_kernel_is_small_predictions_move_in_proportion_to_time(features, lr, size):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j, j_test)
    t = torch.tensor([0.002], **FLOAT64)
    test = constant_kernel_flow(size * kernel, f_0, y, t, lr=lr, k_test_train=cross, f_test_0=torch.zeros_like(f_test_0))
    expected = -0.002 * torch.einsum("ijab,jb->ia", cross, f_0 - y)[None]
    torch.testing.assert_close(test, expected, rtol=0.02 * size + 1e-12, atol=0.02 * size + 1e-14)  # next order lambda t


@pytest.mark.parametrize("lr", [None, 0.1])
def test_null_directions_of_the_kernel_decay_nowhere_and_sum_to_time(lr):
    kernel = torch.diag(torch.tensor([2.0, 0.0], **FLOAT64))[:, :, None, None]
    f_0, zeros, t = torch.ones(2, 1, **FLOAT64), torch.zeros(2, 1, **FLOAT64), torch.tensor([3.0], **FLOAT64)
    assert constant_kernel_flow(kernel, f_0, zeros, t, lr=lr)[0, 1] == 1
    total = constant_kernel_flow(
        kernel, f_0, zeros, t, lr=lr, k_test_train=torch.eye(2, **FLOAT64)[:, :, None, None], f_test_0=zeros
    )
    assert total[0, 1] == pytest.approx(-3, rel=1e-15)


def test_without_a_ridge_regression_leaves_out_what_the_kernel_does_not_see():
    kernel, y = torch.diag(torch.tensor([2.0, 0.0, 1e-17], **FLOAT64)), torch.ones(3, 1, **FLOAT64)
    assert kernel_regression(kernel, torch.eye(3, **FLOAT64), y).flatten().tolist() == pytest.approx([0.5, 0, 0], rel=1e-15)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 100.0])
def test_kernel_regression_is_ridge_regression_in_parameters(features, ridge):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j, j_test)
    ours = kernel_regression(kernel, cross, y, ridge=ridge, f_0=f_0, f_test_0=f_test_0)
    expected = f_test_0 + ridge_regression(j, j_test, y - f_0, ridge)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)  # the reference is worse conditioned, 1e7 at the least ridge
    plain = kernel_regression(kernel, cross, y, ridge=ridge)
    torch.testing.assert_close(plain, ridge_regression(j, j_test, y, ridge), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [30, 7])
def test_the_flow_ends_at_kernel_regression_also_for_singular_kernels(features, rank):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j[:, :, :rank], j_test[:, :, :rank])
    end = kernel_regression(kernel, cross, y, f_0=f_0, f_test_0=f_test_0)
    flow = constant_kernel_flow(kernel, f_0, y, torch.tensor([1e4], **FLOAT64), k_test_train=cross, f_test_0=f_test_0)[0]
    torch.testing.assert_close(end, flow, rtol=1e-10, atol=1e-10)  # lambda t > 100; what null directions leave is 1e4 eps
    torch.testing.assert_close(
        end, f_test_0 + ridge_regression(j[:, :, :rank], j_test[:, :, :rank], y - f_0, 1e-9), rtol=1e-6, atol=1e-6
    )  # of order ridge / lambda


def test_without_noise_kernel_regression_interpolates_and_a_small_ridge_changes_little(features):
    j, _, f_0, _, y = features
    kernel = kernels(j, j)[0]
    torch.testing.assert_close(kernel_regression(kernel, kernel, y, f_0=f_0, f_test_0=f_0), y, rtol=1e-11, atol=1e-11)  # condition
    torch.testing.assert_close(kernel_regression(kernel, kernel, y, ridge=1e-9), y, rtol=1e-6, atol=1e-6)  # ridge / lambda


class Products:
    """An operator that counts its products."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.shape, self.dtype, self.count = matrix, matrix.shape, matrix.dtype, 0

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix @ v


@pytest.mark.parametrize("lr", [None, 0.05, 0.9])
@pytest.mark.parametrize("test", [False, True])
def test_products_alone_give_what_the_decomposition_gives(features, lr, test):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j, j_test)
    t = torch.tensor([30.0, 0.0, 0.1, 3.0, 30.0], **FLOAT64)
    dense, free = (
        constant_kernel_flow(k, f_0, y, t, lr=lr, **({"k_test_train": across, "f_test_0": f_test_0} if test else {}))
        for k, across in ((kernel, cross), (Products(flatten_kernel(kernel)), Products(flatten_kernel(cross))))
    )
    torch.testing.assert_close(free, dense, rtol=1e-10, atol=1e-12 * float(dense.abs().max()))  # rounding grows with outputs, times


def stiff(seed: int = 0, m: int = 200) -> torch.Tensor:
    """Make a kernel of eigenvalues from 1 to 1e-6."""
    q = torch.linalg.qr(torch.randn(m, m, generator=stream(seed, "q"), **FLOAT64))[0]
    return (q * torch.logspace(0, -6, m, **FLOAT64)) @ q.T


@pytest.mark.parametrize("time", [1.0, 100.0, 1e5])
@pytest.mark.parametrize("test", [False, True])
def test_stiff_flows_need_products_as_the_root_of_the_time(time, test):
    kernel, t = stiff(), torch.tensor([time], **FLOAT64)
    f_0, y = normal(200, 1, use="f"), torch.zeros(200, 1, **FLOAT64)
    operator = Products(kernel)
    options = {"k_test_train": kernel, "f_test_0": f_0} if test else {}
    free, dense = (constant_kernel_flow(k, f_0, y, t, **options) for k in (operator, kernel))
    torch.testing.assert_close(free, dense, rtol=0, atol=1e-11 + 1e-15 * time)  # of the integral up to t
    assert operator.count < 60 + 8 * time**0.5


def test_a_network_s_operator_and_kernel_give_the_same_flow():
    model, x = mlp(), normal(N, D)
    f_0, y, t = model(x).detach(), normal(N, C, use="y"), torch.tensor([0.1, 2.0], **FLOAT64)
    free = constant_kernel_flow(NTKOperator(model, x), f_0, y, t)
    torch.testing.assert_close(free, constant_kernel_flow(empirical_ntk(model, x), f_0, y, t), rtol=1e-11, atol=1e-11)  # rounding


@pytest.mark.parametrize("form", ["matrix", "operator"])
@pytest.mark.parametrize("lr", [None, 0.1])
def test_a_kernel_of_one_output_acts_on_each_output(form, lr):
    k, cross = stiff(0, 6), stiff(1, 6)[:2]
    eye, f_0, y, t = torch.eye(C, **FLOAT64), normal(6, C, use="f"), normal(6, C, use="y"), torch.tensor([0.5, 4.0], **FLOAT64)
    f_test_0 = normal(2, C, use="f_test")
    whole, across = (torch.einsum("ij,ab->ijab", part, eye) for part in (k, cross))
    one = k if form == "matrix" else Products(k)
    options = {"k_test_train": cross, "f_test_0": f_test_0}, {"k_test_train": across, "f_test_0": f_test_0}
    for ours, theirs in ((options[0], options[1]), ({}, {})):
        expected = constant_kernel_flow(whole, f_0, y, t, lr=lr, **theirs)
        torch.testing.assert_close(
            constant_kernel_flow(one, f_0, y, t, lr=lr, **ours), expected, rtol=1e-12, atol=1e-12
        )  # rounding
    expected = kernel_regression(whole, across, y, ridge=0.1, f_0=f_0)
    torch.testing.assert_close(kernel_regression(k, cross, y, ridge=0.1, f_0=f_0), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        kernel_regression(flatten_kernel(whole), flatten_kernel(across), y, ridge=0.1, f_0=f_0), expected, rtol=1e-12, atol=1e-12
    )


def test_a_zero_kernel_moves_nothing():
    f_0, t = normal(N, C), torch.tensor([0.0, 5.0], **FLOAT64)
    for kernel in (torch.zeros(N, N, C, C, **FLOAT64), Products(torch.zeros(N * C, N * C, **FLOAT64))):
        flow = constant_kernel_flow(kernel, f_0, torch.zeros_like(f_0), t)
        torch.testing.assert_close(flow, torch.stack([f_0, f_0]), rtol=1e-14, atol=0)  # rounding


def test_what_diverges_without_bound_is_infinite_and_not_wrong():
    kernel = torch.diag(torch.tensor([3.0, 0.5], **FLOAT64))[:, :, None, None]
    f_0, t = torch.ones(2, 1, **FLOAT64), torch.tensor([2.0, 1e4], **FLOAT64)
    flow = constant_kernel_flow(kernel, f_0, torch.zeros_like(f_0), t, lr=1.0)
    assert flow[0].flatten().tolist() == pytest.approx([4.0, 0.25], rel=1e-14)  # (1 - 3)^2 and (1 - 1/2)^2
    assert not flow[1, 0].isfinite()


@pytest.mark.parametrize("test", [False, True])
def test_an_operator_with_a_negative_eigenvalue_has_no_flow(test):
    kernel = torch.diag(torch.tensor([1.0, -0.5, *[0.1] * 198], **FLOAT64))
    f_0 = torch.ones(200, 1, **FLOAT64)
    options = {"k_test_train": kernel, "f_test_0": f_0} if test else {}
    with pytest.raises(ValueError, match="An operator must be positive semidefinite for the flow to converge"):
        constant_kernel_flow(Products(kernel), f_0, 0 * f_0, torch.tensor([100.0], **FLOAT64), **options)


@pytest.mark.parametrize("time", [-1.0, float("inf"), float("nan")])
def test_times_without_outputs_are_refused(case, time):
    with pytest.raises(ValueError, match=f"Times must be finite and not negative. Got {time}. The limit .* is kernel_regression"):
        constant_kernel_flow(*case, torch.tensor([0.0, time], **FLOAT64))


def test_test_kernels_that_do_not_fit_are_refused(features):
    j, j_test, f_0, f_test_0, y = features
    kernel, cross = kernels(j, j_test)
    t = torch.zeros(1, **FLOAT64)
    flow, regression = inspect.unwrap(constant_kernel_flow), inspect.unwrap(kernel_regression)  # before any type checker
    with pytest.raises(ValueError, match="k_test_train and f_test_0 must be given together"):
        flow(kernel, f_0, y, t, k_test_train=cross)
    for across, start in (
        (cross[:, :-1], f_test_0),
        (cross[:-1], f_test_0),
        (cross, f_test_0[:, :-1]),
        (cross[..., 0, 0], f_test_0),
    ):
        with pytest.raises(ValueError, match="k_test_train and f_test_0 must be"):
            flow(kernel, f_0, y, t, k_test_train=across, f_test_0=start)
        with pytest.raises(ValueError, match="k_test_train and f_test_0 must be"):
            regression(kernel, across, y, f_test_0=start)


def test_ridges_that_make_no_positive_definite_matrix_are_refused(features):
    j, j_test, *_, y = features
    kernel, cross = kernels(j, j_test)
    with pytest.raises(ValueError, match="ridge must be finite and not negative. Got -1.0"):
        kernel_regression(kernel, cross, y, ridge=-1.0)
    with pytest.raises(ValueError, match="must be positive definite. Got ridge=0.001. Take a larger one"):
        kernel_regression(-kernel, cross, y, ridge=1e-3)
