"""Laws of gradient flow and of the central flow: closed forms, limits, complementarity."""

import copy
import math

import pytest
import torch
from torch import nn

from ntklib.models import MLP
from ntklib.random import stream
from ntklib.training import central_flow, gradient_descent, gradient_flow
from ntklib.training.critical import Hessian, critical_modes, oscillation_covariance

ONE = torch.ones(1, 1, dtype=torch.float64)


class Products(nn.Module):
    """c independent scalar networks of two layers, outputs a_i b_i, whatever the single input."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def forward(self, x):
        return (self.a * self.b)[None] * x

    @property
    def sizes(self):
        return (self.a.square() + self.b.square()).detach()


def targets(*values):
    return torch.tensor([values], dtype=torch.float64)


def problem(seed=0, n=7, activation="tanh"):
    generator = stream(seed, "flow")
    net = MLP(3, [4], 1, activation=activation).double()
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(torch.randn(w.shape, generator=generator, dtype=torch.float64) / 2)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return net, x, torch.randn(n, 1, generator=generator, dtype=torch.float64)


def weights(model):
    return torch.cat([w.detach().reshape(-1) for w in model.parameters()])


def last(states):
    return list(states)[-1]


def test_gradient_flow_of_a_linear_model_is_the_exponential_of_the_kernel():
    generator = stream(0, "linear")
    x, y = (torch.randn(5, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    net = MLP(3, [], 2, bias=False).double()
    start = (net(x) - y).detach()
    kernel = x @ x.T
    for state in gradient_flow(net, x, y, lr=0.3, steps=3, tol=1e-8):
        expected = torch.matrix_exp(-kernel * 0.3 * state.step / 5) @ start  # n = 5
        torch.testing.assert_close((net(x) - y).detach(), expected, rtol=1e-5, atol=1e-6)
        assert state.loss == pytest.approx(float(expected.square().sum()) / 10, rel=1e-5)


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_gradient_flow_of_a_balanced_product_is_a_logistic_curve(target):
    net = Products([0.1], [0.1])
    for state in gradient_flow(net, ONE, targets(target), lr=0.5, steps=8, tol=1e-7):
        t, u_0 = 0.5 * state.step, 0.01
        expected = target / (1 + (target / u_0 - 1) * math.exp(-2 * target * t))
        assert float(net(ONE).detach()) == pytest.approx(expected, rel=1e-5)


def test_gradient_flow_conserves_the_balance_of_the_layers():
    net = Products([1.5], [0.2])
    last(gradient_flow(net, ONE, targets(2.0), lr=1.0, steps=4, tol=1e-7))
    balance = (net.a.square() - net.b.square()).detach()
    assert float(balance) == pytest.approx(1.5**2 - 0.2**2, rel=1e-5)


def test_gradient_descent_tends_to_gradient_flow_at_first_order():
    net, x, y = problem()
    flow = copy.deepcopy(net)
    last(gradient_flow(flow, x, y, lr=0.5, steps=4, tol=1e-8))
    errors = []
    for divisions in (32, 64):
        descent = copy.deepcopy(net)
        last(gradient_descent(descent, x, y, lr=0.5 / divisions, steps=4 * divisions))
        errors.append(float((weights(descent) - weights(flow)).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_gradient_flow_stops_at_the_loss():
    net, x, y = problem()
    whole = [s.loss for s in gradient_flow(copy.deepcopy(net), x, y, lr=0.5, steps=8, tol=1e-6)]
    level = (whole[2] + whole[3]) / 2
    states = [(s.step, s.epoch, s.loss, s.total_steps) for s in gradient_flow(net, x, y, lr=0.5, steps=8, tol=1e-6, stop_at=level)]
    step, time, loss, total = states[-1]
    assert loss == pytest.approx(level, rel=1e-6)
    assert loss <= level
    assert (step, total, len(states)) == (3, 3, 4)
    assert 2 < time < 3
    assert float((net(x) - y).detach().square().mean()) / 2 == pytest.approx(level, rel=1e-6)


@pytest.mark.parametrize("flow", [gradient_flow, central_flow])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_flow_goes_on_to_the_same_bits(flow, at):
    net, x, y = problem()
    options = {"lr": 0.5, "steps": 5}
    kept = {}
    for state in flow(copy.deepcopy(net), x, y, **options):
        kept[state.step] = {k: v.clone() for k, v in state.tensors().items()}
    resumed = {s.step: s.tensors() for s in flow(net, x, y, **options, resume=(at, kept[at]))}
    assert list(resumed) == list(range(at + 1, 6))
    assert all(torch.equal(resumed[5][k], kept[5][k]) for k in kept[5])


@pytest.mark.parametrize("measured", [[2], range(0, 6, 2)])
@pytest.mark.parametrize("flow", [gradient_flow, central_flow])
def test_a_flow_yields_the_measured_states_and_the_last(flow, measured):
    net, x, y = problem()
    assert [s.step for s in flow(net, x, y, lr=0.1, steps=5, measure_at=measured)] == sorted({*measured, 5})


def test_an_infinite_loss_ends_a_flow():
    net, x, y = problem()
    for flow in (gradient_flow, central_flow):
        states = list(flow(copy.deepcopy(net), x, y * math.inf, lr=0.1, steps=5))
        assert [(s.step, s.diverged) for s in states] == [(0, True)]


# -- the central flow ----------------------------------------------------------------------------------------------------------


def test_below_the_edge_the_central_flow_is_gradient_flow():
    net, x, y = problem()
    exact = copy.deepcopy(net)
    last(gradient_flow(exact, x, y, lr=0.2, steps=10, tol=1e-8))
    errors = []
    for substeps in (3, 6):
        central = copy.deepcopy(net)
        state = last(central_flow(central, x, y, lr=0.2, steps=10, substeps=substeps))
        assert float(state.extra["eigvals"][0]) < 2 / 0.2
        assert not state.extra["covariance"].any()
        errors.append(float((weights(central) - weights(exact)).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler's method
    assert errors[1] < 0.03 * float((weights(net) - weights(exact)).norm())


@pytest.mark.parametrize("edge", [2.5, 4.0])
def test_the_central_flow_of_a_product_ends_at_the_minimum_whose_sharpness_is_the_edge(edge):
    net = Products([2.2], [0.1])
    for state in central_flow(net, ONE, targets(1.0), lr=2 / edge, steps=30, num_critical=1, substeps=2):
        assert float(state.extra["covariance"]) >= 0
        if state.step > 5:
            assert float(state.extra["eigvals"][0]) <= edge * 1.01
    assert float(net(ONE).detach()) == pytest.approx(1, abs=1e-6)
    assert float(net.sizes) == pytest.approx(edge, rel=1e-6)  # the sharpness at a minimum is a^2 + b^2


def test_two_products_are_held_at_the_edge_at_once():
    net = Products([2.2, 2.0], [0.1, 0.3])
    held = []
    for state in central_flow(net, ONE, targets(1.0, 1.0), lr=2 / 3, steps=30, num_critical=2, substeps=2):
        held.append(torch.linalg.matrix_rank(state.extra["covariance"], atol=1e-9).item())
    assert max(held) == 2
    torch.testing.assert_close(net.sizes, torch.tensor([3.0, 3.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_flat_product_is_left_alone_beside_a_critical_one():
    net, alone = Products([2.2, 0.9], [0.1, 0.8]), Products([0.9], [0.8])
    last(central_flow(net, ONE, targets(1.0, 1.0), lr=2 / 3, steps=30, num_critical=2, substeps=2))
    last(central_flow(alone, ONE, targets(1.0), lr=2 / 3, steps=30, num_critical=1, substeps=2))
    torch.testing.assert_close(net.sizes, torch.stack([torch.tensor(3.0).double(), alone.sizes[0]]), rtol=1e-6, atol=0)


def test_on_the_edge_the_sharpness_stays_and_the_covariance_is_that_of_the_formula():
    a, b, lr = 1.5, 0.6, 0.0
    net = Products([a], [b])
    hessian = torch.tensor([[b * b, 2 * a * b - 2.0], [2 * a * b - 2.0, a * a]], dtype=torch.float64)
    lr = 2 / float(torch.linalg.eigvalsh(hessian)[-1])
    states = central_flow(net, ONE, targets(2.0), lr=lr, steps=1, num_critical=1, substeps=2**20)
    sigma = float(next(states).extra["covariance"])
    u = torch.linalg.eigh(hessian)[1][:, 1]
    slope = torch.tensor([2 * a * u[1] ** 2 + 4 * b * u[0] * u[1], 2 * b * u[0] ** 2 + 4 * a * u[0] * u[1]])  # of u^T H u
    gradient = (a * b - 2) * torch.tensor([b, a], dtype=torch.float64)
    expected = max(0.0, -2 * float(slope @ gradient) / float(slope @ slope))
    assert expected > 0
    assert sigma == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_covariance_meets_the_conditions_of_complementarity(k, seed):
    draw = lambda *shape: torch.randn(*shape, generator=stream(seed, "sigma", k, len(shape)), dtype=torch.float64)  # noqa: E731
    slopes, gradient, lr, dt = draw(k, k, 30), draw(30), 0.1, 0.5
    slopes = (slopes + slopes.transpose(0, 1)) / 2
    eigvals = 2 / lr + torch.linspace(0.3, -0.3, k, dtype=torch.float64)
    sigma = oscillation_covariance(eigvals, slopes, gradient, lr, dt)
    drift = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        for j in range(k):
            drift[i, j] = slopes[i, j] @ gradient + 0.5 * sum(
                sigma[m, n] * (slopes[i, j] @ slopes[m, n]) for m in range(k) for n in range(k)
            )
    room = 2 / lr * torch.eye(k) - torch.diag(eigvals) + lr * dt * drift
    assert float(sigma.abs().max()) > 0
    assert float(torch.linalg.eigvalsh(sigma)[0]) >= -1e-10
    assert float(torch.linalg.eigvalsh(room)[0]) >= -1e-6
    assert abs(float((sigma * room).sum())) < 1e-6
    torch.testing.assert_close(sigma, sigma.T)


@pytest.mark.parametrize("hidden", [4, 40])
def test_critical_modes_and_their_slopes_are_those_of_the_automatic_hessian(hidden):
    generator = stream(1, "modes")
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    w = torch.randn(4 * hidden, generator=generator, dtype=torch.float64) / 2
    loss = lambda w: ((torch.tanh(x @ w[: 3 * hidden].reshape(3, hidden)) @ w[3 * hidden :]) - 1).square().mean()  # noqa: E731
    hessian = torch.autograd.functional.hessian(loss, w)
    eigvals, basis = critical_modes(Hessian(loss, w), 2)
    torch.testing.assert_close(eigvals, torch.linalg.eigvalsh(hessian).flip(0)[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Hessian(loss, w) @ basis, hessian @ basis, rtol=1e-10, atol=1e-12)
    again = critical_modes(Hessian(loss, w), 2, basis)[0]
    torch.testing.assert_close(again, eigvals, rtol=1e-5, atol=1e-6)
    slopes = Hessian(loss, w).entries(basis)
    direction = torch.randn(len(w), generator=generator, dtype=torch.float64)
    h = 1e-5
    ahead, behind = (torch.autograd.functional.hessian(loss, w + s * h * direction) for s in (1, -1))
    torch.testing.assert_close(slopes @ direction, basis.T @ (ahead - behind) @ basis / (2 * h), rtol=1e-6, atol=1e-7)


def test_wrong_arguments_are_named():
    net, x, y = problem()
    with pytest.raises(ValueError, match="lr, the unit of time, and tol must be positive. Got 0.1 and 0.0"):
        next(gradient_flow(net, x, y, lr=0.1, steps=1, tol=0.0))
    with pytest.raises(ValueError, match="substeps must be at least 2.* Got 1"):
        next(central_flow(net, x, y, lr=0.1, steps=1, substeps=1))
    with pytest.raises(ValueError, match="from 1 to p - 1 = 20. Got 21"):
        next(central_flow(net, x, y, lr=0.1, steps=1, num_critical=21))


# -- gradient descent that ends at a loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [range(0, 61, 7), [0], range(61)])
def test_descent_that_ends_at_a_loss_yields_the_steps_around_it(measured):
    net, x, y = problem()
    whole = [(s.loss, weights(s.model)) for s in gradient_descent(copy.deepcopy(net), x, y, lr=0.3, steps=60)]
    level = 0.5 * (whole[40][0] + whole[41][0])
    states = gradient_descent(net, x, y, lr=0.3, steps=60, stop_at=level, measure_at=measured)
    found = [(s.step, s.loss, weights(s.model), s.total_steps) for s in states]
    assert [f[0] for f in found] == [*(m for m in measured if m < 40), 40, 41]
    for step, loss, w, _ in found:
        assert loss == whole[step][0]
        assert torch.equal(w, whole[step][1])
    assert [f[3] for f in found[:-1]] == [60] * (len(found) - 1)
    assert found[-1][3] == 41
    torch.testing.assert_close(weights(net), whole[41][1], rtol=0, atol=0)


def test_descent_that_is_left_at_the_step_before_its_last_leaves_the_last_weights_in_the_network():
    net, x, y = problem()
    losses = [s.loss for s in gradient_descent(copy.deepcopy(net), x, y, lr=0.3, steps=9)]
    level, other = 0.5 * (losses[5] + losses[6]), copy.deepcopy(net)
    whole = [weights(s.model) for s in gradient_descent(other, x, y, lr=0.3, steps=9, stop_at=level, measure_at=[])]
    states = gradient_descent(net, x, y, lr=0.3, steps=9, stop_at=level, measure_at=[])
    assert torch.equal(weights(next(states).model), whole[0])
    states.close()  # as after an error in what measures the state
    assert torch.equal(weights(net), whole[1])
