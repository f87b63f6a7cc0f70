"""The benchmark of stacked networks compares the same training."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import replicas


@pytest.mark.parametrize("name", replicas.CASES)
def test_both_ways_end_at_the_same_losses_and_the_ratios_are_theirs(name):
    found = replicas.compare(name, 2, steps=4, repeats=1)
    assert found.difference < 1e-5
    assert found.gain == pytest.approx(2 * found.alone / found.stacked)
    assert found.cost == pytest.approx(found.stacked / found.alone)


def test_a_table_is_printed_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "CASES", dict(list(replicas.CASES.items())[:1]))
    done = CliRunner().invoke(
        replicas.main, ["--replicas", "3", "--steps", "4", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["replicas"] == 3
    assert result["case"] in done.output
