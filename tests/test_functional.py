"""Laws of the pure function of a module, of flat parameters and of random streams."""

import pytest
import torch
from torch import nn

from ntklib.checks import check_rows_independent
from ntklib.directions import flatten_params, unflatten_params
from ntklib.functional import functional_model
from ntklib.random import stream

x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)).double()


def test_the_pure_function_at_the_current_parameters_is_the_module():
    model = small_net().eval()
    f, params = functional_model(model)
    assert torch.equal(f(params, x), model(x))


def test_the_pure_function_at_other_parameters_is_the_module_with_these_loaded():
    model, other = small_net().eval(), small_net().eval()
    out = functional_model(model)[0](dict(other.named_parameters()), x)
    assert torch.equal(out, other(x))
    assert not torch.equal(out, model(x))


def test_params_are_the_trainable_ones_without_copies():
    model = small_net().eval()
    model[0].weight.requires_grad_(False)
    _, params = functional_model(model)
    assert list(params) == [name for name, _ in model.named_parameters() if name != "0.weight"]
    assert all(w.data_ptr() == model.get_parameter(name).data_ptr() and not w.requires_grad for name, w in params.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), r"BatchNorm1d '1' in training mode.*model\.eval\(\)"),
        (nn.BatchNorm1d(3), r"Got BatchNorm1d in training mode"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "without running statistics"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), r"deterministic.*Dropout '1'"),
    ],
)
def test_a_module_whose_rows_interact_or_are_random_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        check_rows_independent(model)


@pytest.mark.parametrize("model", [small_net().eval(), nn.InstanceNorm1d(3), nn.LayerNorm(3)])
def test_a_module_whose_rows_do_not_interact_is_accepted(model):
    check_rows_independent(model)


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        functional_model(nn.Linear(3, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("model", "got"), [(nn.Unflatten(1, (3, 1)), r"\(4, 3, 1\)"), (nn.Flatten(0), r"\(12,\)"), (nn.RNN(3, 2), "tuple")]
)
def test_outputs_that_are_not_n_by_c_are_refused(model, got):
    f, params = functional_model(nn.Sequential(nn.Linear(3, 3), model).double())
    with pytest.raises(ValueError, match=rf"\[n, c\] with n = 4. Got {got}"):
        f(params, x)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_unflatten_inverts_flatten_and_keeps_leading_axes(leading):
    _, params = functional_model(small_net().eval())
    flat = torch.cat([w.reshape(-1) for w in params.values()])
    assert torch.equal(flatten_params(params), flat)
    parts = unflatten_params(flat.expand(*leading, -1), params)
    assert all(torch.equal(parts[k], w.expand(*leading, *w.shape)) for k, w in params.items())


def test_a_stream_is_a_function_of_its_seed_and_use():
    uses = [(0, "batches", 1), (1, "batches", 1), (0, "batches", 2), (0, "augment", 1), (0, "batches"), (0,)]
    first, again = ([torch.randn(4, generator=stream(*use)) for use in uses] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(first[i], first[j]) for i in range(len(uses)) for j in range(i))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match=r"non-negative integer\. Got -1"):
        stream(-1, "init")
