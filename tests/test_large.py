"""Large kernels: every order of summation against gradients by definition, files that survive, memory that does not suffice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_case import assert_kernel
from engine_cases import CASES, truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ntklib import NTKOperator, models, ntk_sketch, ntk_trace, top_eigenpairs
from ntklib.kernels import empirical_ntk, held, operations, shapes
from ntklib.kernels.evaluate import Request, prepared
from ntklib.kernels.shapes import LayerShape, large_cost, large_plan, survey
from ntklib.large import large_ntk
from ntklib.large_job import Job, Worker
from ntklib.random import stream

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, about the model
REDUCE = {
    "sum": lambda kernel: kernel.sum((2, 3)),
    "trace": lambda kernel: kernel.diagonal(dim1=2, dim2=3).sum(2),
    0: lambda kernel: kernel[:, :, 0, 0],
}
ORDERS = {"gradients held": (True, True), "gradients made again": (False, True), "products of positions": (False, False)}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB."
SOME = ["groups", "embedding", "padding index", "cross attention", "module used twice", "lstm", "batch norm of images"]


def small(n=12, width=2, dtype=torch.float64, name="cnn"):
    """A convolutional network and images."""
    model = models.build(name, input_shape=(1, 8, 8), num_classes=4, width=width, seed=0)
    model = models.calibrate_batch_norm(model, images(32, 8).float()).eval()
    return model.to(dtype), images(n, 8).to(dtype)


def images(n, side, seed=0):
    return torch.randn(n, 1, side, side, generator=stream(seed, "images"), dtype=torch.float64)


def array(result):
    return torch.from_numpy(np.array(result.kernel))


@pytest.mark.parametrize("name", CASES)
def test_blocks_hold_the_inner_products_of_gradients(name):
    t = truth(name)
    found = array(large_ntk(t.model, t.x1, reduce="trace", rows=2, columns=2, check=0))
    assert_kernel(found, REDUCE["trace"](t.kernel()), float(t.kernel().abs().max()))
    assert torch.equal(found, found.T)
    found = array(large_ntk(t.model, t.x1, t.x2, rows=2, columns=1, check=0))
    assert_kernel(found, REDUCE["sum"](t.kernel(cross=True)), float(t.kernel(cross=True).abs().max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SOME)
def test_every_order_of_summation_gives_the_same(name, order, monkeypatch):
    written, explicit = ORDERS[order]
    monkeypatch.setattr(LayerShape, "written", property(lambda _: written))
    monkeypatch.setattr(LayerShape, "explicit", lambda *_: explicit)
    t = truth(name)
    for work in (2**20, 1):  # all rows at once, or one row and one channel at a time
        monkeypatch.setattr(Job, "plan", lambda _, work=work: shapes.LargePlan(2, 2, work, 0))
        for reduce in ("trace", 0):
            found = array(large_ntk(t.model, t.x1, t.x2, reduce=reduce, check=0))
            assert_kernel(found, REDUCE[reduce](t.kernel(cross=True)), float(t.kernel(cross=True).abs().max()))


def product_in_place(_total, a, b, *_args, **_options) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(action) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
        action()
    return counter.get_total_flops()


NETWORKS = {
    "images": lambda: small()[0],
    "transformer": lambda: models.build("vit", input_shape=(1, 8, 8), num_classes=4, width=8).double().eval(),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 4)).double(),
    "groups, biases and strides": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, groups=2, stride=2),
            nn.Tanh(),
            nn.Conv2d(8, 8, 1, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        .double()
        .eval()
    ),
}


@pytest.mark.parametrize(("cross", "reduce"), [(False, "trace"), (True, "sum")])
@pytest.mark.parametrize("name", NETWORKS)
def test_arithmetic_and_memory_are_those_that_are_counted(name, cross, reduce, monkeypatch):
    model, x1, x2 = NETWORKS[name](), images(13, 8), images(9, 8, seed=1) if cross else None
    jobs, flops, each, held = [], [], [], []
    monkeypatch.setattr(Worker, "release", lambda self: held.append(0 if self.held is None else self.held.numbers()))

    def run(self, run=Job.run, **options):
        jobs.append(self)
        worker = self.workers[0]
        each.append(counted(lambda: worker.program.stream(x1[:1], worker.v[:, None], lambda _: None)))
        flops.append(counted(lambda: run(self, **options)))

    monkeypatch.setattr(Job, "run", run)
    large_ntk(model, x1, x2, reduce=reduce, rows=5, columns=3, check=0)
    worker, cost = jobs[0].workers[0], large_cost(jobs[0].workers[0].layers, 13, 9 if cross else None, 5, 3)
    assert flops[0] == 2 * cost.products + each[0] * cost.passes
    assert cost.passes == worker.passes
    k, forward = len(worker.v), [layer.forward for layer in worker.layers]
    if name != "transformer":  # torch counts attention between tokens as well
        first = next(f for f in reversed(forward) if f)  # its gradient with respect to the inputs is not needed
        assert each[0] == 2 * cost.backprop // cost.passes - 2 * k * first
    assert max(held) == 5 * sum(layer.held for layer in worker.layers)


@pytest.mark.parametrize("cross", [False, True])
def test_two_devices_give_the_bits_of_one(cross):
    model, x = small(dtype=torch.float32)
    other = images(7, 8, seed=1).float() if cross else None
    one = large_ntk(model, x, other, rows=5, columns=2, check=0)
    two = large_ntk(model, x, other, rows=5, columns=2, check=0, devices=["cpu", "cpu"])
    assert torch.equal(array(one), array(two))


def test_the_class_summed_kernel_is_the_quadratic_form_of_the_full_one():
    model, x = small()
    v = torch.ones(4, dtype=torch.float64)
    assert_kernel(array(large_ntk(model, x, rows=5, columns=3)), torch.einsum("ijab,a,b->ij", empirical_ntk(model, x), v, v))


def test_the_error_against_float64_is_that_of_a_block_of_random_examples():
    model, x = small(n=40, dtype=torch.float32)
    found = large_ntk(model, x, rows=20, columns=8, check=6, seed=3)
    exact = empirical_ntk(model.double(), x.double()).sum((2, 3))
    generator = stream(3, "check")
    i, j = (torch.randperm(40, generator=generator)[:6].sort().values for _ in range(2))
    error = (array(found).double() - exact)[i][:, j].norm() / exact[i][:, j].norm()
    assert 1e-9 < found.error < 1e-4
    assert found.error == pytest.approx(float(error), rel=1e-4)
    assert found.checked == (6, 6)


def test_nothing_about_the_model_changes():
    model, x = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    large_ntk(model, x, rows=5, columns=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_two_thousand_images_and_a_residual_network_agree_with_double_precision():
    model, x = small(n=2000, width=4, dtype=torch.float32, name="resnet18")
    found = large_ntk(model, x, max_memory=50 * 2**20)
    assert found.rows < 1500  # several chunks
    assert found.error < 1e-5
    block = torch.randperm(2000, generator=stream(0, "block"))[:40]
    exact = empirical_ntk(model.double(), x[block[:20]].double(), x[block[20:]].double()).sum((2, 3))
    part = array(found)[block[:20]][:, block[20:]].double()
    assert float((part - exact).norm() / exact.norm()) < 1e-5
    assert torch.equal(array(found), array(found).T)


# files


def test_a_finished_kernel_is_a_plain_array_file_that_a_second_call_reads(tmp_path):
    model, x = small()
    path = tmp_path / "kernel.npy"
    first = large_ntk(model, x, path=path, rows=5, columns=3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["kernel.npy", "kernel.npy.json"]
    assert torch.equal(torch.from_numpy(np.load(path, allow_pickle=False)), array(large_ntk(model, x, rows=5, columns=3)))
    again = large_ntk(model, x, path=path)  # chunks are those of the record
    assert (again.passes, again.rows, again.columns, again.error) == (0, 5, 3, first.error)
    assert torch.equal(array(again), array(first))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model, x: (model.double(), x + 1, {}), "other inputs x1"),
        (lambda model, x: (nn.Sequential(model), x, {}), "another model, other parameters or buffers"),
        (lambda model, x: (model, x, {"reduce": "trace"}), "another reduction"),
        (lambda model, x: (model, x[:5], {}), "another shape, other inputs x1"),
        (lambda model, x: (model, x, {"x2": x}), "other inputs x2"),
    ],
)
def test_a_kernel_of_something_else_is_not_written_over(tmp_path, change, sentence):
    model, x = small()
    large_ntk(model, x, path=tmp_path / "kernel.npy", check=0)
    content = (tmp_path / "kernel.npy").read_bytes()
    model, x, options = change(model, x)
    with pytest.raises(ValueError, match=f"Got one of {sentence}: give another path or delete it"):
        large_ntk(model, x, path=tmp_path / "kernel.npy", check=0, **options)
    assert (tmp_path / "kernel.npy").read_bytes() == content


def test_changed_parameters_are_another_kernel(tmp_path):
    model, x = small()
    large_ntk(model, x, path=tmp_path / "kernel.npy", check=0)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-12
    with pytest.raises(ValueError, match="Got one of other parameters or buffers: give another path"):
        large_ntk(model, x, path=tmp_path / "kernel.npy", check=0)


def test_a_file_that_is_no_kernel_is_left_alone(tmp_path):
    model, x = small()
    (tmp_path / "kernel.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match="path must be free, or hold a kernel with its record kernel.npy.json"):
        large_ntk(model, x, path=tmp_path / "kernel.npy")
    with pytest.raises(ValueError, match=r"path must end in \.npy. Got .*kernel.pt"):
        large_ntk(model, x, path=tmp_path / "kernel.pt")
    assert (tmp_path / "kernel.npy").read_bytes() == b"mine"


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
@pytest.mark.parametrize("stop_at", [1, 4, 9])
def test_an_interrupted_kernel_is_continued_to_the_same_bits(tmp_path, monkeypatch, stop_at, devices):
    model, x = small(dtype=torch.float32)
    whole = large_ntk(model, x, rows=5, columns=2, check=0)
    blocks = []

    def block(self, *arguments, block=Worker.block):
        blocks.append(self)
        if len(blocks) == stop_at:
            raise KeyboardInterrupt
        return block(self, *arguments)

    monkeypatch.setattr(Worker, "block", block)
    options = {"path": tmp_path / "kernel.npy", "check": 0, "devices": devices}
    with pytest.raises(KeyboardInterrupt):
        large_ntk(model, x, rows=5, columns=2, **options)
    assert not (tmp_path / "kernel.npy").exists()
    record = json.loads((tmp_path / "kernel.npy.json").read_text())
    done = sum((d - c + 1) // 2 for _, _, c, d in record["blocks"])  # of two columns each, the last of one
    assert stop_at - 1 <= done <= stop_at + 1  # another device ends its block
    before = len(blocks)
    continued = large_ntk(model, x, **options)
    assert torch.equal(array(continued), array(whole))
    assert len(blocks) - before == 6 + 4 + 1 - done  # nothing is computed twice


def test_a_killed_kernel_is_continued_to_the_same_bits(tmp_path):
    path = tmp_path / "kernel.npy"
    command = [sys.executable, str(Path(__file__).parent / "killed_kernel.py"), str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen([*command, "0.05"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("block 7"):
                break
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    record = json.loads((tmp_path / "kernel.npy.json").read_text())
    assert record["blocks"]
    subprocess.run([*command, "0"], env=environment, check=True, capture_output=True)
    continued = np.load(path, allow_pickle=False)
    path.unlink()
    (tmp_path / "kernel.npy.json").unlink()
    subprocess.run([*command, "0"], env=environment, check=True, capture_output=True)
    assert np.array_equal(continued, np.load(path, allow_pickle=False))


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, x = small()
    with pytest.raises(OSError, match=r"The disk must have room for .*kernel.npy.partial, 1,280 bytes"):
        large_ntk(model, x, path=tmp_path / "kernel.npy")
    assert not (tmp_path / "kernel.npy.partial").exists()


# memory


def out_of_memory_above(limit):
    """Torch's error wherever gradients of more than so many examples are taken."""

    def factors(self, g, factors=operations.Convolution.factors):
        if g.shape[1] > limit:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return factors(self, g)

    return factors


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_columns_that_do_not_fit_are_halved_and_told(monkeypatch, capsys, devices):
    model, x = small()
    expected = array(large_ntk(model, x, rows=12, columns=2, check=0))
    monkeypatch.setattr(held.HeldRows, "block", limited("block", 2))
    found = large_ntk(model, x, rows=12, columns=8, check=0, devices=devices)
    assert_kernel(array(found), expected)
    assert found.columns == 2
    told = capsys.readouterr().err
    assert "out of memory with 8 columns at a time; going on with 4" in told
    assert "out of memory with 4 columns at a time; going on with 2" in told


def limited(name, limit):
    """``HeldRows.hold`` or ``block`` that runs out of memory above so many examples."""
    method = getattr(held.HeldRows, name)

    def call(self, x, *arguments):
        if len(x) > limit:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return method(self, x, *arguments)

    return call


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_rows_that_do_not_fit_are_halved_and_told(monkeypatch, capsys, devices):
    model, x = small()
    expected = array(large_ntk(model, x, check=0))
    monkeypatch.setattr(held.HeldRows, "hold", limited("hold", 4))
    found = large_ntk(model, x, rows=12, columns=3, check=0, devices=devices)
    assert_kernel(array(found), expected)
    assert found.rows == 3
    assert "out of memory with 12 rows held; going on with 6" in capsys.readouterr().err


def test_one_row_that_does_not_fit_is_an_error(monkeypatch):
    model, x = small()
    for name in ("hold", "block"):
        with monkeypatch.context() as patch:
            patch.setattr(held.HeldRows, name, limited(name, 0))
            with pytest.raises(
                ValueError, match="Memory must hold one example of the rows and one of the columns. Got out of memory"
            ):
                large_ntk(model, x, rows=4, columns=2, check=0)


@pytest.mark.parametrize("reduce", [None, "trace"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_kernel_at_once_goes_on_with_smaller_chunks_and_says_so(monkeypatch, capsys, cross, reduce):
    model, x = small()
    other = images(5, 8, seed=1) if cross else None
    expected = empirical_ntk(model, x, other, reduce=reduce)
    monkeypatch.setattr(operations.Convolution, "factors", out_of_memory_above(4))
    assert_kernel(empirical_ntk(model, x, other, reduce=reduce), expected)
    assert "kernel: out of memory with 12 examples and 4 outputs at a time; going on with 3 and 4" in capsys.readouterr().err


def test_norms_of_gradients_go_on_with_smaller_chunks(monkeypatch, capsys):
    model, x = small()
    expected = float(empirical_ntk(model, x, reduce="trace").trace())
    monkeypatch.setattr(operations.Convolution, "factors", out_of_memory_above(4))
    assert ntk_trace(model, x, normalize=False).mean == pytest.approx(expected, rel=1e-12)
    assert "going on with 3" in capsys.readouterr().err


def test_a_kernel_of_one_example_that_does_not_fit_is_an_error(monkeypatch, capsys):
    model, x = small()
    empirical_ntk(model, x[:1])  # the structure is known from here on
    monkeypatch.setattr(operations.Convolution, "factors", out_of_memory_above(0))
    with pytest.raises(
        ValueError, match=r"Memory must hold the kernel, in its smallest pieces,: [\d,]+ bytes. Got out of memory. Take"
    ):
        empirical_ntk(model, x)
    assert "going on with 1 and 1" in capsys.readouterr().err


def test_plans_keep_to_their_memory_and_hold_more_rows_where_there_is_more():
    model, x = small(dtype=torch.float32)
    with prepared(Request(model, x, None, "trace")) as (program, some, _):
        layers = survey(program, some[:1], torch.ones(1, 1, 4))
    plans = [large_plan(program, layers, 4000, None, memory=m * 2**20, work=2**20) for m in (6, 20, 60, 2000)]
    assert all(p.needed <= m * 2**20 for p, m in zip(plans, (6, 20, 60, 2000), strict=True))
    assert [p.rows for p in plans] == sorted(p.rows for p in plans)
    assert plans[0].rows < plans[-1].rows == 4000
    with pytest.raises(
        ValueError, match=r"Memory must hold one example of the rows and 1 of the columns: [\d,]+ bytes. Got 1,000 bytes"
    ):
        large_plan(program, layers, 4000, None, memory=1000, work=2**20)
    for name in ("rows", "columns"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1. Got 0."):
            large_plan(program, layers, 4000, None, memory=2**30, work=2**20, **{name: 0})


def test_passes_are_those_of_the_formula():
    layer = LayerShape(("w",), 1, rows=3)
    assert large_cost([layer], 600, None, 200, 50).passes == 600 + 600 * (3 + 1) // 2
    assert large_cost([layer], 600, 100, 200, 50).passes == 600 + 3 * 100
    assert large_cost([layer], 600, None, 600, 600).products == 3 * 600 * 600


# errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reduce": "trce"}, "Unknown reduction 'trce'. Did you mean 'trace'"),
        ({"reduce": 4}, "reduce must name one of the outputs 0 to 3. Got 4."),
        ({"reduce": True}, "Unknown reduction True"),
        ({"devices": []}, "devices must name at least one device. Got none."),
        ({"devices": ["gpu"]}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N'. Got 'gpu'."),
        ({"check": -1}, "check must be at least 0. Got -1."),
        ({"rows": 0}, "rows must be at least 1. Got 0."),
        ({"columns": 0}, "columns must be at least 1. Got 0."),
        ({"max_memory": 10_000}, "Memory must hold one example of the rows"),
    ],
)
def test_mistakes_are_told(options, sentence):
    model, x = small()
    with pytest.raises(ValueError, match=sentence):
        large_ntk(model, x, **options)


def test_a_model_that_differs_from_call_to_call_is_an_error():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(4, 3), nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.a(x) + (self.b(x) if self.calls > 6 else 0)

    with pytest.raises(RuntimeError, match="differs from call to call"):
        large_ntk(Moody().double(), torch.randn(8, 4, dtype=torch.float64), rows=2, columns=2, check=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_kernel_of_the_processor():
    model, x = small(n=200, width=16, dtype=torch.float32)
    expected = array(large_ntk(model, x, check=0))
    found = large_ntk(model, x, devices=["cuda:0"], rows=80, columns=32)  # inputs stay in host memory
    assert float((array(found) - expected).norm() / expected.norm()) < 1e-5
    assert found.error < 1e-5
    fast = large_ntk(model, x, devices=["cuda:0"], tf32=True)
    assert fast.error < 1e-2


# at n = 10,000 with ten outputs neither a matrix of all outputs nor all gradients fit anywhere


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and not func.is_view:
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("measure", ["eigenpairs", "sketch"])
def test_eigenpairs_and_sketches_hold_no_kernel_and_no_jacobian(measure):
    n, c, k = 1500, 10, 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, c))
    x, p = images(n, 8).float(), sum(w.numel() for w in model.parameters())
    with Largest() as seen:
        if measure == "sketch":
            assert ntk_sketch(model, x, num_samples=8).shape == (n * c, 8)
        else:
            assert len(top_eigenpairs(NTKOperator(model, x), k)[0]) == k
    assert seen.numbers < 0.02 * min((n * c) ** 2, n * c * p)
