"""The arithmetic that a kernel needs at least by the best order known, and the rate at which this machine multiplies matrices.

Counted are the products of linear and convolution layers and the Gram products of other parameters; attention, embeddings,
activations, copies and normalisation count nothing, so the floor is a little too low there. A symmetric product counts half.
Convolutions count as plain sums of products: ways that need fewer multiplications, by tiles, can beat the floor.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """Sizes of one linear or convolution layer, for one example.

    Attributes:
        d: Inputs of one output unit (channels per group times kernel size).
        o: Output channels, all groups.
        t: Positions.
        groups: Groups.
        backward: Whether the gradient with respect to its input is needed.
        separable: Whether its output gradients are W[a, o] M[i, o, t], as in front of a linear head behind an average.
        constant: Whether its output gradients are the same for all examples, as for the head.
    """

    d: int
    o: int
    t: int = 1
    groups: int = 1
    backward: bool = True
    separable: bool = False
    constant: bool = False

    @property
    def forward_flops(self) -> int:
        """Of one example: 2 t d o."""
        return 2 * self.t * self.d * self.o


def kernel_orders(layer: Layer, n: int, c: int) -> dict[str, int]:
    """FLOPs of one layer's part of the kernel in each order of summation.

    ``gradients``: per-example gradients, then their Gram matrix. ``inputs``: products of inputs between positions, applied to
    output gradients, then the product of output gradients. ``separable``: one n x n Gram matrix per channel. ``constant``: the Gram
    matrix of inputs alone.
    """
    d, o, t, groups = layer.d, layer.o, layer.t, layer.groups
    orders = {
        "gradients": 2 * n * c * t * d * o + (n * c) ** 2 * d * o,
        "inputs": groups * (n * t) ** 2 * d + (n * c) ** 2 * o * t + (n * n * c * o * t * t if t > 1 else 0),
    }
    if layer.separable:
        orders["separable"] = 2 * n * o * t * d + n * n * d * o + (n * c) ** 2 * o
    if layer.constant:
        orders["constant"] = n * n * d
    return orders


def trace_orders(layer: Layer, n: int, c: int) -> dict[str, int]:
    """FLOPs of one layer's part of the exact trace in each order of summation."""
    d, o, t, groups = layer.d, layer.o, layer.t, layer.groups
    if t == 1:
        return {"norms": 2 * n * (groups * d + c * o)}
    orders = {
        "gradients": 2 * n * c * t * d * o + 2 * n * c * d * o,
        "inputs": n * (groups * t * t * d + 2 * c * o * t * t + 2 * c * o * t),
    }
    if layer.separable:
        orders["separable"] = 2 * n * o * t * d + 2 * n * d * o + 2 * n * c * o
    return orders


def flops(layers: list[Layer], others: int, n: int, c: int, kind: str) -> dict[str, int]:
    """FLOPs of a kernel or a trace: forward pass, c backward passes to the inputs of layers, best contractions.

    Args:
        layers: Linear and convolution layers.
        others: Number of all other parameters but embeddings.
        n: Examples.
        c: Outputs.
        kind: ``"kernel"`` or ``"trace"``.
    """
    orders = kernel_orders if kind == "kernel" else trace_orders
    found = {
        "forward": n * sum(layer.forward_flops for layer in layers),
        "backward": n * c * sum(layer.forward_flops for layer in layers if layer.backward),
        "contraction": sum(min(orders(layer, n, c).values()) for layer in layers)
        + ((n * c) ** 2 if kind == "kernel" else 2 * n * c) * others,
    }
    return found | {"total": sum(found.values())}


def walk(model: nn.Module, x: Tensor) -> tuple[list[Layer], int, int]:
    """Return the layers that ``model`` runs on two examples, the number of other parameters, and the number of outputs."""
    model, x = copy.deepcopy(model).double(), x[:2].double() if x.is_floating_point() else x[:2]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        calls.append((module, args[0], out))

    watched = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_hook(keep) for m in watched]
    f = model(x)
    for hook in hooks:
        hook.remove()
    outs = [out for _, _, out in calls]
    rows = [torch.autograd.grad(f_a, outs, retain_graph=True) for f_a in f.sum(0)]  # examples do not interact
    layers = [_layer(m, a, torch.stack([row[i] for row in rows])) for i, (m, a, _) in enumerate(calls)]
    counted = {id(m.weight) for m in watched} | {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    biases = {id(m.bias) for m in watched}
    others = sum(w.numel() for w in model.parameters() if id(w) not in counted | biases)
    return layers, others, f.shape[1]


def _layer(module: nn.Module, a: Tensor, gradients: Tensor) -> Layer:
    """Sizes from a module, its input and its output gradients ``[c, n, *output]``."""
    weight, groups = module.get_parameter("weight"), getattr(module, "groups", 1)
    channel = -1 if isinstance(module, nn.Linear) else 2
    g = gradients.movedim(channel, 2).flatten(3) if gradients.ndim > 3 else gradients[..., None]  # [c, n, o, t]
    matrices = g.permute(2, 0, 1, 3).flatten(2)  # [o, c, n t]
    values = torch.linalg.svdvals(matrices)  # [o, min(c, n t)]
    return Layer(
        d=weight[0].numel(), o=len(weight), t=g.shape[-1], groups=groups, backward=a.requires_grad,
        separable=values.shape[1] < 2 or bool((values[:, 1] <= 1e-10 * values.max()).all()),
        constant=g.shape[-1] == 1 and bool((g[:, 0] - g[:, -1]).norm() <= 1e-12 * g.norm()),
    )  # fmt: skip


def gemm_rate(sizes: list[tuple[int, int, int]], device: str, seconds: float = 0.3) -> float:
    """FLOPs per second of the fastest float32 matrix product among sizes ``(m, k, n)``; CPU seconds, wall seconds on CUDA."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    best = 0.0
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        out = a @ b
        used, count = 0.0, 0
        while used < seconds:
            start = clock()
            torch.mm(a, b, out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            used, count = used + clock() - start, count + 1
        best = max(best, 2 * m * k * n * count / used)
    return best


def gemm_sizes(layers: list[Layer], n: int, c: int, largest: int) -> list[tuple[int, int, int]]:
    """Products like the largest Gram product of the workload, and a square one, none wider than ``largest``."""
    side, inner = min(n * c, largest), min(max(layer.o * layer.t for layer in layers), largest)
    square = min(1024, largest)
    return [(side, inner, side), (square, square, square)]
