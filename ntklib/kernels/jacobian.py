"""Per-example gradients by torch.func: the general method."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from ntklib.functional import Model, Params
from ntklib.kernels.loops import agrees, by_loops


def jacobian(f: Model, params: Params, x: Tensor, v: Float[Tensor, "n k c"] | None = None) -> dict[str, Float[Tensor, "n k _"]]:
    r"""Gradients of outputs with respect to the parameters, one example at a time.

    .. math:: J_{i,a} = \nabla_\theta f_a(x_i), \qquad \text{or} \quad \sum_b v_{i,a,b} \nabla_\theta f_b(x_i)

    Kept apart by parameter, as contractions add up over them: a concatenated copy would double the memory. A model that
    ``torch.func.vmap`` cannot run (a recurrent net, a custom operation) is differentiated by plain autograd in loops, and so is one
    that it runs wrongly: torch 2.15 does so with ``prelu``, ``cdist``, ``linalg.solve`` and ``linalg.det``, batched twice.

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
        right = agrees(pieces, f, params, x, v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some operation has no batching rule
        pieces, right = {}, False
    if not right:
        pieces = by_loops(f, params, x, v)
    return {name: piece.reshape(*piece.shape[:2], -1) for name, piece in pieces.items()}
