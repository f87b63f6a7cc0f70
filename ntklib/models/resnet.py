"""Residual networks with the stem used for small images."""

import torch
from torch import Tensor, nn

LAYERS = {  # blocks per stage
    "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3),
    "resnet20": (3, 3, 3),
}  # fmt: skip


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """x -> relu(g(x) + shortcut(x)); g is two 3x3 convolutions, or a 1x1-3x3-1x1 bottleneck that expands 4-fold."""

    def __init__(self, c_in: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        c_out = 4 * width if bottleneck else width
        steps = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        channels = [c_in, *[width] * (len(steps) - 1), c_out]
        body: list[nn.Module] = []
        for i, (kernel, step) in enumerate(steps):
            body += [_conv(channels[i], channels[i + 1], kernel, step), nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        self.body = nn.Sequential(*body[:-1])  # the last ReLU comes after the sum
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(c_in, c_out, 1), nn.BatchNorm2d(c_out))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # the stride before the 1x1 convolution: the same numbers, and with it inside, oneDNN on processors without AVX-512 writes
        # beyond its memory in the backward pass of 2 to 6 channels (github.com/uxlfoundation/oneDNN/issues/6035)
        return torch.relu(self.body(x) + self.shortcut(x[..., :: self.stride, :: self.stride]))


class ResNet(nn.Module):
    """Residual network for small images: 3x3 stem without pooling, four stages, global average pooling, linear head.

    The blocks of He et al. 2016 (arXiv:1512.03385v1, Table 1) behind the stem of their CIFAR networks (section 4.2), as is usual
    for images of 32 pixels and meant by the main paper's "ResNet18". Stage ``k`` has
    ``width * 2**(k-1)`` channels (times 4 after bottlenecks); ``width=64`` is the standard network, 11.2 M parameters at depth 18
    with 3 input channels and 10 outputs. ``"resnet20"`` is the CIFAR network itself, of three stages: ``width=16`` is the standard
    one, 0.27 M parameters (with a convolution as the shortcut wherever the number of channels changes). Inputs
    ``[n, in_channels, h, w]``, outputs ``[n, num_classes]`` (logits).
    """

    def __init__(self, name: str, *, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        bottleneck = name in ("resnet50", "resnet101")
        self.stem = nn.Sequential(_conv(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        c, stages = width, []
        self.num_stages = len(LAYERS[name])
        for stage, depth in enumerate(LAYERS[name]):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(c, width * 2**stage, stride, bottleneck=bottleneck))
                c = width * 2**stage * (4 if bottleneck else 1)
            stages.append(nn.Sequential(*blocks))
        for number, stage in enumerate(stages, 1):
            self.add_module(f"layer{number}", stage)
        self.head = nn.Linear(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.head(x.mean((2, 3)))
