"""Per-example gradients by torch.func: the general method."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from ntklib.functional import Model, Params


def jacobian(f: Model, params: Params, x: Tensor, v: Float[Tensor, "n k c"] | None = None) -> dict[str, Float[Tensor, "n k _"]]:
    r"""Gradients of outputs with respect to the parameters, one example at a time.

    .. math:: J_{i,a} = \nabla_\theta f_a(x_i), \qquad \text{or} \quad \sum_b v_{i,a,b} \nabla_\theta f_b(x_i)

    Kept apart by parameter, as contractions add up over them: a concatenated copy would double the memory. A model that
    ``torch.func.vmap`` cannot run (a recurrent net, a custom operation) is differentiated by plain autograd in loops.

    Args:
        f: Model, ``[n, *input] -> [n, c]``, whose rows do not interact.
        params: Parameters at which the gradients are taken.
        x: Inputs, ``[n, *input]``.
        v: Output directions of every example, ``[n, k, c]``. Default: each output for itself, k = c.

    Returns:
        For every parameter its gradients, ``[n, k, numel]``.
    """
    if v is None:
        with torch.no_grad():
            c = f(params, x[:1])
        v = torch.eye(c.shape[1]).to(c).expand(len(x), -1, -1)

    def one_example(x_i: Tensor, v_i: Tensor) -> Params:
        pull = vjp(lambda params: f(params, x_i[None])[0], params)[1]
        return vmap(pull)(v_i)[0]  # each [k, *w.shape]

    try:
        pieces = vmap(one_example)(x, v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some operation has no batching rule
        pieces = _by_loops(f, params, x, v)
    return {name: piece.reshape(*piece.shape[:2], -1) for name, piece in pieces.items()}


def _by_loops(f: Model, params: Params, x: Tensor, v: Tensor) -> Params:
    leaves = {name: w.detach().requires_grad_() for name, w in params.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    with torch.enable_grad():
        for x_i, v_i in zip(x.split(1), v, strict=True):
            out = f(leaves, x_i)[0]
            for v_ia in v_i:
                grads = torch.autograd.grad(out, list(leaves.values()), v_ia, retain_graph=True, materialize_grads=True)
                for name, g in zip(rows, grads, strict=True):
                    rows[name].append(g)
    return {name: torch.stack(g).unflatten(0, v.shape[:2]) for name, g in rows.items()}
