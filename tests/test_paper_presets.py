"""The sources' own settings run: their first epoch, cell by cell, on a few images in the format of the real dataset."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
from test_data import FOLDERS, write

from ntklib import chapters

pytestmark = pytest.mark.slow

SHORT = {  # what has to be cut for a processor; all else is the paper preset's
    "trace_estimators": {
        "num_seeds": 1, "networks": ["resnet18"], "widths": [64], "lrs": [0.1], "epochs": 1, "epsilons": [0.01, 0.001],
        "repeats": 2, "num_perturbations": 2, "reference_probe": 2, "reference_perturbations": 2,
    },
    "trace_evolution": {"num_seeds": 1, "epochs": 1, "other_datasets": [], "num_control_seeds": 1, "num_perturbations": 1},
    "trace_sweeps": {
        "num_seeds": 1, "num_rate_seeds": 1, "epochs": 1, "learning_rates": [0.001], "momenta": [0.9],
        "inits": ["kaiming", "standard"], "depths": ["resnet18", "resnet50"], "optimizers": ["adamw"], "architectures": ["cnn"],
    },
    "kernel_distance": {"num_seeds": 1, "num_control": 1, "epochs": 1, "velocity_epochs": []},
    "layerwise": {"num_seeds": 1, "epochs": 1, "num_perturbations": 1},
    "fixmatch": {
        "num_seeds": 1, "num_train": 0, "label_counts": [40], "batch_size": 2, "steps": 1, "eval_every": 1, "num_early": 0,
        "num_perturbations": 1,
    },
}  # fmt: skip
FEW = {"num_train": 20, "num_test": 10, "num_probe": 2, "num_samples": 1}
VERBATIM = {"dataset": "cifar10", "momentum": 0.9, "weight_decay": 0.0005, "batch_size": 128, "epochs": 200, "schedule": "cosine"}
SEMI_SUPERVISED = {  # the main paper's section 5.3.1; the last row from public code
    "dataset": "cifar10", "label_counts": [40, 250, 4000], "model": "wrn28_2", "width": 32, "steps": 2**20, "eval_every": 5000,
    "batch_size": 64, "mu": 7, "threshold": 0.95, "lr": 0.03, "momentum": 0.9, "strong": "rand_augment", "flip": True,
    "schedule": "cosine_7_16", "nesterov": True, "weight_decay": 0.0, "lambda_u": 1.0, "padding": 4, "ema_decays": [0.999],
}  # fmt: skip


@pytest.mark.parametrize("chapter", SHORT)
def test_the_first_epoch_of_the_paper_preset_runs_on_images_in_the_real_format(chapter, tmp_path, monkeypatch):
    mpl.use("Agg")
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path))
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("NTKLIB_JOBS", "1")
    monkeypatch.chdir(chapters.notebooks_folder())
    write("cifar10", tmp_path, monkeypatch)
    paper = chapters.complete_preset(chapter, "paper")
    verbatim = SEMI_SUPERVISED if chapter == "fixmatch" else VERBATIM | {"width": 64, "lr": 0.1}
    assert {k: paper.get(k, v) for k, v in verbatim.items()} == verbatim
    changed = {k: v for k, v in (FEW | SHORT[chapter]).items() if k in paper}
    namespace = {"__name__": "__main__"}
    for cell in nbformat.read(chapters.notebook_path(chapter), 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, chapter, "exec"), namespace)
            plt.close("all")
            if "parameters" in cell.metadata.get("tags", []):
                namespace.update(paper | changed)
    folder = tmp_path / "runs" / "store" / chapter
    assert (tmp_path / FOLDERS["cifar10"]).is_dir()
    assert len(list(folder.glob("*/run.json"))) >= 1
    assert (tmp_path / "runs" / "results" / "custom" / f"{chapter}.json").is_file()
