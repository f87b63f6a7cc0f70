"""What the page on choosing an estimator says: deviations, costs, names and the stored measurement."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ntklib
from ntklib import estimator_table, storage
from ntklib.estimators import PROBES
from ntklib.paths import project_root

PAGE = (project_root() / "book" / "estimators.md").read_text(encoding="utf-8")
N, C = 5, 4


@pytest.fixture(scope="module")
def network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, C)).double().eval()
    for w in model.parameters():
        w.data = torch.randn(w.shape, generator=generator, dtype=torch.float64) / math.sqrt(w.shape[-1])
    return model, torch.randn(N, 6, generator=generator, dtype=torch.float64)


def kernel_by_definition(model, x):
    """Gradients of all outputs by autograd, as rows, and their inner products ``[n, c, n, c]``."""
    rows = []
    for out in model(x).flatten():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()), retain_graph=True)]))
    j = torch.stack(rows)
    return (j @ j.T).reshape(N, C, N, C)


def deviation(kernel, method, probes, q):
    """The square root of the page's formulas, in the words of the page."""
    trace = kernel.reshape(N * C, N * C).trace()
    blocks = torch.stack([kernel[i, :, i] for i in range(N)])  # [n, c, c]
    squares = blocks.square().sum((1, 2))
    if method != "output":
        r_eff = trace**2 / kernel.square().sum()
        return math.sqrt(2 / (q * r_eff))
    if probes == "rademacher":
        off = squares.sum() - blocks.diagonal(dim1=1, dim2=2).square().sum()
        return math.sqrt(2 * off / (q * trace**2))
    own = (squares - blocks.diagonal(dim1=1, dim2=2).sum(1) ** 2 / C).sum()
    return math.sqrt(2 * C * (C - q) * own / (q * (C + 2) * (C - 1) * trace**2))


@pytest.mark.parametrize(("method", "options"), [("jvp", {}), ("perturbation", {"epsilon": 1e-5}), ("output", {})])
def test_independent_draws_scatter_as_the_page_says(network, method, options):
    model, x = network
    kernel, draws = kernel_by_definition(model, x), 4000
    generator = torch.Generator().manual_seed(1)
    found = ntklib.ntk_trace(model, x, method=method, num_samples=draws, generator=generator, normalize=False, **options)
    trace = float(kernel.reshape(N * C, N * C).trace())
    one = deviation(kernel, method, "rademacher", 1)
    assert found.mean / trace == pytest.approx(1, abs=4 * one / math.sqrt(draws))
    # four standard errors, for a parent whose excess kurtosis is at most that of one square, 12
    assert math.sqrt(found.variance) / trace == pytest.approx(one, rel=4 * math.sqrt(14 / (4 * draws)))


@pytest.mark.parametrize("q", [1, 3])
def test_orthogonal_probes_scatter_as_the_page_says(network, q):
    model, x = network
    kernel, draws = kernel_by_definition(model, x), 20_000
    v = PROBES["orthogonal"](draws * N, q, C, torch.Generator().manual_seed(1)).reshape(draws, N, q, C)
    blocks = torch.stack([kernel[i, :, i] for i in range(N)])
    means = torch.einsum("dnqa,nab,dnqb->d", v, blocks, v) / q
    trace = float(kernel.reshape(N * C, N * C).trace())
    expected = deviation(kernel, "output", "orthogonal", q)
    assert float(means.mean()) / trace == pytest.approx(1, abs=4 * expected / math.sqrt(draws))
    assert float(means.std()) / trace == pytest.approx(expected, rel=4 * math.sqrt(14 / (4 * draws)))


def test_orthogonal_probes_are_exact_at_as_many_as_outputs(network):
    model, x = network
    exact = ntklib.ntk_trace(model, x).mean
    estimate = ntklib.ntk_trace(model, x, method="output", probes="orthogonal", num_samples=C)
    assert estimate.mean == pytest.approx(exact, rel=1e-12)
    assert deviation(kernel_by_definition(model, x), "output", "orthogonal", C) == 0


def test_products_cost_no_more_than_the_page_says():
    layers = [nn.Linear(64, 64), nn.Tanh()] * 3
    model = nn.Sequential(*(nn.Linear(64, 64) if isinstance(m, nn.Linear) else m for m in layers), nn.Linear(64, 8)).double().eval()
    x, y = torch.ones(32, 64, dtype=torch.float64), torch.zeros(32, 8, dtype=torch.float64)

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    forward = flops(lambda: model(x))
    hessian = ntklib.hessian_operator(model, lambda f, t: (f - t).square().sum() / 2, (x, y))
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    assert 6 < flops(lambda: hessian @ v) / forward <= 9
    kernel = ntklib.NTKOperator(model, x)
    u = torch.ones(kernel.shape[0], dtype=torch.float64)
    _ = kernel @ u  # keeps the forward pass
    assert 4 < flops(lambda: kernel @ u) / forward <= 5
    assert flops(lambda: ntklib.ntk_sketch(model, x, num_samples=4)) / forward <= 3 * 4


def test_the_names_on_the_page_exist():
    names = re.findall(r"`([A-Za-z]+_\w+|NTKOperator|sharpness)`", PAGE)
    options = {"batch_statistics"}
    assert len(set(names)) >= 20
    assert not {n for n in names if n not in ntklib.__all__} - options


def test_the_table_has_the_numbers_of_the_stored_measurement():
    probes = storage.read_json(estimator_table.source())["probes"]
    rows = {row.split("`")[1]: row for row in estimator_table.table().splitlines() if row.startswith("| `")}
    assert rows.keys() == probes["estimators"].keys()
    for name, values in probes["estimators"].items():
        cells = [float(cell) for cell in rows[name].strip("| ").split(" | ")[1:]]
        expected = [values[k] for k in ("relative_sd", "relative_sd_closed_form", "mean_over_exact", "cost", "cost_amortised")]
        assert cells == pytest.approx(expected, rel=0.05)


def test_the_table_says_so_where_nothing_is_stored(monkeypatch, tmp_path):
    monkeypatch.setattr(estimator_table, "source", lambda: tmp_path / "benchmarks.json")
    assert "Nothing is stored" in estimator_table.table()
