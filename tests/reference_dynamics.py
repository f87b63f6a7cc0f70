"""Definitions of training dynamics, similarities and wide networks by loops and quadrature in float64, independent of ntklib."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from scipy import special
from torch import Tensor, nn

Scalar = Callable[[np.ndarray], np.ndarray]


def relu(u: np.ndarray) -> np.ndarray:
    return np.maximum(u, 0)


def step(u: np.ndarray) -> np.ndarray:
    return (u > 0).astype(float)


def bell(u: np.ndarray) -> np.ndarray:
    """Derivative of erf."""
    return 2 / math.sqrt(math.pi) * np.exp(-(u**2))


FUNCTIONS: dict[str, tuple[Scalar, Scalar]] = {
    "relu": (relu, step),
    "erf": (special.erf, bell),
    "identity": (lambda u: u, lambda u: np.ones_like(u)),
}


def gaussian_mean(g: Scalar, a: float, b: float, s: float) -> float:
    """E g(u) g(v) for Gaussians of variances a > 0 and b > 0 and covariance s, by quadrature in polar coordinates.

    u = sqrt(a) r cos p and v = sqrt(b) r cos(p - t) with cos t the correlation; g may have a kink at 0, where sectors end.
    """
    t = math.acos(max(-1.0, min(1.0, s / math.sqrt(a * b))))
    cuts = sorted({v % (2 * math.pi) for v in (math.pi / 2, -math.pi / 2, t + math.pi / 2, t - math.pi / 2)})
    radii, radius_weights = rule(0, 12, 120)  # e^{-72} is left out
    total = 0.0
    for start, end in zip(cuts, [*cuts[1:], cuts[0] + 2 * math.pi], strict=True):
        angles, weights = rule(start, end, 60)
        u = math.sqrt(a) * np.outer(radii, np.cos(angles))
        v = math.sqrt(b) * np.outer(radii, np.cos(angles - t))
        density = np.outer(radius_weights * radii * np.exp(-(radii**2) / 2), weights) / (2 * math.pi)
        total += float((g(u) * g(v) * density).sum())
    return total


def rule(start: float, end: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = leggauss(points)
    return start + (end - start) * (nodes + 1) / 2, weights * (end - start) / 2


def wide_kernels(
    x: Sequence[float],
    z: Sequence[float],
    depth: int,
    activation: str,
    weight_std: float,
    bias_std: float,
    widths: Sequence[int] | None = None,
    bias: bool = True,
) -> tuple[float, float]:
    """NNGP and NTK of one pair of inputs: products of the mean slopes above each layer, summed over layers.

    Without ``widths`` in NTK parameterization, with them in standard parameterization.
    """
    g, slope = FUNCTIONS[activation]
    d = len(x)
    covariances = [[sum(u * v for u, v in zip(p, q, strict=True)) / d for q in (x, z)] for p in (x, z)]
    own, slopes = [], []
    for layer in range(depth + 1):
        if layer > 0:
            (a, s), (_, b) = covariances
            slopes.append(weight_std**2 * gaussian_mean(slope, a, b, s))
            covariances = [[gaussian_mean(g, a, a, a), gaussian_mean(g, a, b, s)], [0.0, gaussian_mean(g, b, b, b)]]
        below = covariances[0][1]
        covariances = [[weight_std**2 * v + bias_std**2 for v in row] for row in covariances]
        fan_in = None if widths is None else [d, *widths][layer]
        own.append(covariances[0][1] if fan_in is None else fan_in * below + (1 if bias else 0))
    return covariances[0][1], sum(part * math.prod(slopes[layer:]) for layer, part in enumerate(own))


class WideMLP(nn.Module):
    """MLP in NTK parameterization: every layer is W h sigma_w / sqrt(fan_in) + sigma_b b, with standard normal W and b."""

    def __init__(self, d: int, width: int, depth: int, c: int, activation: Callable[[Tensor], Tensor], stds, generator):
        super().__init__()
        sizes = [d, *[width] * depth, c]
        self.weights = nn.ParameterList(
            torch.randn(sizes[i + 1], sizes[i], generator=generator, dtype=torch.float64) for i in range(depth + 1)
        )
        self.biases = nn.ParameterList(
            torch.randn(sizes[i + 1], generator=generator, dtype=torch.float64) for i in range(depth + 1)
        )
        self.activation, self.stds = activation, stds

    def forward(self, x: Tensor) -> Tensor:
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = self.activation(x) if layer > 0 else x
            x = self.stds[0] / math.sqrt(w.shape[1]) * x @ w.T + self.stds[1] * b
        return x


class Attention(nn.Module):
    """A transformer layer on sequences ``[n, 3, 4]``, with fused attention and a first token that is read out."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)
        redraw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, 0])


class Shared(nn.Module):
    """A weight at two places, a module called twice, a parameter of the root, and a buffer."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))
        redraw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two, self.one):
            x = torch.tanh(layer(x) * self.scale + self.shift)
        return x[:, :3]


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    for w in model.parameters():
        w.copy_(torch.randn(w.shape, generator=generator) / 2)


def taylor_by_gradients(model: nn.Module, x: Tensor, change: Sequence[Tensor]) -> Tensor:
    """Outputs plus the inner products of their gradients with a change of the parameters, one backward pass per number."""
    params = [w for w in model.parameters() if w.requires_grad]
    f = model(x)
    rows = []
    for row in f:
        for value in row:
            grads = torch.autograd.grad(value, params, retain_graph=True)
            rows.append(value.detach() + sum((g * d).sum() for g, d in zip(grads, change, strict=True)))
    return torch.stack(rows).reshape(f.shape)


def feature_descent(
    features: Tensor, test_features: Tensor, f_0: Tensor, f_test_0: Tensor, y: Tensor, lr: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Gradient descent in theta on 1/2 sum of squares of f_0 + J theta: outputs at every step, train and test.

    Features are Jacobians ``[n, c, p]``.
    """
    j, j_test = features.reshape(-1, features.shape[2]), test_features.reshape(-1, features.shape[2])
    theta = torch.zeros(j.shape[1], dtype=j.dtype)
    train, test = [], []
    for _ in range(steps + 1):
        residual = f_0.reshape(-1) + j @ theta - y.reshape(-1)
        train.append((residual + y.reshape(-1)).reshape(f_0.shape))
        test.append((f_test_0.reshape(-1) + j_test @ theta).reshape(f_test_0.shape))
        theta = theta - lr * j.T @ residual
    return torch.stack(train), torch.stack(test)


def ridge_regression(features: Tensor, test_features: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """J_* theta with theta = (J^T J + ridge)^{-1} J^T residual: least squares in parameters, not in kernels."""
    j, j_test = features.reshape(-1, features.shape[2]), test_features.reshape(-1, features.shape[2])
    gram = j.T @ j + ridge * torch.eye(j.shape[1], dtype=j.dtype)
    theta = torch.linalg.solve(gram, j.T @ residual.reshape(-1))
    return (j_test @ theta).reshape(len(test_features), -1)


def centered_by_loops(kernel: Tensor) -> Tensor:
    """Inner products of features minus their mean over examples, output by output."""
    k = kernel[:, :, None, None] if kernel.ndim == 2 else kernel
    n, _, c, _ = k.shape
    out = torch.zeros_like(k)
    for a in range(c):
        for b in range(c):
            block = k[:, :, a, b].tolist()
            rows = [sum(row) / n for row in block]
            columns = [sum(block[i][j] for i in range(n)) / n for j in range(n)]
            mean = sum(rows) / n
            for i in range(n):
                for j in range(n):
                    out[i, j, a, b] = block[i][j] - rows[i] - columns[j] + mean
    return out.reshape(kernel.shape)


def cosine_by_loops(k1: Tensor, k2: Tensor) -> float:
    a, b = k1.reshape(-1).tolist(), k2.reshape(-1).tolist()
    dot = sum(u * v for u, v in zip(a, b, strict=True))
    return dot / math.sqrt(sum(u * u for u in a) * sum(v * v for v in b))
