"""The measured networks, their inputs, and a float64 definition of the kernel that shares no code with what is measured."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload
from ntklib import models
from ntklib.random import stream

PRIME = 113  # modulus of the addition task


def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, as batch normalisation follows or precedes it."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def small_cnn(width: int) -> nn.Module:
    """Three 3x3 convolutions with strides 1, 2, 2, global average pooling and a linear head."""
    sizes, layers = [3, width, 2 * width, 4 * width], []
    for i in range(3):
        layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, 1 if i == 0 else 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


def separable_cnn(width: int) -> nn.Module:
    """Depthwise-separable blocks: a 3x3 convolution per channel, a 1x1 convolution across channels, each with normalisation."""
    norm_relu = lambda c: [nn.BatchNorm2d(c), nn.ReLU()]  # noqa: E731
    layers = [conv(3, width), *norm_relu(width)]
    c = width
    for c_out, stride in ((2 * width, 1), (4 * width, 2), (4 * width, 1), (8 * width, 2), (8 * width, 1)):
        layers += [conv(c, c, stride=stride, groups=c), *norm_relu(c), conv(c, c_out, kernel=1), *norm_relu(c_out)]
        c = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


class PreActivation(nn.Module):
    """x -> shortcut + g(relu(norm(x))), the block of wide residual networks."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), conv(c_in, c_out, stride=stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(c_out), conv(c_out, c_out)
        self.shortcut = None if c_in == c_out else conv(c_in, c_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        out = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(width: int, factor: int = 2, depth: int = 28) -> nn.Module:
    """WideResNet-28-2 (Zagoruyko and Komodakis 2016, arXiv:1605.07146v4, Table 1) for ``width=16``."""
    layers: list[nn.Module] = [conv(3, width)]
    c = width
    for group in range(3):
        for i in range((depth - 4) // 6):
            c_out = factor * width * 2**group
            layers.append(PreActivation(c, c_out, 2 if group > 0 and i == 0 else 1))
            c = c_out
    return nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


class Attention(nn.Module):
    """Softmax attention among all tokens, written out."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value, self.project = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.query_key_value(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        return self.project((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to its input; with layer normalisation before them, or without."""

    def __init__(self, width: int, heads: int, *, norm: bool, activation: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.attention = Attention(width, heads, bias=norm)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels, a class token, positions, four blocks, a head on the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(0.1 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*[Block(width, 4, norm=True, activation=nn.GELU()) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class AdditionTransformer(nn.Module):
    """One block without normalisation on the tokens (a, b, =); the logits of a + b are read at the last token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(PRIME + 1, width), nn.Parameter(torch.randn(3, width) / math.sqrt(width))
        self.block = Block(width, 4, norm=False, activation=nn.ReLU())
        self.unembed = nn.Linear(width, PRIME, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.block(self.embed(tokens) + self.position)[:, -1])


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda width: models.MLP(784, [width, width], 10),
    "resnet18": lambda width: models.ResNet("resnet18", in_channels=3, num_classes=10, width=width),
    "small_cnn": small_cnn,
    "separable_cnn": separable_cnn,
    "wide_resnet": wide_resnet,
    "vision_transformer": VisionTransformer,
    "addition_transformer": AdditionTransformer,
}


def build(workload: Workload) -> nn.Module:
    """Return the network in eval mode, the same at every call; batch normalisation gets random statistics, scales and shifts."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = BUILDERS[workload.network](workload.width).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.normal_(module.weight, 1, 0.1)
                nn.init.normal_(module.bias, 0, 0.1)
    return model


def inputs(workload: Workload, n: int) -> Tensor:
    """Return the first ``n`` inputs; fewer inputs are the beginning of more."""
    generator = stream(0, "benchmark inputs")
    if workload.network == "addition_transformer":
        numbers = torch.randint(PRIME, (max(n, workload.n), 2), generator=generator)
        return torch.cat([numbers, torch.full((len(numbers), 1), PRIME)], 1)[:n]
    shape = (1, 28, 28) if workload.network == "mlp" else (3, 32, 32)
    return torch.randn(max(n, workload.n, 16), *shape, generator=generator)[:n]


def kernel_by_loops(model: nn.Module, x: Tensor) -> Tensor:
    """Kernel ``[n, n, c, c]`` in float64 by its definition: one backward pass per example and output, then inner products."""
    model, x = model.double(), x.double() if x.is_floating_point() else x
    params, rows = list(model.parameters()), []
    for i in range(len(x)):
        out = model(x[i : i + 1])[0]
        for f_a in out:
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(f_a, params, retain_graph=True)]))
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).reshape(len(x), -1, len(x), len(rows) // len(x)).transpose(1, 2)


def trace_by_loops(model: nn.Module, x: Tensor) -> Tensor:
    """Trace in float64, as the sum of squared gradients."""
    return torch.einsum("iiaa->", kernel_by_loops(model, x))
