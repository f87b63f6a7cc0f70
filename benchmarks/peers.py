"""Every way to compute the kernel ``[n, n, c, c]`` or its trace with PyTorch, each in its best documented form."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from ntklib import empirical_ntk, ntk_trace

Params = dict[str, Tensor]


def single(model: nn.Module) -> tuple[Callable[[Params, Tensor], Tensor], Params]:
    """Return f(params, one example) and its parameters."""
    buffers = dict(model.named_buffers())
    params = {name: w.detach() for name, w in model.named_parameters()}
    return lambda params, x_i: functional_call(model, {**params, **buffers}, (x_i[None],))[0], params


def func_einsum(model: nn.Module, x: Tensor) -> Tensor:
    """The recipe of torch.func's tutorial: vmap of jacrev, then one einsum per parameter."""
    f, params = single(model)
    jacobians = [j.flatten(2) for j in vmap(jacrev(f), (None, 0))(params, x).values()]  # [n, c, p_k]
    return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in jacobians]).sum(0)


def func_gemm(model: nn.Module, x: Tensor) -> Tensor:
    """The same Jacobians as matrices ``[n c, p_k]``, one product each, freed as it goes."""
    f, params = single(model)
    jacobians = vmap(jacrev(f), (None, 0))(params, x)
    n, c = next(iter(jacobians.values())).shape[:2]
    kernel = x.new_zeros(n * c, n * c, dtype=next(iter(params.values())).dtype)
    while jacobians:
        j = jacobians.popitem()[1].reshape(n * c, -1)
        kernel.addmm_(j, j.T)
    return kernel.reshape(n, c, n, c).transpose(1, 2)


def func_vp(model: nn.Module, x: Tensor) -> Tensor:
    """The tutorial's other recipe: for every pair of examples, J_i (J_j^T e_a) by a vjp and a jvp."""
    f, params = single(model)

    def pair(x_i: Tensor, x_j: Tensor) -> Tensor:
        out, pullback = vjp(lambda p: f(p, x_j), params)  # pyright: ignore[reportAssignmentType] no auxiliary output
        product = lambda v: jvp(lambda p: f(p, x_i), (params,), pullback(v))[1]  # noqa: E731
        return vmap(product)(torch.eye(len(out), dtype=out.dtype, device=out.device)).T  # [c of x_i, c of x_j]

    return vmap(vmap(pair, (None, 0)), (0, None))(x, x)


def func_chunks(model: nn.Module, x: Tensor, chunk: int = 4) -> Tensor:
    """Sum of squared gradients, the Jacobians of a few examples at a time."""
    f, params = single(model)
    jacobian = vmap(jacrev(f), (None, 0))
    return torch.stack([sum_of_squares(jacobian(params, part).values()) for part in x.split(chunk)]).sum()


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all entries."""
    return torch.stack([t.square().sum() for t in tensors]).sum()


def nngeometry(model: nn.Module, x: Tensor) -> Tensor:
    """Its Gram matrix ``[c, n, c, n]``, by hooks on every pair of outputs, in batches of all examples."""
    from nngeometry.gram import GramMatrix  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))
    kernel = GramMatrix(model, loader, function=lambda *d: model(d[0])).to_torch()
    return kernel.detach().permute(1, 3, 0, 2)


def backpack(model: nn.Module, x: Tensor) -> Tensor:
    """Per-example gradients of every output, then one product per parameter."""
    from backpack.extensions import BatchGrad  # pyright: ignore[reportMissingImports]

    per_output = [list(grads) for grads in backpack_gradients(model, x, BatchGrad(), "grad_batch")]
    kernel = torch.zeros(len(x) * len(per_output), len(x) * len(per_output), dtype=per_output[0][0].dtype, device=x.device)
    for k in range(len(per_output[0])):
        j = torch.stack([grads[k].flatten(1) for grads in per_output], 1).flatten(0, 1)  # [n c, p_k]
        for grads in per_output:
            grads[k] = torch.empty(0)
        kernel.addmm_(j, j.T)
    return kernel.reshape(len(x), len(per_output), len(x), -1).transpose(1, 2)


def backpack_l2(model: nn.Module, x: Tensor) -> Tensor:
    """Squared norms of the per-example gradients of every output."""
    from backpack.extensions import BatchL2Grad  # pyright: ignore[reportMissingImports]

    norms = backpack_gradients(model, x, BatchL2Grad(), "batch_l2")
    return torch.stack([torch.stack(list(of_one_output)).sum() for of_one_output in norms]).sum()


def backpack_gradients(model: nn.Module, x: Tensor, extension: Any, attribute: str) -> list[list[Tensor]]:
    """Return what an extension of backpack stores at each parameter, for each output."""
    from backpack import backpack as context  # pyright: ignore[reportMissingImports]
    from backpack import extend  # pyright: ignore[reportMissingImports]

    if not hasattr(model, "_backpack_extend"):
        extend(model)
    found = []
    for a in range(model(x[:1]).shape[1]):
        model.zero_grad()
        with context(extension):
            model(x)[:, a].sum().backward()
        found.append([getattr(w, attribute) for w in model.parameters()])
        for w in model.parameters():
            delattr(w, attribute)
    return found


def curvlinops(model: nn.Module, x: Tensor) -> Tensor:
    """Products of its Jacobian operator with its transposed Jacobian operator, on the identity."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator  # pyright: ignore[reportMissingImports]

    params, out = list(model.parameters()), model(x)
    data, options = [(x, out.detach())], {"check_deterministic": False, "num_data": len(x)}
    jacobian = JacobianLinearOperator(model, params, data, **options)
    transposed = TransposedJacobianLinearOperator(model, params, data, **options)
    columns = torch.eye(out.numel(), dtype=out.dtype, device=out.device).split(len(out[0]))  # one example's at a time
    products: list[Any] = [jacobian @ (transposed @ e.T) for e in columns]
    kernel = torch.cat(products, 1)
    return kernel.detach().reshape(*out.shape, *out.shape).transpose(1, 2)


Function = Callable[[nn.Module, Tensor], Tensor]
KERNELS: dict[str, Function] = {
    "ours": empirical_ntk,
    "func-einsum": func_einsum,
    "func-gemm": func_gemm,
    "func-vp": func_vp,
    "nngeometry": nngeometry,
    "backpack": backpack,
    "curvlinops": curvlinops,
}
TRACES: dict[str, Function] = {
    "ours": lambda model, x: torch.tensor(ntk_trace(model, x, method="exact", normalize=False).mean, dtype=torch.float64),
    "func-chunks": func_chunks,
    "backpack-l2": backpack_l2,
}
