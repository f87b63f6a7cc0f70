"""Laws of training loops, losses, schedules and augmentation."""

import copy
import math

import pytest
import torch
from reference import adam_by_hand, cosine_by_hand, linear_gradient, loss_by_loops, sgd_by_hand, windows
from torch import nn

from ntklib.data import Dataset
from ntklib.data.augment import augment_by_name, crop_flip
from ntklib.models import MLP, build, initialize
from ntklib.random import stream
from ntklib.training import (
    LOSSES,
    State,
    accuracy,
    gradient_descent,
    gradient_flow_time,
    learning_rate,
    loop_by_optimizer,
    loss_by_name,
    one_hot,
    parameter_norm,
    sgd,
    steps_per_epoch,
)

LAWS = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order


def dataset(n: int = 11, shape: tuple[int, ...] = (1, 2, 2), c: int = 3, dtype: torch.dtype = torch.float64) -> Dataset:
    generator = stream(0, "data")
    x = torch.randn(n, *shape, generator=generator, dtype=dtype)
    y = torch.randint(c, (n,), generator=generator)
    y[:c] = torch.arange(c)
    return Dataset("tiny", x, y, x, y, c)


def linear(c: int = 3) -> nn.Module:
    return initialize(MLP(4, [], c), "standard", stream(0, "init")).double()


def start(**options) -> State:
    return next(sgd(linear(), dataset(), lr=0.1, batch_size=4, epochs=1, **options))


def content(state: State) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.tensors().items()}


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [w.detach().clone() for w in model.parameters()]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("momentum", "weight_decay", "nesterov", "schedule"),
    [(0.0, 0.0, False, "constant"), (0.9, 0.0, False, "constant"), (0.9, 0.05, False, "cosine"), (0.8, 0.1, True, "cosine")],
)
@pytest.mark.parametrize("n", [11, 9])
def test_sgd_takes_the_steps_of_its_definition(n, momentum, weight_decay, nesterov, schedule, loss):
    data, model, epochs, lr, seed = dataset(n), linear(), 3, 0.2, 5
    batches = []
    for epoch in range(epochs):
        order = torch.randperm(n, generator=stream(seed, "batches", epoch))
        for index in (order[:4], order[4:8], *([order[8:]] if n == 11 else [])):  # a last batch of one is left out
            batches.append((data.x_train[index].flatten(1), data.y_train[index]))
    total = len(batches)
    rates = [cosine_by_hand(lr, s, total) if schedule == "cosine" else lr for s in range(total)]
    by_hand = list(sgd_by_hand(*weights(model), batches, rates, loss, momentum, weight_decay, nesterov))
    options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "schedule": schedule, "loss": loss}
    states = sgd(model, data, lr=lr, batch_size=4, epochs=epochs, seed=seed, measure_at=range(1, total + 1), **options)
    for state, (w, b, value) in zip(states, by_hand, strict=True):
        for got, expected in zip(state.model.parameters(), (w, b), strict=True):
            torch.testing.assert_close(got.detach(), expected, **LAWS)
        assert state.loss == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(("decay", "schedule"), [(0.0, "constant"), (0.3, "cosine")])
def test_adam_takes_the_steps_of_its_definition(name, decay, schedule):
    data, model, betas, lr, total = dataset(9), linear(), (0.8, 0.95), 0.2, 6
    orders = [torch.randperm(9, generator=stream(5, "batches", epoch)) for epoch in range(3)]
    batches = [(data.x_train[i].flatten(1), data.y_train[i]) for order in orders for i in (order[:4], order[4:8])]
    rates = [cosine_by_hand(lr, s, total) if schedule == "cosine" else lr for s in range(total)]
    by_hand = adam_by_hand(*weights(model), batches, rates, betas, decay, name == "adamw")
    options = {"beta1": betas[0], "beta2": betas[1], "weight_decay": decay, "schedule": schedule}
    states = loop_by_optimizer(name)(model, data, lr=lr, batch_size=4, epochs=3, seed=5, measure_at=range(1, 7), **options)
    for state, expected in zip(states, by_hand, strict=True):
        for got, wanted in zip(state.model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach(), wanted, rtol=1e-11, atol=1e-12)  # a quotient of reordered sums


@pytest.mark.parametrize("n", [1, 2, 8, 9, 10, 11, 12])
def test_an_epoch_has_as_many_steps_as_told(n):
    states = list(sgd(linear(), dataset(12) if n == 12 else shortened(n), lr=0.0, batch_size=4, epochs=3))
    assert states[-1].step == 3 * steps_per_epoch(n, 4)
    assert [s.epoch for s in states] == [0, 1, 2, 3]


def shortened(n: int) -> Dataset:
    whole = dataset(12)
    return Dataset("short", whole.x_train[:n], whole.y_train[:n], whole.x_test, whole.y_test, 3)


def test_the_step_schedule_divides_by_ten_at_epochs_80_and_120_of_160():
    rates = [learning_rate("step", 0.1, 391 * epoch, 391 * 160) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)
    assert learning_rate("step", 0.1, 391 * 80 - 1, 391 * 160) == 0.1
    assert learning_rate("step", 0.1, 391 * 120 - 1, 391 * 160) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(("momentum", "schedule"), [(0.0, "constant"), (0.9, "constant"), (0.5, "cosine"), (0.0, "cosine")])
def test_the_time_of_the_flow_is_the_way_under_a_constant_gradient(momentum, schedule):
    total, w, velocity, way = 30, 0.0, 0.0, [0.0]
    for step in range(total):
        velocity = momentum * velocity + 1.0
        w += (cosine_by_hand(0.2, step, total) if schedule == "cosine" else 0.2) * velocity
        way.append(w)
    assert gradient_flow_time(schedule, 0.2, momentum, total) == pytest.approx(way, rel=1e-12)


def test_a_momentum_of_one_has_no_time():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\). Got 1.0"):
        gradient_flow_time("constant", 0.1, 1.0, 5)


def test_an_unknown_optimizer_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Unknown optimizer 'adamv'.*adam"):
        loop_by_optimizer("adamv")


def test_the_loss_of_a_state_is_the_mean_since_the_last_measured_one():
    options = {"lr": 0.1, "batch_size": 4, "epochs": 4}
    each = [s.loss for s in sgd(linear(), dataset(), measure_at=range(13), **options)]
    some = {s.step: s.loss for s in sgd(linear(), dataset(), measure_at=[0, 2, 7], **options)}
    assert math.isnan(each[0])
    assert math.isnan(some.pop(0))
    means = {2: sum(each[1:3]) / 2, 7: sum(each[3:8]) / 5, 12: sum(each[8:13]) / 5}
    assert some == pytest.approx(means, rel=1e-12)  # reordered sum


@pytest.mark.parametrize(
    ("measure_at", "steps"),
    [(None, [0, 3, 6]), ([], [6]), ([0, 1, 4], [0, 1, 4, 6]), (range(7), list(range(7))), ([5, 99], [5, 6])],
)
def test_states_come_at_the_measured_steps_and_at_the_end(measure_at, steps):
    states = [
        (s.step, s.epoch, s.lr, s.total_steps, s.model.training, s.diverged)
        for s in sgd(linear(), dataset(), lr=0.1, batch_size=4, epochs=2, schedule="cosine", measure_at=measure_at)
    ]
    assert [s[0] for s in states] == steps
    assert [s[1] for s in states] == pytest.approx([step / 3 for step in steps])
    assert [s[2] for s in states] == pytest.approx([cosine_by_hand(0.1, step, 6) for step in steps], rel=1e-12, abs=1e-17)
    assert {s[3:] for s in states} == {(6, False, False)}


def with_dropout(seed: int, d: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    return initialize(model, "standard", stream(seed, "init"))


RESUMED = {
    "mlp": (lambda seed: build("mlp", input_shape=(1, 2, 2), num_classes=3, width=5, seed=seed), (1, 2, 2), "none"),
    "resnet": (lambda seed: build("resnet18", input_shape=(2, 8, 8), num_classes=3, width=2, seed=seed), (2, 8, 8), "crop_flip"),
    "dropout": (with_dropout, (1, 2, 2), "none"),
}


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "sgd") for name in RESUMED), ("resnet", "adam"), ("resnet", "adamw")])
def test_a_run_resumed_from_any_measured_step_ends_with_the_same_bits(name, optimizer):
    make, shape, augment = RESUMED[name]
    data = dataset(shape=shape, dtype=torch.float32)

    def run(model, **resume):
        options = {"lr": 0.1, "weight_decay": 1e-3, "batch_size": 4, "epochs": 2, "schedule": "cosine", "augment": augment}
        options |= {"momentum": 0.9} if optimizer == "sgd" else {}
        for s in loop_by_optimizer(optimizer)(model, data, **options, seed=1, measure_at=[0, 2, 3, 5], **resume):
            yield (s.step, s.epoch, s.loss, s.lr, s.diverged), content(s)

    whole = list(run(make(0)))
    for k, (facts, tensors) in enumerate(whole):
        checkpoint = {key: v.clone() for key, v in tensors.items()}
        rest = list(run(make(7), resume=(facts[0], checkpoint)))
        assert [f for f, _ in rest] == [f for f, _ in whole[k + 1 :]]
        for (_, got), (_, expected) in zip(rest, whole[k + 1 :], strict=True):
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert all(torch.equal(checkpoint[key], tensors[key]) for key in tensors)  # the caller's checkpoint is not written to


def test_the_seed_decides_batches_augmentation_and_dropout_and_the_global_generator_is_not_touched():
    data, model = dataset(), with_dropout(0).double()

    def end(seed: int) -> torch.Tensor:
        *_, last = sgd(copy.deepcopy(model), data, lr=0.1, batch_size=11, epochs=2, seed=seed)
        return torch.cat([w.reshape(-1) for w in weights(last.model)])

    state = torch.get_rng_state()
    assert torch.equal(end(3), end(3))
    assert (end(3) - end(4)).abs().max() > 1e-3  # whole batches: by dropout alone
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("make", "augment"), [(with_dropout, "none"), (lambda _, d: MLP(d, [], 3), "crop_flip")])
def test_masks_and_augmentations_differ_from_step_to_step(make, augment):
    data = dataset(4, (1, 8, 8))
    data.x_train[:], data.y_train[:] = data.x_train[0].clone(), 0  # equal examples, lr 0: losses differ by chance alone
    states = sgd(make(0, 64).double(), data, lr=0.0, batch_size=4, epochs=6, augment=augment, measure_at=range(1, 7))
    assert len({s.loss for s in states}) == 6


def test_batch_statistics_are_calibrated_before_the_first_state():
    data = dataset(shape=(2, 8, 8), dtype=torch.float32)
    model = build("resnet18", input_shape=(2, 8, 8), num_classes=3, width=2)
    state = next(sgd(model, data, lr=0.1, batch_size=4, epochs=1))
    mean = state.model.stem[0](data.x_train).mean((0, 2, 3)).detach()
    torch.testing.assert_close(state.model.stem[1].running_mean, mean, rtol=1e-4, atol=1e-5)  # float32
    assert float(mean.abs().max()) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rate_that_is_too_large_ends_in_a_diverged_state(loss):
    model = build("mlp", input_shape=(1, 2, 2), num_classes=3, width=8)
    data = dataset(dtype=torch.float32)
    states = [(s.step, s.diverged) for s in sgd(model, data, lr=1e12, batch_size=4, epochs=50, loss=loss)]
    assert [diverged for _, diverged in states] == [False] * (len(states) - 1) + [True]
    assert states[-1][0] < 150
    slow = [s.diverged for s in sgd(linear(), dataset(), lr=0.01, batch_size=4, epochs=2, loss=loss)]
    assert slow == [False] * 3


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_descent_takes_the_steps_of_its_definition(loss):
    data, model, lr = dataset(), linear(), 0.3
    w, b = weights(model)
    for state in gradient_descent(model, data.x_train, data.y_train, lr=lr, steps=10, loss=loss):
        for got, expected in zip(weights(state.model), (w, b), strict=True):
            torch.testing.assert_close(got, expected, **LAWS)
        x = data.x_train.flatten(1)
        assert state.loss == pytest.approx(loss_by_loops(loss, x @ w.T + b, data.y_train), rel=1e-12)
        grad_w, grad_b = linear_gradient(loss, w, b, x, data.y_train)
        w, b = w - lr * grad_w, b - lr * grad_b
    assert state.step == 10


@pytest.mark.parametrize(("measure_at", "steps"), [(None, [0, 1, 2, 3]), ([], [3]), ([0, 2], [0, 2, 3])])
def test_gradient_descent_yields_the_measured_steps_and_the_last(measure_at, steps):
    data = dataset()
    states = gradient_descent(linear(), data.x_train, data.y_train, lr=0.1, steps=3, measure_at=measure_at)
    assert [s.step for s in states] == steps


@pytest.mark.parametrize("measure_at", [None, [0, 2]])
def test_gradient_descent_resumed_from_any_measured_step_ends_with_the_same_bits(measure_at):
    data = dataset()

    def run(**resume):
        states = gradient_descent(linear(), data.x_train, data.y_train, lr=0.1, steps=4, measure_at=measure_at, **resume)
        return [(s.step, s.loss, content(s)) for s in states]

    whole = run()
    for k, (step, _, tensors) in enumerate(whole):
        rest = run(resume=(step, tensors))
        assert [r[:2] for r in rest] == [w[:2] for w in whole[k + 1 :]]
        assert all(torch.equal(r[2][key], w[2][key]) for r, w in zip(rest, whole[k + 1 :], strict=True) for key in tensors)


def test_gradient_descent_above_the_stable_rate_ends_in_a_diverged_state():
    data = dataset()
    states = gradient_descent(linear(), data.x_train, data.y_train, lr=1e9, steps=1000, measure_at=[0])
    *before, last = [(s.step, s.diverged) for s in states]
    assert before == [(0, False)]
    assert last[1]
    assert last[0] < 1000


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_means_over_examples_of_their_definitions(loss):
    outputs = 3 * torch.randn(7, 4, generator=stream(0, "outputs"), dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    assert float(loss_by_name(loss)(outputs, y)) == pytest.approx(loss_by_loops(loss, outputs, y), rel=1e-12)  # reordered sum


def test_one_hot_targets_have_a_one_at_the_label():
    assert one_hot(torch.tensor([1, 0]), 3, torch.float64).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_accuracy_counts_the_examples_whose_largest_output_is_the_label(batch_size):
    data, model = dataset(40), linear()
    outputs = [model(x[None])[0].tolist() for x in data.x_train]
    right = sum(out[label] == max(out) for out, label in zip(outputs, data.y_train.tolist(), strict=True))
    assert 0 < right < 40
    assert accuracy(model, data.x_train, data.y_train, batch_size) == right / 40


def test_the_parameter_norm_is_over_trainable_parameters():
    model = linear()
    model.layers[1].bias.requires_grad_(False)
    squares = sum(v * v for v in model.layers[1].weight.detach().reshape(-1).tolist())
    assert parameter_norm(model) == pytest.approx(math.sqrt(squares), rel=1e-12)  # reordered sum


def test_the_cosine_falls_from_the_rate_through_half_of_it_to_zero():
    assert learning_rate("cosine", 0.3, 0, 10) == 0.3
    assert learning_rate("cosine", 0.3, 5, 10) == pytest.approx(0.15, rel=1e-12)
    assert learning_rate("cosine", 0.3, 10, 10) == 0
    rates = [learning_rate("cosine", 0.3, step, 10) for step in range(11)]
    assert rates == pytest.approx([cosine_by_hand(0.3, step, 10) for step in range(11)], rel=1e-12, abs=1e-17)
    assert {learning_rate("constant", 0.3, step, 10) for step in range(11)} == {0.3}


@pytest.mark.parametrize("padding", [1, 2])
def test_crop_flip_shifts_the_padded_image_and_mirrors_half_of_them(padding):
    x = torch.randn(200, 2, 4, 5, generator=stream(0, "images"))
    out = crop_flip(x, stream(1, "augment"), padding)
    assert out.shape == x.shape
    found = []
    for image, augmented in zip(x, out, strict=True):
        found += [k for k, window in enumerate(windows(image, padding)) if torch.equal(window, augmented)][:1]
    assert len(found) == 200  # windows of a random image differ
    assert set(found) == set(range(2 * (2 * padding + 1) ** 2))  # every shift, mirrored or not
    assert abs(sum(k % 2 for k in found) / 200 - 0.5) < 4 * math.sqrt(0.25 / 200)


def test_augmentation_is_decided_by_the_generator():
    x = torch.randn(5, 3, 8, 8, generator=stream(0, "images"))
    first, again, other = (crop_flip(x, stream(seed, "augment")) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(crop_flip(x.double(), stream(1, "augment")), first.double())
    assert augment_by_name("none")(x, stream(0, "augment")) is x
    assert augment_by_name("crop_flip") is crop_flip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_by_name("half_mes"), "Unknown loss 'half_mes'. Did you mean 'half_mse'"),
        (lambda: learning_rate("cosin", 0.1, 0, 1), "Unknown schedule 'cosin'. Did you mean 'cosine'"),
        (lambda: start(loss="crossentropy"), "Did you mean 'cross_entropy'"),
        (lambda: start(schedule="cosin"), "Did you mean 'cosine'"),
        (lambda: start(augment="crop"), "Unknown augmentation 'crop'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(call, message):
    with pytest.raises(ValueError, match=message):
        call()
