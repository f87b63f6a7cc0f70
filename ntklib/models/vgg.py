"""Plain convolutional networks of the VGG type."""

from torch import Tensor, nn

STAGES = {"cnn": (1, 1, 1), "vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3)}  # convolutions per stage


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each stage ended by 2x2 max pooling; global average pooling; a linear head.

    The columns A and D of Simonyan & Zisserman 2015 (arXiv:1409.1556v6, Table 1) as ``"vgg11"`` and ``"vgg16"``, with batch
    normalisation after each convolution and one linear layer as head, as is usual for images of 32 pixels; and ``"cnn"``, three
    stages of one convolution with biases and no normalisation. Stage ``k`` has ``width * 2**(k-1)`` channels, at most
    ``8 * width``; ``width=64`` is the standard network. Pooling rounds sizes up, so that small images pass. Inputs
    ``[n, in_channels, h, w]``, outputs ``[n, num_classes]`` (logits).
    """

    def __init__(self, name: str, *, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        norm = name != "cnn"
        c, stages = in_channels, []
        for stage, depth in enumerate(STAGES[name]):
            c_out = min(width * 2**stage, 8 * width)
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=not norm), *([nn.BatchNorm2d(c_out)] if norm else []), nn.ReLU()]
                c = c_out
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))
