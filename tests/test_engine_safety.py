"""Measuring changes nothing: not the model, not the inputs, not the generators; not after an error, and not after an interrupt."""

import gc
import weakref

import pytest
import torch
from engine_case import Net, assert_kernel
from reference import ntk_by_definition
from torch import nn

from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, ntk_by_layer, ntk_diagonal
from ntklib.random import stream

MEASURES = {
    "kernel": empirical_ntk,
    "kernel in chunks": lambda model, x: empirical_ntk(model, x, chunk_size=1, reduce="trace"),
    "general kernel": lambda model, x: empirical_ntk(model, x, method="jacobian"),
    "kernel of an inner output": lambda model, x: empirical_ntk(model, x, output="1"),
    "blocks": ntk_diagonal,
    "layers": ntk_by_layer,
    "exact trace": ntk_trace,
    "jvp trace": lambda model, x: ntk_trace(model, x, method="jvp", generator=stream(0, "draws")),
    "output trace": lambda model, x: ntk_trace(model, x, method="output", generator=stream(0, "draws")),
    "perturbed trace": lambda model, x: ntk_trace(model, x, method="perturbation", epsilon=0.1, generator=stream(0, "draws")),
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


class Counter(nn.Module):
    """Counts its calls in a buffer and in a number, and fails when it is told to."""

    def __init__(self, fail_at: int = 0, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.count, self.fail_at, self.error = 0, fail_at, error

    def forward(self, x):
        self.calls += 1
        self.count += 1
        if self.count == self.fail_at:
            raise self.error
        return x


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Tanh(), Counter(**options), nn.Linear(5, 3)
    )
    model.double().eval()
    model[1].bias.requires_grad_(False)
    model(inputs()).square().sum().backward()
    model[4].train()  # a module whose mode does not matter
    return model


def inputs(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, generator=stream(0, "inputs"), dtype=torch.float64)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a caller can see; tensors with their identity and their bits."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[f"mode of {name}"] = module.training
        seen[f"hooks of {name}"] = [list(value) for key, value in vars(module).items() if "hooks" in key]
        seen[f"attributes of {name}"] = sorted(vars(module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        seen[name] = (id(tensor), tensor.tolist(), tensor.requires_grad, tensor.is_leaf, grad)
    seen["random state"] = torch.get_rng_state().tolist()
    seen["gradients on"] = torch.is_grad_enabled()
    return seen


@every_measure
def test_a_measurement_leaves_everything_as_it_was(measure):
    model, x = network(), inputs()
    before, x_before = snapshot(model), x.clone()
    measure(model, x)
    assert snapshot(model) == before
    assert torch.equal(x, x_before)  # though the first layer works in place


@every_measure
@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_an_error_or_an_interrupt_in_the_forward_pass_leaves_everything_as_it_was(measure, error, fail_at):
    model, x = network(), inputs()
    model[5].error, model[5].fail_at, model[5].count = error, fail_at, 0
    before, x_before = snapshot(model), x.clone()
    try:
        measure(model, x)
    except error:
        pass
    else:
        assert error is RuntimeError or model[5].count < fail_at  # a RuntimeError under vmap: the general method takes over
    assert snapshot(model) == before
    assert torch.equal(x, x_before)
    model[5].fail_at = 0
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x.clone(), x.clone()))


class Interrupted(torch.autograd.Function):
    """The identity, whose gradient is interrupted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(_ctx, _inputs, _output): ...

    @staticmethod
    def backward(_ctx, _g):
        raise KeyboardInterrupt


def test_an_interrupt_in_the_backward_pass_leaves_everything_as_it_was():
    model = Net(lambda m, x: m.net(Interrupted.apply(m.first(x))), first=nn.Linear(4, 4).double(), net=network())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        empirical_ntk(model, inputs())
    assert snapshot(model) == before
    assert_kernel(empirical_ntk(model.net, inputs()), ntk_by_definition(model.net, inputs(), inputs()))


@every_measure
def test_a_call_can_be_repeated_to_the_last_bit(measure):
    model, x = network(), inputs()
    first, again = measure(model, x), measure(model, x)
    if isinstance(first, dict):
        assert all(torch.equal(first[name], again[name]) for name in first)
    else:
        assert torch.equal(first, again) if isinstance(first, torch.Tensor) else str(first) == str(again)  # nan equals nan


def test_forward_hooks_are_called_and_what_they_return_counts():
    model, x, calls = network(), inputs(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    doubled = model[1].register_forward_hook(lambda _module, _args, out: 2 * out)
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x.clone(), x.clone()))
    assert len(calls) > 0
    doubled.remove()
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x.clone(), x.clone()))


def test_a_kernel_can_be_taken_inside_a_hook_of_another():
    outer, inner, x, found = network(), network(), inputs(), []
    alone = empirical_ntk(inner, x)

    def hook(*_):
        if not found:
            found.append(empirical_ntk(inner, x))

    outer[6].register_forward_hook(hook)
    assert_kernel(empirical_ntk(outer, x), ntk_by_definition(outer, x.clone(), x.clone()))
    assert torch.equal(found[0], alone)


def amid(context):
    def measure(model, x):
        with context:
            return empirical_ntk(model, x)

    return measure


SETTINGS = {
    "no_grad": amid(torch.no_grad()),
    "inference mode": amid(torch.inference_mode()),
    "mixed precision": amid(torch.autocast("cpu", torch.bfloat16)),
    "anomaly detection": amid(torch.autograd.set_detect_anomaly(False)),
    "inputs with gradients": lambda model, x: empirical_ntk(model, x.clone().requires_grad_()),
    "inputs of inference mode": lambda model, x: empirical_ntk(model, inference(x)),
    "transposed inputs": lambda model, x: empirical_ntk(model, x.T.contiguous().T),
    "expanded inputs": lambda model, x: empirical_ntk(model, x[:1].expand(3, -1))[[0], [0]].expand(3, 3, 3, 3),
    "every second input": lambda model, x: empirical_ntk(model, x.repeat_interleave(2, 0)[::2]),
    "compiled": lambda model, x: empirical_ntk(torch.compile(model, backend="eager"), x),
    "data parallel": lambda model, x: empirical_ntk(nn.DataParallel(model), x),
    "compiled inside": lambda model, x: empirical_ntk(nn.Sequential(torch.compile(model, backend="eager")), x),
}


def inference(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("name", SETTINGS)
def test_surroundings_do_not_matter(name):
    model, x = network(), inputs()
    expected = ntk_by_definition(model, x.clone(), x.clone())
    if name == "expanded inputs":
        expected = expected[:1, :1].expand(3, 3, 3, 3)
    found = SETTINGS[name](model, x)
    assert_kernel(found, expected)
    assert not found.requires_grad


def test_a_compiled_model_that_has_run_is_measured_as_written():
    model, x = network(), inputs()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert_kernel(empirical_ntk(compiled, x), ntk_by_definition(model, x.clone(), x.clone()))
    assert list(ntk_by_layer(compiled, x)) == list(ntk_by_layer(model, x))  # plain names


@pytest.mark.parametrize("method", ["auto", "jacobian"])
def test_nothing_stays_alive_after_a_call(method):
    model, x = network(), inputs()
    empirical_ntk(model, inputs(), method=method)
    gc.collect()
    gc.disable()  # memory must come back at once, not when the collector runs
    try:
        dead = weakref.ref(x)
        before = live_tensors()
        empirical_ntk(model, x, method=method)
        assert live_tensors() == before
        del x
        assert dead() is None
    finally:
        gc.enable()


def live_tensors() -> int:
    return sum(1 for item in gc.get_objects() if type(item) is torch.Tensor)


def test_successive_estimates_with_the_global_generator_are_different_draws():
    model, x = network(), inputs()
    for options in ({"method": "jvp"}, {"method": "output"}, {"method": "perturbation", "epsilon": 0.1}):
        draws = {ntk_trace(model, x, **options).mean for _ in range(4)}
        assert len(draws) > 1, options


def test_a_model_with_parts_in_two_precisions_has_the_kernel_of_its_gradients():
    def forward(m, x):
        return m.b(m.a(x.float()).double().tanh())

    torch.manual_seed(0)
    model, x = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3).double()), inputs()
    exact = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    for i, j, a, b in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist():
        first = torch.autograd.grad(model(x[i : i + 1])[0, a], list(model.parameters()))
        second = torch.autograd.grad(model(x[j : j + 1])[0, b], list(model.parameters()))
        exact[i, j, a, b] = sum(float((g.double() * h.double()).sum()) for g, h in zip(first, second, strict=True))
    for method in ("structured", "jacobian"):
        found = empirical_ntk(model, x, method=method)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)  # float32 parts
