"""Laws of the kernel, and what every option means."""

import io
import time
from contextlib import contextmanager, redirect_stderr

import pytest
import torch
import tqdm.std
from engine_case import Case, Net, assert_kernel
from engine_cases import CASES, truth
from reference import deep_linear_kernel, flatten_by_definition, ntk_by_definition, reduce_by_definition
from torch import nn
from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential, Tanh

from ntklib.estimators import ntk_trace
from ntklib.kernels import empirical_ntk, evaluate, flatten_kernel, ntk_by_layer, ntk_diagonal
from ntklib.random import stream

SEVERAL = ["linear on grids", "groups", "global pooling", "batch norm of images", "embedding", "cross attention", "prelu", "lstm"]
several_cases = pytest.mark.parametrize("name", SEVERAL)


def convolutional(*, bias: bool = True, norm: bool = True) -> Case:
    def build() -> nn.Module:
        layers = [Conv2d(2, 3, 3, padding=1, bias=bias), *([BatchNorm2d(3)] if norm else []), ReLU(), Conv2d(3, 4, 2, 2, bias=bias)]
        return Sequential(*layers, ReLU(), Flatten(), Linear(16, 3, bias=bias))

    return Case(build, (2, 4, 4))


@several_cases
def test_the_kernel_of_one_set_is_symmetric_to_the_last_bit_in_any_chunks(name):
    t = truth(name)
    for chunk_size in (None, 1, 2):
        kernel = empirical_ntk(t.model, t.x1, chunk_size=chunk_size)
        assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
        for reduce in ("trace", "diagonal"):
            reduced = empirical_ntk(t.model, t.x1, reduce=reduce, chunk_size=chunk_size)
            assert torch.equal(reduced, reduced.transpose(0, 1))
        blocks = ntk_diagonal(t.model, t.x1, chunk_size=chunk_size)
        assert torch.equal(blocks, blocks.mT)


@several_cases
def test_the_kernel_has_no_negative_eigenvalue_and_they_sum_to_the_squared_gradients(name):
    t = truth(name)
    eigvals = torch.linalg.eigvalsh(flatten_kernel(empirical_ntk(t.model, t.x1)))
    assert eigvals.min() > -1e-12 * eigvals.max()  # rounding of the largest
    squares = sum(float(g.square().sum()) for g in t.gradients1.values())
    assert float(eigvals.sum()) == pytest.approx(squares, rel=1e-12)
    assert ntk_trace(t.model, t.x1, normalize=False).mean == pytest.approx(squares, rel=1e-12)


@several_cases
def test_exchanging_the_two_sets_transposes_the_kernel(name):
    t = truth(name)
    assert_kernel(empirical_ntk(t.model, t.x2, t.x1), empirical_ntk(t.model, t.x1, t.x2).permute(1, 0, 3, 2))


@several_cases
def test_the_kernel_of_a_set_with_itself_given_twice_is_that_of_the_set(name):
    t = truth(name)
    assert_kernel(empirical_ntk(t.model, t.x1, t.x1.clone()), empirical_ntk(t.model, t.x1))


@several_cases
def test_a_block_of_the_kernel_of_a_larger_set_is_the_kernel_of_its_part(name):
    t = truth(name)
    whole = empirical_ntk(t.model, torch.cat([t.x1, t.x2]))
    scale = float(whole.abs().max())
    assert_kernel(whole[:3, :3], empirical_ntk(t.model, t.x1), scale)
    assert_kernel(whole[:3, 3:], empirical_ntk(t.model, t.x1, t.x2), scale)
    order = torch.tensor([4, 0, 2])
    assert_kernel(whole[order][:, order], empirical_ntk(t.model, torch.cat([t.x1, t.x2])[order]), scale)


@several_cases
def test_the_kernel_adds_up_over_any_division_of_the_parameters(name):
    t = truth(name)
    names = list(t.gradients1)
    parts = [names[::2], names[1::2]]
    kernels = [empirical_ntk(t.model, t.x1, t.x2, params=iter(part)) for part in parts]  # any iterable, once
    for part, kernel in zip(parts, kernels, strict=True):
        assert_kernel(kernel, t.kernel(cross=True, names=part), float(t.kernel(cross=True).abs().max()))
    assert_kernel(kernels[0] + kernels[1], empirical_ntk(t.model, t.x1, t.x2))
    exact = sum(ntk_trace(t.model, t.x1, params=part).mean for part in parts)
    assert exact == pytest.approx(ntk_trace(t.model, t.x1).mean, rel=1e-12)
    blocks = sum(ntk_diagonal(t.model, t.x1, params=part) for part in parts)
    assert_kernel(blocks, ntk_diagonal(t.model, t.x1))
    assert len(ntk_by_layer(t.model, t.x1, params=names[:1])) == 1


def test_permuted_outputs_permute_the_kernel():
    model, x = convolutional().model(), convolutional().inputs(3, 0)
    kernel, order = empirical_ntk(model, x), torch.tensor([2, 0, 1])
    with torch.no_grad():
        for w in model[-1].parameters():
            w.copy_(w[order])
    assert_kernel(empirical_ntk(model, x), kernel[:, :, order][:, :, :, order])


def test_permuted_hidden_channels_leave_the_kernel_as_it_is():
    model, x = convolutional().model(), convolutional().inputs(3, 0)
    kernel, order = empirical_ntk(model, x), torch.tensor([1, 2, 0])
    with torch.no_grad():
        for tensor in [*model[0].parameters(), *model[1].parameters(), model[1].running_mean, model[1].running_var]:
            tensor.copy_(tensor[order])
        model[3].weight.copy_(model[3].weight[:, order])
    assert_kernel(empirical_ntk(model, x), kernel)


@pytest.mark.parametrize("scale", [-2.0, 0.25])
def test_a_scaled_network_has_the_kernel_scaled_by_the_square(scale):
    case = convolutional()
    model, x = case.model(), case.inputs(3, 0)
    scaled = Net(lambda m, x: scale * m.net(x), net=model)
    assert_kernel(empirical_ntk(scaled, x), scale**2 * empirical_ntk(model, x))


def test_a_network_of_three_homogeneous_layers_has_a_kernel_of_degree_four():
    case = convolutional(bias=False, norm=False)
    model, x = case.model(), case.inputs(3, 0)
    kernel = empirical_ntk(model, x)
    assert_kernel(empirical_ntk(model, 3 * x), 9 * kernel)  # degree two in the inputs
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.5)
    assert_kernel(empirical_ntk(model, x), 1.5**4 * kernel)


def test_a_weight_before_batch_norm_scales_its_part_of_the_kernel_by_the_inverse_square():
    # statistics that scale along: outputs do not change, gradients with respect to the weight scale by 1 / alpha
    case = convolutional(bias=False)
    model, x, alpha = case.model(), case.inputs(3, 0), 4.0
    model[1].eps = 0.0
    before = ntk_by_layer(model, x)
    with torch.no_grad():
        model[0].weight.mul_(alpha)
        model[1].running_mean.mul_(alpha)
        model[1].running_var.mul_(alpha**2)
    after = ntk_by_layer(model, x)
    assert_kernel(alpha**2 * after.pop("0"), before.pop("0"))
    for name, kernel in after.items():
        assert_kernel(kernel, before[name])


def test_a_deep_linear_network_of_bare_matrices_has_the_closed_form():
    x = torch.randn(4, 3, generator=stream(0, "x"), dtype=torch.float64)
    case = Case(lambda: Net(lambda m, x: x @ m.a.T @ m.b.T @ m.c.T, a=(5, 3), b=(4, 5), c=(2, 4)), (3,))
    model = case.model()
    assert_kernel(empirical_ntk(model, x), deep_linear_kernel(x, [w.detach() for w in model.parameters()]))


def test_a_linear_readout_of_pooled_patches_has_the_gram_matrix_of_the_pooled_features():
    case = Case(lambda: Net(lambda m, x: m.a(x).mean((2, 3)), a=Conv2d(2, 3, 2, bias=True)), (2, 3, 3))
    model, x = case.model(), case.inputs(4, 0)
    patches = torch.stack([x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(2) for j in range(2)]).mean(0)
    gram = patches @ patches.T + 1  # plus 1: the bias
    assert_kernel(flatten_kernel(empirical_ntk(model, x)), torch.kron(gram, torch.eye(3, dtype=x.dtype)))


@pytest.mark.parametrize("name", [*SEVERAL, "residual net", "vision transformer", "modular addition transformer"])
def test_single_precision_gives_the_kernel_to_single_precision(name):
    t = truth(name)
    model = CASES[name].model().float()
    cast = (lambda x: x) if CASES[name].tokens else torch.Tensor.float
    for reduce in (None, "trace"):
        found = empirical_ntk(model, cast(t.x1), cast(t.x2), reduce=reduce)
        expected = reduce_by_definition(t.kernel(cross=True), reduce)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


INNER = {  # layers whose outputs are f, as networks of their own
    "feature map": ("2", lambda m: Sequential(m[0], m[1], m[2], Flatten())),
    "flat features": ("5", lambda m: m[:6]),
    "itself last": ("6", lambda m: m),
}


@pytest.mark.parametrize("name", INNER)
def test_an_inner_output_is_that_of_the_network_cut_there(name):
    output, cut = INNER[name]
    case = convolutional()
    model, x = case.model(), case.inputs(3, 0)
    expected = ntk_by_definition(cut(model), x, x)
    for reduce in (None, "trace", "diagonal"):
        for options in ({}, {"chunk_size": 2}, {"method": "jacobian"}):
            found = empirical_ntk(model, x, reduce=reduce, output=output, **options)
            assert_kernel(found, reduce_by_definition(expected, reduce))
    trace = ntk_trace(model, x, output=output)
    assert trace.mean == pytest.approx(float(flatten_by_definition(expected).trace()) / (3 * expected.shape[2]), rel=1e-12)
    layers = ntk_by_layer(model, x, output=output)
    assert_kernel(torch.stack(list(layers.values())).sum(0), expected)
    assert all(not layers[name].any() for name in layers if int(name) > int(output))  # what comes later does not count


def test_an_inner_sequence_is_flattened_and_the_first_call_of_a_reused_module_counts():
    def forward(m, x):
        return m.b(m.inner.part(torch.tanh(m.inner.part(x))).mean(1))

    case = Case(lambda: Net(forward, inner=nn.ModuleDict({"part": Linear(3, 3)}), b=Linear(3, 2)), (2, 3))
    model, x = case.model(), case.inputs(3, 0)
    expected = ntk_by_definition(Net(lambda m, x: m.part(x).flatten(1), part=model.inner["part"]), x, x)
    assert_kernel(empirical_ntk(model, x, output="inner.part"), expected)


def test_many_outputs_are_taken_in_parts_that_fit_and_give_the_same_numbers(monkeypatch):
    case = Case(lambda: Sequential(Conv2d(1, 2, 3), Tanh(), Conv2d(2, 4, 3), Flatten(), Linear(144, 2)), (1, 10, 10))
    model, x = case.model(), case.inputs(2, 0)
    plans, make_plan = [], evaluate.make_plan
    monkeypatch.setattr(evaluate, "make_plan", lambda *args, **options: [plans.append(make_plan(*args, **options)), plans[-1]][1])
    exact = [ntk_trace(model, x, output="2", max_memory=limit).mean for limit in (None, 400_000)]
    kernels = [empirical_ntk(model, x, reduce="trace", output="2", max_memory=limit) for limit in (None, 800_000)]
    assert [plan.outputs < 144 for plan in plans] == [False, True, False, True]
    assert exact[1] == pytest.approx(exact[0], rel=1e-12)  # reordered sum
    assert_kernel(kernels[1], kernels[0])
    assert float(kernels[0].trace()) / (2 * 144) == pytest.approx(exact[0], rel=1e-12)


def test_tensor_float_on_a_cpu_changes_nothing():
    t = truth("groups")
    assert torch.equal(empirical_ntk(t.model, t.x1, tf32=True), empirical_ntk(t.model, t.x1))


@pytest.mark.parametrize("progress", [True, False])
def test_short_work_shows_no_bar(progress):
    t, text = truth("groups"), io.StringIO()
    with redirect_stderr(text):
        empirical_ntk(t.model, t.x1, chunk_size=1, progress=progress)
    assert text.getvalue() == ""


@several_cases
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"method": "jacobian"}])
def test_the_bar_ends_where_it_said_that_it_would(name, options, monkeypatch):
    counted = []

    @contextmanager
    def counting(total: int, *, enabled: bool):
        ticks = []
        yield lambda: ticks.append(enabled)
        counted.append((len(ticks), total))

    monkeypatch.setattr(evaluate, "_bar", counting)
    t = truth(name)
    empirical_ntk(t.model, t.x1, t.x2, **options)
    ((done, total),) = counted
    assert done == total > 0


@pytest.mark.parametrize("progress", [True, False])
def test_long_work_shows_a_bar_unless_told_not_to(progress, monkeypatch):
    now = time.time()
    clock = iter(range(10**6))
    monkeypatch.delenv(evaluate.FILE, raising=False)
    monkeypatch.setattr(tqdm.std, "time", lambda: now + 10.0 * next(clock))  # ten seconds pass whenever somebody looks
    t, text = truth("groups"), io.StringIO()
    with redirect_stderr(text):
        empirical_ntk(t.model, t.x1, chunk_size=1, progress=progress)
    assert ("kernel" in text.getvalue()) == progress
