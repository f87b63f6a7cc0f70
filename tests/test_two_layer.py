"""The closed forms of the two-layer linear network, against symbolic algebra, autograd and full-matrix descent."""

import numpy as np
import pytest
import sympy
import torch

from ntklib import TwoLayerSettings, two_layer

N, D = 5, 7


def problem(seed=0, n=N, d=D):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, d)) * np.exp(draw.normal(size=d))
    return x, x @ draw.normal(size=d)


def jacobian(a, w, x):
    """Gradients of the outputs by autograd, one output at a time: [n, p]."""
    a, w = torch.from_numpy(a).requires_grad_(), torch.from_numpy(w).requires_grad_()
    out = torch.from_numpy(x) @ (w.T @ a)
    return np.stack([np.concatenate([g.reshape(-1) for g in torch.autograd.grad(o, (a, w), retain_graph=True)]) for o in out])


def top_of_hessian(a, w, x, y):
    flat = torch.from_numpy(np.concatenate([a, w.ravel()]))

    def loss(v):
        out = torch.from_numpy(x) @ (v[len(a) :].reshape(w.shape).T @ v[: len(a)])
        return ((out - torch.from_numpy(y)) ** 2).sum() / 2

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


def alignment(k, y):
    return float(y @ k @ y / np.linalg.norm(k) / (y @ y))


@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_are_the_products_of_gradients(seed):
    x, _ = problem(seed)
    draw = np.random.default_rng(seed + 10)
    a, w = draw.normal(size=3), draw.normal(size=(3, D))
    gradients = jacobian(a, w, x)
    np.testing.assert_allclose(two_layer.general_kernel(a, w, x), gradients @ gradients.T, rtol=1e-12)
    direction, v = a / np.linalg.norm(a), draw.normal(size=D)
    gradients = jacobian(1.7 * direction, np.outer(direction, v), x)
    np.testing.assert_allclose(two_layer.kernel(1.7, v, x), gradients @ gradients.T, rtol=1e-11)


@pytest.mark.parametrize("t", [0.3, 2.0, 9.0])
def test_kernel_sharpness_and_alignment_at_a_minimum(t):
    x, y = problem(2)
    theta = two_layer.interpolator(x, y)
    np.testing.assert_allclose(theta, np.linalg.pinv(x) @ y, rtol=1e-9)
    direction = np.array([0.6, -0.8])
    a, w = t**0.5 * direction, np.outer(direction, theta / t**0.5)
    gradients = jacobian(a, w, x)
    k = gradients @ gradients.T
    np.testing.assert_allclose(two_layer.minimum_kernel(x, y, t), k, rtol=1e-10)
    assert two_layer.minimum_sharpness(x, y, t) == pytest.approx(top_of_hessian(a, w, x, y), rel=1e-10)
    assert two_layer.minimum_alignment(x, y, t) == pytest.approx(alignment(k, y), rel=1e-12)


def test_network_has_the_form_it_promises():
    x, _ = problem(0)
    v = np.arange(1.0, D + 1)
    net = two_layer.two_layer_network(1.5, v, width=6, seed=3)
    hidden, readout = (w.detach().numpy() for w in net.parameters())
    assert np.linalg.norm(readout) == pytest.approx(1.5, rel=1e-14)
    np.testing.assert_allclose(hidden, np.outer(readout[0] / 1.5, v), rtol=1e-13)
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy()[:, 0], 1.5 * x @ v, rtol=1e-12)


def test_alignment_falls_with_the_readout_by_symbolic_differentiation():
    rho, g, extra = sympy.symbols("rho g c", positive=True)  # c = ||G||_F^2 - g^2
    kta = (1 + rho * g) / sympy.sqrt(1 + 2 * g * rho + rho**2 * (g**2 + extra))
    slope = sympy.simplify(sympy.diff(sympy.log(kta), rho) * (1 + rho * g) * (1 + 2 * g * rho + rho**2 * (g**2 + extra)))
    assert sympy.simplify(slope + rho * extra) == 0


def test_orthonormal_inputs_have_their_explicit_forms():
    n, t = 6, sympy.symbols("t", positive=True)
    y = sympy.Matrix([1, -1, 1, 1, -1, 2])
    k = y * y.T / t + t * sympy.eye(n)
    size = y.dot(y)
    assert sympy.simplify(k * y - (size / t + t) * y) == sympy.zeros(n, 1)
    lam = size / t + t
    kta = lam / sympy.sqrt(lam**2 + (n - 1) * t**2)
    x, target = np.eye(n), np.array([float(v) for v in y])
    for value in (0.5, 3.0, 7.0):
        assert two_layer.minimum_sharpness(x, target, value) == pytest.approx(float(lam.subs(t, value)), rel=1e-13)
        assert two_layer.minimum_alignment(x, target, value) == pytest.approx(float(kta.subs(t, value)), rel=1e-13)
    assert two_layer.flattest_readout(x, target) == pytest.approx(3.0, rel=1e-7)  # ||y|| = 3
    assert two_layer.minimum_alignment(x, target, 3.0) == pytest.approx(2 / (n + 3) ** 0.5, rel=1e-13)


@pytest.mark.parametrize("seed", range(6))
def test_sharpness_is_convex_and_least_at_the_flattest_readout_below_the_balanced_one(seed):
    x, y = problem(seed)
    best = two_layer.flattest_readout(x, y)
    t = best * np.linspace(0.05, 4, 80)
    flat = np.array([two_layer.minimum_sharpness(x, y, v) for v in t])
    assert (np.diff(flat, 2) > -1e-9 * flat.max()).all()
    assert two_layer.minimum_sharpness(x, y, best) <= flat.min() * (1 + 1e-12)
    kta = [two_layer.minimum_alignment(x, y, v) for v in t]
    assert (np.diff(kta) < 0).all()
    assert np.linalg.norm(two_layer.interpolator(x, y)) >= best * (1 - 1e-6)


def test_a_target_along_the_top_direction_has_the_flattest_readout_of_its_norm():
    x, y = two_layer.dominant_inputs(6, 8, 4.0, 1.0, seed=2)
    assert two_layer.flattest_readout(x, y) == pytest.approx(np.linalg.norm(y) / 4, rel=1e-7)


def test_dominant_inputs_have_their_spectrum_and_cosine():
    x, y = two_layer.dominant_inputs(6, 9, 5.0, 0.6, seed=1)
    left, values, _ = np.linalg.svd(x)
    assert values[0] == pytest.approx(5, rel=1e-12)
    assert (values[1:] < 1.5).all()
    assert (values[1:] > 0.5).all()
    assert np.linalg.norm(y) == pytest.approx(6**0.5, rel=1e-12)
    assert abs(left[:, 0] @ y) / np.linalg.norm(y) == pytest.approx(0.6, rel=1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_reduced_descent_is_that_of_all_weights_and_of_autograd(seed):
    x, y = problem(seed)
    draw = np.random.default_rng(seed)
    direction = draw.normal(size=4)
    direction /= np.linalg.norm(direction)
    q, v, lr = np.array([0.8, 1.3]), draw.normal(size=(2, D)) * 0.3, np.array([0.002, 0.004])
    a, w = q[:, None] * direction, direction[None, :, None] * v[:, None, :]
    *_, (q_end, v_end) = two_layer.rank_one_descent(q, v, x, y, lr, 20)
    *_, (a_end, w_end) = two_layer.two_layer_descent(a, w, x, y, lr, 20)
    np.testing.assert_allclose(a_end, q_end[:, None] * direction, rtol=1e-10)
    np.testing.assert_allclose(w_end, direction[None, :, None] * v_end[:, None, :], rtol=1e-10, atol=1e-14)
    leaves = [torch.from_numpy(p.copy()) for p in (a[1], w[1])]
    for _ in range(20):
        leaves = [p.detach().requires_grad_() for p in leaves]
        loss = ((torch.from_numpy(x) @ (leaves[1].T @ leaves[0]) - torch.from_numpy(y)) ** 2).sum() / 2
        leaves = [p - lr[1] * g for p, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True)]
    np.testing.assert_allclose(a_end[1], leaves[0].detach().numpy(), rtol=1e-10)


def test_gradient_flow_ends_at_its_readout():
    x, y = two_layer.dominant_inputs(4, 5, 2.0, 0.5)
    q, w = np.array([1.2]), 0.3 * two_layer.interpolator(x, y)[None]
    predicted = two_layer.flow_readout(1.2, w[0], x, y)
    errors = []
    for lr in (2e-3, 1e-3):
        *_, (end, _) = two_layer.rank_one_descent(q, w, x, y, np.array([lr]), round(40 / lr))
        errors.append(abs(float(end[0]) ** 2 - predicted))
    assert errors[1] < 1e-2 * predicted
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order in the step


@pytest.mark.parametrize("side", [0.5, 2.0])
def test_edge_readout_has_the_sharpness_of_the_edge_on_its_own_side(side):
    x, y = problem(3)
    best = two_layer.flattest_readout(x, y)
    start = side * best
    sharp, least = (two_layer.minimum_sharpness(x, y, v) for v in (start, best))
    lr = 2 / (0.5 * (sharp + least))
    found = two_layer.edge_readout(x, y, lr, start)
    assert two_layer.minimum_sharpness(x, y, found) == pytest.approx(2 / lr, rel=1e-10)
    assert (found - best) * (start - best) > 0
    assert two_layer.edge_readout(x, y, 1.9 / sharp, start) == start
    assert two_layer.edge_readout(x, y, 2.2 / least, start) == pytest.approx(best)


def test_edge_of_stability_raises_or_lowers_alignment_by_the_side():
    x, y = np.eye(20), np.resize([1.0, -1.0], 20)
    lrs = np.array([0.5, 0.95]) / np.linalg.norm(y)
    gains = []
    for side in (1.5, 1 / 1.5):
        q = np.full(2, (side * np.linalg.norm(y)) ** 0.5)
        *_, (q, w) = two_layer.rank_one_descent(q, np.tile(1.001 * y / q[0], (2, 1)), x, y, lrs, 4000)
        kta = [alignment(two_layer.kernel(*end, x), y) for end in zip(q, w, strict=True)]
        gains.append(kta[1] - kta[0])
    assert gains[0] > 0.02
    assert gains[1] < -0.05


def test_measures_are_those_of_the_kernel_and_nan_after_divergence():
    x, y = two_layer.dominant_inputs(4, 5, 2.0, 0.5)
    a, w = two_layer.random_start(3, 5, 0.7, 2, seed=1)
    assert a.shape == (2, 3)
    assert np.linalg.norm(a[0]) == pytest.approx(0.7)
    assert np.linalg.norm(w[1]) == pytest.approx(0.7)
    kta, top = two_layer.measures(a[0], w[0], x, y)
    k = two_layer.general_kernel(a[0], w[0], x)
    least = min(two_layer.minimum_sharpness(x, y, t) for t in np.geomspace(0.05, 20, 4001))
    assert kta == pytest.approx(alignment(k, y), rel=1e-12)
    assert top == pytest.approx(np.linalg.eigvalsh(k)[-1] / least, rel=1e-5)
    assert np.isnan(two_layer.measures(a[0] * np.inf, w[0], x, y)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_layer.dominant_inputs(5, 4, 2.0, 0.5), r"2 <= n <= d and 0 <= share <= 1\. Got n = 5, d = 4, share = 0\.5"),
        (lambda: two_layer.interpolator(np.ones((2, 1)), np.array([1.0, -1.0])), r"linear function of the inputs\. Got norm 1\.41"),
        (lambda: two_layer.interpolator(np.eye(2), np.zeros(2)), r"must be non-zero values.*Got norm 0"),
        (lambda: two_layer.minimum_kernel(np.eye(2), np.ones(2), -1.0), r"t = q\^2 must be positive and finite\. Got -1\.0"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


GOOD = {
    "num_inputs": 4, "dim": 5, "top": 3.0, "share": 0.5, "width": 3, "init_scale": 0.1, "lr_low": 0.3, "lr_high": 0.9, "num_lr": 3,
    "steps": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 3}, r"dim must be at least num_inputs = 4, so that all targets can be fitted\. Got 3"),
        ({"lr_low": 0.9}, r"lr_low must be below lr_high = 0\.9\. Got 0\.9"),
        ({"share": 1.5}, r"share must be at most 1\. Got 1\.5"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    assert TwoLayerSettings(**GOOD).seed == 0
    with pytest.raises(ValueError, match=message):
        TwoLayerSettings(**{**GOOD, **change})
