"""Wrong settings are refused at once, with what was required, what was got and what to do."""

import pytest
import torch

from ntklib import FullBatchSettings, SupervisedSettings
from ntklib.settings import resolve_device

GOOD = {"dataset": "digits", "model": "mlp", "width": 4, "lr": 0.1, "batch_size": 8, "epochs": 1, "num_probe": 4, "num_train": 20}


def test_good_settings_are_hashable_values_with_a_resolved_device():
    settings = SupervisedSettings(**GOOD)
    assert settings == SupervisedSettings(**GOOD)
    assert settings.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert settings.but(lr=0.2).lr == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "minst"}, r"Unknown dataset 'minst'\. Did you mean '.*mnist.*'\? Known: cifar10"),
        ({"model": "resnet81"}, r"Unknown model 'resnet81'\. Did you mean 'resnet18'\?"),
        ({"lr": -0.1}, r"lr must be greater than 0\. Got -0\.1\."),
        ({"lr": float("nan")}, r"lr must be finite\. Got nan\."),
        ({"lr": "fast"}, r"lr must be a number\. Got 'fast'\."),
        ({"momentum": 1.0}, r"momentum must be less than 1\. Got 1\.0\."),
        ({"weight_decay": -1}, r"weight_decay must be at least 0\. Got -1\."),
        ({"epochs": 0}, r"epochs must be at least 1\. Got 0\."),
        ({"epochs": 1.5}, r"epochs must be a whole number\. Got 1\.5\."),
        ({"num_probe": 21}, r"num_probe must be at most num_train = 20.*Got 21\."),
        ({"schedule": "cosin"}, r"Unknown schedule 'cosin'\. Did you mean 'cosine'\?"),
        ({"init": "kaimin"}, r"Unknown initialization 'kaimin'\. Did you mean 'kaiming'\?"),
        ({"method": "guess"}, r"Unknown method 'guess'\."),
        ({"loss": "l2"}, r"Unknown loss 'l2'\."),
        ({"augment": "flip"}, r"Unknown augmentation 'flip'\."),
        ({"ema_decays": [0.9, 1.0]}, r"decay rate must be in \[0, 1\).*Got 1\."),
        ({"ema_buffers": "copie"}, r"Unknown choice of buffers 'copie'\. Did you mean 'copy'\?"),
        ({"batchsize": 8}, r"Unknown setting 'batchsize'\. Did you mean 'batch_size'\?"),
        ({"device": "gpu"}, r"device must be 'auto', 'cpu', 'cuda' or 'cuda:N'\. Got 'gpu'\."),
        ({"device": "cuda:99"}, r"device 'cuda:99' was asked for, and torch .* sees \d+ CUDA devices\. Use device='auto' or 'cpu'"),
    ],
)
def test_a_wrong_setting_is_explained(change, message):
    with pytest.raises(ValueError, match=message):
        SupervisedSettings(**{**GOOD, **change})


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match=r"lr is required\."):
        SupervisedSettings(**{k: v for k, v in GOOD.items() if k != "lr"})


def test_full_batch_settings_check_names_too():
    with pytest.raises(ValueError, match="Unknown dataset 'digit'"):
        FullBatchSettings(dataset="digit", num_train=5, width=3, lr_fraction=0.1, steps=2)
    with pytest.raises(ValueError, match="Unknown initialization 'his'"):
        FullBatchSettings(dataset="digits", num_train=5, width=3, lr_fraction=0.1, steps=2, init="his")


def test_cuda_is_taken_when_asked_for_and_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cuda:0") == "cuda:0"
