"""The benchmark of data measures what it says, on small files."""

import json
import os

import pytest
from click.testing import CliRunner
from torchvision.datasets import CIFAR10

from benchmarks import data_loading
from ntklib.data import load


def test_random_images_are_read_as_cifar10_and_all_is_restored(tmp_path):
    before = CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta, dict(os.environ)
    with data_loading.random_cifar10(tmp_path, per_file=20):
        images = load("cifar10")
        assert (images.x_train.shape, images.x_test.shape) == ((100, 3, 32, 32), (20, 3, 32, 32))
    assert (CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta, dict(os.environ)) == before


def test_three_tables_are_printed_and_kept(tmp_path):
    target = tmp_path / "out.json"
    options = {"--per-file": 60, "--steps": 1, "--rounds": 1, "--files": 6, "--json": target, "--device": "cpu"}
    done = CliRunner().invoke(data_loading.main, [str(word) for pair in options.items() for word in pair])
    assert done.exit_code == 0, done.output
    report = json.loads(target.read_text())
    assert [r["storage"] for r in report["loading"]] == ["float32", "uint8", "stream"]
    assert all(r["second"] > 0 for r in report["loading"])
    for r in report["shares"]:
        assert r["share"] == pytest.approx(r["batch"] / r["step"])
        assert r["epoch"] == pytest.approx(3 * r["batch"] / 1e3)  # 300 images in batches of 128
    assert {r["workers"] for r in report["decoding"]} >= {0, 1}
    assert "resized_crop_flip" in done.output
