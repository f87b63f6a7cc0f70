"""Wide residual networks for small images, as in public code of FixMatch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntklib.models.resnet import _conv

WIDE = {"wrn10_2": (10, 2), "wrn16_2": (16, 2), "wrn28_2": (28, 2)}  # name -> depth, widening factor
SLOPE = 0.1  # of the leaky rectifier
BATCH_NORM_MOMENTUM = 0.001  # weight of the newest batch in the running statistics


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM)


class PreActivationBlock(nn.Module):
    """x -> shortcut(x) + conv(a(conv(a(x)))), with a = leaky rectifier after batch normalisation.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        stride: Of the first convolution.
        activate_shortcut: Whether the shortcut, too, starts from a(x).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, *, activate_shortcut: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), _conv(c_in, c_out, 3, stride)
        self.norm2, self.conv2 = _norm(c_out), _conv(c_out, c_out, 3)
        self.shortcut = nn.Identity() if c_in == c_out and stride == 1 else _conv(c_in, c_out, 1)
        self.activate_shortcut, self.stride = activate_shortcut, stride

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(x), SLOPE)
        start = h if self.activate_shortcut else x
        h = self.conv2(F.leaky_relu(self.norm2(self.conv1(h)), SLOPE))
        return h + self.shortcut(start[..., :: self.stride, :: self.stride])  # strided before the 1x1 convolution, as in ResNet


class WideResNet(nn.Module):
    """Wide residual network: 3x3 stem, three stages of pre-activation blocks, global average pooling, linear head.

    Depth 6 n + 4 with n blocks per stage (Zagoruyko & Komodakis 2016, arXiv:1605.07146v4, Table 1). As in the code of FixMatch
    (Sohn et al. 2020, arXiv:2001.07685v2) activations are leaky rectifiers of slope 0.1, the shortcut of the first block starts
    after its activation, and the running statistics of batch normalisation move by 0.001 per step, a memory of a thousand steps:
    recalibrate them before a measurement at weights that moved within it. Stage ``k`` has ``width * 2**(k-1)`` channels and the
    stem ``width / widen``: ``width=32`` is the standard WRN-28-2, 1,467,610 parameters with 3 input channels and 10 outputs.
    Inputs ``[n, in_channels, h, w]``, outputs ``[n, num_classes]`` (logits).

    Raises:
        ValueError: If the width is not a multiple of the widening factor.
    """

    def __init__(self, name: str, *, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        depth, widen = WIDE[name]
        if width % widen:
            msg = f"width of {name} must be a multiple of its widening factor {widen}. Got {width}."
            raise ValueError(msg)
        c = width // widen
        self.stem = _conv(in_channels, c, 3)
        stages = []
        for stage in range(3):
            blocks, c_out = [], width * 2**stage
            for i in range((depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(PreActivationBlock(c, c_out, stride, activate_shortcut=stage == 0 and i == 0))
                c = c_out
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3 = stages
        self.norm, self.head = _norm(c), nn.Linear(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(torch.mean(F.leaky_relu(self.norm(x), SLOPE), (2, 3)))
