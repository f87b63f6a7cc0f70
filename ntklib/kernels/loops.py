"""Per-example gradients by plain autograd, one at a time: for what ``torch.func`` cannot do, and to check what it does."""

import torch
from torch import Tensor

from ntklib.functional import Model, Params


def by_loops(f: Model, params: Params, x: Tensor, v: Tensor) -> Params:
    """For every parameter the gradients ``[n, k, *w.shape]`` along output directions ``[n, k, c]``, one backward pass each."""
    leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    with torch.enable_grad():
        for x_i, v_i in zip(x.split(1), v, strict=True):
            out = f(leaves, x_i)[0]
            for v_ia in v_i:
                targets = list(leaves.values())
                if out.requires_grad:
                    grads = torch.autograd.grad(out, targets, v_ia, retain_graph=True, materialize_grads=True)
                else:  # this example uses no parameter
                    grads = [torch.zeros_like(w) for w in targets]
                for name, g in zip(rows, grads, strict=True):
                    rows[name].append(g)
    return {name: torch.stack(g).unflatten(0, v.shape[:2]) for name, g in rows.items()}


def agrees(pieces: Params, f: Model, params: Params, x: Tensor, v: Tensor) -> bool:
    """Whether a combination of the directions has plain autograd's gradients, on the first and on the last example."""
    if any(piece.shape != (*v.shape[:2], *params[name].shape) for name, piece in pieces.items()):
        return False
    weights = torch.cos(torch.arange(1.0, v.shape[1] + 1, device=v.device)).to(v.dtype)
    for i in {0, len(x) - 1}:
        exact = by_loops(f, params, x[i : i + 1], (weights @ v[i])[None, None])
        error = sum(
            float((torch.tensordot(weights.to(g.dtype), pieces[name][i], 1) - g).square().sum()) for name, g in exact.items()
        )
        size = sum(float(g.square().sum()) for g in exact.values())
        if not error <= max(torch.finfo(g.dtype).eps for g in exact.values()) * size:
            return False
    return True
