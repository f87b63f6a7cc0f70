"""Laws of matrix-free products with the empirical NTK."""

import math

import numpy as np
import pytest
import torch
from reference import flatten_by_definition, gradients_by_definition, ntk_by_definition
from scipy.sparse.linalg import aslinearoperator, cg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntklib import operator as operators
from ntklib.models import MLP, ResNet, calibrate_batch_norm, initialize
from ntklib.operator import JacobianProducts, NTKOperator
from ntklib.random import stream

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed, "data"), dtype=dtype)


def mlp(widths=(4, 3), *, d: int = 5, c: int = 3, **options) -> nn.Module:
    return initialize(MLP(d, list(widths), c, **options), "standard", stream(0, "init")).double()


def resnet() -> nn.Module:
    model = ResNet("resnet18", in_channels=2, num_classes=2, width=2)
    initialize(model, "he", stream(0, "init")).double()
    return calibrate_batch_norm(model, normal(12, 2, 8, 8, seed=2)).eval()


class Attention(nn.Module):
    """A normalised self-attention layer over the rows of an input, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.maps, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys, values = self.maps(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(queries @ keys.transpose(1, 2) / 2, dim=-1)
        return self.head((weights @ values).mean(1))


def attention() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention().double()


def transformer() -> nn.Module:
    """PyTorch's own layer, whose fused attention has no forward derivative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).double().eval()


MODELS = {
    "relu": (mlp, (5,)),
    "tanh": (lambda: mlp(activation="tanh"), (5,)),
    "resnet": (resnet, (2, 8, 8)),
    "attention": (attention, (3, 4)),
    "transformer": (transformer, (3, 4)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Make a model, inputs, and their kernel by definition, as a matrix."""
    make, shape = MODELS[request.param]
    model, x = make(), normal(4, *shape)
    return model, x, flatten_by_definition(ntk_by_definition(model, x, x))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_products_are_those_of_the_kernel_of_inner_products_of_gradients(case, chunk_size):
    model, x, kernel = case
    operator = NTKOperator(model, x, chunk_size=chunk_size)
    scale = float(kernel.abs().max())
    block, vector = normal(len(kernel), 5, seed=1), normal(len(kernel), seed=2)
    for v in (block, vector, block[:, :1], vector):  # the last of a kept linearization
        torch.testing.assert_close(operator @ v, kernel @ v, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(operator.to_dense(), kernel, rtol=1e-12, atol=1e-12 * scale)
    assert (operator.shape, operator.dtype, operator.device.type) == (kernel.shape, torch.float64, "cpu")
    assert (operator @ block[:, :0]).shape == (len(kernel), 0)


def test_products_are_linear_symmetric_and_positive(case):
    model, x, _ = case
    operator = NTKOperator(model, x)
    u, v = normal(operator.shape[0], seed=3), normal(operator.shape[0], seed=4)
    ku, kv = operator @ u, operator @ v
    torch.testing.assert_close(operator @ (2 * u - v), 2 * ku - kv, rtol=1e-11, atol=1e-11 * float(ku.abs().max()))
    assert float(u @ kv) == pytest.approx(float(v @ ku), rel=1e-11, abs=1e-11 * float(u.norm() * kv.norm()))
    pulled = (gradients_by_definition(model, x).flatten(0, 1) * v[:, None]).sum(0)  # J^T v
    assert float(v @ kv) == pytest.approx(float(pulled.square().sum()), rel=1e-11)
    assert operator.T is operator
    assert operator.adjoint() is operator


@pytest.mark.parametrize(
    ("parameters", "columns", "budget"),
    [(2**22, 64, 1), (1, 64, 2**29), (2**22, 3, 2**29), (2**22, 64, 3000), (100, 2, 1000)],
)
def test_how_products_are_cut_into_groups_does_not_matter(monkeypatch, parameters, columns, budget):
    model, x = mlp(activation="tanh"), normal(6, 5)
    v = normal(18, 7, seed=1)
    expected = NTKOperator(model, x) @ v
    monkeypatch.setattr(operators, "PARAMETERS", parameters)
    monkeypatch.setattr(operators, "MAX_COLUMNS", columns)
    monkeypatch.setattr(operators, "BUDGET", budget)
    for chunk_size in (None, 4):
        torch.testing.assert_close(NTKOperator(model, x, chunk_size=chunk_size) @ v, expected, **ROUNDING)


def test_groups_keep_to_the_budget(monkeypatch):
    model, x = mlp([50]), normal(64, 5)
    f, theta = operators.restricted_model(model, None, None)
    per_example = JacobianProducts(f, theta, x, None)._bytes_per_example
    assert 8 * 50 <= per_example <= 8 * (5 + 50 + 50 + 3)  # inputs, hidden units before and after, outputs, in float64
    monkeypatch.setattr(operators, "BUDGET", 40 * per_example)
    jacobian = JacobianProducts(f, theta, x, None)
    for k in (1, 4, 9, 100):
        parts = jacobian._chunks(k)
        assert sum(map(len, parts)) == 64
        assert len(parts[0]) == max(1, 40 // (k + 1))
    assert JacobianProducts(f, theta, x, 10).columns_at_a_time == 4
    assert JacobianProducts(f, theta, x, 1000).columns_at_a_time == 1


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made while it is active."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_no_tensor_of_the_size_of_the_kernel_or_the_jacobian_is_made():
    model, x = mlp([30, 30], c=10), normal(200, 5)
    p = sum(w.numel() for w in model.parameters())
    operator, v = NTKOperator(model, x), normal(2000, seed=1)
    with _Largest() as largest:
        operator @ v
    assert 200 * 30 <= largest.numel <= 4 * 200 * 30  # hidden layers of all examples; the Jacobian has 2000 p, the kernel 2000^2
    assert largest.numel < 2000 * p / 50


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_later_training_does_not_move_the_operator(chunk_size):
    model, x = resnet(), normal(3, 2, 8, 8)
    operator, v = NTKOperator(model, x, chunk_size=chunk_size), normal(6, seed=1)
    expected = operator @ v
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().sum().backward()  # moves running statistics
    optimizer.step()
    assert torch.equal(operator @ v, expected)
    moved = NTKOperator(model.eval(), x) @ v
    assert (moved - expected).abs().max() > 1e-3 * expected.abs().max()


def test_making_and_using_the_operator_leaves_model_and_random_numbers_as_they_were():
    model, x = resnet(), normal(2, 2, 8, 8)
    model(x).sum().backward()
    model.stem[2].train()  # a module whose mode does not matter
    tensors = {**model.state_dict(), **{f"grad of {name}": w.grad for name, w in model.named_parameters()}}
    before = {name: value.clone() for name, value in tensors.items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    v = normal(4, seed=1).requires_grad_()
    product = NTKOperator(model, x) @ v
    assert not product.requires_grad
    assert [name for name, value in before.items() if not torch.equal(value, tensors[name])] == []
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(w.requires_grad for w in model.parameters())


def test_parameters_add_up_and_an_inner_output_is_a_network_of_its_own():
    model, x = mlp([4, 3], activation="tanh"), normal(4, 5)
    names, v = [name for name, _ in model.named_parameters()], normal(12, seed=1)
    parts = [NTKOperator(model, x, params=group) @ v for group in (names[:1], names[1:])]
    torch.testing.assert_close(parts[0] + parts[1], NTKOperator(model, x) @ v, **ROUNDING)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inner = flatten_by_definition(ntk_by_definition(net[:2], x, x))
    torch.testing.assert_close(NTKOperator(net, x, output="1").to_dense(), inner, **ROUNDING)


def test_a_tied_weight_counts_once():
    shared = nn.Linear(1, 1, bias=False).double()
    x, w = normal(3, 1), float(shared.weight.detach())
    torch.testing.assert_close(NTKOperator(nn.Sequential(shared, shared), x).to_dense(), 4 * w**2 * x @ x.T, **ROUNDING)


def test_scipy_solves_with_the_operator():
    model, x = mlp(activation="tanh"), normal(6, 5)
    operator = NTKOperator(model, x)
    kernel, ridge, y = operator.to_dense().numpy(), 0.1, normal(18, seed=1).numpy()
    products = operator.to_scipy()
    assert (products.shape, products.dtype) == ((18, 18), np.float64)
    block = normal(18, 4, seed=2).numpy()
    for left, right in ((products @ y, kernel @ y), (products @ block, kernel @ block), (products.T @ y, kernel @ y)):
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(products.rmatvec(y), products.matvec(y))
    shifted = products + aslinearoperator(ridge * np.eye(18))
    solution, failed = cg(shifted, y, rtol=1e-12)
    assert failed == 0
    np.testing.assert_allclose(solution, np.linalg.solve(kernel + ridge * np.eye(18), y), rtol=1e-9)  # 1e-12 times the condition


def test_float32_networks_take_and_give_float32():
    model, x = mlp(), normal(4, 5)
    v, expected = normal(12, 2, seed=1), NTKOperator(mlp(), x) @ normal(12, 2, seed=1)
    operator = NTKOperator(model.float(), x.float())
    product = operator @ v.float()
    torch.testing.assert_close(product, expected.float(), rtol=1e-4, atol=1e-4)  # sums of some hundred terms at 1e-7
    assert operator.to_scipy().dtype == np.float32
    assert (operator.to_scipy() @ v[:, 0].numpy()).dtype == np.float32


def test_it_says_what_it_is():
    assert repr(NTKOperator(mlp(), normal(4, 5))) == "NTKOperator(shape=(12, 12), dtype=torch.float64, device='cpu')"


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (normal(11), r"shape \(12, 12\) takes \[12\] or \[12, k\]. Got \(11,\)"),
        (normal(2, 12), r"takes \[12\] or \[12, k\]. Got \(2, 12\)"),
        (normal(12, 2, 2), r"Got \(12, 2, 2\)"),
        (normal(12).float(), "must be torch.float64 on cpu, as the operator. Got torch.float32 on cpu"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(v, message):
    with pytest.raises(ValueError, match=message):
        NTKOperator(mlp(), normal(4, 5)) @ v


def test_only_tensors_are_multiplied():
    with pytest.raises(TypeError):
        NTKOperator(mlp(), normal(4, 5)) @ math.pi


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mlp().requires_grad_(False), {}, "at least one trainable parameter"),
        (mlp(), {"chunk_size": 0}, "chunk_size must be at least 1. Got 0"),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), {}, "must be in eval mode"),
        (nn.Sequential(nn.Dropout(), nn.Linear(5, 2)), {}, "must be deterministic"),
    ],
)
def test_models_and_options_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        NTKOperator(model, normal(4, 5), **options)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match=r"x must hold at least one example. Got shape \(0, 5\)"):
        NTKOperator(mlp(), normal(0, 5))
