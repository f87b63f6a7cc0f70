"""The benchmark of the transformer's training step compares one function with itself; how fast it is, no test says."""

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks import transformer_step
from ntklib.data import modular_addition
from ntklib.models import ModularTransformer


def test_the_usual_network_has_the_same_logits_at_the_last_position():
    data, ours = modular_addition(7, 0.5), ModularTransformer(p=7, width=8, heads=2, hidden=6).double()
    with torch.no_grad():
        ours.inner.bias.normal_(generator=torch.Generator().manual_seed(0))
    tokens = data.tokens(data.train)
    usual = transformer_step.Eager(ours).double()(tokens)
    assert usual.shape == (len(tokens), 3, 7)
    torch.testing.assert_close(usual[:, -1], ours(tokens), rtol=1e-12, atol=1e-12)  # reordered sums


def test_a_quick_run_takes_the_same_steps_both_ways_and_writes_what_it_found(tmp_path):
    path = tmp_path / "found.json"
    done = CliRunner().invoke(
        transformer_step.main, ["--quick", "--rounds", "1", "--steps", "3", "--json", str(path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "times faster" in done.output
    found = json.loads(path.read_text())["quick"]
    assert found["disagreement64"] < 1e-9  # Adam divides by roots of small averages, which amplifies rounding
    assert found["disagreement"] < 1e-3
    assert found["ratio"] == pytest.approx(found["eager"] / found["ours"])
    assert found["n"] == 24
