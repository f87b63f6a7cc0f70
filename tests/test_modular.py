"""Laws of modular addition: the task, its transformer, full-batch AdamW and noise on the inputs."""

import copy
import itertools
import math

import pytest
import torch
from reference import assert_mean, loss_by_loops, ntk_by_definition, trace_by_definition
from torch import nn
from torch.nn import functional as F

from ntklib import ModularSettings, Run, empirical_ntk, logit_perturbation, ntk_by_layer, ntk_trace
from ntklib.data import modular_addition
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.streaming import Structured
from ntklib.models import MLP, ModularTransformer
from ntklib.random import stream
from ntklib.training import accuracy, full_batch_adamw, log_steps, precise_cross_entropy

SIZES = {"width": 8, "heads": 2, "hidden": 10}


def transformer(p: int = 5, seed: int = 0, **sizes) -> ModularTransformer:
    """A small network in float64 whose biases are not zero."""
    model = ModularTransformer(p=p, seed=seed, **(SIZES | sizes)).double()
    with torch.no_grad():
        for b in (model.inner.bias, model.outer.bias):
            b.normal_(generator=stream(seed, "bias"))
    return model.eval()


@torch.no_grad()
def every_position(model: ModularTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a causal layer at all positions, one example, position and head at a time."""
    out = []
    d = model.position.shape[1]
    size = d // model.heads
    for example in tokens.tolist():
        h = [model.embed.weight[t] + model.position[i] for i, t in enumerate(example)]
        logits = []
        for i in range(3):
            heads = []
            for k in range(model.heads):
                rows = slice(k * size, (k + 1) * size)
                q = model.query.weight[rows] @ h[i]
                scores = [float(q @ (model.key.weight[rows] @ h[j])) / math.sqrt(size) for j in range(i + 1)]
                total = sum(math.exp(s) for s in scores)
                heads.append(sum(math.exp(s) / total * (model.value.weight[rows] @ h[j]) for j, s in enumerate(scores)))
            r = h[i] + model.project.weight @ torch.cat(heads)
            hidden = (model.inner.weight @ r + model.inner.bias).clamp(min=0)
            logits.append(model.unembed.weight @ (r + model.outer.weight @ hidden + model.outer.bias))
        out.append(torch.stack(logits))
    return torch.stack(out)


# -- the task ------------------------------------------------------------------------------------------------------------------


def test_the_split_is_a_partition_of_all_pairs_with_their_sums():
    data = modular_addition(7, 0.3, seed=1)
    assert (len(data.train), len(data.test)) == (14, 35)  # 0.3 * 49 = 14.7
    both = sorted(map(tuple, torch.cat([data.train, data.test]).tolist()))
    assert both == list(itertools.product(range(7), repeat=2))
    assert data.all_pairs().tolist() == [list(pair) for pair in both]
    assert data.sums(data.test).tolist() == [(a + b) % 7 for a, b in data.test.tolist()]
    assert data.tokens(data.train).tolist() == [[a, b, 7] for a, b in data.train.tolist()]
    one_hot = data.one_hot(data.train)
    assert torch.equal(one_hot.argmax(2), data.tokens(data.train))
    assert one_hot.sum() == 3 * 14


def test_the_split_is_a_function_of_its_seed_and_looks_random():
    a, b, other = (modular_addition(31, 0.5, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.train, b.train)
    assert not torch.equal(a.train, other.train)
    means = a.train.double().mean(0)
    assert (means - 15).abs().max() < 4 * math.sqrt((31**2 - 1) / 12 / len(a.train))


@pytest.mark.parametrize(
    ("p", "fraction", "message"),
    [
        (1, 0.5, "p must be at least 2.*Got 1"),
        (5, 0.03, "at least one of the 25 pairs for training and one for testing, so be at least 0.04 and below 1. Got 0.03"),
        (5, 1.0, "below 1. Got 1"),
    ],
)
def test_a_task_without_pairs_is_refused(p, fraction, message):
    with pytest.raises(ValueError, match=message):
        modular_addition(p, fraction)


@pytest.mark.parametrize("p", [4, 9, 91])
def test_a_modulus_that_is_not_prime_is_allowed_with_a_warning(p):
    with pytest.warns(UserWarning, match=f"p = {p} is not prime"):
        assert len(modular_addition(p, 0.5).train) == p * p // 2


def settings(**changes) -> ModularSettings:
    small = {"p": 5, "train_fraction": 0.5, **SIZES, "lr": 0.01, "weight_decay": 1.0, "steps": 9, "num_measured": 3, "num_probe": 4}
    return ModularSettings(**(small | {"num_kernel": 2, "epsilon": 0.01, "device": "cpu"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width must be a multiple of heads = 3. Got 8"),
        ({"train_fraction": 0.01}, "one of the 25 pairs"),
        ({"p": 1}, "p must be at least 2"),
        ({"loss": "cross"}, "Unknown loss 'cross'"),
        ({"device": "tpu"}, "device must be 'auto'"),
    ],
)
def test_settings_are_refused_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_settings_warn_of_a_modulus_that_is_not_prime():
    with pytest.warns(UserWarning, match="p = 6 is not prime"):
        settings(p=6)


# -- the network ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_logits_are_those_of_a_causal_layer_at_its_last_position(heads):
    model, data = transformer(heads=heads), modular_addition(5, 0.4)
    tokens = data.tokens(data.train)
    expected = every_position(model, tokens)[:, -1]
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)  # reordered sums
    torch.testing.assert_close(model(data.one_hot(data.train).double()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.folded(data.train), expected, rtol=1e-12, atol=1e-12)


def test_the_folded_order_has_the_same_gradients():
    model, data = transformer(p=7), modular_addition(7, 0.5)
    v = torch.randn(len(data.train), 7, generator=stream(0, "v"), dtype=torch.float64)
    params = list(model.parameters())
    plain = torch.autograd.grad((v * model(data.tokens(data.train))).sum(), params)
    folded = torch.autograd.grad((v * model.folded(data.train)).sum(), params)
    assert len(params) == 11
    for a, b in zip(plain, folded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["tokens", "one_hot"])
def test_the_kernel_is_exact_and_streamed(form):
    model, data = transformer(p=3), modular_addition(3, 0.5)
    x1, x2 = (getattr(data, form)(pairs) for pairs in (data.train, data.test[:2]))
    x1, x2 = (x.double() if form == "one_hot" else x for x in (x1, x2))
    expected = ntk_by_definition(model, x1, x2)
    torch.testing.assert_close(empirical_ntk(model, x1, x2), expected, rtol=1e-11, atol=1e-11)
    parts = ntk_by_layer(model, x1, x2)
    assert set(parts) == {"embed", "position", "query", "key", "value", "project", "inner", "outer", "unembed"}
    torch.testing.assert_close(sum(parts.values()), expected, rtol=1e-11, atol=1e-11)
    trace = trace_by_definition(ntk_by_definition(model, x1, x1)) / (len(x1) * 3)
    assert ntk_trace(model, x1).mean == pytest.approx(trace, rel=1e-11)
    with prepared(Request(model, x1, None, "norms")) as (program, _, _):
        assert isinstance(program, Structured)
        assert program.leaves == {"position"}


def test_weights_are_drawn_with_their_variances_and_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    model = ModularTransformer(p=40, width=96, heads=4, hidden=300, seed=2)
    for name, w in model.named_parameters():
        if name.endswith("bias"):
            assert not w.any()
        else:
            variance = 1 / (40 if name == "unembed.weight" else 96)
            assert float(w.detach().var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / w.numel())), name
    d, m = 96, 300
    assert sum(w.numel() for w in model.parameters()) == 41 * d + 3 * d + 4 * d * d + 2 * d * m + d + m + 40 * d
    again, other = (ModularTransformer(p=40, width=96, heads=4, hidden=300, seed=s) for s in (2, 3))
    assert torch.equal(model.query.weight, again.query.weight)
    assert not torch.equal(model.query.weight, other.query.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"p": 1}, "p must be at least 2"), ({"hidden": 0}, "at least 1. Got"), ({"heads": 3}, "multiple of heads")],
)
def test_a_network_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModularTransformer(**({"p": 5} | SIZES | sizes))


# -- loss and training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_the_precise_cross_entropy_is_the_cross_entropy(scale):
    outputs = scale * torch.randn(6, 4, generator=stream(0, "f"), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert float(precise_cross_entropy(outputs, y)) == pytest.approx(loss_by_loops("cross_entropy", outputs, y), rel=1e-12)


def test_it_keeps_its_relative_accuracy_in_single_precision_where_the_usual_one_rounds():
    gap = 19.0  # loss log(1 + 2 e^-19) = 1.1e-8
    outputs, y = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    share = 2 * math.exp(-gap) / (1 + 2 * math.exp(-gap))
    loss = precise_cross_entropy(outputs, y)
    (g,) = torch.autograd.grad(loss, outputs)
    assert float(loss.detach()) == pytest.approx(math.log1p(2 * math.exp(-gap)), rel=1e-5)
    assert g[0].tolist() == pytest.approx([-share, share / 2, share / 2], rel=1e-5)
    (usual,) = torch.autograd.grad(F.cross_entropy(outputs, y), outputs)
    assert abs(float(usual[0, 0]) + share) > 0.1 * share


def steps_by_hand(model: nn.Module, x, y, *, lr, beta1, beta2, decay, warmup, steps):
    """Parameters before each step and after the last, by AdamW's definition."""
    w = [v.detach().clone() for v in model.parameters()]
    m, s = [torch.zeros_like(v) for v in w], [torch.zeros_like(v) for v in w]
    for step in range(steps + 1):
        yield [v.clone() for v in w]
        leaves = [v.clone().requires_grad_() for v in w]
        named = dict(zip([k for k, _ in model.named_parameters()], leaves, strict=True))
        loss = F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)
        rate = lr * min(step / warmup, 1) if warmup else lr
        for k, g in enumerate(torch.autograd.grad(loss, leaves)):
            m[k], s[k] = beta1 * m[k] + (1 - beta1) * g, beta2 * s[k] + (1 - beta2) * g * g
            root = (s[k] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
            w[k] = (1 - rate * decay) * w[k] - rate * m[k] / (1 - beta1 ** (step + 1)) / root


@pytest.mark.parametrize("warmup", [0, 4])
def test_full_batch_adamw_takes_the_steps_of_its_definition(warmup):
    model, data = transformer(), modular_addition(5, 0.6)
    x, y = data.tokens(data.train), data.sums(data.train)
    options = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "warmup": warmup, "steps": 7}
    expected = list(steps_by_hand(copy.deepcopy(model), x, y, decay=0.3, **options))
    states = full_batch_adamw(model, x, y, weight_decay=0.3, **options)
    for state, wanted in zip(states, expected, strict=True):
        assert state.lr == pytest.approx(0.05 * min(state.step / warmup, 1) if warmup else 0.05)
        assert state.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-11)
        for got, w in zip(state.model.parameters(), wanted, strict=True):
            torch.testing.assert_close(got.detach(), w, rtol=1e-9, atol=1e-10)  # roots of tiny averages amplify rounding


def test_states_come_at_the_measured_steps_and_a_loss_that_is_not_finite_ends_the_run():
    data = modular_addition(5, 0.6)
    x, y = data.tokens(data.train), data.sums(data.train)
    steps = [s.step for s in full_batch_adamw(transformer(), x, y, lr=0.01, steps=6, measure_at=[0, 4])]
    assert steps == [0, 4, 6]
    wild = [(s.step, s.diverged) for s in full_batch_adamw(transformer(), x, y, lr=1e200, warmup=0, steps=50, measure_at=[0])]
    assert wild[0] == (0, False)
    assert wild[-1][1]
    assert wild[-1][0] < 50


def content(state):
    return {k: v.detach().clone() for k, v in state.tensors().items()}


def test_a_run_resumed_from_any_measured_step_ends_with_the_same_bits():
    data = modular_addition(7, 0.6)

    def run(seed, **resume):
        model = ModularTransformer(p=7, seed=seed, **SIZES)
        loop = full_batch_adamw(
            model, data.train, data.sums(data.train), lr=0.02, steps=30, forward=model.folded, measure_at=[0, 5, 12], **resume
        )
        for s in loop:
            yield (s.step, s.loss, s.lr, s.diverged), content(s)

    whole = list(run(0))
    assert [facts[0] for facts, _ in whole] == [0, 5, 12, 30]
    for k, (facts, tensors) in enumerate(whole):
        rest = list(run(3, resume=(facts[0], tensors)))
        assert [f for f, _ in rest] == [f for f, _ in whole[k + 1 :]]
        for (_, got), (_, expected) in zip(rest, whole[k + 1 :], strict=True):
            assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_run_interrupted_between_fitting_and_generalizing_resumes_to_the_same_history(tmp_path):
    """Fitted by step 91 with a third of the test pairs right; interrupted there, and resumed from its files."""
    s = settings(p=19, train_fraction=0.6, width=32, heads=4, hidden=64, lr=0.02, steps=400, num_measured=6)
    data = modular_addition(s.p, s.train_fraction)
    y, y_test = data.sums(data.train), data.sums(data.test)

    def compute(root, stop=math.inf):
        model = ModularTransformer(p=s.p, width=s.width, heads=s.heads, hidden=s.hidden)
        with Run("grok", s, save_every=0, root=root) as run:
            for state in run.states(
                full_batch_adamw, model, data.train, y, forward=model.folded, measure_at=log_steps(s.steps, 6, 10)
            ):
                run.log(state, split="train", loss=state.loss, accuracy=accuracy(model, data.tokens(data.train), y))
                run.log(state, split="test", accuracy=accuracy(model, data.tokens(data.test), y_test))
                run.log(state, trace=ntk_trace(model, data.tokens(data.train[:5])))
                if state.step > stop:
                    raise KeyboardInterrupt
        return run.result

    torch.set_num_threads(1)
    whole = compute(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "broken", stop=60)
    resumed = compute(tmp_path / "broken")
    assert len(resumed.sessions) == 2
    assert whole.history.equals(resumed.history)
    test = whole.history.query("split == 'test' and quantity == 'accuracy'")["value"].tolist()
    train = whole.history.query("split == 'train' and quantity == 'accuracy'")["value"].tolist()
    fitted = next(i for i, a in enumerate(train) if a >= 0.99)
    assert test[-1] > test[fitted] + 0.2  # what came after the interruption was learning to generalize


def test_bad_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="warmup must be at least 0 steps. Got -1"):
        next(full_batch_adamw(transformer(), torch.zeros(1), torch.zeros(1, dtype=torch.long), lr=0.1, steps=1, warmup=-1))
    with pytest.raises(ValueError, match="first between 1 and steps = 5. Got 3 and 6"):
        log_steps(5, 3, 6)


def test_measured_steps_are_even_on_a_logarithmic_axis():
    assert log_steps(1000, 4) == [0, 1, 10, 100, 1000]
    assert log_steps(1000, 3, 10) == [0, 10, 100, 1000]
    assert log_steps(4, 50) == [0, 1, 2, 3, 4]
    assert log_steps(7, 1) == [0, 1, 7]


# -- noise on the inputs ---------------------------------------------------------------------------------------------------------


def squared_jacobian_by_loops(model: nn.Module, x: torch.Tensor) -> float:
    total = 0.0
    for i in range(len(x)):
        leaf = x[i : i + 1].clone().requires_grad_()
        for f in model(leaf)[0]:
            total += float(torch.autograd.grad(f, leaf, retain_graph=True)[0].square().sum())
    return total


def test_the_exact_distance_is_the_squared_input_jacobian():
    model, data = transformer(), modular_addition(5, 0.5)
    x = data.one_hot(data.train).double()
    expected = squared_jacobian_by_loops(model, x)
    assert logit_perturbation(model, x).mean == pytest.approx(expected / (len(x) * 5), rel=1e-12)
    assert logit_perturbation(model, x, normalize=False).mean == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.01, 3.0])
def test_of_a_linear_model_it_is_the_squared_norm_of_the_weights_at_any_epsilon(epsilon):
    model = MLP(4, [], 3).double().eval()
    x = torch.randn(6, 4, generator=stream(0, "x"), dtype=torch.float64)
    truth = float(model.layers[1].weight.detach().square().sum()) / 3
    assert logit_perturbation(model, x).mean == pytest.approx(truth, rel=1e-12)
    many = x.repeat(3000, 1)  # every copy has its own noise
    noise = {"num_samples": 30, "generator": stream(0, "noise")}
    found = logit_perturbation(model, many, method="perturbation", epsilon=epsilon, **noise)
    assert_mean(found.mean, found.sem, truth)


def test_draws_of_the_limit_are_unbiased_and_those_at_small_epsilon_agree_with_them():
    model, data = transformer(), modular_addition(5, 0.9)
    x = data.one_hot(data.train).double()
    limit = logit_perturbation(model, x.repeat(400, 1, 1), method="jvp", num_samples=8, generator=stream(1, "z"))
    assert_mean(limit.mean, limit.sem, logit_perturbation(model, x).mean)
    few = {"num_samples": 40, "generator": stream(2, "z")}
    a = logit_perturbation(model, x, method="jvp", **few)
    b = logit_perturbation(model, x, method="perturbation", epsilon=1e-6, num_samples=40, generator=stream(2, "z"))
    assert b.mean == pytest.approx(a.mean, rel=1e-3)  # the same draws; a few cross a kink
    c = logit_perturbation(model, x, method="jvp", **few)  # the generator has moved on
    assert a.mean != c.mean


def test_the_model_is_left_as_it_was_and_the_global_generator_moves_on():
    model, data = transformer(), modular_addition(5, 0.5)
    x, before = data.one_hot(data.train).double(), copy.deepcopy(model.state_dict())
    a, b = (logit_perturbation(model, x, method="jvp").mean for _ in range(2))
    assert a != b
    logit_perturbation(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "jvpp"}, "Unknown method 'jvpp'. Did you mean 'jvp'"),
        ({"method": "perturbation"}, "requires epsilon > 0.*Got epsilon=None"),
        ({"epsilon": 0.1}, "epsilon belongs to method='perturbation' only. Got epsilon=0.1 with method='exact'"),
        ({"method": "jvp", "num_samples": 0}, "num_samples must be at least 1. Got 0"),
    ],
)
def test_bad_noise_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        logit_perturbation(transformer(), torch.ones(1, 3, 6, dtype=torch.float64), **options)


def test_tokens_cannot_be_perturbed():
    with pytest.raises(ValueError, match="x must be real.*one-hot vectors. Got torch.int64"):
        logit_perturbation(transformer(), torch.tensor([[0, 1, 5]]))
