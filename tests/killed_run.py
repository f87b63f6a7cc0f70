"""A small training run for the tests to kill and to run twice: python killed_run.py ROOT SECONDS_BETWEEN_STEPS."""

import sys
import time
from pathlib import Path

import torch

from ntklib import Run, accuracy, data, models, ntk_trace, sgd

torch.set_num_threads(1)
SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 32, "epochs": 6, "schedule": "cosine", "seed": 3}

images = data.load("digits", num_train=128, num_test=50, seed=0)
model = models.build("resnet18", input_shape=images.input_shape, num_classes=10, width=2, seed=3)
with Run("killed", SETTINGS, save_every=0, root=Path(sys.argv[1])) as run:
    for state in run.states(sgd, model, images):
        trace = ntk_trace(model, images.x_train[:8], method="output", generator=torch.Generator().manual_seed(0))
        run.log(state, split="train", loss=state.loss, trace=trace, accuracy=accuracy(model, images.x_train, images.y_train))
        print(f"step {state.step}", flush=True)
        time.sleep(float(sys.argv[2]))  # no plain value of this script: the key would depend on it
print(f"{run.status} {run.key}", flush=True)
