"""Mistakes meet messages that say what is required, what was got, and what to do."""

import re
import subprocess
import sys

import pytest
import torch
from engine_case import Net, assert_kernel
from reference import ntk_by_definition
from torch import nn

from ntklib.checks import check_pair
from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, ntk_by_layer, ntk_diagonal
from ntklib.random import stream

MEASURES = {"kernel": empirical_ntk, "blocks": ntk_diagonal, "layers": ntk_by_layer, "trace": ntk_trace}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), generator=stream(0, "inputs"), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def after_linear(function) -> nn.Module:
    return Net(lambda m, x: function(m.a(x)), a=nn.Linear(4, 3)).double()


def broken(value: float) -> torch.Tensor:
    x = inputs()
    x[1, 2] = value
    return x


@every_measure
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (broken(torch.nan), "x1 must be finite. Got 1 entries that are nan or infinite"),
        (broken(-torch.inf), "x1 must be finite. Got 1 entries"),
        (inputs(0, 4), r"x1 must hold at least one example. Got shape \(0, 4\)"),
        (torch.tensor(1.0), r"x1 must hold at least one example. Got shape \(\)"),
        (torch.ones(3, 4, dtype=torch.int64), "dtype that the model takes; its parameters are torch.float64. Got torch.int64"),
        (inputs().float(), "dtype that the model takes; its parameters are torch.float64. Got torch.float32"),
        (inputs().to("meta"), "on the device of the parameters, cpu. Got meta"),
    ],
)
def test_inputs_that_the_network_cannot_take_are_refused(measure, x, message):
    if x.device.type == "meta":  # whose entries cannot be looked at
        x = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=message):
        measure(net(), x)


def test_real_numbers_in_place_of_tokens_are_refused():
    with pytest.raises(ValueError, match="dtype that the model takes; its parameters are torch.float64. Got torch.float32"):
        empirical_ntk(nn.Sequential(nn.Embedding(4, 3), nn.Flatten()).double(), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("x2", "message"),
    [
        (broken(torch.nan), "x2 must be finite"),
        (inputs(0, 4), "x2 must hold at least one example"),
        (inputs(3, 5), r"share the input shape. Got \(3, 4\) and \(3, 5\)"),
        (inputs(3, 4, 1), r"share the input shape. Got \(3, 4\) and \(3, 4, 1\)"),
        (inputs().float(), "share dtype and device. Got torch.float64 on cpu and torch.float32 on cpu"),
    ],
)
def test_a_second_set_unlike_the_first_is_refused(x2, message):
    for measure in (empirical_ntk, ntk_by_layer):
        with pytest.raises(ValueError, match=message):
            measure(net(), inputs(), x2)


def test_sets_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="share dtype and device. Got torch.float64 on cpu and torch.float64 on meta"):
        check_pair(inputs(), inputs().to("meta"))


@every_measure
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (after_linear(lambda h: (h, h)), r"shape \[n, c\] with n = 1. Got tuple"),
        (after_linear(lambda h: {"logits": h}), r"shape \[n, c\] with n = 1. Got dict"),
        (after_linear(lambda h: h[:, 0]), r"shape \[n, c\] with n = 1. Got \(1,\)"),
        (after_linear(lambda h: h[:, :, None]), r"shape \[n, c\] with n = 1. Got \(1, 3, 1\)"),
        (after_linear(lambda h: h.sum(0, keepdim=True)), r"shape \[n, c\] with n = 2. Got \(1, 3\)"),
        (after_linear(lambda _: None), r"shape \[n, c\] with n = 1. Got NoneType"),
        (after_linear(lambda h: h[:, :0]), r"at least one real output. Got shape \(1, 0\)"),
        (after_linear(lambda h: h.argmax(1, keepdim=True)), r"at least one real output. Got shape \(1, 1\) of torch.int64"),
        (after_linear(lambda h: torch.complex(h, h)), "at least one real output. Got .* torch.complex128"),
        (after_linear(lambda h: h - h.mean(0)), "rows of a batch must not interact. Got an output that another example changes by"),
        (after_linear(lambda h: h + torch.randn_like(h)), "must be deterministic. Got a forward pass that draws random numbers"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(),
            r"eval mode.*BatchNorm1d '1' in training mode. Call model.eval\(\)",
        ),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout()).double(), "must be deterministic. Got Dropout '1' in training mode"),
        (net().requires_grad_(False), "at least one trainable parameter. Got none"),
        (nn.Flatten(), "at least one trainable parameter. Got none"),
        (nn.Linear(4, 3, dtype=torch.complex128), "Trainable parameters must be real. Got 'weight' of torch.complex128"),
    ],
)
def test_a_network_without_a_kernel_is_refused(measure, model, message):
    with pytest.raises(ValueError, match=message):
        measure(model, inputs())


def test_outputs_that_cancel_to_rounding_errors_are_not_taken_for_rows_that_interact():
    noise = torch.finfo(torch.float64).eps

    def forward(m, x):  # as of two halves that are equal at first: what is left depends on the order of summation
        return m.a(x) - m.b(x) + noise * len(x)

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(4, 3).double(), b=nn.Linear(4, 3).double())
    model.b.load_state_dict(model.a.state_dict())
    assert_kernel(empirical_ntk(model, inputs()), ntk_by_definition(model, inputs(), inputs()))
    with pytest.raises(ValueError, match="rows of a batch must not interact"):
        empirical_ntk(Net(lambda m, x: m.a(x) - m.a(x).mean(0) + 1e-3 * len(x), a=model.a), inputs())


def test_a_network_that_changes_its_parameters_is_refused():
    def forward(m, x):
        m.a.weight.add_(0.0)
        return m.a(x)

    model = Net(forward, a=nn.Linear(4, 3).double())
    with pytest.raises(ValueError, match="must not change its parameters in a forward pass. Got a change of 'a.weight'"):
        empirical_ntk(model, inputs())


@every_measure
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": ["0.wieght"]}, "Unknown trainable parameter '0.wieght'. Did you mean '0.weight'"),
        ({"params": ["2.bias"]}, "Unknown trainable parameter '2.bias'"),  # it is frozen
        ({"params": []}, "params must name at least one trainable parameter"),
        ({"output": "3"}, "Unknown module '3'. .*Known: 0, 1, 2"),
        ({"output": ""}, "Unknown module ''"),
        ({"chunk_size": 0}, "chunk_size must be at least 1. Got 0"),
        ({"chunk_size": -2}, "chunk_size must be at least 1. Got -2"),
        ({"max_memory": 0}, "max_memory must be at least 1. Got 0"),
        (
            {"max_memory": 1},
            r"Memory must hold .*: [\d,]+ bytes. Got 1 bytes available. .*larger max_memory, or ntklib.NTKOperator",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(measure, options, message):
    model = net()
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        measure(model, inputs(), **options)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (empirical_ntk, {"method": "structure"}, "Unknown method 'structure'. Did you mean 'structured'"),
        (ntk_diagonal, {"method": "ntk_vp"}, "Unknown method 'ntk_vp'. Known: auto, jacobian, structured"),
        (empirical_ntk, {"reduce": "sum"}, "Unknown reduction 'sum'. Known: diagonal, trace"),
        (ntk_by_layer, {"reduce": "diag"}, "Unknown reduction 'diag'. Did you mean 'diagonal'"),
        (ntk_trace, {"method": "output", "probes": "gaussian"}, "Unknown kind of probes 'gaussian'"),
        (ntk_trace, {"method": "jvp", "probes": "orthogonal"}, "belongs to method='output' only.*method='jvp'"),
        (
            ntk_trace,
            {"method": "output", "probes": "orthogonal", "num_samples": 4},
            "at most as many as outputs, 3.*Got num_samples=4",
        ),
    ],
)
def test_unknown_choices_are_refused_and_the_known_ones_named(measure, options, message):
    with pytest.raises(ValueError, match=message):
        measure(net(), inputs(), **options)


def test_an_inner_module_that_is_never_called_is_refused():
    model = Net(lambda m, x: m.a(x), a=nn.Linear(4, 3), unused=nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="output='unused' must be used in the forward pass. Got a pass that never called it"):
        empirical_ntk(model, inputs(), output="unused")


def test_streaming_that_is_asked_for_but_impossible_is_refused_with_the_reason():
    model = Net(lambda m, x: m.a(x) if x[0, 0] > 0 else -m.a(x), a=nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="requires a model that can be streamed; method='jacobian' takes any. Got: .*vmap"):
        empirical_ntk(model, inputs(), method="structured")


@pytest.mark.parametrize("reduce", [None, "trace", "diagonal"])
@pytest.mark.parametrize("method", ["structured", "jacobian"])
def test_the_memory_that_an_error_asks_for_is_enough(reduce, method):
    model, x = net(), inputs(4, 4)
    asked, options = 1, {"reduce": reduce, "method": method}
    for _ in range(3):  # for the result, then for the smallest pieces of the work
        try:
            kernel = empirical_ntk(model, x, max_memory=asked, **options)
            break
        except ValueError as error:
            found = re.search(r"([\d,]+) bytes\. Got ([\d,]+) bytes available", str(error))
            assert found is not None
            needed, got = (int(number.replace(",", "")) for number in found.groups())
            assert got == asked < needed
            asked = needed
    assert_kernel(kernel, empirical_ntk(model, x, **options))


def test_a_network_whose_outputs_ignore_its_parameters_has_a_kernel_of_zeros():
    x = inputs()
    ignoring = Net(lambda _m, x: x[:, :3].sin(), a=nn.Linear(4, 3)).double()
    detached = after_linear(lambda h: h.detach())
    for model in (ignoring, detached):
        for method in ("auto", "structured", "jacobian"):
            kernel = empirical_ntk(model, x, method=method)
            assert kernel.shape == (3, 3, 3, 3)
            assert not kernel.any()
        assert [float(part.abs().sum()) for part in ntk_by_layer(model, x).values()] == [0.0]
        assert ntk_trace(model, x).mean == 0


def test_a_single_example_is_enough_and_is_seen_alone():
    model = after_linear(lambda h: h - h.mean(0) + h)  # its rows would interact, but there is only one
    x = inputs(1, 4)
    assert_kernel(empirical_ntk(model, x), ntk_by_definition(model, x, x))


AS_A_USER = """
import torch
from ntklib import empirical_ntk, ntk_trace
model, x = torch.nn.Linear(4, 3), torch.randn(3, 4)
for call in (
    lambda: empirical_ntk(model, x.numpy()),
    lambda: empirical_ntk(model, x, [x]),
    lambda: empirical_ntk(model, x, chunk_size=2.5),
    lambda: empirical_ntk(model, x, max_memory="1 GB"),
    lambda: empirical_ntk(model, x, chunk_size="3"),
):
    try:
        call()
    except TypeError as error:
        print(error)
"""


def test_values_of_the_wrong_type_are_refused():
    # in a process without the checks on annotations, which would be the first to complain
    done = subprocess.run([sys.executable, "-c", AS_A_USER], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "x1 must be a tensor. Got ndarray.",
        "x2 must be a tensor. Got list.",
        "chunk_size must be a whole number. Got 2.5.",
        "max_memory must be a whole number. Got '1 GB'.",
        "chunk_size must be a whole number. Got '3'.",
    ]
