"""Networks trained in one stack: each as if it were alone, whatever happens to the others."""

import pandas as pd
import pytest
import torch
from crashes import crash_at
from torch import nn

from ntklib import Run, data
from ntklib.estimators import ntk_trace
from ntklib.models.initialization import initialize
from ntklib.models.mlp import MLP
from ntklib.random import stream
from ntklib.training import gradient_descent, loop_by_optimizer, parameter_norm, replicated_gradient_descent, replicated_minibatches
from ntklib.training.replicas import StackedMLP

SEEDS = (0, 1, 2)


def network(seed: int, **options) -> MLP:
    model = MLP(64, [5, 4], 3, **{"activation": "tanh", **options})
    return initialize(model, "standard", stream(seed, "init")).double()


def networks(**options) -> list[MLP]:
    return [network(seed, **options) for seed in SEEDS]


def problem(n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 8, 8, generator=stream(0, "x"), dtype=torch.float64)
    return x, torch.arange(n) % 3


def digits() -> data.Dataset:
    images = data.load("digits", num_train=50, num_test=10)
    y = images.y_train % 3
    return data.Dataset("digits", images.x_train.double(), y, images.x_test.double(), images.y_test % 3, 3)


def assert_same(found: nn.Module, alone: nn.Module) -> None:
    for (name, w), (other, v) in zip(found.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(w, v, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"bias": False}, {"activation": "identity"}])
def test_outputs_of_a_stack_are_those_of_its_networks(options):
    models, (x, _) = networks(**options), problem()
    stack = StackedMLP(models)
    out = stack(x.expand(3, *x.shape))
    assert len(stack) == 3
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(x), rtol=1e-13, atol=1e-14)
        assert_same(stack.unstack(i), model)
    assert sum(w.numel() for w in stack.parameters()) == 3 * sum(w.numel() for w in models[0].parameters())


@pytest.mark.parametrize("loss", ["half_mse", "cross_entropy"])
def test_every_replica_of_full_batch_descent_equals_its_own_run(loss):
    lrs, (x, y) = (0.3, 0.1, 0.9), problem()
    states = list(replicated_gradient_descent(networks(), x, y, lrs=lrs, steps=30, loss=loss, measure_at={0, 7}))
    assert [s.step for s in states] == [0, 7, 30]
    for i, lr in enumerate(lrs):
        runs = gradient_descent(network(i), x, y, lr=lr, steps=30, loss=loss, measure_at={0, 7})
        alone = [(s.loss, ntk_trace(s.model, x).mean) for s in runs]
        assert float(states[-1].losses[i]) == pytest.approx(alone[-1][0], rel=1e-11)
        assert ntk_trace(states[-1].stack.unstack(i), x).mean == pytest.approx(alone[-1][1], rel=1e-11)


@pytest.mark.parametrize(
    ("optimizer", "options"), [("sgd", {"momentum": 0.9, "weight_decay": 1e-2}), ("adam", {}), ("adamw", {"weight_decay": 0.1})]
)
def test_every_replica_of_minibatch_training_equals_its_own_run(optimizer, options):
    images, common = digits(), {"lr": 0.01, "batch_size": 16, "epochs": 3, "schedule": "cosine", "measure_at": {0, 5}, **options}
    *_, last = replicated_minibatches(networks(), images, optimizer=optimizer, seeds=SEEDS, **common)
    for i, seed in enumerate(SEEDS):
        *_, alone = loop_by_optimizer(optimizer)(network(i), images, seed=seed, **common)
        assert (last.step, last.epoch) == (alone.step, alone.epoch)
        assert float(last.losses[i]) == pytest.approx(alone.loss, rel=1e-10)
        assert_same(last.stack.unstack(i), alone.model)


def test_a_replica_that_diverges_is_marked_stays_and_harms_no_other():
    (x, y), lrs = problem(), (0.3, 1e200, 0.1)
    states = list(replicated_gradient_descent(networks(), x, y, lrs=lrs, steps=12, measure_at={6}))
    *_, broken = gradient_descent(network(1), x, y, lr=lrs[1], steps=12)
    assert broken.diverged
    assert [s.step for s in states] == [broken.step, 6, 12]
    assert all(s.fallen.tolist() == [False, True, False] and not s.diverged for s in states)
    assert states[-1].loss == pytest.approx(float(states[-1].losses[[0, 2]].mean()), rel=1e-15)  # of those that still train
    for i in (0, 2):
        *_, alone = gradient_descent(network(i), x, y, lr=lrs[i], steps=12)
        assert_same(states[-1].stack.unstack(i), alone.model)
    for w, v in zip(states[-1].stack.unstack(1).parameters(), broken.model.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-11, atol=1e-13, equal_nan=True)


def broken(seed: int) -> MLP:
    model = network(seed)
    with torch.no_grad():
        model.layers[1].weight.fill_(torch.inf)
    return model


def test_when_all_have_diverged_the_run_ends():
    x, y = problem()
    *_, last = replicated_gradient_descent([broken(0), broken(1)], x, y, lrs=[0.1, 0.2], steps=50)
    assert (last.fallen.tolist(), last.diverged, last.step) == ([True, True], True, 0)
    *_, last = replicated_minibatches([broken(0), broken(1)], digits(), lr=0.1, batch_size=16, epochs=3, seeds=[0, 1])
    assert (last.fallen.tolist(), last.diverged, last.epoch) == ([True, True], True, 1)


def test_a_replica_that_diverges_on_minibatches_harms_no_other():
    images, common = digits(), {"lr": 0.05, "batch_size": 16, "epochs": 3, "momentum": 0.9}
    *_, last = replicated_minibatches([network(0), broken(1), network(2)], images, seeds=SEEDS, **common)
    assert (last.fallen.tolist(), last.diverged) == ([False, True, False], False)
    for i in (0, 2):
        *_, alone = loop_by_optimizer("sgd")(network(i), images, seed=i, **common)
        assert_same(last.stack.unstack(i), alone.model)


def full_batch(resume=None):
    x, y = problem()
    return replicated_gradient_descent(networks(), x, y, lrs=(0.3, 1e200, 0.1), steps=12, measure_at={5, 9}, resume=resume)


def minibatch(resume=None):
    options = {"optimizer": "adamw", "lr": 0.01, "batch_size": 16, "epochs": 3, "measure_at": {5, 7}}
    return replicated_minibatches(networks(), digits(), seeds=SEEDS, resume=resume, **options)


@pytest.mark.parametrize("loop", [full_batch, minibatch])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(loop):
    def noted(states):
        return [(s.step, s.losses.tolist(), s.fallen.tolist(), {k: v.clone() for k, v in s.tensors().items()}) for s in states]

    whole = noted(loop())
    middle = next(i for i, entry in enumerate(whole) if entry[0] >= 5)
    rest = noted(loop(resume=(whole[middle][0], whole[middle][3])))
    assert len(rest) == len(whole) - middle - 1 > 0
    for (step, losses, diverged, tensors), (other, expected, fallen, kept) in zip(rest, whole[middle + 1 :], strict=True):
        assert (step, diverged) == (other, fallen)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
        for name in kept:
            torch.testing.assert_close(tensors[name], kept[name], rtol=0, atol=0, equal_nan=True)


FULL = {"lrs": (0.3, 1e200, 0.1), "steps": 12}
MINI = {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine", "batch_size": 16, "epochs": 3, "seeds": SEEDS}


def compute(root, settings):
    """A stored run of a stack that measures each of its networks; what it measured and the steps this call computed."""
    steps = []
    with Run("test", settings, save_every=0, root=root) as run:
        if settings is FULL:
            states = run.states(replicated_gradient_descent, networks(), *problem(), measure_at={5, 9})
        else:
            states = run.states(replicated_minibatches, networks(), digits(), measure_at={0, 5, 7})
        for state in states:
            steps.append(state.step)
            run.log(state, lr=state.lr, mean_loss=state.loss)
            for i, loss in enumerate(state.losses):
                norm = parameter_norm(state.stack.unstack(i))
                run.log(state, layer=str(i), loss=loss, norm=norm, fallen=state.fallen[i])
    return run.result, steps


@pytest.mark.parametrize("write", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("settings", [FULL, MINI])
def test_an_interrupted_run_of_a_stack_resumes_to_the_same_history(tmp_path, settings, write):
    whole, steps = compute(tmp_path / "whole", settings)
    with crash_at(write):
        compute(tmp_path / "crashed", settings)
    resumed, rest = compute(tmp_path / "crashed", settings)
    assert rest == steps[write // 3 :]  # three files per save: history, checkpoint, manifest
    assert len(steps) > 2
    assert resumed.status == whole.status == "complete"
    pd.testing.assert_frame_equal(whole.history, resumed.history, check_exact=True)
    assert compute(tmp_path / "crashed", settings)[1] == []


def test_a_run_of_a_stack_whose_networks_all_fall_has_diverged(tmp_path):
    settings = {"lrs": (1e200, 1e200), "steps": 12}
    with Run("test", settings, root=tmp_path) as run:
        steps = [s.step for s in run.states(replicated_gradient_descent, networks()[:2], *problem())]
    assert run.result.diverged
    assert steps[-1] < 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: next(replicated_gradient_descent([], x, y, lrs=[], steps=1)), "at least one MLP"),
        (lambda x, y: next(replicated_gradient_descent([nn.Linear(64, 3)], x, y, lrs=[1.0], steps=1)), r"Got \['Linear'\]"),
        (
            lambda x, y: next(replicated_gradient_descent([network(0), network(1, bias=False)], x, y, lrs=[1.0, 1.0], steps=1)),
            "Got 2 different builds",
        ),
        (lambda x, y: next(replicated_gradient_descent(networks(), x, y, lrs=[1.0], steps=1)), "each of the 3 networks. Got 1"),
        (
            lambda *_: next(replicated_minibatches(networks(), digits(), lr=1.0, batch_size=5, epochs=1, seeds=[0])),
            "one seed for each of the 3 networks. Got 1",
        ),
        (
            lambda *_: next(
                replicated_minibatches(networks(), digits(), optimizer="sdg", lr=1.0, batch_size=5, epochs=1, seeds=SEEDS)
            ),
            "Unknown optimizer 'sdg'. Did you mean 'sgd'",
        ),
    ],
)
def test_what_cannot_be_trained_together_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem())
