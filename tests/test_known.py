"""A structure that an earlier call found out is used again for the same forward pass, and for no other."""

import pytest
import torch
from reference import ntk_by_definition
from torch import nn

from ntklib.kernels import empirical_ntk, known, streaming
from ntklib.models import build, recalibrated
from ntklib.random import stream


@pytest.fixture(autouse=True)
def searches(monkeypatch) -> list[int]:
    """Grows by one whenever a structure has to be found out; starts with nothing known."""
    known.forget()
    found: list[int] = []
    find = streaming._find_structure
    monkeypatch.setattr(streaming, "_find_structure", lambda *args: [found.append(1), find(*args)][1])
    return found


def inputs(n: int = 3, *shape: int) -> torch.Tensor:
    return torch.randn(n, *(shape or (4,)), generator=stream(0, "inputs"), dtype=torch.float64)


def assert_exact(model: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(empirical_ntk(model, x), ntk_by_definition(model, x, x), rtol=1e-12, atol=1e-12)


class Branching(nn.Module):
    """Adds a bias by hand when it is told to, by a number, a buffer or the class."""

    everyone = False

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.late = nn.Linear(4, 2), nn.Parameter(torch.ones(2))
        self.number, self.word, self.size = 0, "plain", (0, 0)
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
        self.double().eval()

    def forward(self, x):
        told = self.number or self.word != "plain" or self.size != (0, 0) or bool(self.flag) or Branching.everyone
        return self.linear(x) + self.late.square() if told else self.linear(x)


@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit"])
def test_another_network_of_the_same_build_and_other_weights_needs_no_search(name, searches):
    shape = (1, 8, 8)
    for seed in range(3):
        model = build(name, input_shape=shape, num_classes=2, width=4, seed=seed).double().eval()
        x = inputs(2, *shape)
        assert_exact(recalibrated(model, x) if seed else model, x)
    assert len(searches) == 1


def test_what_differs_in_the_forward_pass_is_found_out_anew(searches):
    model, x = Branching(), inputs()
    assert_exact(model, x)
    changes = [("number", 1), ("word", "other"), ("size", (0, 1)), ("flag", torch.ones((), dtype=torch.bool))]
    for i, (name, value) in enumerate(changes):
        before = getattr(model, name)
        setattr(model, name, value)
        assert_exact(model, x)
        setattr(model, name, before)
        assert len(searches) == 2 + i
    assert_exact(model, x)
    assert len(searches) == 1 + len(changes)  # the first build is still known


def test_what_the_fingerprint_cannot_see_is_seen_in_the_pass(searches, monkeypatch):
    model, x = Branching(), inputs()
    assert_exact(model, x)
    monkeypatch.setattr(Branching, "everyone", True)
    assert_exact(model, x)  # found out during the pass, and then anew
    assert len(searches) == 2


@pytest.mark.parametrize("change", ["shape", "dtype", "frozen", "subset", "mode of a module", "hook", "tied"])
def test_other_inputs_parameters_and_modes_are_other_builds(change, searches):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double().eval()
    x, options = inputs(), {}
    empirical_ntk(model, x)
    if change == "shape":
        x = inputs(3, 4)[:, None].expand(3, 1, 4)
        model.append(nn.Flatten())
    elif change == "dtype":
        model, x = model.float(), x.float()
    elif change == "frozen":
        model[0].bias.requires_grad_(False)
    elif change == "subset":
        options = {"params": ["0.weight"]}
    elif change == "mode of a module":
        model[1].train()
    elif change == "hook":
        model[1].register_forward_hook(lambda *args: 2 * args[-1])
    else:
        model[2].weight = model[0].weight
    empirical_ntk(model, x, **options)
    assert len(searches) == 2


def test_models_with_attributes_that_are_not_plain_values_are_looked_at_every_time(searches):
    model = nn.Sequential(nn.Linear(4, 2)).double()
    model.table = {"a": 1}
    for _ in range(2):
        assert_exact(model, inputs())
    assert len(searches) == 2


def test_the_oldest_structure_makes_room(monkeypatch, searches):
    monkeypatch.setattr(known, "KEPT", 2)
    models = [nn.Sequential(nn.Linear(4, c)).double() for c in (1, 2, 3)]
    for model in models:
        empirical_ntk(model, inputs())
    empirical_ntk(models[1], inputs())
    assert len(searches) == 3
    empirical_ntk(models[0], inputs())
    assert len(searches) == 4
