"""Laws of the kernels of infinitely wide networks, and their distance to wide ones."""

import inspect
import math

import pytest
import torch
from reference_dynamics import WideMLP, wide_kernels

from ntklib.infinite import infinite_nngp, infinite_ntk
from ntklib.kernels import empirical_ntk
from ntklib.models import MLP, initialize
from ntklib.random import stream

D = 5
WIDTHS, SEEDS = [16, 64, 256], 40
CASES = [("relu", 1.4, 0.3), ("relu", math.sqrt(2), 0.0), ("erf", 1.7, 0.5), ("erf", 3.0, 0.0), ("identity", 0.9, 0.2)]


def inputs(n: int = 4, use: str = "x") -> torch.Tensor:
    return torch.randn(n, D, generator=stream(0, use), dtype=torch.float64)


def settings(case) -> dict:
    activation, weight_std, bias_std = case
    return {"activation": activation, "weight_std": weight_std, "bias_std": bias_std}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("standard", [False, True])
def test_the_recursions_are_those_of_quadrature(case, depth, standard):
    x1, x2 = inputs(2), inputs(3, "z")
    widths = [7, 30, 11][:depth] if standard else None
    kernels = (
        infinite_nngp(x1, x2, depth=depth, **settings(case)),
        infinite_ntk(x1, x2, depth=depth, widths=widths, **settings(case)),
    )
    expected = [[wide_kernels(u, v, depth, *case, widths) for v in x2.tolist()] for u in x1.tolist()]
    for kernel, number in zip(kernels, (0, 1), strict=True):
        reference = torch.tensor([[pair[number] for pair in row] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(kernel, reference, rtol=1e-9, atol=1e-9)  # quadrature of 60 x 120 nodes


def test_without_biases_the_standard_kernel_lacks_one_gradient_per_layer():
    x1, x2 = inputs(2), inputs(3, "z")
    kernel = infinite_ntk(x1, x2, depth=2, widths=[5, 6], bias=False)
    expected = [[wide_kernels(u, v, 2, "relu", math.sqrt(2), 0.0, [5, 6], bias=False)[1] for v in x2.tolist()] for u in x1.tolist()]
    torch.testing.assert_close(kernel, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)  # quadrature


@pytest.mark.parametrize("depth", [0, 1, 4, 30])
def test_of_one_input_he_weights_keep_the_variance_and_the_kernel_counts_layers(depth):
    x = inputs()
    norms = x.square().sum(1) / D
    torch.testing.assert_close(infinite_nngp(x, depth=depth).diagonal(), 2 * norms, rtol=1e-13, atol=0)  # rounding per layer
    torch.testing.assert_close(infinite_ntk(x, depth=depth).diagonal(), 2 * (depth + 1) * norms, rtol=1e-13, atol=0)
    widths = list(range(3, 3 + depth))
    expected = D * norms * (1 + sum(widths) / D) + depth + 1  # exact mean at any width; every bias adds 1
    torch.testing.assert_close(infinite_ntk(x, depth=depth, widths=widths).diagonal(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-9, 1e-6])
def test_near_inputs_have_the_kernel_of_one_input_to_first_order_in_their_distance(case, distance):
    x = inputs()
    near = x + distance * torch.nn.functional.normalize(inputs(4, "direction"))
    kernel = infinite_ntk(x, near, depth=3, **settings(case)).diagonal()
    torch.testing.assert_close(kernel, infinite_ntk(x, depth=3, **settings(case)).diagonal(), rtol=10 * distance + 1e-14, atol=0)


def test_the_relu_kernel_is_steep_where_inputs_meet():
    x = inputs(1)
    across = torch.nn.functional.normalize(inputs(1, "across") - (inputs(1, "across") @ x.T) / x.square().sum() * x)
    distances = torch.tensor([[1e-11], [1e-8], [1e-5]], dtype=torch.float64)
    gap = 1 - infinite_ntk(x, x + distances * across, depth=1) / infinite_ntk(x, depth=1)
    slope = (distances / x.norm()).T / (2 * math.pi)  # half of the kernel falls by t / pi, from an arc cosine of 1 - t^2/2
    torch.testing.assert_close(gap, slope, rtol=1e-3, atol=1e-15)  # next order t; rounding of 1 - ratio


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [infinite_nngp, infinite_ntk])
def test_kernels_are_symmetric_positive_semidefinite_and_blocks_of_a_larger_one(case, kernel):
    x = torch.cat([inputs(6), inputs(2), -inputs(1), torch.zeros(1, D)])  # doubles, an opposite and zero
    whole = kernel(x, depth=2, **settings(case))
    assert torch.equal(whole, whole.T)
    assert torch.linalg.eigvalsh(whole).min() > -1e-14 * whole.max()  # rounding
    torch.testing.assert_close(kernel(x[:3], x[2:], depth=2, **settings(case)), whole[:3, 2:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", [infinite_nngp, infinite_ntk])
def test_relu_kernels_without_biases_are_homogeneous(kernel):
    x = inputs()
    torch.testing.assert_close(kernel(3 * x, 0.5 * x, depth=3), 1.5 * kernel(x, depth=3), rtol=1e-12, atol=1e-12)  # rounding
    assert torch.equal(kernel(0 * x, x, depth=3), torch.zeros(4, 4, dtype=torch.float64))


def test_opposite_inputs_share_no_relu_unit():
    x = inputs(1)
    kernel = infinite_nngp(x, -x, depth=1)
    assert abs(float(kernel)) < 1e-15 * float(infinite_nngp(x, depth=1))  # rounding
    assert abs(float(infinite_ntk(x, -x, depth=1))) < 1e-15 * float(infinite_ntk(x, depth=1))


def test_a_linear_model_has_the_kernel_of_its_inputs():
    x = inputs()
    model = initialize(MLP(D, [], 1), "he", stream(0, "init")).double()
    torch.testing.assert_close(
        infinite_ntk(x, depth=0, widths=[]), empirical_ntk(model, x, reduce="trace"), rtol=1e-13, atol=1e-13
    )  # reordered sums


def test_zero_inputs_agree_with_the_convention_of_torch_for_the_slope_at_zero():
    x = torch.cat([torch.zeros(1, D, dtype=torch.float64), inputs(1)])
    model = initialize(MLP(D, [4], 2), "he", stream(0, "init")).double()
    ours = infinite_ntk(x, depth=1, widths=[4])
    theirs = empirical_ntk(model, x, reduce="trace") / 2
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-13, atol=1e-13)  # only the last bias counts, whatever the weights


def relative_errors(make, limit, x: torch.Tensor) -> torch.Tensor:
    """``[widths, seeds]``: Frobenius distance of the mean over outputs to the limit for this width, over its norm."""
    rows = []
    for width in WIDTHS:
        models = [make(width, stream(seed, "init", width)) for seed in range(SEEDS)]
        kernels = [empirical_ntk(m, x, reduce="trace", method="jacobian") / 2 for m in models]  # of two outputs
        rows.append([float((k - limit(width)).norm() / limit(width).norm()) for k in kernels])
    return torch.tensor(rows)


def assert_root_law(errors: torch.Tensor) -> None:
    """Mean errors fall as width^(-1/2): the slope of their logarithms, with its standard error over seeds."""
    logs, spans = errors.log(), torch.tensor(WIDTHS, dtype=torch.float32).log()
    weights = (spans - spans.mean()) / (spans - spans.mean()).square().sum()
    slope, sem = float(weights @ logs.mean(1)), float((weights.square() * logs.var(1) / errors.shape[1]).sum().sqrt())
    assert sem < 0.05, f"blind test: slope {slope} +- {sem}"
    assert abs(slope + 0.5) < 4 * sem, f"slope {slope} +- {sem}"


def test_wide_networks_of_standard_parameterization_approach_the_limit_as_the_root_of_the_width():
    def make(width: int, generator: torch.Generator) -> torch.nn.Module:
        return initialize(MLP(D, [width, width], 2), "he", generator).double()

    x = inputs()
    assert_root_law(relative_errors(make, lambda width: infinite_ntk(x, depth=2, widths=[width, width]), x))


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_wide_networks_of_ntk_parameterization_approach_the_limit_as_the_root_of_the_width(activation):
    function = {"relu": torch.relu, "erf": torch.erf}[activation]

    def make(width: int, generator: torch.Generator) -> torch.nn.Module:
        return WideMLP(D, width, 2, 2, function, (1.3, 0.4), generator)

    x = inputs()
    limit = infinite_ntk(x, depth=2, activation=activation, weight_std=1.3, bias_std=0.4)
    assert_root_law(relative_errors(make, lambda _: limit, x))


def test_the_covariance_of_random_networks_is_the_nngp_kernel():
    x, stds = inputs(2), (1.3, 0.4)
    with torch.no_grad():
        f = torch.cat([WideMLP(D, 64, 1, 100, torch.erf, stds, stream(seed, "draw"))(x) for seed in range(400)], dim=1)
    exact = infinite_nngp(x, depth=1, activation="erf", weight_std=stds[0], bias_std=stds[1])
    products = f[:, None] * f[None]  # [n, n, draws], for one hidden layer without bias at any width
    by_network = products.reshape(2, 2, 400, 100).mean(3)
    sem = by_network.std(2) / math.sqrt(400)
    assert bool((sem < 0.02 * exact.diagonal().min()).all())
    assert bool(((by_network.mean(2) - exact).abs() < 4 * sem).all())


def test_outputs_do_not_share_a_kernel():
    x = inputs(3)
    model = WideMLP(D, 4096, 1, 2, torch.relu, (1.4, 0.3), stream(0, "init"))
    kernel = empirical_ntk(model, x)
    limit = infinite_ntk(x, depth=1, weight_std=1.4, bias_std=0.3)
    error = (kernel - limit[:, :, None, None] * torch.eye(2)).norm() / kernel.norm()
    assert error < 0.1  # a few times 4096^(-1/2)


def test_images_are_flattened_and_single_precision_stays():
    x = torch.randn(3, 2, 4, 4, generator=stream(0, "images"))
    kernel = infinite_ntk(x, depth=2)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel, infinite_ntk(x.double().reshape(3, -1), depth=2).float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rleu"}, "Unknown activation 'rleu'. Did you mean 'relu'"),
        ({"depth": -1}, "depth, weight_std and bias_std must be finite and not negative. Got -1"),
        ({"weight_std": math.inf}, "must be finite and not negative. Got 2, inf and"),
        ({"bias_std": -0.1}, "must be finite and not negative. Got 2, .* and -0.1"),
        ({"widths": [3]}, r"widths must be 2 positive numbers, one for each hidden layer. Got \[3\]"),
        ({"widths": [3, 0]}, r"widths must be 2 positive numbers, one for each hidden layer. Got \[3, 0\]"),
    ],
)
def test_settings_that_make_no_network_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        infinite_ntk(inputs(), **{"depth": 2, **options})


@pytest.mark.parametrize(
    ("x1", "x2", "message"),
    [
        (torch.zeros(0, 3), None, "x1 must hold at least one example"),
        (torch.full((2, 3), math.nan), None, "x1 must be finite"),
        (torch.ones(2, 3), torch.ones(2, 4), "x1 and x2 must share the input shape"),
    ],
)
@pytest.mark.parametrize("kernel", [infinite_nngp, infinite_ntk])
def test_inputs_without_a_kernel_are_refused(kernel, x1, x2, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(kernel)(x1, x2, depth=1)  # before any type checker
