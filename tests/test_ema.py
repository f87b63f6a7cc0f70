"""Laws of moving averages of parameters, and of training that carries them."""

import copy

import pytest
import torch
from test_training import dataset, linear
from torch import nn

from ntklib import ntk_trace
from ntklib.models import MLP, build, initialize, recalibrated
from ntklib.random import stream
from ntklib.training import ExponentialAverages, State, adamw, loop_by_optimizer, sgd

LAWS = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order
DECAYS = (0.0, 0.5, 0.97)


def perturb(model: nn.Module, step: int) -> list[torch.Tensor]:
    """Move all parameters in place, as an optimizer does; returns copies."""
    generator = stream(step, "perturb")
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn(w.shape, generator=generator, dtype=w.dtype))
    return [w.detach().clone() for w in model.parameters()]


def walk(steps: int, **options):
    model = linear()
    path = [[w.detach().clone() for w in model.parameters()]]
    averages = ExponentialAverages(model, DECAYS, **options)
    for step in range(steps):
        path.append(perturb(model, step))
        averages.update()
    return model, averages, path


def weighted_sum(path, tau: float) -> list[torch.Tensor]:
    """Closed form: weight tau^n on the start and (1 - tau) tau^(n - s) on the parameters after step s."""
    n = len(path) - 1
    weights = [tau**n, *((1 - tau) * tau ** (n - s) for s in range(1, n + 1))]
    return [sum(w * step[i] for w, step in zip(weights, path, strict=True)) for i in range(len(path[0]))]


@pytest.mark.parametrize("tau", DECAYS)
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_an_average_is_the_sum_with_geometric_weights(tau, steps):
    _, averages, path = walk(steps)
    expected = weighted_sum(path, tau)
    for got, wanted in zip(averages.averaged(tau).values(), expected, strict=True):
        torch.testing.assert_close(got, wanted, **LAWS)
    squares = sum(float((z - w).square().sum()) for z, w in zip(path[-1], expected, strict=True))
    assert averages.distance(tau) == pytest.approx(squares**0.5, rel=1e-12, abs=1e-12)


def test_updated_before_the_step_it_is_the_average_of_the_main_paper_which_is_a_step_late():
    """z2_{n+1} = tau z2_n + (1 - tau) z1_n, from z2_0 = z1_0."""
    model = linear()
    averages, printed = ExponentialAverages(model, [0.8]), ExponentialAverages(model, [0.8])
    for step in range(6):
        before = [w.clone() for w in averages.averaged(0.8).values()]
        printed.update()
        for got, wanted in zip(printed.averaged(0.8).values(), before, strict=True):
            torch.testing.assert_close(got, wanted, **LAWS)
        perturb(model, step)
        averages.update()


def test_an_average_with_decay_rate_zero_is_the_network_itself():
    model, averages, _ = walk(5)
    for got, wanted in zip(averages.averaged_model(0.0).parameters(), model.parameters(), strict=True):
        assert torch.equal(got, wanted)
    assert averages.distance(0.0) == 0


def batch_norm_network(seed: int = 0) -> nn.Module:
    return build("resnet18", input_shape=(1, 8, 8), num_classes=3, width=1, seed=seed)


def train_a_little(buffers: str):
    data = dataset(12, (1, 8, 8), dtype=torch.float32)
    states = list(sgd(batch_norm_network(), data, lr=0.1, batch_size=4, epochs=2, ema_decays=[0.6], ema_buffers=buffers))
    return states[-1], data


def test_copied_buffers_are_those_of_the_network_in_training():
    state, _ = train_a_little("copy")
    mine, its = dict(state.averages.averaged_model(0.6).named_buffers()), dict(state.model.named_buffers())
    assert mine
    assert all(torch.equal(mine[k], its[k]) for k in its)


def test_averaged_buffers_are_averaged_as_parameters_are():
    data = dataset(12, (1, 8, 8), dtype=torch.float32)
    options = {"lr": 0.1, "batch_size": 4, "epochs": 2, "measure_at": range(7)}
    path = [
        {k: b.double().clone() for k, b in s.model.named_buffers() if b.is_floating_point()}
        for s in sgd(batch_norm_network(), data, **options)
    ]
    state, _ = train_a_little("average")
    mine = dict(state.averages.averaged_model(0.6).named_buffers())
    for name in path[0]:
        expected = weighted_sum([[p[name]] for p in path], 0.6)[0]
        torch.testing.assert_close(mine[name].double(), expected, rtol=1e-5, atol=1e-6)  # float32
    counts = [k for k in mine if k.endswith("num_batches_tracked")]
    assert all(torch.equal(mine[k], dict(state.model.named_buffers())[k]) for k in counts)


def test_the_choice_of_buffers_changes_no_average_of_parameters_and_no_distance():
    (a, _), (b, _) = train_a_little("copy"), train_a_little("average")
    for x, y in zip(a.averages.averaged_model(0.6).parameters(), b.averages.averaged_model(0.6).parameters(), strict=True):
        assert torch.equal(x, y)
    assert a.averages.distance(0.6) == b.averages.distance(0.6)


def test_an_averaged_network_is_a_network_for_every_probe_and_training_does_not_move_it():
    state, data = train_a_little("copy")
    averaged = recalibrated(state.averages.averaged_model(0.6), data.x_train)
    before = ntk_trace(averaged, data.x_test[:4]).mean
    with torch.no_grad():
        for w in state.model.parameters():
            w.add_(1.0)
    state.averages.update()
    assert ntk_trace(averaged, data.x_test[:4]).mean == before > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_training_with_averages_has_the_bits_of_training_without(optimizer, buffers):
    data = dataset(12, (1, 8, 8), dtype=torch.float32)

    def run(**options):
        loop = loop_by_optimizer(optimizer)
        return [
            (s.loss, {k: v.clone() for k, v in s.tensors().items() if not k.startswith("average.")})
            for s in loop(batch_norm_network(), data, lr=0.05, batch_size=4, epochs=2, seed=3, **options)
        ]

    plain, carried = run(), run(ema_decays=DECAYS, ema_buffers=buffers)
    assert len(plain) == len(carried) == 3
    for (_, a), (_, b) in zip(plain, carried, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_resumed_run_has_the_same_averages_bit_for_bit(optimizer, buffers):
    data = dataset(12, (1, 8, 8), dtype=torch.float32)

    def run(seed=0, **options):
        loop, momentum = loop_by_optimizer(optimizer), {"momentum": 0.9} if optimizer == "sgd" else {}
        options |= {"ema_decays": DECAYS, "ema_buffers": buffers, **momentum}
        marks = [0, 1, 4, 6]
        for s in loop(batch_norm_network(seed), data, lr=0.05, batch_size=4, epochs=2, measure_at=marks, **options):
            yield s.step, {k: v.clone() for k, v in s.tensors().items()}, [s.averages.distance(tau) for tau in DECAYS]

    whole = list(run())
    assert any(k.startswith("average.2.") for k in whole[0][1])
    for i in range(3):
        rest = list(run(seed=8, resume=whole[i][:2]))
        assert [r[0] for r in rest] == [w[0] for w in whole[i + 1 :]]
        for (_, got, far), (_, wanted, distance) in zip(rest, whole[i + 1 :], strict=True):
            assert far == distance
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[k], wanted[k]) for k in got)


def test_a_frozen_parameter_is_no_part_of_the_average():
    model = initialize(MLP(4, [3], 2), "standard", stream(0, "init"))
    next(model.parameters()).requires_grad_(False)
    averages = ExponentialAverages(model, [0.9])
    assert len(averages.averaged(0.9)) == len(list(model.parameters())) - 1
    averaged = averages.averaged_model(0.9)
    assert torch.equal(next(averaged.parameters()), next(model.parameters()))


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    averages = ExponentialAverages(model, [0.5])
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averages.update()
    averaged = averages.averaged_model(0.5)
    assert averaged[2].weight is averaged[0].weight
    torch.testing.assert_close(averaged[0].weight, model[0].weight - 0.5)
    assert averages.distance(0.5) == pytest.approx(0.5 * 3, rel=1e-6)  # nine weights moved by 1/2


@pytest.mark.parametrize("tau", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_rate_outside_its_range_is_refused(tau):
    with pytest.raises(ValueError, match=r"decay rate must be in \[0, 1\).*Got"):
        ExponentialAverages(linear(), [0.9, tau])


@pytest.mark.parametrize("decays", [[], [0.9, 0.9]])
def test_decay_rates_are_some_and_each_once(decays):
    with pytest.raises(ValueError, match="At least one decay rate is required, each once"):
        ExponentialAverages(linear(), decays)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choice of buffers.*'coppy'"):
        ExponentialAverages(linear(), [0.9], "coppy")
    with pytest.raises(ValueError, match=r"decay rate.*'0\.99'.*0\.9"):
        ExponentialAverages(linear(), [0.9]).averaged_model(0.99)


@pytest.mark.parametrize("change", ["decays", "network", "none"])
def test_averages_of_another_run_are_refused(change):
    averages = ExponentialAverages(linear(), [0.9])
    other = {
        "decays": ExponentialAverages(linear(), [0.8]).tensors(),
        "network": ExponentialAverages(initialize(MLP(4, [3], 2), "standard", stream(0, "init")), [0.9]).tensors(),
        "none": {},
    }
    with pytest.raises(ValueError, match="must be averages of this network"):
        averages.restore(other[change])


def test_a_state_without_averages_has_no_tensors_of_them():
    state = next(adamw(linear(), dataset(), lr=0.1, batch_size=4, epochs=1))
    assert isinstance(state, State)
    assert state.averages is None
    assert not [k for k in state.tensors() if k.startswith("average")]


def test_averages_share_no_memory_with_the_network():
    model = linear()
    averages = ExponentialAverages(model, [0.5])
    start = copy.deepcopy(averages.averaged(0.5))
    perturb(model, 0)
    assert all(torch.equal(start[k], v) for k, v in averages.averaged(0.5).items())
