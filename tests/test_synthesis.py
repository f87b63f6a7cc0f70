"""The probes against their definitions by loops, and times of rest, events, cones and coincidences on made-up histories."""

import inspect
import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Cells, made_up
from reference import gradients_by_definition, ntk_by_definition, reduce_by_definition
from reference_spectra import distance_by_definition, hessian_by_definition
from torch import nn
from torch.nn import functional as F

from ntklib import plots
from ntklib import synthesis as syn
from ntklib.models import ModularTransformer
from ntklib.probes import Gauges, log_probes, measure_probes, targets_as_numbers, task_accuracy, task_measures
from ntklib.random import stream
from ntklib.scenarios import BASES, scenario, stage
from ntklib.training import half_mse

STEPS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def network(c: int = 3) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c)).double().eval()


def gauges(c: int = 3, signs: bool = False) -> Gauges:
    x = torch.randn(6, 4, generator=stream(0, "x"), dtype=torch.float64)
    y = (torch.arange(6) % 2 * 2.0 - 1)[:, None].double() if signs else torch.arange(6) % c
    return Gauges((x, y), (x, y), (-x, y), (x[1:], y[1:]), half_mse if signs else F.cross_entropy)


@pytest.mark.parametrize(("c", "signs"), [(3, False), (1, True)])
def test_the_probes_of_one_network_are_their_definitions(c, signs):
    model, g = network(c), gauges(c, signs)
    x, y = g.probe
    found, kernel = measure_probes(model, g, {})
    definition = reduce_by_definition(ntk_by_definition(model, x, x), "trace")
    torch.testing.assert_close(kernel, definition, rtol=1e-10, atol=1e-10)
    targets = y if signs else torch.tensor([[float(label == a) for a in range(c)] for label in y.tolist()]).double()
    ideal = targets @ targets.T
    squares = [float(r.square().sum()) for r in gradients_by_definition(model, x).flatten(0, 1)]
    assert found["trace"] == pytest.approx(sum(squares) / (6 * c), rel=1e-10)
    inner = sum(float(definition[i, j] * ideal[i, j]) for i in range(6) for j in range(6))
    assert found["kta"] == pytest.approx(inner / float(definition.norm() * ideal.norm()), rel=1e-10)
    leading = torch.linalg.svd(definition)[0][:, :c]
    share = sum(float((leading[:, k] @ targets[:, a]) ** 2) for k in range(c) for a in range(targets.shape[1]))
    assert found["alignment"] == pytest.approx(share / float(targets.square().sum()), rel=1e-9)
    assert found["norm"] == pytest.approx(math.sqrt(sum(v**2 for w in model.parameters() for v in w.flatten().tolist())))
    leaf, slopes = x.clone().requires_grad_(), 0.0
    for i in range(6):
        for a in range(c):
            slopes += float(torch.autograd.grad(model(leaf[i : i + 1])[0, a], leaf, retain_graph=True)[0].square().sum())
    assert found["perturbation"] == pytest.approx(slopes / (6 * c), rel=1e-10)
    hessian = hessian_by_definition(model, lambda: g.loss(model(g.objective[0]), g.objective[1]))
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert found["sharpness"] == pytest.approx(top, rel=1e-3)  # the square of a residual of 2 %


def test_a_followed_sharpness_is_that_of_the_network_it_has_come_to():
    memory, model, g = {}, nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double(), gauges()
    for scale in (0.3, 0.6):
        with torch.no_grad():
            for k, w in enumerate(model.parameters()):
                w.copy_(scale * torch.randn(w.shape, generator=stream(k, "w"), dtype=torch.float64))
        found, _ = measure_probes(model, g, memory)
        top = hessian_by_definition(model, lambda: g.loss(model(g.objective[0]), g.objective[1]))
        assert found["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(top)[-1]), rel=1e-3)
    assert memory["modes"].shape == (163, 2)


def test_task_measures_take_each_from_its_own_examples():
    model, g = network(), gauges()
    found = task_measures(model, g)
    right = sum(int(model(g.probe[0][i : i + 1]).argmax()) == int(g.probe[1][i]) for i in range(6))
    assert found["accuracy_train"] == pytest.approx(right / 6)
    assert found["loss"] == pytest.approx(F.cross_entropy(model(g.probe[0][1:]), g.probe[1][1:]).item())
    flipped = sum(int(model(-g.probe[0][i : i + 1]).argmax()) == int(g.probe[1][i]) for i in range(6))
    assert found["accuracy_test"] == pytest.approx(flipped / 6)
    outputs = torch.tensor([[0.2], [-1.0], [3.0], [0.0]])
    assert task_accuracy(outputs, torch.tensor([[1.0], [1.0], [1.0], [1.0]])) == 0.5
    assert torch.equal(targets_as_numbers(torch.tensor([1, 0]), 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"labels \[n\] or signs \[n, 1\]"):
        task_accuracy(torch.zeros(2, 3), torch.zeros(2, 3))


def test_logged_distances_lead_to_distance_angle_and_velocity():
    rows, memory, kernels, g = [], {}, {}, gauges()

    def log(state, *, split="", layer="", **quantities):
        rows.extend({"step": state.step, "split": split, "layer": layer, "quantity": k, "value": v} for k, v in quantities.items())

    for step, scale in ((0, 1.0), (2, 1.4), (6, 2.0)):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        log_probes(log, SimpleNamespace(step=step), model, g, memory)
        kernels[step] = reduce_by_definition(ntk_by_definition(model, g.probe[0], g.probe[0]), "trace")
    table = syn.probe_table(pd.DataFrame(rows))

    def angle(a, b):
        return math.acos(1 - distance_by_definition(kernels[a], kernels[b]))

    assert list(table.columns) == list(syn.PROBES)
    assert table["distance"].tolist() == pytest.approx([0, *(distance_by_definition(kernels[0], kernels[t]) for t in (2, 6))])
    assert table["angle"].tolist() == pytest.approx([angle(0, 6), angle(2, 6), 0])
    assert math.isnan(table["velocity"].iloc[0])
    assert table["velocity"].iloc[1:].tolist() == pytest.approx([angle(0, 2) / 2, angle(2, 6) / 4])


def test_a_curve_that_steps_rests_at_its_step_and_one_that_drifts_never():
    assert syn.rest_time(STEPS, [0] * 4 + [1] * 7, 0.1) == 16
    assert syn.rest_time(STEPS, [5] * 3 + [-1] * 8, 0.1) == 8
    assert math.isnan(syn.rest_time(STEPS, list(range(11)), 0.1))  # a straight line over the measurements
    assert math.isnan(syn.rest_time(STEPS, [0] * 9 + [1] * 2, 0.1))  # one measurement of ten after the step
    assert syn.rest_time(STEPS, [0] * 8 + [1] * 3, 0.1) == 256  # two of ten
    assert math.isnan(syn.rest_time(STEPS, [0] * 8 + [1] * 3, 0.15))
    assert math.isnan(syn.rest_time(STEPS, [3.0] * 11, 0.1))
    with pytest.raises(ValueError, match="between 0 and 1/2. Got 0.5"):
        syn.rest_time(STEPS, STEPS, 0.5)


def test_the_scale_on_which_a_curve_rests_and_what_is_left_out():
    fall = [10.0**-k for k in range(6)] + [1e-6] * 5  # within a tenth of its range from the second step on
    assert syn.rest_time(STEPS, fall, 0.15) == 2
    assert syn.rest_time(STEPS, fall, 0.15, logarithmic=True) == 64  # 6 decades: a tenth is less than one
    holes = [math.nan, -1.0, *fall[2:]]
    assert syn.rest_time(STEPS, holes, 0.15, logarithmic=True) == 64
    assert math.isnan(syn.rest_time([1, 2], [1, 2], 0.1))


def run_with(trace=None, accuracy=None, test=None, loss=None, angle=None):
    """A run whose probes are constant but for what is given; kernels lie in a plane at these angles."""
    steps = [0, *STEPS]
    flat = [1.0] * 12
    angle = [0.0] * 12 if angle is None else angle
    curves = {(p, "probe"): flat for p in ("kta", "alignment", "sharpness", "norm", "perturbation")}
    curves[("trace", "probe")] = flat if trace is None else trace
    curves |= {("accuracy_train", ""): accuracy or flat, ("accuracy_test", ""): test or flat, ("loss", ""): loss or flat}
    table = {k: dict(zip(steps, v, strict=True)) for k, v in curves.items()}
    for i, early in enumerate(steps):
        later = {steps[j]: 1 - math.cos(angle[j] - angle[i]) for j in range(i + 1, 12)}
        if later:
            table["distance", "probe", str(early)] = later
    return made_up(table)


def test_events_and_rests_of_a_run():
    run = run_with(
        trace=[1.0] * 5 + [100.0] * 7,
        accuracy=[0.1, 0.1, 0.5, 0.985, 0.995, *[1.0] * 7],
        test=[0.1] * 7 + [0.79, 0.8, 0.8, 0.8, 0.8],
        loss=[1.0] * 4 + [1e-4] * 8,
    ).history
    times = syn.event_times(run, 0.1)
    assert times["training accuracy"] == 8  # 0.995 at the fourth of STEPS, the first at 0.99
    assert times["test accuracy"] == 128  # 0.79 / 0.8 is not 0.99
    assert times["loss"] == 8
    assert math.isnan(times["phase boundary"])  # nothing moves
    rests = syn.rest_times(run, 0.1)
    assert rests["trace"] == 16
    assert all(math.isnan(rests[p]) for p in syn.PROBES if p != "trace")


def test_a_phase_boundary_is_a_step_of_the_velocity_and_no_power_law():
    lengths = np.diff([0, *STEPS])
    stepped = np.cumsum([0, *(1e-3 * lengths[:4]), *(1e-6 * lengths[4:])])
    assert syn.event_times(run_with(angle=stepped).history, 0.1)["phase boundary"] == 16
    power = np.cumsum([0, *(1e-3 * lengths / np.array(STEPS))])  # straight in logarithms
    assert math.isnan(syn.event_times(run_with(angle=power).history, 0.1)["phase boundary"])


def test_a_kernel_enters_the_cone_at_half_of_the_first_angle_to_the_late_ones():
    jumping = [0.0, 0.1, 0.2, 0.3, 1.0, 1.02, 0.99, 1.01, 1.0, 0.98, 1.02, 1.0]
    assert syn.cone_entry(run_with(angle=jumping).history) == 8
    drift = np.linspace(0, 1, 12)  # the axis is at 19/22, the angle of the last four: in from 10/22 on, the sixth of all
    assert syn.cone_entry(run_with(angle=drift).history) == 16
    back = [0.0, 1.0, 1.0, 1.0, 1.0, 0.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert syn.cone_entry(run_with(angle=back).history) == 32  # it leaves once more
    wide = [0.9, *[0.5] * 7, 0.0, 1.0, 0.0, 1.0]  # late kernels are farther apart than half of the first angle
    assert math.isnan(syn.cone_entry(run_with(angle=wide).history))
    assert math.isnan(syn.cone_entry(run_with().history))  # nothing moves
    with pytest.raises(ValueError, match="late_share must be between 0 and 1. Got 1"):
        syn.cone_entry(run_with().history, 1)


def test_times_coincide_within_a_factor_at_two_standard_errors_over_most_seeds():
    nan = math.nan
    ratio, pairs, hit = syn.coincidence([2, 4, 8], [2, 4, 8], 1.5)
    assert (ratio.value, ratio.sem, pairs, hit) == (0, 0, 3, True)
    ratio, pairs, hit = syn.coincidence([2, 8], [1, 4], 1.9)
    assert ratio.value == pytest.approx(math.log(2))
    assert not hit
    assert syn.coincidence([2, 8], [1, 4], 2.1)[2]
    assert syn.coincidence([1, 4], [2, 8], 1.9)[0].value == pytest.approx(-math.log(2))
    assert not syn.coincidence([1, 4], [2, 8], 1.9)[2]
    wide, _, hit = syn.coincidence([1, 4], [2, 2], 1.9)  # log ratios -log 2 and log 2: mean 0, error log 2
    assert wide.sem == pytest.approx(math.log(2))
    assert not hit
    assert syn.coincidence([2, nan, 2], [2, 2, nan], 1.5)[1:] == (1, False)
    assert syn.coincidence([2, 2, nan, nan], [2, 2, 2, 2], 1.5)[1:] == (2, False)  # half is not most
    assert syn.coincidence([2, 2, nan], [2, 2, 2], 1.5)[1:] == (2, True)
    assert syn.coincidence([5], [5], 1.5)[1:] == (1, False)
    for bad in (([1], [1, 2], 2.0), ([1], [1], 1.0)):
        with pytest.raises(ValueError, match="factor must be above 1"):
            syn.coincidence(*bad)


def test_the_table_of_coincidences_keeps_scenarios_apart():
    index = pd.MultiIndex.from_product([["a", "b"], [0, 1]], names=["scenario", "seed"])
    rests = pd.DataFrame({"trace": [4.0, 4.0, 9.0, 9.0]}, index=index)
    events = pd.DataFrame({"loss": [4.0, 4.0, 1.0, 1.0]}, index=index)
    table = syn.coincidences(rests, events, 1.5).set_index("scenario")
    assert table["coincides"].tolist() == [True, False]
    assert table["value"].tolist() == pytest.approx([0, math.log(9)])


def test_chance_is_the_share_of_admissible_steps_near_the_event():
    assert syn.chance_share(STEPS, 16, 2.0, 0.1) == pytest.approx(3 / 9)  # 8, 16, 32 of the first nine
    assert syn.chance_share(STEPS, 1, 2.0, 0.1) == pytest.approx(2 / 9)
    assert syn.chance_share(STEPS, 1024, 2.0, 0.1) == 0
    assert math.isnan(syn.chance_share(STEPS, math.nan, 2.0, 0.1))
    draw = np.random.default_rng(0).integers(0, 9, 4000)
    hits = [abs(math.log(STEPS[i] / 16)) <= math.log(2) + 1e-12 for i in draw]
    assert np.mean(hits) == pytest.approx(3 / 9, abs=4 * math.sqrt(2 / 9 / 4000))


def test_the_shuffle_test_counts_assignments_that_fit_as_well():
    event = {"a": 0.1, "b": 0.4, "c": 0.8, "d": 0.9}
    found, p = syn.shuffle_test(event, event)
    assert found == 0
    assert p == pytest.approx(1 / 24)  # only the identity fits as well
    assert syn.shuffle_test(dict.fromkeys(event, 0.5), event)[1] == 1  # a probe that always rests in one place
    mixed = {"a": 0.3, "b": 0.2, "c": 0.7, "d": 0.95}
    sums = [sum(abs(x - y) for x, y in zip(order, event.values(), strict=True)) for order in permutations(mixed.values())]
    assert syn.shuffle_test(mixed, event)[1] == pytest.approx(np.mean([s <= sums[0] + 1e-9 for s in sums]))
    assert math.isnan(syn.shuffle_test({"a": 0.1, "b": math.nan, "c": 1.0}, event)[1])


def test_positions_are_shares_of_the_measured_axis():
    assert [syn.position(STEPS, t) for t in (1, 32, 1024)] == [0, 0.5, 1]
    assert math.isnan(syn.position(STEPS, math.nan))


SMALL = {
    "supervised": {"num_train": 30, "num_test": 20, "batch_size": 10, "epochs": 2, "width": 8, "dataset": "digits"},
    "grokking addition": {"p": 5, "train_fraction": 0.6, "width": 8, "heads": 2, "hidden": 8, "steps": 8},
    "grokking digits": {"num_train": 30, "num_test": 20, "batch_size": 15, "epochs": 4, "width": 8, "dataset": "digits"},
    "FixMatch": {"num_train": 60, "num_test": 20, "num_labels": 10, "batch_size": 2, "mu": 2, "steps": 4, "width": 8, "shrink": 2,
                 "dataset": "digits"},
    "edge of stability": {"num_train": 20, "steps": 8, "width": 8, "depth": 2},
    "lazy": {"num_train": 20, "width": 16, "steps": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_every_scenario_trains_and_is_measured_the_same_each_time(name):
    def history():
        s = scenario(name, {**SMALL[name], "seed": 3, "device": "cpu"}, num_kernel=6, num_measured=6)
        scene, rows, memory = stage(s), [], {}
        keywords = [p.name for p in inspect.signature(scene.loop).parameters.values() if p.kind is p.KEYWORD_ONLY]
        given = {k: v for k, v in s.flat().items() if k in keywords} | scene.options

        def log(state, *, split="", layer="", **quantities):
            rows.extend((state.step, split, layer, k, v) for k, v in quantities.items())

        for state in scene.loop(*scene.arguments, **given, measure_at=scene.marks(6, 1)):
            log_probes(log, state, scene.at(state), scene.gauges, memory)
        return scene, rows

    scene, first = history()
    assert first == history()[1]
    assert len(scene.gauges.probe[0]) == 6
    assert {r[0] for r in first} == set(scene.marks(6, 1))
    assert all(step % 2 == 0 or step == scene.steps for step in scene.marks(6, 1))
    assert all(math.isfinite(r[4]) for r in first)
    per_step = {step: sum(r[0] == step and r[3] in syn.PROBES and r[2] == "" for r in first) for step in scene.marks(6, 1)}
    assert set(per_step.values()) == {6}


def test_noise_on_tokens_is_noise_on_one_hot_vectors():
    scene = stage(scenario("grokking addition", {**SMALL["grokking addition"], "device": "cpu"}, num_kernel=4, num_measured=6))
    model, g = scene.model, scene.gauges
    assert isinstance(model, ModularTransformer)
    torch.testing.assert_close(model(g.probe[0]), model(g.real))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("supervised learning", {}, "supervised"),
        ("lazy", {"num_kernel": 1}, "num_kernel must be at least 2"),
        ("lazy", {"num_measured": 5}, "num_measured at least 6. Got 40 and 5"),
    ],
)
def test_wrong_scenarios_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        scenario(name, {}, **{"num_kernel": 40, "num_measured": 20, **options})


def test_what_the_chapter_judges_on_made_up_times():
    index = pd.MultiIndex.from_product([["a", "b", "c", "d"], [0, 1]], names=["scenario", "seed"])
    never = [math.nan, math.nan]
    rests = pd.DataFrame({p: [8.0, 8.0, *never, *never, *never] for p in syn.PROBES}, index=index)
    rests["trace"] = [8.0, 8.0, 64.0, 64.0, *never, *never]
    rests["distance"] = [4.0, 4.0, 16.0, 16.0, *never, *never]
    rests["norm"] = [16.0, 16.0, 32.0, 32.0, *never, *never]  # after the trace in one scenario, before it in the other
    rests["kta"] = [32.0, 32.0, 32.0, 32.0, 32.0, 32.0, *never]
    events = pd.DataFrame({e: [2.0] * 8 for e in syn.EVENTS}, index=index)
    events["training accuracy"] = [8.0, 8.0, 64.0, 64.0, 2.0, 2.0, 2.0, 2.0]
    events["test accuracy"] = [8.0, 8.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    events["loss"] = 32.0
    runs = {name: [made_up({}), made_up({})] for name in "abcd"}
    entry = pd.Series([4.0, 4.0, *never, *never, *never], index)
    scores = syn.coincidences(rests, events, 1.5)
    cells = Cells(
        "synthesis", rests=rests, events=events, runs=runs, scores=scores, entry=entry, known={}, num_seeds=2, LABELS={},
        steps=dict.fromkeys("abcd", STEPS), rows=list(syn.PROBES), factor=1.5, tolerance=0.1,
    )  # fmt: skip
    found = cells.run("wins = scores", '"N141"', "def near", "def paired", '"N144"', "settled = rests")
    assert found["N140"] == pytest.approx([2 / 4])  # with the training accuracy in a and b
    assert found["N141"] == pytest.approx([1 / 4])  # test accuracy in a alone
    close = {"a": (6 + 6 + 1 + 0) / 36, "b": (1 + 0 + 2 + 0) / 16, "c": (0 + 0 + 1 + 0) / 4}  # by event; in d no probe rests
    assert found["N142"] == pytest.approx([sum(close.values()) / 3 - 1 / 9])  # nine admissible steps, one of them at each event
    assert found["N143"] == pytest.approx([(math.log(2) + math.log(4)) / 2])
    assert found["N144"] == pytest.approx([math.log(2)])
    assert found["N145"] == pytest.approx([-math.log(2)])


def test_a_normalized_panel_runs_from_0_to_1_on_its_scale_and_shows_the_events_there_are():
    ax = plots.figure()[1]
    table = pd.DataFrame({"a": [1.0, 10.0, 100.0], "b": [4.0, 40.0, 400.0]}, index=[1, 2, 4])
    plots.normalized_curve(ax, table, logarithmic=True, events={"one": 2.0, "none": math.nan})
    event, mean = ax.lines
    assert list(event.get_xdata()) == [2, 2]
    assert list(mean.get_ydata()) == pytest.approx([0, 0.5, 1])
    plots.plt.close("all")


def test_a_map_of_ratios_writes_them_frames_the_marked_and_hatches_the_missing():
    ax = plots.figure()[1]
    values = pd.DataFrame({"loss": [math.log(2), math.nan]}, index=["trace", "KTA"])
    plots.ratio_map(ax, values, values > 0, limit=3)
    assert [t.get_text() for t in ax.texts] == ["2"]
    frame, hatched = ax.patches
    assert frame.get_xy() == pytest.approx((-0.46, -0.46))
    assert not frame.get_fill()
    assert (hatched.get_xy(), hatched.get_hatch()) == ((-0.5, 0.5), "////")
    plots.plt.close("all")
