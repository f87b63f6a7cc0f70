"""What is missing for a chapter is said before anything is started."""

import pytest
from rich.console import Console

from ntklib import needs, runner
from ntklib.data import DatasetNotFoundError, datasets


def test_the_datasets_that_need_no_look_are_those_that_packages_carry():
    assert set(needs.CARRIED) == {name for name in datasets.NAMES if not datasets.locate(name)}


def test_datasets_are_those_of_all_parameters_that_name_one():
    parameters = {"dataset": "cifar10", "other_datasets": ["digits", "cifar100", "cifar10"], "other_dataset": "mnist", "width": 4}
    assert needs.datasets_of(parameters) == ["cifar10", "cifar100", "mnist"]


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NTKLIB_OFFLINE", "1")
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "absent")


@pytest.mark.usefixtures("nothing_here")
def test_an_absent_dataset_is_an_error_before_any_chapter_is_started(monkeypatch, capsys):
    monkeypatch.setattr(runner, "_start", lambda *_: pytest.fail("a chapter was started"))
    ready = runner.make_task("quickstart", "smoke")
    task = runner.make_task("trace_evolution", "paper", {"dataset": "cifar10"})
    with pytest.raises(DatasetNotFoundError, match=r"'cifar10' was not found whole.*Unpack cifar-10-python\.tar\.gz in .*data"):
        runner.run([ready, task], console=Console(stderr=True))
    assert "trace_evolution: dataset cifar10 is not here yet" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_here")
def test_the_paper_preset_without_a_gpu_is_told_so_unless_the_cpu_was_asked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees none" in "".join(needs.missing({"device": "auto", "dataset": "digits"}, "paper"))
    assert not list(needs.missing({"device": "cpu"}, "paper"))
    assert not list(needs.missing({"device": "auto"}, "default"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not list(needs.missing({"device": "auto"}, "paper"))
