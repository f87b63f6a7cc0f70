"""Kernels compared along a run: identities, windows, and a memory that outlives a kill."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from crashes import crash_at

from ntklib import Run, data, distances_to_earlier, kernel_change, kernel_distance, models, sgd, steps_per_epoch
from ntklib.phases import complementary_windows, pairwise_distances
from ntklib.runs import load_tensors_of
from ntklib.training.batches import epoch_batches


def random_kernels(seed, size=7):
    factors = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factors @ factors.mT


@pytest.mark.parametrize("seed", range(3))
def test_the_change_of_a_kernel_is_the_sum_of_scale_and_direction(seed):
    k1, k2 = random_kernels(seed)
    n1, n2 = (math.sqrt(sum(float(v) ** 2 for v in k.flatten())) for k in (k1, k2))
    cosine = sum(float(a * b) for a, b in zip(k1.flatten(), k2.flatten(), strict=True)) / (n1 * n2)
    found = kernel_change(k1, k2)
    assert found.total == pytest.approx(n1**2 + n2**2 - 2 * cosine * n1 * n2, rel=1e-12)
    assert found.scale == pytest.approx((n1 - n2) ** 2, rel=1e-12)
    assert found.direction == pytest.approx(2 * (1 - cosine) * n1 * n2, rel=1e-12)
    assert found.error < 1e-13
    assert found.scale_share == pytest.approx(found.scale / found.total, rel=1e-12)


def test_a_multiple_is_a_change_of_scale_and_a_kernel_of_equal_norm_one_of_direction():
    k1, k2 = random_kernels(5)
    assert kernel_change(k1, 3 * k1).scale_share == pytest.approx(1.0, abs=1e-14)
    assert kernel_change(k1 / k1.norm(), k2 / k2.norm()).scale_share == pytest.approx(0.0, abs=1e-14)
    assert math.isnan(kernel_change(k1, k1).scale_share)
    assert kernel_change(k1, k1).error == 0


def test_each_kernel_is_compared_with_all_earlier_ones_of_its_name():
    memory, kernels = {}, [random_kernels(seed)[0] for seed in range(4)]
    for step, kernel in zip((0, 2, 10, 11), kernels, strict=True):
        found = distances_to_earlier(memory, "full", step, kernel)
        distances_to_earlier(memory, "other", step, kernel[:2, :2])
    assert found == {s: kernel_distance(k, kernels[3]) for s, k in zip((0, 2, 10), kernels[:3], strict=True)}
    assert len(memory) == 8
    with pytest.raises(ValueError, match=r"no dot.*Got 'a.b'"):
        distances_to_earlier(memory, "a.b", 0, kernels[0])


def compute(root, steps):
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, width=6, seed=0)
    settings = {"lr": 0.1, "batch_size": 16, "epochs": 3, "seed": 0}
    torch.set_num_threads(1)
    with Run("memory", settings, save_every=0, root=root) as run:
        for state in run.states(sgd, model, data.load("digits", num_train=40, num_test=10)):
            steps.append(state.step)
            weights = model.layers[1].weight.detach().clone()
            found = distances_to_earlier(run.memory, "weights", state.step, weights @ weights.T)
            for step, distance in found.items():
                run.log(state, layer=str(step), distance=distance)
    return run.result


@pytest.mark.parametrize("write", range(0, 12, 2))
def test_pairwise_distances_of_an_interrupted_run_are_those_of_an_uninterrupted_one(tmp_path, write):
    whole = compute(tmp_path / "whole", [])
    assert len(whole.history) == 6  # pairs of four states
    assert not [name for name in load_tensors_of(whole, tmp_path / "whole") if name.startswith("memory")]
    with crash_at(write):
        compute(tmp_path / "crashed", [])
    steps = []
    resumed = compute(tmp_path / "crashed", steps)
    assert steps == [s for s in (0, 3, 6, 9) if s >= 3 * (write // 3)]
    pd.testing.assert_frame_equal(whole.history, resumed.history, check_exact=True)


def test_a_straight_line_of_networks_starts_and_ends_at_its_two_states():
    first, last = (models.build("mlp", input_shape=(1, 8, 8), num_classes=10, width=6, seed=s) for s in (0, 1))
    before, now = (dict(m.named_parameters()) for m in (first, last))
    for u in (0.0, 0.25, 1.0):
        for name, w in models.between(last, before, u).named_parameters():
            expected = (1 - u) * before[name] + u * now[name]
            torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)  # float32
    with pytest.raises(ValueError, match=r"Unknown parameter 'layers\.1\.weight'"):
        models.between(last, {}, 0.5)


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (6, 3), (3, 7), (1, 4), (9, 4), (5, 1)])
def test_the_steps_per_epoch_are_the_batches_of_an_epoch(n, batch_size):
    assert steps_per_epoch(n, batch_size) == len(epoch_batches(n, batch_size, 0, 0))


def turning_kernels(angles):
    """Distances 1 - cos of unit vectors in the plane at these angles."""
    a = np.asarray(angles)
    return 1 - np.cos(a[:, None] - a[None])


def test_windows_of_growth_and_of_turning_are_found():
    # grows at a fixed direction during 0..3, turns at a fixed trace during 3..6
    trace = [1, 2, 4, 8, 8, 8, 8]
    angles = [0, 0, 0, 0, 0.2, 0.4, 0.6]
    frozen, turning = complementary_windows(range(7), trace, turning_kernels(angles))
    assert (frozen.start, frozen.end) == (0, 3)
    assert frozen.value == pytest.approx(math.log(8), rel=1e-12)
    assert (turning.start, turning.end) == (3, 6)
    assert turning.value == pytest.approx(1 - math.cos(0.6), rel=1e-12)


def test_what_happens_between_the_ends_of_a_window_counts():
    # out and back again, in direction and in trace: no window of either kind is longer than a point
    frozen, turning = complementary_windows([0, 1, 2], [1, 2, 1.01], turning_kernels([0, 0.5, 0.1]))
    assert frozen.value == turning.value == 0
    assert frozen.start == frozen.end == 0
    out_and_back = complementary_windows([0, 1, 2], [1, 2, 1.5], turning_kernels([0, 0.5, 0.01]))
    assert out_and_back[0].value == 0


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match=r"square, with one row per epoch and trace. Got 2 epochs, 2 traces, \(2, 3\)"):
        complementary_windows([0, 1], [1, 1], np.zeros((2, 3)))
    with pytest.raises(ValueError, match="positive and finite. Got 0"):
        complementary_windows([0, 1], [1, 0], np.zeros((2, 2)))


def test_logged_distances_become_a_symmetric_matrix():
    rows = [(4, "0", 0.1), (9, "0", 0.3), (9, "4", 0.2)]
    history = pd.DataFrame(
        [{"step": s, "layer": e, "split": "full", "quantity": "distance", "value": v} for s, e, v in rows]
        + [{"step": 9, "layer": "4", "split": "summed", "quantity": "distance", "value": 0.9}]
    )
    matrix = pairwise_distances(history, "full", [9, 0, 4])
    assert matrix.tolist() == [[0, 0.3, 0.2], [0.3, 0, 0.1], [0.2, 0.1, 0]]
    with pytest.raises(ValueError, match="Got none for steps 4 and 5"):
        pairwise_distances(history, "full", [4, 5])
