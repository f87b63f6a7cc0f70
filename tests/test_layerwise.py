"""Settling times, sign tests, the outline of a network and its drawing."""

import math
from itertools import product
from math import comb

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ntklib import data, models, ntk_by_layer, ntk_trace, plots
from ntklib.phases import settling_time, sign_test


def test_an_exponential_approach_settles_at_the_time_that_its_formula_gives():
    t = np.linspace(0, 20, 2001)
    value = np.exp(np.exp(-t))  # log value = e^-t, which ends at 2e-9
    for tolerance in (0.05, 0.1, 0.2):
        assert settling_time(t, value, tolerance=tolerance) == pytest.approx(-math.log(tolerance), abs=0.011)  # the grid
        assert settling_time(t, value**-1, tolerance=tolerance) == settling_time(t, value, tolerance=tolerance)
        linear = 1 + 7 * np.exp(-t)
        assert settling_time(t, linear, tolerance=tolerance, measure="range") == pytest.approx(-math.log(tolerance), abs=0.011)


def test_a_curve_that_leaves_again_has_not_settled_before():
    assert settling_time([0, 1, 2, 3, 4], [1, 5, 1, 5, 5]) == 3
    assert settling_time([0, 1, 2, 3, 4], [5, 5, 5, 5, 5]) == 0
    assert settling_time([0, 1, 2], [5, 5, 1]) == 2


def test_the_scale_of_a_value_does_not_matter():
    value = np.array([9.0, 4.0, 2.5, 2.1, 2.0])
    for measure in ("log", "range"):
        assert settling_time(range(5), value, measure=measure) == settling_time(range(5), 1e6 * value, measure=measure)
    assert settling_time(range(5), value, measure="range") == settling_time(range(5), value + 100, measure="range")
    assert settling_time(range(5), value + 100, measure="log") == 0


def test_bad_curves_do_not_settle():
    with pytest.raises(ValueError, match="same length, at least 1. Got 2 and 1"):
        settling_time([0, 1], [1])
    with pytest.raises(ValueError, match="positive and finite. Got -1"):
        settling_time([0, 1], [1, -1])
    with pytest.raises(ValueError, match="Unknown measure 'logs'. Did you mean 'log'"):
        settling_time([0, 1], [1, 1], measure="logs")


def test_the_p_value_is_the_share_of_sign_patterns_with_as_many_smaller_ones():
    for n in range(1, 7):
        for smaller in range(n + 1):
            first, second = [0] * smaller + [2] * (n - smaller) + [1], [1] * n + [1]  # one tie
            found = sign_test(first, second)
            assert (found.smaller, found.larger, found.ties) == (smaller, n - smaller, 1)
            patterns = sum(sum(signs) >= smaller for signs in product((0, 1), repeat=n))
            assert found.p_value == pytest.approx(patterns / 2**n, rel=1e-12)
            assert patterns == sum(comb(n, k) for k in range(smaller, n + 1))


def test_ties_alone_decide_nothing_and_pairs_are_needed():
    assert sign_test([1, 2], [1, 2]).p_value == 1
    with pytest.raises(ValueError, match="same length. Got 1 and 2"):
        sign_test([1], [1, 2])


def network(name, width=4):
    images = data.load("digits", num_train=20, num_test=10)
    net = models.build(name, input_shape=images.input_shape, num_classes=10, width=width).eval()
    return models.calibrate_batch_norm(net, images.x_train), images.x_train[:3]


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg11", "resnet18", "vit"])
def test_the_outline_holds_all_parameters_and_the_usual_inner_outputs(name):
    net, x = network(name)
    inside = models.inner_outputs(name)
    parts = models.outline(net, x, inside)
    assert [p.name for p in parts if p.name in inside] == inside  # front comes before middle
    assert parts[-1].shape == (10,)
    alone = sum(w.numel() for _, w in net.named_parameters(recurse=False))
    assert sum(p.parameters for p in parts) + alone == sum(w.numel() for w in net.parameters())
    for place in inside:
        (part,) = (p for p in parts if p.name == place)
        estimate = ntk_trace(net, x, method="output", output=place, normalize=False, generator=torch.Generator().manual_seed(0))
        unit = ntk_trace(net, x, method="output", output=place, generator=torch.Generator().manual_seed(0))
        assert estimate.mean / unit.mean == pytest.approx(len(x) * math.prod(part.shape), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit"])
def test_every_layer_belongs_to_a_part_and_contributions_add_up(name):
    net, x = network(name)
    parts = models.outline(net, x, models.inner_outputs(name))
    total = {}
    for layer, kernel in ntk_by_layer(net, x, reduce="trace").items():
        part = models.part_of(layer, parts)
        total[part] = total.get(part, 0.0) + float(kernel.trace())
    own = {n for n, _ in net.named_parameters(recurse=False)}
    assert set(total) <= {p.name for p in parts} | own
    assert sum(total.values()) == pytest.approx(ntk_trace(net, x, normalize=False).mean, rel=1e-5)  # single precision


def test_a_part_is_not_mistaken_for_one_whose_name_it_begins_with():
    parts = [models.Part("layer1", (), 0), models.Part("layer10", (), 0)]
    assert models.part_of("layer10.0.body", parts) == "layer10"
    assert models.part_of("layer1.0", parts) == "layer1"
    assert models.part_of("token", parts) == "token"


def test_unknown_names_are_refused():
    net, x = network("resnet18", 2)
    with pytest.raises(ValueError, match="Unknown module 'layer9'. Did you mean 'layer"):
        models.outline(net, x, ["layer9"])
    with pytest.raises(ValueError, match="Unknown model 'resnext50'. Did you mean 'resnet'"):
        models.inner_outputs("resnext50")


def test_the_outline_leaves_no_hooks():
    net, x = network("resnet18", 2)
    models.outline(net, x, ["layer1"])
    assert not any(m._forward_hooks for m in net.modules())


def test_a_diagram_shows_every_part_and_every_mark():
    net, x = network("resnet18", 2)
    parts = models.outline(net, x)
    _, ax = plt.subplots()
    plots.network_diagram(ax, parts, {"layer1": "front", "head": "last"})
    words = [t.get_text() for t in ax.texts]
    for part in parts:
        assert any(w.startswith(f"{part.name}\n") and f"{part.parameters:,}" in w for w in words)
    assert {"front", "last", "image"} <= set(words)
    plt.close("all")


def test_a_distance_map_has_the_times_as_ticks():
    _, ax = plt.subplots()
    times = [0, 0.5, 1, 2]
    plots.distance_map(ax, times, np.arange(16).reshape(4, 4), "S")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.5", "1", "2"]
    assert ax.images[0].get_array()[3, 0] == 12
    plt.close("all")


def test_the_share_of_a_sign_test_adds_two_pairs_of_either_kind():
    share, sem = sign_test([1, 1, 1, 1, 1, 2], [2, 2, 2, 2, 1, 1]).share  # 4 smaller, 1 larger, 1 tie
    assert share == pytest.approx(6 / 9, rel=1e-15)
    assert sem == pytest.approx(math.sqrt((6 / 9) * (3 / 9) / 9), rel=1e-15)
    assert sign_test([1, 1], [1, 1]).share[0] == 0.5


@pytest.mark.parametrize(("smaller", "larger"), [(5, 0), (6, 0), (5, 1), (4, 1), (7, 1), (3, 3), (0, 5), (9, 3)])
def test_the_share_is_two_errors_above_one_half_when_the_test_is_significant(smaller, larger):
    found = sign_test([0] * smaller + [1] * larger, [1] * smaller + [0] * larger)
    share, sem = found.share
    assert (share - 2 * sem >= 0.5 - 1e-12) == (found.p_value <= 0.05)  # 7 of 8: exactly one half
