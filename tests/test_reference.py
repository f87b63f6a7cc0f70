"""Reference results come with their provenance, whole or not at all."""

import shlex

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from ntklib import Chapter, Run, Verdicts, chapters, data, load_reference, models, reference, runner, sgd, storage
from ntklib.__main__ import cli

SETTINGS = {"lr": 0.05, "batch_size": 16, "epochs": 2}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A chapter's record over two tiny training runs, and the folder of references in a place of its own."""
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(reference, "folder", lambda: tmp_path / "reference")
    results = []
    for seed in range(2):
        model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, width=4, seed=seed)
        with Run("trace_evolution", {**SETTINGS, "seed": seed}) as run:
            for state in run.states(sgd, model, data.load("digits", num_train=32, num_test=10)):
                run.log(state, split="train", loss=state.loss)
        results.append(run.result)
    parameters = chapters.preset_parameters("trace_evolution", "default") | {"width": 3}
    Verdicts(Chapter("trace_evolution", parameters)).save(results)
    return results


def test_a_reference_result_is_the_histories_of_the_runs_with_their_origin(stored):
    reference.save_reference("tiny", "trace_evolution", "custom", "python -m ntklib reference tiny ...")
    loaded = load_reference("tiny")
    columns = list(stored[0].history.columns)
    expected = pd.concat([r.history for r in stored], ignore_index=True)
    pd.testing.assert_frame_equal(loaded.history[columns], expected, check_exact=True)
    assert set(loaded.history["seed"]) == {0, 1}
    assert loaded.about["parameters"]["width"] == 3
    assert {"hardware", "wall_seconds", "git", "versions", "written", "command"} <= loaded.about.keys()
    assert "reference run tiny: python -m ntklib reference tiny" in str(loaded)


@pytest.mark.usefixtures("stored")
def test_a_damaged_or_unknown_reference_is_refused():
    reference.save_reference("tiny", "trace_evolution", "custom", "command")
    path = reference.folder() / "tiny.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with (
        pytest.warns(storage.DamagedFileWarning, match=r"tiny\.parquet is damaged"),
        pytest.raises(FileNotFoundError, match="Restore it from the repository"),
    ):
        load_reference("tiny")
    with pytest.raises(FileNotFoundError, match=r"Unknown reference result 'tinny'\. Did you mean 'tiny'\?"):
        load_reference("tinny")


def test_a_chapter_that_was_not_executed_gives_no_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="trace_evolution has no results at preset paper. Execute it first: the command"):
        reference.save_reference("x", "trace_evolution", "paper", "the command")


def test_a_measurement_of_another_kind_is_no_reference():
    assert (reference.folder() / "benchmarks.json").exists()
    with pytest.raises(FileNotFoundError, match="'benchmarks'.*trace_evolution_width8"):
        load_reference("benchmarks")


def test_every_committed_reference_is_whole_and_says_which_chapter_it_belongs_to():
    names = reference.names()
    assert names
    for name in names:
        loaded = load_reference(name)
        words = shlex.split(loaded.about["command"])  # of its commit, whose chapter may have had other parameters; still legal
        changed = {words[i + 1]: yaml.safe_load(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
        assert changed.items() <= loaded.about["parameters"].items()
        chapters.check_parameters(loaded.about["chapter"], changed)
        assert loaded.history["seed"].nunique() == loaded.about["parameters"]["num_seeds"]
        assert loaded.about["git"]["commit"]
        assert loaded.about["git"]["dirty"] is False


def test_every_planned_run_has_legal_parameters_and_a_command_that_says_all_of_them():
    plans = reference.planned()
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        task = runner.make_task(plan.chapter, plan.preset, plan.parameters)
        words = shlex.split(plan.command)
        assert words[:5] == ["python", "-m", "ntklib", "reference", plan.name]
        changed = {words[i + 1]: yaml.safe_load(words[i + 2]) for i, word in enumerate(words) if word == "-p"}
        again = runner.make_task(words[5], words[words.index("--preset") + 1], changed)
        assert again.parameters == task.parameters


def test_planned_and_kept_runs_are_listed_with_their_commands():
    lines = CliRunner().invoke(cli, ["references"]).output.splitlines()
    assert {line.split(" python ")[0].strip() for line in lines} == {"kept", "not computed"}
    assert any(line.startswith("kept") and "reference trace_evolution_width8 trace_evolution" in line for line in lines)
    assert all(plan.command in "\n".join(lines) for plan in reference.planned())


def test_an_unknown_planned_run_is_named_with_the_nearest():
    with pytest.raises(
        FileNotFoundError, match=r"Unknown planned reference run 'eos_alignment_500'\. Did you mean 'eos_alignment_5000'"
    ):
        reference.find_planned("eos_alignment_500")
