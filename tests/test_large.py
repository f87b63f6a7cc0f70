"""Large kernels: every order of summation against gradients by definition, files that survive, memory that does not suffice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_case import assert_kernel
from engine_cases import CASES, truth
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ntklib import large, models
from ntklib.kernels import empirical_ntk, evaluate, held, operations, plan, shapes
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
SOME = ["groups", "embedding", "padding index", "cross attention", "module used twice", "lstm", "batch norm of images"]


def small(n=12, width=2, side=8, **options):
    """A residual network and images, in float64 unless told otherwise."""
    model = models.build("resnet18", input_shape=(1, side, side), num_classes=4, width=width, seed=0)
    model = models.calibrate_batch_norm(model, images(32, side).float()).eval()
    return model.to(**{"dtype": torch.float64, **options}), images(n, side).to(**{"dtype": torch.float64, **options})


def images(n, side, seed=0):
    return torch.randn(n, 1, side, side, generator=stream(seed, "images"), dtype=torch.float64)


def array(result):
    return torch.from_numpy(np.asarray(result.kernel))


@pytest.mark.parametrize("name", CASES)
def test_blocks_hold_the_inner_products_of_gradients(name):
    t = truth(name)
    for reduce, law in REDUCE.items():
        found = large_ntk(t.model, t.x1, reduce=reduce, rows=2, columns=2, check=0)
        assert_kernel(array(found), law(t.kernel()), float(t.kernel().abs().max()))
        assert torch.equal(array(found), array(found).T)
    found = large_ntk(t.model, t.x1, t.x2, rows=2, columns=1, check=0)
    assert_kernel(array(found), REDUCE["sum"](t.kernel(cross=True)), float(t.kernel(cross=True).abs().max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*SOME, "residual network"] if "residual network" in CASES else SOME)
def test_every_order_of_summation_gives_the_same(name, order, monkeypatch):
    written, explicit = ORDERS[order]
    monkeypatch.setattr(LayerShape, "written", property(lambda _: written))
    monkeypatch.setattr(LayerShape, "explicit", lambda *_: explicit)
    t = truth(name)
    for work in (2**20, 1):  # all rows at once, or one row and one channel at a time
        monkeypatch.setattr(Job, "plan", lambda self, work=work: shapes.LargePlan(2, 2, work, 0))
        for reduce, law in REDUCE.items():
            found = large_ntk(t.model, t.x1, t.x2, reduce=reduce, check=0)
            assert_kernel(array(found), law(t.kernel(cross=True)), float(t.kernel(cross=True).abs().max()))


def product_in_place(_total, a, b, *_args, **_options) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(action) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
        action()
    return counter.get_total_flops()


NETWORKS = {
    "residual": lambda: small()[0],
    "transformer": lambda: models.build("vit", input_shape=(1, 8, 8), num_classes=4, width=8).double().eval(),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 4)).double(),
    "groups and biases": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=True), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)
    ).double(),
}


@pytest.mark.parametrize("reduce", ["sum", "trace"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_arithmetic_and_memory_are_those_that_are_counted(name, cross, reduce, monkeypatch):
    model, x1, x2 = NETWORKS[name](), images(13, 8), images(9, 8, seed=1) if cross else None
    jobs, flops, held = [], [], []
    monkeypatch.setattr(Worker, "release", lambda self: held.append(0 if self.held is None else self.held.numbers()))

    def run(self, run=Job.run, **options):
        jobs.append(self)
        flops.append(counted(lambda: run(self, **options)))

    monkeypatch.setattr(Job, "run", run)
    large_ntk(model, x1, x2, reduce=reduce, rows=5, columns=3, check=0)
    worker, cost = jobs[0].workers[0], large_cost(jobs[0].workers[0].layers, 13, 9 if cross else None, 5, 3)
    each = counted(lambda: worker.program.stream(x1[:1], worker.v[:, None], lambda _: None))
    assert flops[0] == 2 * cost.products + each * cost.passes
    assert cost.passes == worker.passes
    k, forward = len(worker.v), [layer.forward for layer in worker.layers]
    if name != "transformer":  # torch counts attention between tokens as well
        first = next(f for f in reversed(forward) if f)  # its gradient with respect to the inputs is not needed
        assert each == 2 * cost.backprop // cost.passes - 2 * k * first
    assert max(held) == 5 * sum(layer.held for layer in worker.layers)
