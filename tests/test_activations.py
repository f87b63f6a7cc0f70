"""Functions of every number: however they are called, kernels are those of the definition, and no work is done in vain."""

import pytest
import torch
import torch.nn.functional as F
from engine_case import assert_kernel
from hypothesis import given
from hypothesis import strategies as st
from reference import ntk_by_definition
from torch import nn

from ntklib import empirical_ntk
from ntklib.kernels.activations import Activation, ReLU, in_order_of
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.uses import ACTIVATIONS
from ntklib.random import stream

BY_RULE = {
    "F.relu": F.relu,
    "F.relu, named": lambda z: F.relu(input=z, inplace=False),
    "torch.relu": torch.relu,
    "Tensor.relu": lambda z: z.relu(),
    "F.gelu": F.gelu,
    "F.gelu, tanh": lambda z: F.gelu(z, approximate="tanh"),
    "F.silu": F.silu,
    "F.mish": F.mish,
    "F.softplus": F.softplus,
    "F.softplus, beta 3": lambda z: F.softplus(z, 3.0),
    "F.elu": F.elu,
    "F.elu, alpha 0.5": lambda z: F.elu(z, 0.5),
    "F.selu": F.selu,
    "F.celu, alpha 2": lambda z: F.celu(z, alpha=2.0),
    "F.leaky_relu, slope 0.2": lambda z: F.leaky_relu(z, negative_slope=0.2),
    "F.tanh": F.tanh,
    "F.sigmoid": F.sigmoid,
    "torch.tanh": torch.tanh,
    "torch.sigmoid": torch.sigmoid,
    "torch.erf": torch.erf,
    "Tensor.tanh": lambda z: z.tanh(),
    "Tensor.sigmoid": lambda z: z.sigmoid(),
    "Tensor.erf": lambda z: z.erf(),
}
WITHOUT_RULE = {
    "in place": lambda z: F.relu(z + 0, inplace=True),
    "in place, by position": lambda z: F.relu(z + 0, True),
    "method in place": lambda z: (z + 0).relu_(),
    "in place, another": lambda z: F.silu(z + 0, inplace=True),
    "without a rule": lambda z: F.hardtanh(z, -0.7, 0.6),
}
EVERY = BY_RULE | WITHOUT_RULE


class Net(nn.Module):
    """Linear maps and channels-last images around a function; its value is used twice."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second, self.head = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2), nn.Linear(8, 2)

    def forward(self, x):
        z = self.function(self.first(x))
        z = self.function(self.second(z)) + z[:, :2, 1:, 1:]
        return self.head(z.flatten(1))


def example(function):
    torch.manual_seed(0)
    return Net(function).double(), torch.randn(3, 1, 4, 4, generator=stream(0, "activations"), dtype=torch.float64)


def kinds(model, x):
    with prepared(Request(model, x, None, None)) as (program, _, _):
        return [kind for kind, _ in program.uses]


@pytest.mark.parametrize("name", EVERY)
def test_kernels_through_it_hold_the_inner_products_of_gradients(name):
    model, x = example(EVERY[name])
    assert_kernel(empirical_ntk(model, x, method="structured"), ntk_by_definition(model, x, x))
    rule = "ReLU" if "relu" in name and "leaky" not in name else "Activation"
    assert kinds(model, x).count(rule) == (2 if name in BY_RULE else 0)


def test_every_function_with_a_rule_is_tried():
    tried = {name.partition(",")[0].partition(".")[::2] for name in BY_RULE}
    homes = {"F": F, "torch": torch, "Tensor": torch.Tensor}
    assert {getattr(homes[home], name) for home, name in tried} == ACTIVATIONS


def test_a_function_of_a_parameter_or_with_a_parameter_in_it_has_no_rule():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.tensor([0.3, -0.4, 0.9])), nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.inner(x)) * torch.tanh(self.scale)

    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(4, 3, dtype=torch.float64)
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x, x))
    assert kinds(model, x) == ["Linear", "Activation", "Activation"]  # the parameter is given to every example as its own copy


def test_the_derivative_is_0_where_relu_has_its_kink():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    x = torch.randn(3, 2, dtype=torch.float64)
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x, x))


def test_the_derivative_is_taken_once_for_all_output_directions():
    shapes = []
    op = Activation(lambda z: (shapes.append(z.shape), z.sin())[1])
    x, g = torch.randn(3, 4), torch.randn(7, 3, 4)
    op.forward(x)
    torch.testing.assert_close(op.pull_back(g), g * x.cos())
    assert shapes == [x.shape] * 2


def test_nothing_is_pulled_back_to_what_stands_before_the_first_wanted_parameter(monkeypatch):
    pulled = []
    for kind in (Activation, ReLU):
        plain = kind.pull_back
        monkeypatch.setattr(kind, "pull_back", lambda op, g, plain=plain: pulled.append(type(op)) or plain(op, g))
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)]
    model, x = nn.Sequential(*layers).double(), torch.randn(3, 3, dtype=torch.float64)
    found = empirical_ntk(model, x, params=["4.weight"])
    assert set(pulled) == {Activation}
    assert kinds(model, x).count("ReLU") == 1
    with prepared(Request(model, x, None, None, params=["4.weight"])) as (program, _, _):
        assert [kind for kind, _ in program.uses] == ["Linear", "Activation"]
    for w in model.parameters():
        w.requires_grad_(w is model[4].weight)
    assert_kernel(found, ntk_by_definition(model, x, x))


@given(order=st.permutations(range(3)), other=st.permutations(range(3)))
def test_gradients_are_brought_into_the_order_of_the_values_in_memory(order, other):
    shape = (2, 3, 4)

    def laid_out(order):
        x = torch.randn([shape[i] for i in order], dtype=torch.float64)
        return x.permute([order.index(i) for i in range(3)])

    x, g = laid_out(order), torch.stack([laid_out(other) for _ in range(5)])
    ordered = in_order_of(x, g)
    torch.testing.assert_close(ordered, g, rtol=0, atol=0)
    assert ordered.stride()[1:] == x.stride()


@pytest.mark.parametrize("x", [torch.randn(2, 1, 1).expand(2, 3, 4), torch.randn(0, 3, 4)], ids=["repeated in memory", "empty"])
def test_values_without_an_order_of_their_own_leave_gradients_as_they_are(x):
    g = torch.randn(5, *x.shape)
    assert in_order_of(x, g) is g


def test_an_infinite_gradient_of_a_dead_unit_stays_dead():
    op = ReLU()
    op.forward(torch.tensor([[-1.0, 2.0]]))
    assert op.pull_back(torch.tensor([[[float("inf"), 3.0]]])).tolist() == [[[0.0, 3.0]]]


def test_functions_without_parameters_emit_nothing():
    assert list(ReLU().factors(torch.zeros(1, 1, 1))) == []
