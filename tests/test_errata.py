"""The errata: every correction can be told from the printed form, and the exact cases behind it are right."""

import contextlib
import io
import json
import math
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ntklib import chapters, errata, kernel_angle, kernel_distance, ntk_trace
from ntklib.training import cross_entropy

ROOT = chapters.project_root()
CELLS = nbformat.read(chapters.notebook_path("errata"), 4).cells
TARGET = re.compile(r"^\(errata-([\w-]+)\)=$", re.MULTILINE)
LINK = re.compile(r"\{doc\}`(\w+)`")


def sections():
    """Label -> (markdown of the section, code of the cells that follow it)."""
    found, label = {}, None
    for cell in CELLS:
        labels = TARGET.findall(cell.source) if cell.cell_type == "markdown" else []
        if labels:
            (label,) = labels
            found[label] = (cell.source, [])
        elif cell.cell_type == "markdown":
            label = None
        elif label:
            found[label][1].append(cell.source)
    return found


SECTIONS = sections()
SLIPS = [name for name in SECTIONS if name != "table"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The namespace of the page after all its code ran at the cell's own parameters."""
    import matplotlib.pyplot as plt

    names = {"display": lambda _: None, "__name__": "errata_page"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("NTKLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(plt, "show", plt.close)
        for cell in CELLS:
            if cell.cell_type == "code":
                exec(compile(cell.source, "errata", "exec"), names)
    return names


@pytest.mark.parametrize("label", SLIPS)
def test_each_section_says_what_is_printed_derives_what_is_right_checks_it_and_links_to_a_chapter(label):
    text, code = SECTIONS[label]
    assert "*Printed.*" in text
    assert "*Right.*" in text
    assert re.search(r"^\$\$ \(eq-errata-[\w-]+\)$", text, re.MULTILINE)
    assert set(LINK.findall(text)) & set(chapters.names())
    assert f'"{label}"' in code[0]
    assert "checks.add(" in code[0]


def test_the_opening_table_lists_every_section_once():
    listed = re.findall(r"\]\(#errata-([\w-]+)\) \|", CELLS[0].source)
    assert sorted(listed) == sorted(SLIPS)


def test_every_check_tells_the_two_forms_apart(page):
    rows = page["checks"].rows
    assert {r.section for r in rows} == set(SLIPS)
    assert [r.quantity for r in rows if not r.decides] == []


def test_every_check_fails_when_the_printed_form_is_taken_for_the_corrected_one(page):
    for row in page["checks"].rows:
        wrong = replace(row, corrected=row.printed, corrected_bound=row.printed_bound)
        assert not wrong.decides, row.quantity
        assert wrong.corrected_error > row.tolerance, row.quantity


def test_every_equality_fails_when_the_corrected_value_is_off_by_a_tenth(page):
    for row in page["checks"].rows:
        if not row.corrected_bound and row.corrected:
            assert not replace(row, corrected=1.12 * row.corrected).decides, row.quantity


def test_the_findings_hold_at_the_default_parameters(page):
    judged = page["verdicts"].judgements
    assert sorted(judged) == [f"N16{i}" for i in range(6)]
    assert {k: j.verdict for k, j in judged.items()} == dict.fromkeys(judged, "holds")


def test_the_table_of_checks_links_every_row_to_its_section(page):
    table = page["checks"]._repr_markdown_().splitlines()
    assert len(table) == 2 + len(page["checks"].rows)
    for line, row in zip(table[2:], page["checks"].rows, strict=True):
        assert f"(#errata-{row.section})" in line
        assert line.endswith("| yes |")


def test_a_relative_error_is_symmetric_and_a_bound_counts_only_what_exceeds_it():
    assert errata.relative_error(2.0, 1.0) == errata.relative_error(1.0, 2.0) == 0.5
    assert errata.relative_error(0.0, 0.0) == 0.0
    assert errata.relative_error(0.0, 3.0) == 1.0
    assert errata.relative_error(-1.0, 1.0) == 2.0
    assert errata.relative_error(2.0, 3.0, bound=True) == 0.0
    assert errata.relative_error(4.0, 3.0, bound=True) == 0.25
    assert math.isnan(errata.relative_error(math.nan, 1.0))


def test_an_unknown_number_decides_nothing():
    row = errata.Comparison("x", "q", math.nan, 1.0, 2.0, 1e-9)
    assert not row.decides
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ValueError, match="tolerance must be positive"):
        errata.Comparisons().add("x", "q", 1.0, 2.0, 1.0, tolerance=0.0)


def test_quadrature_has_the_moments_of_a_normal_vector():
    moment = lambda *powers: errata.gaussian_mean(  # noqa: E731
        lambda z: torch.stack([z[i] ** p for i, p in enumerate(powers)]).prod(), len(powers), 6
    )
    assert moment(2, 4) == pytest.approx(3, rel=1e-12)
    assert moment(
        6,
    ) == pytest.approx(15, rel=1e-12)
    assert moment(1, 3) == pytest.approx(0, abs=1e-12)
    assert errata.gaussian_mean(lambda z: torch.cos(z[0]), 1, 20) == pytest.approx(math.exp(-0.5), rel=1e-12)
    with pytest.raises(ValueError, match="at most 2,000,000 points"):
        errata.gaussian_mean(lambda z: z[0], 9, 20)


def test_the_bias_of_the_estimate_has_the_coefficient_of_a_product_of_two_weights():
    """f = u v x: gradients (v, u) x, Hessian off-diagonal x, no Laplacian: Tr K = (u^2 + v^2) x^2, C = x^2."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    net = errata.small_network(1, [1], 1, 3, activation="identity")
    f, w = errata.flat_function(net, x)
    trace, bias = errata.trace_and_bias(f, w)
    assert trace == pytest.approx(float(w.square().sum()) * 5, rel=1e-12)
    assert bias == pytest.approx(5, rel=1e-12)
    # E (u + e a)(v + e b) - uv squared, over e^2: u^2 + v^2 + e^2
    assert errata.perturbed_trace(f, w, 0.7) == pytest.approx(trace + 5 * 0.49, rel=1e-12)


def test_the_bias_of_the_estimate_has_the_coefficient_of_a_cubic_function():
    """f = w^3: J = 3 w^2, H = 6 w, third derivative 6: C = 9 w^2 + 18 w^2 + 18 w^2, next term E z^6 = 15."""
    w = torch.tensor([1.5], dtype=torch.float64)
    trace, bias = errata.trace_and_bias(lambda v: v**3, w)
    assert trace == pytest.approx(9 * 1.5**4, rel=1e-12)
    assert bias == pytest.approx(45 * 1.5**2, rel=1e-12)
    mean = errata.perturbed_trace(lambda v: v**3, w, 0.4)
    assert mean == pytest.approx(trace + bias * 0.16 + 15 * 0.4**4, rel=1e-12)


def test_the_flat_function_is_the_network_and_its_trace_that_of_the_engine():
    net, x = errata.small_network(3, [4], 2, 0, bias=True), errata.normal(0, "x", 5, 3)
    f, w = errata.flat_function(net, x)
    torch.testing.assert_close(f(w), net(x).detach().flatten(), rtol=0, atol=1e-14)
    assert errata.trace_and_bias(f, w)[0] == pytest.approx(ntk_trace(net, x, normalize=False).mean, rel=1e-12)


def test_the_angular_speed_is_that_of_a_kernel_that_turns_and_grows():
    kernel = lambda t: torch.exp(5 * t) * torch.diag(torch.stack([torch.cos(0.3 + 2 * t), torch.sin(0.3 + 2 * t)]))  # noqa: E731
    assert errata.angular_speed(kernel) == pytest.approx(2, rel=1e-12)
    f = lambda w: torch.tanh(w).cumsum(0)  # noqa: E731
    along = errata.kernel_along(f, errata.normal(1, "w", 3), errata.normal(1, "d", 3))
    at = [along(torch.tensor(t, dtype=torch.float64)) for t in (-1e-4, 1e-4)]
    assert errata.angular_speed(along) == pytest.approx(kernel_angle(*at) / 2e-4, rel=1e-5)


@pytest.mark.parametrize(("n", "angle"), [(2, 0.3), (50, 0.05), (50, math.pi / 2)])
def test_two_kernels_of_equal_trace_are_at_their_angle_and_no_pair_differs_more(n, angle):
    a, b = errata.equal_traces(n, angle)
    assert float(a.trace()) == pytest.approx(float(b.trace()), rel=1e-12)
    assert kernel_distance(a, b) == pytest.approx(1 - math.cos(angle), rel=1e-9)
    assert min(float(torch.linalg.eigvalsh(k)[0]) for k in (a, b)) >= 0
    most = float(a.norm() / b.norm())
    assert most == pytest.approx(math.cos(angle) + math.sqrt(n - 1) * math.sin(angle), rel=1e-12)
    draw = np.random.default_rng(0)
    for _ in range(200):  # other directions at the same angle to e_1, positive semidefinite
        rest = draw.random(n - 1)
        other = np.r_[math.cos(angle), math.sin(angle) * rest / np.linalg.norm(rest)]
        assert other.sum() <= most * (1 + 1e-12)
    with pytest.raises(ValueError, match=r"n >= 2 and an angle in \[0, pi/2\]"):
        errata.equal_traces(1, 0.1)


def test_a_block_kernel_is_one_number_within_and_one_across_classes():
    y = torch.tensor([1.0, -1.0, 1.0])
    expected = [[2.0, 0.6, 2.0], [0.6, 2.0, 0.6], [2.0, 0.6, 2.0]]
    assert errata.block_kernel(y, 2.0, 0.6).tolist() == expected


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_flow_of_a_separable_example_takes_the_time_of_its_integral(depth):
    f = errata.separable_flow(depth, 0.5, np.array([1.0, 50.0, 1e8]))
    b = 2 - 2 / depth
    for value, t in zip(f, (1.0, 50.0, 1e8), strict=True):
        time = quad(lambda g: (1 + math.exp(g)) / (depth * g**b), 0.5, value, epsrel=1e-12, limit=400)[0]
        assert time == pytest.approx(t, rel=1e-7)
    errors = [abs(errata.late_output(depth, t) / errata.separable_flow(depth, 0.5, np.array([1.0, t]))[1] - 1) for t in (1e6, 1e12)]
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 3  # the next term is of third order in 1/f


@pytest.mark.parametrize(("speed", "rate"), [(0.02, 0.1), (0.4, 0.1)])
def test_the_average_of_a_mode_solves_its_equation(speed, rate):
    t = np.linspace(0, 40, 4001)
    z = errata.mode_flow(speed, rate, t)
    assert z[0] == pytest.approx(1, abs=1e-14)
    slope = np.gradient(z, t, edge_order=2)
    np.testing.assert_allclose(slope[1:-1], rate * (np.exp(-speed * t) - z)[1:-1], atol=1e-5)
    for wrong in [(0.1, 0.1), (-0.1, 0.2)]:
        with pytest.raises(ValueError, match="Two different positive rates"):
            errata.mode_flow(*wrong, t)


def test_an_averaged_descent_is_that_of_a_loop_and_its_steps_keep_the_safe_bound():
    """Softmax regression by hand: Tr K = c sum ||x||^2, gradient x^T (p - y) / n."""
    x, y, lr, tau = errata.normal(0, "x", 6, 3), torch.arange(6) % 3, 4.0, 0.8
    net = errata.small_network(3, [], 3, 0)
    w = net.layers[1].weight.detach().clone()
    mean, target, safe = w.clone(), torch.eye(3, dtype=torch.float64)[y], 0.0
    scale = math.sqrt(3 * float(x.square().sum()) / 6)
    for step in errata.averaged_descent(net, x, y, lr=lr, tau=tau, steps=15):
        error = (x @ w.T).softmax(1) - target
        safe = tau * safe + lr * (1 - tau) * scale * math.sqrt(float(error.square().sum()) / 6)
        w = w - lr * error.T @ x / 6
        before, mean = mean, tau * mean + (1 - tau) * w
        at_mean = (x @ mean.T).softmax(1) - target
        assert step.left == pytest.approx(float((mean - before).norm()), rel=1e-9)
        assert step.safe == pytest.approx(safe, rel=1e-9)
        assert step.bound.right == pytest.approx(scale * math.sqrt(float(at_mean.square().sum()) / 6), rel=1e-9)
        assert step.left <= step.safe
    assert float(cross_entropy(x @ w.T, y)) < math.log(3)


def test_a_chapter_without_runs_says_where_its_numbers_come_from(page):
    shown = chapters.Provenance(page["chapter"], [])._repr_markdown_()
    assert "no stored runs" in shown
    assert re.search(r"Computed on \S.* with \d+ thread", shown)
    assert re.search(r"torch \d", shown)


def test_the_page_stores_its_verdicts_with_the_parameters(page):
    path = page["verdicts"].save()
    saved = json.loads(path.read_text())
    assert saved["parameters"] == chapters.default_parameters("errata")
    assert saved["runs"] == []


def bibliography():
    """Key -> (kind, fields) of the entries of the bibliography."""
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    found = {}
    for kind, key, body in re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        found[key] = kind, dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.MULTILINE))
    assert len(found) == text.count("\n@")
    return found


def test_every_work_of_the_bibliography_is_cited_and_every_citation_is_in_it():
    generated = {"claims.md", "figures.md", "benchmarks.md"}
    pages = [p for p in (ROOT / "book").glob("*.md") if p.name not in generated]
    texts = [p.read_text(encoding="utf-8") for p in pages]
    for name in chapters.names():
        texts += [c.source for c in nbformat.read(chapters.notebook_path(name), 4).cells if c.cell_type == "markdown"]
    cited = {key for t in texts for keys in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", t) for key in re.split(r",\s*", keys)}
    assert cited == bibliography().keys()


WHERE = {"article": "journal", "inproceedings": "booktitle", "techreport": "institution"}


@pytest.mark.parametrize("key", bibliography())
def test_a_work_has_the_fields_by_which_it_can_be_found(key):
    kind, fields = bibliography()[key]
    undated = key in ("trace", "stability")  # neither the manuscript nor the poster bears a date
    assert {"author", "title", *([] if undated else ["year"])} <= fields.keys()
    assert kind not in WHERE or fields.get(WHERE[kind])
    assert undated or kind in WHERE or fields.keys() & {"eprint", "doi"}
    assert re.fullmatch(r"\d{4}\.\d{4,5}", fields.get("eprint", "0000.0000"))
    assert ("eprint" in fields) == (fields.get("archiveprefix") == "arXiv")
    assert re.fullmatch(r"\d+(--\d+)?|giad113", fields.get("pages", "1"))
    assert len(fields["title"]) > 10
    if "eprint" in fields and kind == "misc":  # a preprint bears the year of its number
        assert fields["year"][2:] == fields["eprint"][:2]
