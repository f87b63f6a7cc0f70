"""Laws of FixMatch: the pseudo-label loss, the two streams, the steps against an oracle by hand, and resumption."""

import copy
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from ntklib import FixMatchSettings, Run
from ntklib.data import Dataset, WeakAndStrong, hide_labels, shrink
from ntklib.fixmatch_probe import FixMatchProbe
from ntklib.models import MLP, build, calibrate_batch_norm, initialize
from ntklib.phases import fall_and_rise
from ntklib.random import stream
from ntklib.training import fixmatch, learning_rate, measured_steps, pseudo_label_loss
from ntklib.training.fixmatch import Stream

LAWS = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 sums in another order
OPTIONS = {"lr": 0.2, "batch_size": 3, "mu": 2, "threshold": 0.4, "steps": 6, "padding": 1, "flip": False, "strong": "geometric"}


def partly(n: int = 30, num_labels: int = 6, c: int = 3, side: int = 6, dtype=torch.float64, **options):
    x = torch.rand(n, 1, side, side, generator=stream(0, "x"), dtype=dtype)
    y = torch.arange(n) % c
    x[:, 0, 0] += y[:, None]  # something to learn
    return hide_labels(Dataset("tiny", x, y, x[:5], y[:5], c), num_labels, **options)


def network(norm: bool = False, c: int = 3, side: int = 6) -> nn.Module:
    body = [nn.Flatten(), nn.Linear(side**2, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, c)]
    return initialize(nn.Sequential(*body), "xavier", stream(0, "init")).double()


def content(state) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.tensors().items()}


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=stream(0, "normal"), dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.9999])
def test_the_loss_of_pseudo_labels_by_loops(threshold):
    weak, strong = normal(20, 4, scale=2.0), normal(20, 4).flip(0)
    total, passed = 0.0, []
    for q, p in zip(weak.tolist(), strong.tolist(), strict=True):
        softmax = [math.exp(v) / sum(map(math.exp, q)) for v in q]
        best = softmax.index(max(softmax))
        passed.append(softmax[best] >= threshold)
        if passed[-1]:
            total -= math.log(math.exp(p[best]) / sum(map(math.exp, p)))
    found = pseudo_label_loss(weak, strong, threshold)
    assert float(found.loss) == pytest.approx(total / 20, rel=1e-12)  # a mean over all, not over those that pass
    assert found.mask.tolist() == passed
    assert found.labels.tolist() == weak.argmax(1).tolist()


def test_no_gradient_flows_through_the_weakly_augmented_images():
    weak, strong = normal(8, 3).requires_grad_(), normal(8, 3).flip(1).requires_grad_()
    pseudo_label_loss(weak, strong, 0.35).loss.backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0


def test_a_probability_at_the_threshold_passes_and_one_cannot_be_missed():
    certain = torch.tensor([[1000.0, 0.0], [0.0, 0.0]])
    assert pseudo_label_loss(certain, certain, 1.0).mask.tolist() == [True, False]
    assert pseudo_label_loss(certain, certain, 0.5).mask.tolist() == [True, True]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (4, 11), (5, 5)])
def test_a_stream_is_one_random_order_after_another(n, size):
    whole = Stream(n, size, 3, "labelled")
    places = torch.cat([whole.batch(step) for step in range(2 * n)])
    for k in range(2 * size):
        assert sorted(places[k * n : (k + 1) * n].tolist()) == list(range(n))
    assert torch.equal(Stream(n, size, 3, "labelled").batch(4), whole.batch(4))  # a function of the step
    others = [Stream(20, 20, seed, use).batch(k) for seed, use, k in ((3, "a", 0), (3, "a", 1), (4, "a", 0), (3, "b", 0))]
    assert not any(torch.equal(a, b) for a, b in combinations(others, 2))


def by_hand(model: nn.Module, data, options: dict, steps: int):
    """FixMatch with loops over images, one batch of all images, and SGD written out; yields numbers before each step."""
    augment = WeakAndStrong(data.black, data.white, options["padding"], options["flip"], options["strong"])
    b, mu, seed = options["batch_size"], options["mu"], 0
    labelled, unlabelled = (Stream(len(x), s, seed, u) for x, s, u in (
        (data.x_labelled, b, "labelled"), (data.x_unlabelled, mu * b, "unlabelled")))  # fmt: skip
    decay, momentum = options.get("weight_decay", 0.0), options.get("momentum", 0.9)
    velocity = [torch.zeros_like(w) for w in model.parameters()]
    calibrate_batch_norm(model, data.x_unlabelled)
    for step in range(steps):
        i, j = labelled.batch(step), unlabelled.batch(step)
        x = augment.weak(data.x_labelled[i], stream(seed, "augment_labelled", step))
        weak = augment.weak(data.x_unlabelled[j], stream(seed, "weak", step))
        strong = augment.strong(data.x_unlabelled[j], stream(seed, "strong", step))
        model.train()
        logs = model(torch.cat([x, weak, strong])).log_softmax(1)
        l1 = sum(-logs[k, data.y_labelled[i][k]] for k in range(b)) / b
        l2, passed, right = torch.zeros((), dtype=torch.float64), 0, 0
        for k in range(mu * b):
            confidence, label = logs[b + k].detach().exp().max(0)
            if confidence >= options["threshold"]:
                l2 = l2 - logs[b + mu * b + k, label] / (mu * b)
                passed, right = passed + 1, right + int(label == data.y_unlabelled[j][k])
        grads = torch.autograd.grad(l1 + options.get("lambda_u", 1.0) * l2, list(model.parameters()))
        rate = options["lr"] * math.cos(7 * math.pi * step / (16 * options["steps"]))
        with torch.no_grad():
            for w, g, v in zip(model.parameters(), grads, velocity, strict=True):
                g = g + (decay if w.ndim > 1 or options.get("decayed") == "all" else 0.0) * w  # noqa: PLW2901
                v.mul_(momentum).add_(g)
                w.sub_(rate * (g + momentum * v if options.get("nesterov") else v))
        yield float(l1.detach()), float(l2.detach()), passed / (mu * b), right / passed if passed else math.nan


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decayed": "all", "lambda_u": 3.0, "momentum": 0.5},
        {"threshold": 0.6, "mu": 3},
    ],
)
def test_steps_are_those_by_hand(norm, change):
    options, data = OPTIONS | change, partly()
    ours, theirs = network(norm), network(norm)
    states = fixmatch(ours, data, **options, measure_at=range(7))
    next(states)
    for expected in by_hand(theirs, data, options, 6):
        state = next(states)
        got = (state.loss_labelled, state.loss_unlabelled, state.mask_rate, state.pseudo_accuracy)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
        assert state.loss == pytest.approx(expected[0] + options.get("lambda_u", 1.0) * expected[1], rel=1e-9)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)  # float64, nine digits after six steps
    assert state.step == 6


def test_supervised_training_never_looks_at_unlabelled_images():
    data = partly()
    blind = partly()
    blind.x_unlabelled.fill_(math.nan)
    runs = [list(fixmatch(network(), d, **(OPTIONS | {"lambda_u": 0.0}))) for d in (data, blind)]
    assert all(torch.equal(v, content(runs[1][-1])[k]) for k, v in content(runs[0][-1]).items())
    assert math.isnan(runs[0][-1].mask_rate)
    assert math.isnan(runs[0][-1].loss_unlabelled)
    assert runs[0][-1].loss == runs[0][-1].loss_labelled


def test_with_a_threshold_no_prediction_reaches_training_is_supervised():
    ours, theirs = network(), network()
    *_, a = fixmatch(ours, partly(), **(OPTIONS | {"threshold": 1.0}))
    *_, b = fixmatch(theirs, partly(), **(OPTIONS | {"lambda_u": 0.0}))
    assert a.mask_rate == 0
    assert math.isnan(a.pseudo_accuracy)
    for v, w in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(v, w, **LAWS)


def test_labelled_images_may_be_strongly_augmented():
    weak, strong = (list(fixmatch(network(), partly(), **OPTIONS, labelled_augment=a))[-1] for a in ("weak", "strong"))
    assert weak.loss_labelled != strong.loss_labelled


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("norm", [True, False])
def test_an_interrupted_run_goes_on_bit_for_bit(norm, stop):
    options = OPTIONS | {"ema_decays": (0.5, 0.9), "ema_buffers": "average", "measure_at": range(7)}
    states = list(fixmatch(network(norm), partly(), **options, seed=2))
    whole = [(s.step, s.loss, s.mask_rate) for s in states]
    for k, state in enumerate(fixmatch(network(norm), partly(), **options, seed=2)):
        if k == stop:
            saved = content(state)
            break
    rest = list(fixmatch(network(norm), partly(), **options, seed=2, resume=(stop, saved)))
    assert [(s.step, s.loss, s.mask_rate) for s in rest] == whole[stop + 1 :]
    last = content(states[-1])
    assert content(rest[-1]).keys() == last.keys()
    assert all(torch.equal(v, last[k]) for k, v in content(rest[-1]).items())


def test_a_cached_run_that_was_interrupted_has_the_history_of_a_whole_one(tmp_path):
    settings = OPTIONS | {"ema_decays": (0.5,), "seed": 1, "device": "cpu"}

    def run(root, stop=None):
        with Run("fixmatch", settings, save_every=0, root=root) as run:
            for state in run.states(fixmatch, network(True), partly(), measure_at=range(7)):
                run.log(state, loss=state.loss, mask=state.mask_rate, right=state.pseudo_accuracy)
                if state.step == stop:
                    raise KeyboardInterrupt
        return run.history

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 3)
    assert run(tmp_path / "parts").equals(whole)


def test_averages_do_not_change_training_and_are_those_of_the_path():
    plain, averaged = network(True), network(True)
    *_, a = fixmatch(plain, partly(), **OPTIONS)
    states = fixmatch(averaged, partly(), **OPTIONS, ema_decays=(0.7,), measure_at=range(7))
    expected = None
    for state in states:
        now = state.model[1].weight.detach().clone()
        expected = now if expected is None else 0.7 * expected + 0.3 * now
    torch.testing.assert_close(state.averages.averaged(0.7)["1.weight"], expected, **LAWS)
    assert all(torch.equal(v, averaged.state_dict()[k]) for k, v in plain.state_dict().items())
    assert a.loss_labelled > 0


def test_a_diverged_run_says_so_and_ends():
    states = list(fixmatch(network(), partly(), **(OPTIONS | {"lr": 1e308, "steps": 20}), measure_at=range(21)))
    assert [s.diverged for s in states[:-1]] == [False] * (len(states) - 1)
    assert states[-1].diverged
    assert states[-1].step < 20


def test_dropout_depends_on_the_seed_and_leaves_the_global_generator():
    def last(seed):
        model, data = nn.Sequential(network(), nn.Dropout(0.5)), partly()
        before = torch.get_rng_state()
        *_, state = fixmatch(model, data, **OPTIONS, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return state.loss

    assert last(0) == last(0) != last(1)


@pytest.mark.parametrize("step", [0, 1, 500, 1000])
def test_the_rate_falls_along_seven_sixteenths_of_a_cosine(step):
    assert learning_rate("cosine_7_16", 0.03, step, 1000) == pytest.approx(0.03 * math.cos(7 / 16 * math.pi * step / 1000), rel=1e-12)


def test_the_last_rate_is_a_fifth_of_the_first():
    assert learning_rate("cosine_7_16", 1.0, 100, 100) == pytest.approx(0.19509, abs=1e-5)


def test_steps_at_which_to_measure():
    assert measured_steps(10, 4) == [0, 4, 8, 10]
    assert measured_steps(100, 50, 3) == [0, 1, 3, 13, 50, 100]  # 50^(0, 1/3, 2/3)
    assert measured_steps(3, 50, 3) == [0, 1, 3]
    with pytest.raises(ValueError, match="must be at least 1, early at least 0. Got 5, 0 and 0"):
        measured_steps(5, 0)


@pytest.mark.parametrize("num_labels", [3, 9])
@pytest.mark.parametrize("reuse", [True, False])
def test_labels_are_hidden_evenly_and_nothing_is_lost(num_labels, reuse):
    x = torch.arange(31.0)[:, None, None, None]
    y = torch.arange(31) % 3
    data = hide_labels(Dataset("tiny", x, y, x, y, 3), num_labels, seed=1, reuse_labelled=reuse)
    assert data.y_labelled.bincount().tolist() == [num_labels // 3] * 3
    assert torch.equal(data.y_labelled, data.x_labelled.flatten().long() % 3)
    assert torch.equal(data.y_unlabelled, data.x_unlabelled.flatten().long() % 3)
    kept = set(data.x_unlabelled.flatten().tolist())
    if reuse:
        assert kept == set(range(31))
    else:
        assert sorted([*kept, *data.x_labelled.flatten().tolist()]) == list(range(31))
    again, other = (hide_labels(Dataset("tiny", x, y, x, y, 3), num_labels, seed=s).x_labelled for s in (1, 2))
    assert torch.equal(again, data.x_labelled)
    assert not torch.equal(other, again)
    assert (float(data.black), float(data.white)) == (0, 30)


def test_shrunk_images_are_means_of_squares_standardised():
    x = torch.rand(12, 2, 4, 6, generator=stream(0, "x"), dtype=torch.float64)
    data = Dataset("tiny", x, torch.arange(12) % 3, x[:4], torch.arange(4) % 3, 3)
    small = shrink(data, 2)
    means = torch.stack([x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for i in range(2) for j in range(3)], 2)
    means = means.reshape(12, 2, 2, 3)
    for channel in range(2):
        part = means[:, channel]
        torch.testing.assert_close(small.x_train[:, channel], (part - part.mean()) / part.std(), **LAWS)
        torch.testing.assert_close(small.x_test[:, channel], (part[:4] - part.mean()) / part.std(), **LAWS)
    assert shrink(data, 1) is data


def test_the_probe_has_the_sets_of_the_source():
    data = partly(40, 6, dtype=torch.float32)
    augment = WeakAndStrong(data.black, data.white, 1, False, "geometric")
    probe = FixMatchProbe.draw(data, augment, 12, 0)
    assert [len(x) for x in (probe.labelled, probe.weak, probe.strong, probe.mixture)] == [6, 12, 12, 30]
    model = initialize(MLP(36, [], 3), "xavier", stream(0, "init"))
    confidence = model(probe.weak).softmax(1).amax(1)
    threshold = float(confidence.median()) + 1e-6
    sets = probe.sets(model, threshold)
    assert torch.equal(sets["pseudo"], torch.stack([s for s, q in zip(probe.strong, confidence, strict=True) if q >= threshold]))
    assert list(probe.sets(model, 1.0)) == ["labelled", "weak", "strong"]
    assert torch.equal(FixMatchProbe.draw(data, augment, 12, 0).strong, probe.strong)
    with pytest.raises(ValueError, match="num_probe must be between 1 and the 34 unlabelled images. Got 35"):
        FixMatchProbe.draw(data, augment, 35, 0)


def test_fall_and_rise_by_hand():
    found = fall_and_rise([0, 1, 4, 10], [4.0, 2.0, 8.0, 16.0], 20)
    assert found.minimum_at == 1 / 20
    assert found.fall == pytest.approx(math.log(2))
    assert found.rise == pytest.approx(math.log(8))
    assert fall_and_rise([5], [3.0], 10).rise == 0
    with pytest.raises(ValueError, match="same length, at least 1. Got 2 and 1"):
        fall_and_rise([0, 1], [1.0], 2)
    with pytest.raises(ValueError, match="positive and finite. Got 0"):
        fall_and_rise([0, 1], [1.0, 0.0], 2)


GOOD = {"dataset": "digits", "model": "cnn", "width": 4, "num_labels": 10, "lr": 0.03, "batch_size": 4, "mu": 2, "steps": 5,
        "padding": 1, "flip": False, "strong": "geometric", "eval_every": 2, "num_probe": 4, "num_train": 100}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": 0}, "mu must be at least 1.*set lambda_u=0. Got mu=0"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\].*Got 0.0"),
        ({"threshold": 1.1}, r"threshold must be in \(0, 1\].*Got 1.1"),
        ({"lambda_u": -1.0}, "lambda_u must not be negative. Got -1"),
        ({"ema_decays": [1.0]}, r"decay rate must be in \[0, 1\).*Got 1"),
        ({"ema_buffers": "keep"}, "Unknown choice of buffers 'keep'"),
        ({"strong": "cutout"}, "Unknown strong augmentation 'cutout'"),
        ({"decayed": "biases"}, "Unknown choice of decayed parameters 'biases'"),
        ({"labelled_augment": "none"}, "Unknown augmentation of labelled images 'none'"),
        ({"num_labels": 110}, "num_labels must be at most num_train = 100.*Got 110"),
        ({"schedule": "cosine_716"}, "Unknown schedule 'cosine_716'. Did you mean 'cosine_7_16'"),
        ({"method": "guess"}, "Unknown method 'guess'"),
        ({"model": "wrn28"}, "Unknown model 'wrn28'. Did you mean 'wrn28_2'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov requires a positive momentum"),
        ({"steps": 0}, "steps must be at least 1. Got 0"),
    ],
)
def test_a_wrong_setting_is_explained(change, message):
    assert FixMatchSettings(**GOOD).mu == 2
    with pytest.raises(ValueError, match=message):
        FixMatchSettings(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partly(num_labels=7), "positive multiple of the 3 classes, as many for each. Got 7"),
        (lambda: partly(num_labels=0), "positive multiple of the 3 classes.*Got 0"),
        (lambda: partly(num_labels=33), "at most 3 times the 10 images of the smallest class.*Got 33 of 30"),
        (lambda: partly(num_labels=30), "leave unlabelled ones. Got 30 of 30"),
        (lambda: next(fixmatch(network(), partly(), **(OPTIONS | {"mu": 0}))), "mu must be at least 1"),
        (lambda: next(fixmatch(network(), partly(), **(OPTIONS | {"strong": "x"}))), "Unknown strong augmentation 'x'"),
        (lambda: next(fixmatch(network(), partly(), **OPTIONS, schedule="x")), "Unknown schedule 'x'"),
        (lambda: next(fixmatch(network(), partly(), **OPTIONS, ema_decays=(1.0,))), "decay rate"),
        (lambda: shrink(Dataset("t", torch.ones(2, 1, 5, 4), torch.arange(2), torch.ones(1, 1, 5, 4), torch.arange(1), 2), 2),
         "divide height 5 and width 4 of the images. Got 2"),
    ],
)  # fmt: skip
def test_data_and_options_that_do_not_fit_are_refused_before_work_starts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wide_networks_train_and_move_their_statistics_with_every_batch():
    data = partly(30, 6, side=8, dtype=torch.float32)
    model = build("wrn10_2", input_shape=(1, 8, 8), num_classes=3, width=4, init="kaiming")
    before = copy.deepcopy(model)
    *_, state = fixmatch(model, data, **(OPTIONS | {"steps": 2, "lr": 0.01}))
    assert math.isfinite(state.loss)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked) >= 2 for m in norms)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
