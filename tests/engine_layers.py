"""Cases of single kinds of layers, each with something behind it that makes outputs depend on them nonlinearly."""

import torch
import torch.nn.functional as F
from engine_case import Case, Net
from torch import nn
from torch.nn import Conv1d, Conv2d, Conv3d, Flatten, Linear, Sequential, Tanh

LINEAR = {
    "linear": Case(lambda: Linear(4, 3), (4,)),
    "linear without bias": Case(lambda: Sequential(Linear(4, 5, bias=False), Tanh(), Linear(5, 3)), (4,)),
    "linear on sequences": Case(lambda: Sequential(Linear(3, 4), nn.GELU(), Linear(4, 2), Flatten()), (2, 3)),
    "linear on grids": Case(lambda: Sequential(Linear(3, 4), Tanh(), Linear(4, 2, bias=False), Flatten(), Linear(8, 3)), (2, 2, 3)),
    "linear on vectors": Case(
        lambda: Net(lambda m, x: torch.stack([m.b(m.a(row).tanh()) for row in x]), a=Linear(4, 5), b=Linear(5, 3)), (4,)
    ),
    "pooled head": Case(lambda: Net(lambda m, x: m.b(torch.relu(m.a(x)).mean(1)), a=Linear(3, 5), b=Linear(5, 4)), (4, 3)),
    "x W and x W^T": Case(lambda: Net(lambda m, x: torch.tanh(x @ m.w) @ m.v.T + m.b, w=(4, 5), v=(3, 5), b=(3,)), (4,), ("b",)),
    "matmul by other names": Case(
        lambda: Net(
            lambda m, x: torch.matmul(x.matmul(m.a).tanh() @ m.b.mT, m.c.t()) @ torch.t(m.d), a=(4, 5), b=(3, 5), c=(4, 3), d=(3, 4)
        ),
        (4,),
    ),
    "matmul from the left": Case(
        lambda: Net(lambda m, x: (m.w @ x[:, :, None]).flatten(1).tanh() @ m.v, w=(5, 4), v=(5, 3)), (4,), ("w",)
    ),
}


def convolution(kind, *args, shape, head: int = 0, leaves: tuple[str, ...] = (), **options) -> Case:
    """A convolution between another one, which needs its input's gradient, and a head."""
    before = {1: Conv1d, 2: Conv2d, 3: Conv3d}[len(shape) - 1](shape[0], args[0], 1)
    last = [Linear(head, 3)] if head else []
    return Case(lambda: Sequential(before, Tanh(), kind(*args, **options), Tanh(), Flatten(), *last), shape, leaves)


CONVOLUTION = {
    "conv1d": convolution(Conv1d, 2, 3, 3, shape=(2, 7), head=9, stride=2, padding=1, dilation=2),
    "conv1d alone": Case(lambda: Sequential(Conv1d(2, 3, 2), Flatten()), (2, 3)),
    "conv2d": convolution(Conv2d, 2, 3, (3, 2), shape=(2, 6, 5), head=9, stride=(2, 3), padding=(0, 2), dilation=(2, 1)),
    "conv2d with rows left over": convolution(Conv2d, 2, 3, 2, shape=(1, 6, 7), head=12, stride=3),
    "conv2d of single images": Case(
        lambda: Net(lambda m, x: torch.stack([m.b(m.a(image).tanh().flatten()) for image in x]), a=Conv2d(1, 2, 2), b=Linear(8, 3)),
        (1, 3, 3),
    ),
    "conv3d": convolution(Conv3d, 2, 2, (2, 1, 3), shape=(1, 3, 4, 3), head=24, stride=(1, 2, 1), padding=(0, 0, 1), bias=False),
    **{
        f"{mode} padding": convolution(Conv2d, 2, 3, (3, 2), shape=(1, 4, 4), head=24, stride=2, padding=(1, 2), padding_mode=mode)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "same padding of even kernels": convolution(Conv2d, 2, 2, (2, 4), shape=(1, 4, 3), head=24, padding="same", dilation=(2, 1)),
    "same padding, circular": convolution(Conv1d, 2, 2, 4, shape=(2, 5), head=10, padding="same", padding_mode="circular"),
    "valid padding": convolution(Conv1d, 2, 3, 2, shape=(2, 4), head=9, padding="valid"),
    "groups": convolution(Conv2d, 4, 6, 2, shape=(2, 4, 4), head=54, groups=2),
    "groups with few positions": convolution(Conv1d, 4, 4, 2, shape=(2, 2), head=4, groups=2),
    "depthwise": convolution(Conv2d, 3, 6, 3, shape=(2, 4, 4), head=24, groups=3, stride=2, padding=1, bias=False),
    "1x1": convolution(Conv2d, 3, 2, 1, shape=(2, 2, 3), head=12),
    "functional conv2d": Case(
        lambda: Net(lambda m, x: F.conv2d(x, m.a.weight, m.a.bias, 2, 1).flatten(1).tanh() @ m.v, a=Conv2d(1, 2, 3), v=(8, 3)),
        (1, 4, 4),
    ),
    "transposed conv": convolution(nn.ConvTranspose2d, 2, 2, 3, shape=(1, 3, 3), head=98, stride=2, leaves=("2.weight", "2.bias")),
    "global pooling": Case(
        lambda: Sequential(Conv2d(1, 3, 2), nn.ReLU(), Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(1), Flatten(), Linear(4, 4)), (1, 4, 4)
    ),
}


def norm(layer: nn.Module, shape: tuple[int, ...], channels: int, head: int) -> Case:
    """A normalisation between a convolution (or a linear map of vectors) and a head."""
    first = (
        (lambda: Linear(shape[0], channels))
        if len(shape) == 1
        else (lambda: (Conv1d, Conv2d, Conv3d)[len(shape) - 2](shape[0], channels, 1))
    )
    return Case(lambda: Sequential(first(), layer, Tanh(), Flatten(), Linear(head, 3)), shape)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """The same network, with these parameters frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


NORM = {
    "batch norm of vectors": norm(nn.BatchNorm1d(3), (4,), 3, 3),
    "batch norm of sequences": norm(nn.BatchNorm1d(3), (2, 4), 3, 12),
    "batch norm of images": norm(nn.BatchNorm2d(3), (2, 2, 2), 3, 12),
    "batch norm of volumes": norm(nn.BatchNorm3d(2), (1, 2, 2, 2), 2, 16),
    "batch norm without parameters": norm(nn.BatchNorm2d(3, affine=False), (2, 2, 2), 3, 12),
    "batch norm of one channel": norm(nn.BatchNorm2d(1), (2, 2, 2), 1, 4),
    "batch norm, frozen weight": norm(frozen(nn.BatchNorm2d(3), "weight"), (2, 2, 2), 3, 12),
    "batch norm, frozen bias": norm(frozen(nn.BatchNorm1d(3), "bias"), (2, 4), 3, 12),
    "layer norm": norm(nn.LayerNorm(3), (4,), 3, 3),
    "layer norm over several axes": norm(nn.LayerNorm((3, 1, 2)), (2, 1, 2), 3, 6),
    "layer norm without parameters": norm(nn.LayerNorm((2, 2), elementwise_affine=False), (2, 2, 2), 3, 12),
    "layer norm without bias": norm(nn.LayerNorm(4, bias=False), (2, 4), 3, 12),
    "rms norm": norm(nn.RMSNorm((2, 2)), (2, 2, 2), 3, 12),
    "group norm": norm(nn.GroupNorm(2, 4), (2, 2, 2), 4, 16),
    "group norm of vectors": norm(nn.GroupNorm(2, 6), (4,), 6, 6),
    "instance norm": norm(nn.InstanceNorm2d(3, affine=True), (2, 2, 2), 3, 12),
    "instance norm with running statistics": norm(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 4), 3, 12),
}

EMBEDDING = {
    "embedding": Case(lambda: Sequential(nn.Embedding(5, 3), Tanh(), Flatten(), Linear(12, 3)), (4,), tokens=5),
    "padding index": Case(lambda: Sequential(nn.Embedding(3, 3, padding_idx=1), Flatten(), Linear(12, 3)), (4,), tokens=3),
    "negative padding index": Case(
        lambda: Sequential(nn.Embedding(3, 3, padding_idx=-1), Flatten(), Linear(12, 3)), (4,), tokens=3
    ),
    "embedding in a transposed table": Case(
        lambda: Net(lambda m, x: m.a(F.embedding(x, m.w.T).flatten(1).tanh()), w=(3, 5), a=Linear(12, 3)), (4,), ("w",), tokens=5
    ),
    "embedding of pooled tokens": Case(
        lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Embedding(4, 3), b=Linear(3, 4)), (5,), tokens=4
    ),
    "embedding bag": Case(
        lambda: Sequential(nn.EmbeddingBag(5, 4, mode="sum"), Tanh(), Linear(4, 3)), (4,), ("0.weight",), tokens=5
    ),
    "mean embedding bag": Case(lambda: Sequential(nn.EmbeddingBag(4, 4), Tanh(), Linear(4, 3)), (3,), ("0.weight",), tokens=4),
}
