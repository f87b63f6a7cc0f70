"""The sources' own settings run: their first epoch, cell by cell, on a few images in the format of the real dataset."""

import matplotlib as mpl
import nbformat
import pytest
from test_data import FOLDERS, write

from ntklib import chapters

pytestmark = pytest.mark.slow

SHORT = {  # what has to be cut for a processor; all else is the paper preset's
    "trace_evolution": {"num_seeds": 1, "epochs": 1, "other_datasets": [], "num_control_seeds": 1, "num_perturbations": 1},
    "trace_sweeps": {
        "num_seeds": 1, "num_rate_seeds": 1, "epochs": 1, "learning_rates": [0.001], "momenta": [0.9],
        "inits": ["kaiming", "standard"], "depths": ["resnet18", "resnet50"], "optimizers": ["adamw"], "architectures": ["cnn"],
    },
}  # fmt: skip
FEW = {"num_train": 20, "num_test": 10, "num_probe": 2, "num_samples": 1}


@pytest.mark.parametrize("chapter", SHORT)
def test_the_first_epoch_of_the_paper_preset_runs_on_images_in_the_real_format(chapter, tmp_path, monkeypatch):
    mpl.use("Agg")
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path))
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("NTKLIB_JOBS", "1")
    monkeypatch.chdir(chapters.notebooks_folder())
    write("cifar10", tmp_path, monkeypatch)
    paper = chapters.complete_preset(chapter, "paper")
    assert paper["dataset"] == "cifar10"
    assert paper["width"] == 64
    changed = {k: v for k, v in (FEW | SHORT[chapter]).items() if k in paper}
    namespace = {"__name__": "__main__"}
    for cell in nbformat.read(chapters.notebook_path(chapter), 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, chapter, "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace.update(paper | changed)
    folder = tmp_path / "runs" / "store" / chapter
    assert (tmp_path / FOLDERS["cifar10"]).is_dir()
    assert len(list(folder.glob("*/run.json"))) >= 1
    assert (tmp_path / "runs" / "results" / "custom" / f"{chapter}.json").is_file()
