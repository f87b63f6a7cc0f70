"""Vision transformer for small images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 4
DEPTH = 4
PATCHES = 8  # along each side, at most; patches are square and at least 2 pixels wide


class Attention(nn.Module):
    """Softmax attention among all tokens with ``HEADS`` heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.query_key_value(x).reshape(n, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """x -> y + g(norm(y)) with y = x + attention(norm(x)); g is two linear layers with GELU, expanding 4-fold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer: linear embedding of square patches, class token, learned positions, pre-norm blocks, linear head.

    Dosovitskiy et al. 2021 (arXiv:2010.11929v2, section 3.1) with 4 blocks and 4 heads. Images are cut in patches of
    ``patch`` pixels, the smallest size of at least 2 with at most 8 patches along a side (padded with zeros at the lower right
    edge): 4 for images of 28 or 32 pixels. Inputs ``[n, in_channels, h, w]``, outputs ``[n, num_classes]`` (logits).

    Args:
        input_shape: ``(in_channels, h, w)``.
        num_classes: Outputs c.
        width: Dimension of a token, a multiple of 4.

    Raises:
        ValueError: If the width is not a multiple of the number of heads.
    """

    def __init__(self, *, input_shape: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        if width % HEADS:
            msg = f"width of vit must be a multiple of its {HEADS} heads. Got {width}."
            raise ValueError(msg)
        channels, *sides = input_shape
        self.patch = max(2, -(-max(sides) // PATCHES))
        tokens = 1 + (-(-sides[0] // self.patch)) * (-(-sides[1] // self.patch))
        self.patches = nn.Conv2d(channels, width, self.patch, self.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (-s % self.patch for s in x.shape[2:])
        x = self.patches(F.pad(x, (0, w, 0, h))).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])
