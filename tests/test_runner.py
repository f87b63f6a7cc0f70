"""The runner checks before it starts, writes atomically, and tells the truth about failures."""

import io
import json
import os
import subprocess
import sys
import textwrap

import nbformat
import pytest
from click.testing import CliRunner
from rich.console import Console

from ntklib import chapters, progress, runner
from ntklib.__main__ import _value, cli, main
from ntklib.chapters import ParameterError
from ntklib.execute import fill


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrat"], "Unknown chapter 'quickstrat'. Did you mean 'quickstart'? Known: cone_effect, deep_linear_networks, "),
        (["quickstart", "--preset", "smok"], "Unknown preset 'smok'. Did you mean 'smoke'?"),
        (["quickstart", "-p", "widht", "64"], "Unknown parameter of quickstart 'widht'. Did you mean 'width'?"),
        (["quickstart", "-p", "width", "big"], "Parameter width must be of type int, for example 128. Got 'big' of type str."),
        (["quickstart", "-p", "width", "64.5"], "Parameter width must be of type int"),
        (["quickstart", "-p", "width", "true"], "Parameter width must be of type int"),
        (["quickstart", "-p", "dataset", "7"], "Parameter dataset must be of type str, for example 'digits'. Got 7 of type int."),
    ],
)
def test_a_wrong_call_is_explained_with_status_2_before_any_kernel_starts(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr(sys, "argv", ["ntklib", "run", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("0.05", 0.05),
        ("1e-3", 1e-3),
        ("5e4", 5e4),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("cifar10", "cifar10"),
        ("a=b", "a=b"),
    ],
)
def test_values_are_read_with_their_type(text, value):
    got = _value(text)
    assert got == value
    assert type(got) is type(value)


def test_an_integer_is_taken_for_a_float_parameter():
    assert chapters.check_parameters("trace_evolution", {"lr": 1}) == {"lr": 1.0}


def test_a_changed_parameter_is_no_preset_any_more_and_another_stamp():
    plain = runner.make_task("quickstart", "smoke")
    same = runner.make_task("quickstart", "smoke", {"width": plain.parameters["width"]})
    other = runner.make_task("quickstart", "smoke", {"width": 7})
    assert (plain.preset, same.preset, other.preset) == ("smoke", "smoke", "custom")
    assert plain.stamp == same.stamp != other.stamp
    assert runner.make_task("quickstart", "smoke", {"device": "cpu"}).preset == "smoke"


def test_an_edited_parameters_cell_counts_at_the_default_preset(monkeypatch):
    cell = chapters.default_parameters("quickstart")
    monkeypatch.setattr(chapters, "default_parameters", lambda _: cell | {"width": 99})
    task = runner.make_task("quickstart")
    assert (task.preset, task.parameters["width"]) == ("default", 99)
    assert chapters.Chapter("quickstart", task.parameters).preset == "custom"
    assert runner.make_task("quickstart", "smoke").parameters["width"] == chapters.preset_parameters("quickstart", "smoke")["width"]


def test_captions_are_filled_with_parameters_and_other_braces_stay():
    assert fill("lr {lrs} on {sets}", {"lrs": [0.1, 1.0], "sets": ["digits"]}) == "lr 0.1, 1 on digits"
    assert fill(r"{n} seeds, lr {lr}, $\frac{1}{2}$ {cite}`x`", {"n": 3, "lr": 0.1}) == r"3 seeds, lr 0.1, $\frac{1}{2}$ {cite}`x`"


def test_progress_events_are_read_line_by_line(tmp_path, monkeypatch):
    path = tmp_path / "events"
    monkeypatch.setenv(progress.FILE, str(path))
    progress.report("a", 1, 4)
    with path.open("a") as file:
        file.write('{"unfinished": ')
    events, offset = progress.read_events(path, 0)
    assert [(e["label"], e["step"], e["total"]) for e in events] == [("a", 1, 4)]
    assert progress.read_events(path, offset) == ([], offset)
    assert progress.read_events(tmp_path / "absent", 5) == ([], 5)


def test_a_line_of_progress_counts_announced_runs_and_estimates_the_rest(monkeypatch):
    task = runner.Task("quickstart", "smoke", {}, "x", started=-60.0, cell=(3, 9), expected=4)
    task.steps, task.training_since = {"one": (50, 100), "two": (50, 100)}, 100.0
    monkeypatch.setattr("time.time", lambda: 130.0)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    line = "  ".join(runner._columns(task))
    assert "cell 3/9" in line
    assert "step 100 of 400" in line
    assert "1 min 00 s" in line
    assert "about 1 min 30 s left" in line  # 30 s for 100 steps, 300 to go


def test_data_lists_every_dataset_and_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path))
    listed = CliRunner().invoke(cli, ["data"]).output
    assert "digits         carried by a package" in listed
    assert f"{tmp_path}" in listed.split("cifar10", 1)[1]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A project with one toy chapter, and a function that runs it."""
    folder = tmp_path / "notebooks"
    (folder / "presets").mkdir(parents=True)
    for preset in chapters.PRESETS:
        (folder / "presets" / f"{preset}.yml").write_text("toy: {}\n")
    monkeypatch.setattr(chapters, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))

    def run_toy(body, **options):
        notebook = nbformat.v4.new_notebook()
        parameters = nbformat.v4.new_code_cell("size: int = 3  # a number", metadata={"tags": ["parameters"]})
        notebook.cells = [parameters, nbformat.v4.new_code_cell(textwrap.dedent(body))]
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / "toy.ipynb")
        said = io.StringIO()
        task = runner.make_task("toy", "default", options)
        failed = runner.run([task], console=Console(file=said, width=200))
        return task, bool(failed), said.getvalue()

    return run_toy


@pytest.mark.slow
def test_a_chapter_runs_with_its_parameters_and_is_then_up_to_date(toy):
    task, failed, said = toy("print('size is', size)", size=5)
    assert not failed
    assert "toy: done in" in said
    notebook = nbformat.read(task.output, 4)
    assert "size is 5" in notebook.cells[-1].outputs[0].text
    assert notebook.metadata["ntklib"]["parameters"] == {"size": 5}
    assert not list(task.output.parent.glob("*.partial*"))
    assert "up to date" in toy("print('size is', size)", size=5)[2]
    assert "done in" in toy("print('size is', size)", size=6)[2]


@pytest.mark.slow
def test_a_failing_cell_is_named_with_the_log_and_leaves_the_earlier_output(toy):
    good, _, _ = toy("print(size)")
    before = good.output.read_bytes()
    task, failed, said = toy("raise RuntimeError('no luck')")
    assert failed
    assert "FAILED in cell 3 of 3: RuntimeError: no luck" in said
    assert str(task.log) in said
    assert "no luck" in task.log.read_text()
    assert task.output.read_bytes() == before
    assert task.output.with_suffix(".partial.ipynb").exists()


@pytest.mark.slow
def test_a_killed_kernel_is_a_failure(toy):
    task, failed, said = toy("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert failed
    assert "FAILED in cell 3 of 3: DeadKernelError" in said
    assert not task.output.exists()


@pytest.mark.slow
def test_bad_values_end_a_chapter_at_once_with_their_message(tmp_path):
    environment = os.environ | {"NTKLIB_RUNS": str(tmp_path), "COLUMNS": "300"}
    command = [sys.executable, "-m", "ntklib", "run", "trace_evolution", "--preset", "smoke", "-p", "lr", "-0.1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "lr must be greater than 0. Got -0.1." in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_plain_papermill_works_from_the_root_and_from_the_notebooks_folder(tmp_path):
    smoke = chapters.preset_parameters("quickstart", "smoke") | {"num_seeds": 1, "steps": 3}
    arguments = [word for k, v in smoke.items() for word in ("-p", k, str(v))]
    for folder, source in (
        (chapters.project_root(), "notebooks/quickstart.ipynb"),
        (chapters.notebooks_folder(), "quickstart.ipynb"),
    ):
        out = tmp_path / f"{folder.name}.ipynb"
        environment = os.environ | {"NTKLIB_RUNS": str(tmp_path / "runs")}
        command = [sys.executable, "-m", "papermill", source, str(out), *arguments, "--no-progress-bar"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert any(
            "image/png" in o.get("data", {}) for c in nbformat.read(out, 4).cells if c.cell_type == "code" for o in c.outputs
        )
    assert len(list((tmp_path / "runs" / "store" / "quickstart").iterdir())) == 1  # the second found the first's run
    assert not (chapters.notebooks_folder() / "runs").exists()


@pytest.mark.usefixtures("toy")
def test_a_parameters_cell_with_more_than_literals_is_refused(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("size = len('abc')", metadata={"tags": ["parameters"]})]
    nbformat.write(notebook, tmp_path / "notebooks" / "toy.ipynb")
    with pytest.raises(ValueError, match="malformed node"):
        chapters.default_parameters("toy")
    notebook.cells[0].source = "import os"
    nbformat.write(notebook, tmp_path / "notebooks" / "toy.ipynb")
    with pytest.raises(ParameterError, match="may hold only lines 'name: type = literal'. Got 'import os'"):
        chapters.default_parameters("toy")


def test_json_of_the_stamp_depends_on_every_input(monkeypatch):
    before = runner.make_task("quickstart", "smoke").stamp
    monkeypatch.setattr("ntklib.provenance.code_fingerprint", lambda **_: "other code")
    assert runner.make_task("quickstart", "smoke").stamp != before
    assert json.dumps(before)
