"""The benchmarks run, agree and count right; how fast anything is, no test says."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as cli
from benchmarks import floor, measure, networks, peers, probes, report, targets, worker, workloads
from benchmarks.children import Worker, Workers
from benchmarks.floor import Layer
from benchmarks.measure import Options
from ntklib import empirical_ntk, provenance, storage

NETWORKS = {w.network: w for w in workloads.WORKLOADS}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # torch's own, on first use of its forward mode
OWN = {"func-einsum", "func-gemm", "func-vp"}  # what needs no package beyond torch


@pytest.fixture(scope="module")
def quick_run():
    """A quick run of one workload of each kind, and of the estimators, against torch.func; peers that are absent are named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "NT_FOLDER", workloads.ROOT / "no such environment")
        patch.setattr(workloads, "find_spec", lambda _: None)
        options = Options(workloads.PEERS, quick=True, repeats=1)
        console = Console(file=io.StringIO(), width=124)
        return *cli.measure(["W1", "W4", "probes"], options, console), console


@pytest.mark.parametrize("network", NETWORKS)
def test_all_forms_agree_with_the_definition_in_float64(network):
    workload = workloads.quick(NETWORKS[network])
    model, x = networks.build(workload).double(), networks.inputs(workload, 2)
    x = x.double() if x.is_floating_point() else x
    expected = networks.kernel_by_loops(networks.build(workload), x)
    for name in OWN:
        torch.testing.assert_close(peers.KERNELS[name](model, x), expected, rtol=1e-11, atol=1e-11)  # the same sums, other order
    torch.testing.assert_close(peers.TRACES["func-chunks"](model, x), networks.trace_by_loops(model, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_and_its_inputs_are_the_same_at_every_call(network):
    workload = NETWORKS[network]
    state = torch.random.get_rng_state()
    small = workloads.quick(workload)
    a, b = networks.build(small).state_dict(), networks.build(small).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(networks.inputs(workload, 3), networks.inputs(workload, 20)[:3])
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_measured_networks_have_the_sizes_that_their_names_say():
    sizes = {name: sum(w.numel() for w in networks.build(NETWORKS[name]).parameters()) for name in NETWORKS}
    assert sizes["mlp"] == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert sizes["resnet18"] == 11_173_962
    assert sizes["small_cnn"] == 27 * 16 + 16 + 144 * 32 + 32 + 288 * 64 + 64 + 64 * 10 + 10
    assert sizes["wide_resnet"] == 1_467_610


def test_a_linear_layer_is_counted_as_by_hand():
    # n = 2, c = 3, d = 5, o = 7: a a^T 2*2*5 = 20 (half of 40), g g^T 6*6*7 = 252
    assert floor.kernel_orders(Layer(d=5, o=7), 2, 3) == {"gradients": 2 * 6 * 35 + 36 * 35, "inputs": 20 + 252}
    assert floor.kernel_orders(Layer(d=5, o=7, constant=True), 2, 3)["constant"] == 20
    assert floor.trace_orders(Layer(d=5, o=7), 2, 3) == {"norms": 2 * 2 * 5 + 2 * 2 * 3 * 7}
    assert Layer(d=5, o=7).forward_flops == 70


def test_a_convolution_is_counted_as_by_hand():
    # n = 2, c = 3, t = 4 positions, d = 5, o = 7
    layer = Layer(d=5, o=7, t=4, separable=True)
    assert floor.kernel_orders(layer, 2, 3) == {
        "gradients": 840 * 2 + 36 * 35,  # 2 n c t d o, (n c)^2 d o
        "inputs": 320 + 4 * 3 * 7 * 16 + 36 * 28,  # (n t)^2 d, n^2 c o t^2, (n c)^2 o t
        "separable": 2 * 2 * 7 * 4 * 5 + 4 * 35 + 36 * 7,  # 2 n o t d, n^2 d o, (n c)^2 o
    }
    grouped = floor.kernel_orders(Layer(d=9, o=6, t=4, groups=6), 2, 3)
    assert grouped["inputs"] == 6 * 64 * 9 + 4 * 3 * 6 * 16 + 36 * 24
    assert floor.trace_orders(layer, 2, 3)["inputs"] == 2 * (16 * 5 + 2 * 3 * 7 * 16 + 2 * 3 * 7 * 4)


def test_a_workload_is_the_sum_of_forward_backward_and_the_best_orders():
    layers = [Layer(d=5, o=7, backward=False), Layer(d=7, o=3, constant=True)]
    counted = floor.flops(layers, 4, 2, 3, "kernel")
    assert counted == {"forward": 2 * (70 + 42), "backward": 6 * 42, "contraction": 272 + 28 + 36 * 4, "total": 224 + 252 + 444}


def test_the_floors_of_the_large_workloads():
    """Totals counted by hand for the networks as published, in GFLOP."""
    for name, least, most in (("W1", 8.53, 8.55), ("W3", 19.8, 19.9)):
        workload = workloads.find(name)
        layers, others, c = floor.walk(networks.build(workload), networks.inputs(workload, 2))
        assert least < floor.flops(layers, others, workload.n, c, "kernel")["total"] / 1e9 < most


@pytest.mark.parametrize("network", ["mlp", "small_cnn", "separable_cnn", "resnet18", "wide_resnet"])
def test_walked_layers_do_the_forward_work_that_torch_counts(network):
    workload = workloads.quick(NETWORKS[network])
    model, x = networks.build(workload), networks.inputs(workload, 2)
    layers, _, _ = floor.walk(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * sum(layer.forward_flops for layer in layers) == counter.get_total_flops()


def test_walking_finds_what_is_special_about_a_layer():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.PReLU(),
    )  # fmt: skip
    layers, others, c = floor.walk(model[:-1], torch.randn(2, 2, 5, 5))
    assert [layer.backward for layer in layers] == [False, True, True]
    assert [layer.separable for layer in layers][:2] == [False, True]
    assert [layer.constant for layer in layers] == [False, False, True]
    assert [(layer.d, layer.o, layer.t, layer.groups) for layer in layers] == [(18, 4, 25, 1), (18, 4, 25, 2), (4, 3, 1, 1)]
    assert (others, c) == (0, 3)
    x = torch.randn(2, 2, 5, 5)
    model[-2].bias.data = -model[:-1](x).mean(0).detach() + model[-2].bias.data  # the two examples' outputs then differ in sign
    layers, others, _ = floor.walk(model, x)
    assert others == 1
    assert not layers[-1].constant


def test_one_probe_scatters_as_its_closed_form_says():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double(), torch.randn(5, 3, dtype=torch.float64)
    expected = probes.closed_form(empirical_ntk(model, x))
    found = probes.measure(model, x, 3000)
    for name, row in found["estimators"].items():
        # the relative error of a standard deviation from m draws is about 1/sqrt(2 m) times its kurtosis factor: 1.3 % to 5 %
        assert row["relative_sd"] == pytest.approx(expected[name], rel=0.15)
        assert row["mean_over_exact"] == pytest.approx(1, abs=0.06)
    assert found["orthogonal_error"] < 1e-12


def test_a_quick_run_measures_every_method_and_names_missing_peers(quick_run):
    results, found_probes, _ = quick_run
    assert [r["name"] for r in results] == ["W1", "W4"]
    for result in results:
        rows = {row["method"]: row for row in result["methods"]}
        assert rows.keys() == {"ours", *workloads.find(result["name"], is_quick=True).peers}
        for name, row in rows.items():
            if name.startswith(("ours", "func")):
                assert not row["status"]
                assert row["cpu_seconds"] > 0
                assert row["repeats"] == 1
                assert row["floor_fraction"] > 0
                assert row["error_float32"] < 1e-5
                assert row["error_float64"] < 1e-12
            else:
                assert row["status"].startswith("not installed")
                assert row["cpu_seconds"] is row["ratio"] is row["error_float64"] is None
        assert rows["ours"]["ratio"] == 1
    assert results[0]["versions"]["torch"] == results[0]["git"].get("torch", provenance.versions()["torch"])
    assert found_probes["orthogonal_error"] < 1e-5


def test_a_quick_run_prints_tables(quick_run):
    results, found_probes, _ = quick_run
    console = Console(file=io.StringIO(), record=True, width=124)
    for result in results:
        report.print_workload(console, result)
    report.print_probes(console, found_probes)
    report.print_targets(console, targets.judge({r["name"]: r for r in results}, found_probes))
    text = console.export_text()
    for piece in ("torch.func einsum (published)", "not installed (python -m benchmarks install-neural-tangents)", "perturbation"):
        assert piece in text
    assert "targets were not measured in this run" in text


def test_results_are_kept_whole_and_merged(quick_run, tmp_path, monkeypatch):
    results, found_probes, _ = quick_run
    monkeypatch.setattr(report, "path", lambda name: tmp_path / f"{name}.json")
    report.save(results[:1], None, "cpu")
    report.save(results[1:], found_probes, "cpu")
    stored = storage.read_json(tmp_path / "cpu.json")
    assert stored is not None
    assert [w["name"] for w in stored["workloads"]] == ["W1", "W4"]
    assert stored["probes"]["estimators"].keys() == {"perturbation", "jvp", "output"}
    assert {"command", "written", "git", "machine", "versions"} <= stored["workloads"][0].keys()
    assert len(stored["targets"]) == len(targets.TARGETS) + 3
    (tmp_path / "cpu.json").write_text(json.dumps(stored | {"sha256": "0"}))
    with pytest.warns(storage.DamagedFileWarning):
        report.save(results[:1], None, "cpu")


def row(method, n, seconds, **others):
    return {"method": method, "n": n, "status": "", "cpu_seconds": seconds, "wall_seconds": seconds, "peak_mib": 10.0,
            "error_float64": 1e-15} | others  # fmt: skip


def test_targets_compare_at_equal_size_and_take_the_best_form():
    result = targets.completed({
        "device": "cpu", "n": 16, "gemm_flops_per_second": 100.0, "flops": {"16": {"total": 300}, "8": {"total": 90}},
        "methods": [
            row("ours", 16, 4.0), row("ours", 8, 1.0), row("func-einsum", 8, 3.0), row("func-gemm", 16, 30.0, peak_mib=250.0),
        ],
    })  # fmt: skip
    assert [r["ratio"] for r in result["methods"]] == [1, 1, 3, 7.5]
    assert result["methods"][0]["floor_fraction"] == 0.75
    verdicts = {t["text"]: t for t in targets.judge({"W2": result}, None)}
    kernel = verdicts["W2 kernel against the best form of torch.func"]
    assert (kernel["found"], kernel["met"]) == (7.5, True)  # the other form ran at fewer examples
    assert verdicts["W2 peak memory of that form over ours"]["found"] == 25
    assert verdicts["W2 fraction of the floor"]["met"] is True
    assert verdicts["W3 fraction of the floor"]["met"] is None
    assert verdicts["float64 error on every workload"]["met"] is True
    result["methods"][3]["status"] = "out of memory"
    assert targets.judge({"W2": result}, None)[3]["met"] is None


def test_errors_are_relative_to_the_reference_on_common_examples():
    expected = torch.ones(3, 3, 2, 2).numpy()
    assert measure.relative_error(expected[:2, :2] * 1.5, expected) == pytest.approx(0.5)


def test_memory_that_a_call_takes_and_gives_back_is_seen():
    _, found = worker.measured(lambda: len(bytearray(64 << 20)), worker.Memory())
    assert found["peak_mib"] is None or 60 < found["peak_mib"] < 80
    assert found["cpu_seconds"] >= 0


def test_a_failure_of_a_peer_is_a_result():
    workers = Workers()
    try:
        assert workers.start({"a": "benchmarks.torch_worker"}) == {}
        job = {
            "do": "run",
            "method": "no such method",
            "workload": "W1",
            "quick": True,
            "n": 2,
            "dtype": "float32",
            "device": "cpu",
        }
        assert workers.ask("a", job, 60) == {"error": "KeyError: 'no such method'"}
        assert workers.ask("a", job | {"do": "count", "sizes": [2]}, 1e-3) == {"error": "over 0 s"}
        assert "error" in workers.ask("a", job, 60)  # it was ended
    finally:
        workers.close()


def test_a_worker_that_cannot_start_says_why():
    dead = Worker("benchmarks.no_such_worker")
    assert "No module named" in dead.ready()
    dead.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "W9"], "Unknown name 'W9'. Known: W1, W2"),
        (["--peers", "numpy"], "Unknown name 'numpy'. Known: torch.func"),
        (["--quick", "--save"], "--save keeps measurements at full size. Leave out --quick."),
        (["install-neural-tangents", "--python", "no-such-python"], "neural-tangents could not be installed"),
    ],
)
def test_a_mistake_at_the_command_line_is_explained(arguments, message):
    found = CliRunner().invoke(cli.main, arguments)
    assert found.exit_code != 0
    assert message in found.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_so():
    found = CliRunner().invoke(cli.main, ["--device", "cuda"])
    assert "--device cuda needs a GPU" in found.output


def test_the_tables_of_methods_and_workloads_fit_together():
    for workload in workloads.WORKLOADS:
        functions = peers.KERNELS if workload.kind == "kernel" else peers.TRACES
        for name, n in workload.peers.items():
            assert 2 <= n <= workload.n
            assert name in functions or workloads.METHODS[name].peer == "neural-tangents"
        assert workload.compared <= workload.n
    sizes = workloads.find("W2").sizes(("torch.func",))
    assert sizes == [("ours", 16), ("ours", 2), ("func-einsum", 16), ("func-gemm", 16), ("func-vp", 2)]


def test_the_parent_process_imports_no_torch():
    code = "import sys, benchmarks.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=workloads.ROOT)


def test_a_linearized_step_is_timed_beside_a_step_of_the_network():
    from benchmarks.linearized_step import main

    arguments = ["--model", "mlp", "--width", "4", "--batch-size", "8", "--size", "4", "--rounds", "2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"ratio \d+\.\d\d, target at most 3: (met|missed)", done.output)


@pytest.mark.parametrize("options", [["--beside", "small"], *(["--save", "--beside", name] for name in ("cpu", "cuda", "../x"))])
def test_results_beside_others_need_a_name_of_their_own(options):
    found = CliRunner().invoke(cli.main, options)
    assert found.exit_code == 2
    assert "--beside requires --save and a name of letters" in found.output
