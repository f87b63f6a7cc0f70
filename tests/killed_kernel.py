"""A small kernel on disk for the tests to kill and to run twice: python killed_kernel.py PATH SECONDS_BETWEEN_BLOCKS."""

import sys
import time

import torch

from ntklib import large_ntk, models
from ntklib.large_job import Worker
from ntklib.random import stream

torch.set_num_threads(1)
blocks = 0


def block(self, *arguments, block=Worker.block):
    global blocks
    blocks += 1
    print(f"block {blocks}", flush=True)
    time.sleep(float(sys.argv[2]))
    return block(self, *arguments)


if __name__ == "__main__":
    Worker.block = block
    model = models.build("resnet18", input_shape=(1, 8, 8), num_classes=4, width=2, seed=0).eval()
    x = torch.randn(20, 1, 8, 8, generator=stream(0, "images"))
    large_ntk(model, x, path=sys.argv[1], rows=8, columns=2, check=0, save_every=0, progress=False)
