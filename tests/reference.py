"""Definitions by loops in float64, independent of ntklib: no torch.func, one autograd.grad per number."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def gradients_by_definition(model: nn.Module, x: Tensor) -> Tensor:
    """``[n, c, p]``: one backward pass per example and output, over distinct trainable parameters."""
    params = [w for w in model.parameters() if w.requires_grad]
    rows = []
    for i in range(len(x)):
        out = model(x[i : i + 1])[0]
        for a in range(len(out)):
            used = out.requires_grad  # otherwise the outputs are constants
            grads = torch.autograd.grad(out[a], params, retain_graph=True, allow_unused=True) if used else [None] * len(params)
            pieces = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, params, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in pieces]))
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel())


def ntk_by_definition(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``[n1, n2, c, c]``: inner products of gradients."""
    g1, g2 = gradients_by_definition(model, x1), gradients_by_definition(model, x2)
    kernel = torch.zeros(len(x1), len(x2), g1.shape[1], g2.shape[1], dtype=g1.dtype)
    for i, j, a, b in torch.cartesian_prod(*[torch.arange(s) for s in kernel.shape]).tolist():
        kernel[i, j, a, b] = (g1[i, a] * g2[j, b]).sum()
    return kernel


def reduce_by_definition(kernel: Tensor, reduce: str | None) -> Tensor:
    """Entries a = b of the kernel, or their sum."""
    if reduce is None:
        return kernel
    diagonal = torch.stack([kernel[:, :, a, a] for a in range(kernel.shape[2])], dim=2)
    return diagonal if reduce == "diagonal" else sum(diagonal[:, :, a] for a in range(kernel.shape[2]))


def flatten_by_definition(kernel: Tensor) -> Tensor:
    """``[n1 c, n2 c]``: row i c + a, column j c + b."""
    n1, n2, c, _ = kernel.shape
    flat = torch.empty(n1 * c, n2 * c, dtype=kernel.dtype)
    for i in range(n1):
        for j in range(n2):
            flat[i * c : (i + 1) * c, j * c : (j + 1) * c] = kernel[i, j]
    return flat


def trace_by_definition(kernel: Tensor) -> float:
    return sum(float(kernel[i, i, a, a]) for i in range(kernel.shape[0]) for a in range(kernel.shape[2]))


def deep_linear_kernel(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """K = sum_l (X W_{l-1:1}^T W_{l-1:1} X^T) (x) (W_{L:l+1} W_{L:l+1}^T) for f(x) = W_L ... W_1 x without biases."""
    kernel = torch.zeros(len(x), len(x), len(weights[-1]), len(weights[-1]), dtype=x.dtype)
    for layer in range(len(weights)):
        below, above = x, torch.eye(len(weights[-1]), dtype=x.dtype)
        for w in weights[:layer]:
            below = below @ w.T
        for w in reversed(weights[layer + 1 :]):
            above = above @ w
        kernel += torch.einsum("ij,ab->ijab", below @ below.T, above @ above.T)
    return kernel


def gaussian_variance(kernel: Tensor) -> float:
    """Variance of ||J z||^2 with z ~ N(0, I): 2 ||K||_F^2 over all n c outputs."""
    return 2 * sum(v * v for v in kernel.reshape(-1).tolist())


def rademacher_variance(kernel: Tensor) -> float:
    """Variance of sum_i ||J_i^T v_i||^2 with random signs: 2 sum_i sum_{a != b} K_ii,ab^2."""
    n, _, c, _ = kernel.shape
    return 2 * sum(float(kernel[i, i, a, b]) ** 2 for i in range(n) for a in range(c) for b in range(c) if a != b)


def assert_mean(mean: float, sem: float, truth: float) -> None:
    """Within 4 standard errors of the truth, which are small enough to see a bias of 2 %."""
    assert sem < 0.005 * abs(truth), f"blind test: sem {sem} of {truth}"
    assert abs(mean - truth) < 4 * sem, f"biased: {mean} +- {sem}, truth {truth}"


def assert_sample_mean(samples: Tensor, truth: float) -> None:
    samples = samples.double().reshape(-1)
    assert_mean(float(samples.mean()), float(samples.std()) / math.sqrt(len(samples)), truth)


def one_hot_by_loops(y: Tensor, c: int) -> Tensor:
    return torch.tensor([[1.0 if label == a else 0.0 for a in range(c)] for label in y.tolist()], dtype=torch.float64)


def softmax_by_loops(outputs: Tensor) -> Tensor:
    rows = [[math.exp(v - max(row)) for v in row] for row in outputs.tolist()]
    return torch.tensor([[v / sum(row) for v in row] for row in rows], dtype=torch.float64)


def loss_by_loops(loss: str, outputs: Tensor, y: Tensor) -> float:
    """Mean over examples of ||f - onehot||^2 / 2 or / c, or of -log softmax(f)[y]."""
    n, c = outputs.shape
    if loss in ("half_mse", "mse"):
        squares = [(float(outputs[i, a]) - (1.0 if a == y[i] else 0.0)) ** 2 for i in range(n) for a in range(c)]
        return sum(squares) / (n * (2 if loss == "half_mse" else c))
    return -sum(math.log(softmax_by_loops(outputs)[i, int(y[i])]) for i in range(n)) / n


def linear_gradient(loss: str, w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the loss of f(x) = W x + b by hand: the residual is f - onehot, times 2/c for ``mse``, or softmax(f) - onehot."""
    f = x @ w.T + b
    residual = (f if loss in ("half_mse", "mse") else softmax_by_loops(f)) - one_hot_by_loops(y, len(w))
    residual = residual * (2 / len(w) if loss == "mse" else 1)
    return residual.T @ x / len(x), residual.sum(0) / len(x)


def cosine_by_hand(lr: float, step: int, total: int) -> float:
    return lr * math.cos(math.pi * step / (2 * total)) ** 2  # (1 + cos 2u) / 2 = cos^2 u


def sgd_by_hand(
    w: Tensor,
    b: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    rates: list[float],
    loss: str,
    mu: float,
    decay: float,
    nesterov: bool,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Parameters after every step of a linear model, and the loss before it."""
    params, velocity = [w.clone(), b.clone()], [torch.zeros_like(w), torch.zeros_like(b)]
    for (x, y), rate in zip(batches, rates, strict=True):
        value = loss_by_loops(loss, x @ params[0].T + params[1], y)
        grads = linear_gradient(loss, *params, x, y)
        for k in range(2):
            g = grads[k] + decay * params[k]
            velocity[k] = mu * velocity[k] + g
            params[k] = params[k] - rate * (g + mu * velocity[k] if nesterov else velocity[k])
        yield params[0], params[1], value


def adam_by_hand(
    w: Tensor,
    b: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    rates: list[float],
    betas: tuple[float, float],
    decay: float,
    decoupled: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of a linear model after every step on the cross-entropy; averages as explicit weighted sums."""
    params, history = [w.clone(), b.clone()], []
    for (x, y), rate in zip(batches, rates, strict=True):
        grads = linear_gradient("cross_entropy", *params, x, y)
        history.append([g if decoupled else g + decay * v for g, v in zip(grads, params, strict=True)])
        t = len(history)
        for k in range(2):
            m, v = (
                sum(beta ** (t - 1 - s) * (1 - beta) * history[s][k] ** power for s in range(t)) / (1 - beta**t)
                for beta, power in zip(betas, (1, 2), strict=True)
            )
            shrunk = params[k] * (1 - rate * decay) if decoupled else params[k]
            params[k] = shrunk - rate * m / (v.sqrt() + 1e-8)
        yield params[0], params[1]


def summed_loss_descent(w: Tensor, b: Tensor, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    """Return the outputs ``[steps + 1, n, c]`` of f(x) = W x + b under gradient descent on 1/2 sum_i ||f(x_i) - y_i||^2."""
    outputs = []
    for _ in range(steps + 1):
        f = x @ w.T + b
        outputs.append(f)
        w, b = w - lr * (f - y).T @ x, b - lr * (f - y).sum(0)
    return torch.stack(outputs)


def flow_by_runge_kutta(kernel: Tensor, f_0: Tensor, y: Tensor, t: float, steps: int) -> Tensor:
    """Integrate df_ia/dt = -sum_jb K_ij,ab (f_jb - y_jb) with the classical fourth-order method."""

    def velocity(f: Tensor) -> Tensor:
        return -torch.einsum("ijab,jb->ia", kernel, f - y)

    f, h = f_0, t / steps
    for _ in range(steps):
        k1 = velocity(f)
        k2 = velocity(f + h / 2 * k1)
        k3 = velocity(f + h / 2 * k2)
        k4 = velocity(f + h * k3)
        f = f + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return f


def windows(image: Tensor, padding: int) -> Iterator[Tensor]:
    """Every crop of the zero-padded image ``[channels, h, w]``, and its mirror image."""
    channels, h, w = image.shape
    padded = torch.zeros(channels, h + 2 * padding, w + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + h, padding : padding + w] = image
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + h, left : left + w]
            yield crop
            yield torch.stack([crop[:, :, w - 1 - k] for k in range(w)], dim=2)
