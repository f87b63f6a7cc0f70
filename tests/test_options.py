"""Laws of the options of training steps: layout, precision, compilation and determinism."""

import inspect
import os
import shutil
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import nn

from ntklib import SupervisedSettings, models
from ntklib.data import Dataset, modular_addition
from ntklib.models import initialize
from ntklib.random import stream
from ntklib.training import TrainingOptions, accuracy, full_batch_adamw, gradient_descent, loop_by_optimizer, minibatch, sgd
from ntklib.training.options import Forward, check_determinism, determinism, float32_products, full_loss

NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
OPTIONS = [{"channels_last": True}, {"precision": "tf32"}, {"precision": "bf16"}, {"compile": True}, {"deterministic": True}]


def dataset(n: int = 20, shape: tuple[int, ...] = (2, 16, 16)) -> Dataset:
    x = torch.randn(n, *shape, generator=stream(0, "x"))
    y = torch.arange(n) % 3
    return Dataset("random", x, y, x, y, 3)


def network(kind: str = "resnet18", seed: int = 0) -> nn.Module:
    """A network of another layout than channels last, so that the option has something to do."""
    if kind == "dropout":
        layers = nn.Sequential(nn.Flatten(), nn.Linear(512, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        return initialize(layers, "standard", stream(seed, "init"))
    net = models.build(kind, input_shape=(2, 16, 16), num_classes=3, width=4, seed=seed)
    return net.to(memory_format=torch.contiguous_format)


def path(net: nn.Module, loop=sgd, resume=None, **options) -> list[tuple[int, float, dict[str, torch.Tensor]]]:
    """Steps, losses and contents of all states."""
    given = {"lr": 0.001, "batch_size": 8, "epochs": 2, "seed": 1, "measure_at": range(7)} | options
    return [(s.step, s.loss, {k: v.clone() for k, v in s.tensors().items()}) for s in loop(net, dataset(), resume=resume, **given)]


def furthest(a: list, b: list) -> float:
    """Largest difference of the parameters after the last step, relative to the way that training took them."""
    start, end, other = a[0][2], a[-1][2], b[-1][2]
    names = [k for k in end if k.startswith("model.") and end[k].is_floating_point() and "running" not in k]
    way = sum(float((end[k] - start[k]).square().sum()) for k in names) ** 0.5
    return sum(float((end[k] - other[k]).square().sum()) for k in names) ** 0.5 / way


@pytest.fixture(scope="module")
def plain():
    return path(network())


def test_channels_last_is_the_same_to_rounding_and_lays_out_weights_and_images(plain):
    net = network()
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    laid_out = path(net, channels_last=True)
    assert furthest(plain, laid_out) < 1e-3  # rounding of float32, amplified by batch normalisation and 6 steps
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not network().stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert seen.count(True) == 6  # the training steps; calibration sees images as they are stored


def test_bf16_differs_by_about_its_rounding_and_leaves_all_that_is_kept_in_float32():
    net = network("cnn")
    plain, rounded = path(network("cnn")), path(net, precision="bf16")
    assert 2**-9 < furthest(plain, rounded) < 2**-3  # 2^-9 per factor, amplified by batch normalisation and 6 steps
    assert {v.dtype for v in rounded[-1][2].values() if v.is_floating_point()} == {torch.float32}
    assert {w.grad.dtype for w in net.parameters()} == {torch.float32}
    for (_, a, _), (_, b, _) in zip(plain[1:], rounded[1:], strict=True):
        assert a != b
        assert abs(a - b) < 2**-6 * a


def test_bf16_is_of_training_steps_alone():
    net, types = network(), []
    net.head.register_forward_hook(lambda _, __, out: types.append((net.training, out.dtype)))
    for state in sgd(net, dataset(), lr=0.01, batch_size=10, epochs=1, precision="bf16"):
        accuracy(state.model, dataset().x_test, dataset().y_test)
    assert {dtype for training, dtype in types if training} == {torch.bfloat16}
    assert {dtype for training, dtype in types if not training} == {torch.float32}
    forward = Forward(net, TrainingOptions(precision="bf16"))
    assert forward(dataset().x_train).dtype == torch.float32  # the loss is taken in full precision


def test_products_on_a_gpu_are_exact_but_in_training_steps_of_lower_precision(monkeypatch):
    """The flags can be set where there is no GPU."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    flags = lambda: [place.fp32_precision for place in places]  # noqa: E731
    before = flags()
    for precision, value in (("float32", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")):
        with float32_products(precision, torch.device("cuda:0")):
            assert flags() == [value] * 2
        assert flags() == before
    with float32_products("float32", torch.device("cpu")):
        assert flags() == before
    monkeypatch.setattr(minibatch, "float32_products", lambda precision, _: float32_products(precision, torch.device("cuda")))
    net, seen = network("mlp"), []
    net.register_forward_hook(lambda *_: seen.append((net.training, *flags())))
    for state in sgd(net, dataset(), lr=0.001, batch_size=10, epochs=1, precision="tf32"):
        accuracy(state.model, dataset().x_test, dataset().y_test)
    assert set(seen) == {(True, "tf32", "tf32"), (False, "ieee", "ieee")}
    assert flags() == before


@pytest.mark.parametrize("loop", [gradient_descent, full_batch_adamw])
def test_full_batch_loops_compute_with_exact_products(loop, monkeypatch):
    devices = []

    @contextmanager
    def products(precision, device):
        devices.append((precision, device.type))
        yield
        devices.append("end")

    monkeypatch.setattr("ntklib.training.options.float32_products", products)
    data, net = dataset(), network("mlp")
    for _ in loop(net, data.x_train, data.y_train, lr=0.01, steps=1, loss="cross_entropy"):
        assert devices == [("float32", "cpu")]
    assert devices == [("float32", "cpu"), "end"]
    assert "steps" in inspect.signature(loop).parameters  # what a run takes from its settings


def test_tf32_is_float32_on_a_processor(plain):
    assert bits(path(network(), precision="tf32")[1:], plain[1:])


@pytest.mark.parametrize("loop", ["sgd", "adam", "adamw"])
def test_all_loops_take_the_options(loop):
    a, b = (path(network("mlp"), loop_by_optimizer(loop), precision=p) for p in ("float32", "bf16"))
    assert furthest(a, b) > 1e-4


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("kind", ["mlp", "dropout"])
def test_a_compiled_run_is_the_eager_one_to_rounding_with_the_same_names(kind):
    eager, compiled = path(network(kind)), path(network(kind), compile=True)
    assert furthest(eager, compiled) < 1e-5  # float32
    assert compiled[-1][2].keys() == eager[-1][2].keys()
    assert [step for step, *_ in compiled] == [step for step, *_ in eager]


def test_what_is_compiled_is_the_training_step_alone(monkeypatch):
    calls = []

    def stand_in(function, **given):
        assert given["dynamic"] is False
        return lambda x: calls.append(len(x)) or function(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    net = network()
    for state in sgd(net, dataset(), lr=0.01, batch_size=8, epochs=1, compile=True):
        assert state.model is net
        before = len(calls)
        accuracy(state.model, dataset().x_test, dataset().y_test)
        assert len(calls) == before
    assert calls == [8, 8, 4]


def bits(a: list, b: list) -> bool:
    return [x[:2] for x in a] == [x[:2] for x in b] and all(
        torch.equal(x[2][k], y[2][k]) for x, y in zip(a, b, strict=True) for k in x[2]
    )


def test_a_deterministic_run_gives_the_same_bits_and_restores_the_settings(plain):
    torch.backends.cudnn.benchmark = True
    try:
        inside = []
        for _ in sgd(network(), dataset(), lr=0.001, batch_size=8, epochs=1, deterministic=True):
            inside.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        assert inside == [(True, False)] * 2
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (False, True)
        left = sgd(network(), dataset(), lr=0.001, batch_size=8, epochs=9, deterministic=True)
        next(left)
        left.close()
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (False, True)
    finally:
        torch.backends.cudnn.benchmark = False
    first, second = (path(network(), deterministic=True)[1:] for _ in range(2))
    assert bits(first, second)
    assert bits(first, plain[1:])  # the CPU's operations were deterministic before


@pytest.mark.parametrize("warn_only", [True, False])
def test_determinism_that_was_there_before_stays(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with determinism(True, torch.device("cpu")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class Scattered(nn.Module):
    """A network with an operation that has no deterministic form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        torch.empty(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
        return x.flatten(1)[:, :3] * self.w


def test_an_operation_without_a_deterministic_form_is_named():
    with pytest.raises(ValueError, match=r"^deterministic=True is impossible here: put_ does not have .*\. Use det"):
        path(Scattered(), deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="out of order"), determinism(True, torch.device("cpu")):
        raise RuntimeError(*["out of order"])


def test_a_gpu_is_deterministic_only_if_told_before_python_started(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ValueError, match="requires the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 .* Got None. Set it"):
        check_determinism("cuda:0")
    check_determinism("cpu")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    check_determinism("cuda")


@pytest.mark.parametrize("options", [o for o in OPTIONS if "compile" not in o], ids=str)
def test_a_run_with_an_option_resumed_from_any_step_ends_with_the_same_bits(options):
    assert_resumes("resnet18", options)


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_run_resumed_from_any_step_ends_with_the_same_bits():
    assert_resumes("mlp", {"compile": True})


def assert_resumes(kind: str, chosen: dict) -> None:
    whole = path(network(kind), momentum=0.9, **chosen)
    for k, (step, _, tensors) in enumerate(whole):
        rest = path(network(kind, seed=9), momentum=0.9, resume=(step, tensors), **chosen)
        assert bits(rest, whole[k + 1 :])


@pytest.mark.parametrize("call", [lambda: TrainingOptions(precision="fp16"), lambda: path(network("mlp"), precision="fp16")])
def test_an_unknown_precision_is_refused(call):
    with pytest.raises(ValueError, match=r"Unknown precision 'fp16'\. Did you mean 'bf16'\? Known: bf16, float32, tf32\."):
        call()


SETTINGS = {"dataset": "digits", "model": "mlp", "width": 4, "lr": 0.1, "batch_size": 8, "epochs": 1, "num_probe": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "half"}, r"Unknown precision 'half'\..* Known: bf16, float32, tf32"),
        ({"storage": "bytes"}, r"Unknown storage 'bytes'\. Known: float32, stream, uint8"),
        ({"compile": "later"}, r"compile must be true or false\. Got 'later'"),
        ({"channels_last": 3}, r"channels_last must be true or false\. Got 3"),
    ],
)
def test_a_wrong_option_in_settings_is_explained(change, message):
    with pytest.raises(ValueError, match=message):
        SupervisedSettings(**SETTINGS, **change)


# Full batch


def full_batch(loop, **options) -> list[tuple[int, float, dict[str, torch.Tensor]]]:
    data = dataset()
    states = loop(network("mlp"), data.x_train, data.y_train, lr=0.01, steps=4, loss="cross_entropy", **options)
    return [(s.step, s.loss, {k: v.clone() for k, v in s.tensors().items()}) for s in states]


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("loop", [gradient_descent, full_batch_adamw])
def test_compiled_full_batch_steps_are_the_eager_ones_to_rounding(loop, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of annotations are no code to compile
    eager, compiled = full_batch(loop), full_batch(loop, compile=True)
    assert furthest(eager, compiled) < 1e-5  # float32
    assert [(s, pytest.approx(value, rel=1e-5)) for s, value, _ in eager] == [(s, value) for s, value, _ in compiled]
    for k, (step, _, tensors) in enumerate(compiled):
        assert bits(full_batch(loop, compile=True, resume=(step, tensors)), compiled[k + 1 :])


@pytest.mark.slow
@NEEDS_COMPILER
def test_what_a_gpu_would_replay_is_the_loss(monkeypatch):
    """The branch for a GPU with tensors on the processor, where nothing is replayed."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    data, net = dataset(), network("mlp")
    loss = full_loss(net, nn.functional.cross_entropy, torch.device("cuda"), compile=True)
    for _ in range(2):
        loss(data.x_train, data.y_train).backward()
    twice = [w.grad.clone() for w in net.parameters()]
    net.zero_grad()
    (2 * nn.functional.cross_entropy(net(data.x_train), data.y_train)).backward()
    for got, w in zip(twice, net.parameters(), strict=True):
        torch.testing.assert_close(got, w.grad, rtol=1e-4, atol=1e-6)  # float32


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_transformer_is_trained_like_the_eager_one(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    pairs = modular_addition(5, 0.5, seed=0)

    def run(compile: bool) -> list[float]:
        net = models.ModularTransformer(p=5, width=8, heads=2, hidden=16)
        options = {"lr": 0.01, "steps": 20, "forward": net.folded, "compile": compile}
        return [s.loss for s in full_batch_adamw(net, pairs.train, pairs.sums(pairs.train), **options)]

    assert run(True) == pytest.approx(run(False), rel=1e-4)  # float32


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_step_is_compiled_in_bf16_too():
    full = path(network("mlp"))
    eager, compiled = (path(network("mlp"), precision="bf16", compile=c) for c in (False, True))
    assert furthest(eager, compiled) < 0.2 * furthest(full, eager)


@pytest.mark.parametrize("loop", [gradient_descent, full_batch_adamw])
def test_a_full_batch_loop_compiles_its_loss_once_per_run(loop, monkeypatch):
    calls = []

    def stand_in(function, **given):
        assert given["dynamic"] is False
        return lambda *a: calls.append(1) or function(*a)

    monkeypatch.setattr(torch, "compile", stand_in)
    assert bits(full_batch(loop, compile=True), full_batch(loop))
    assert len(calls) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loop", [gradient_descent, full_batch_adamw])
def test_replayed_steps_on_a_gpu_are_the_eager_ones_to_rounding(loop):
    data = dataset().to("cuda")

    def run(compile: bool) -> list[float]:
        states = loop(network("mlp").cuda(), data.x_train, data.y_train, lr=0.01, steps=20, loss="cross_entropy", compile=compile)
        return [s.loss for s in states]

    assert run(True) == pytest.approx(run(False), rel=1e-4)  # float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_agree_on_a_gpu(options, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def run(**chosen):
        states = sgd(network().cuda(), dataset().to("cuda"), lr=0.001, batch_size=8, epochs=2, measure_at=range(7), **chosen)
        return [(s.step, s.loss, {k: v.cpu() for k, v in s.tensors().items()}) for s in states]

    assert furthest(run(), run(**options)) < (0.1 if "precision" in options else 1e-3)
