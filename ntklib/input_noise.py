"""How far the outputs move under noise on the inputs: the logit perturbation distance and its limit."""

import math

import torch
from torch import Tensor, nn
from torch.func import jvp

from ntklib.checks import check_draws, check_inputs
from ntklib.directions import plain_attention
from ntklib.estimators import TraceEstimate
from ntklib.functional import functional_model
from ntklib.kernels.evaluate import unchanged
from ntklib.kernels.streaming import settings

METHODS = ("exact", "jvp", "perturbation")


def logit_perturbation(
    model: nn.Module,
    x: Tensor,
    *,
    method: str = "exact",
    epsilon: float | None = None,
    num_samples: int = 1,
    normalize: bool = True,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    r"""Measure the squared change of the outputs under Gaussian noise on the inputs, over its variance.

    .. math:: \frac{1}{\epsilon^2} \lVert f(X + \epsilon Z) - f(X) \rVert_F^2 \;\to\; \lVert \partial_X f \, Z \rVert^2 ,
        \qquad \mathbb E_Z \lVert \partial_X f \, Z \rVert^2 = \sum_{i,a} \lVert \nabla_x f_a(x_i) \rVert^2

    divided by n c when ``normalize``. The left side is the logit perturbation distance of the main paper's section 5.2, which
    follows Tan & Huang 2023 (arXiv:2311.06597) and states neither epsilon nor a normalisation. The sum on the right, the squared
    norm of the input Jacobian, is its mean for small epsilon: what the trace of the kernel is for noise on the parameters.

    Args:
        model: Network in eval mode whose rows do not interact, ``[n, *input] -> [n, c]``; left exactly as it was.
        x: Real inputs, ``[n, *input]``. All their entries are perturbed, independently for every example.
        method: ``"exact"`` for the sum over examples and outputs, by c backward passes; ``"jvp"`` for draws of the limit;
            ``"perturbation"`` for draws at a finite epsilon.
        epsilon: Standard deviation of the noise, for ``"perturbation"`` only, which requires it.
        num_samples: Draws, averaged; not used by ``"exact"``.
        normalize: Divide by n c.
        generator: Source of randomness. Default: torch's global.

    Raises:
        ValueError: If the inputs are integers, empty or not finite, rows interact, or an option does not fit the method.
    """
    check_draws(method, METHODS, epsilon, num_samples)
    check_inputs(x, "x")
    _check_real(x)
    f, params = functional_model(model)
    with settings(), unchanged(model), plain_attention():
        if method == "exact":
            total, outputs = _squared_jacobian(lambda x: f(params, x), x.detach())
            return TraceEstimate(total / (outputs if normalize else 1), 0.0, 0, 1.0 + outputs / len(x))
        generator = generator if generator is not None else torch.default_generator
        with torch.no_grad():
            base = f(params, x)
            draws = []
            for _ in range(num_samples):
                z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
                moved = (f(params, x + epsilon * z) - base) / epsilon if epsilon else jvp(lambda x: f(params, x), (x,), (z,))[1]
                draws.append(moved.square().sum(dtype=torch.float64) / (base.numel() if normalize else 1))
            state = generator.get_state()
    generator.set_state(state)  # the global one, too, moves on
    values = torch.stack(draws)
    sem = float(values.std()) / math.sqrt(num_samples) if num_samples > 1 else math.nan
    return TraceEstimate(float(values.mean()), sem, num_samples, 1.0 + num_samples * (1.0 if epsilon else 3.0))


def _squared_jacobian(f, x: Tensor) -> tuple[float, int]:
    """Sum over examples and outputs of squared input gradients, and the number of outputs n c."""
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    total = 0.0
    for a in range(out.shape[1]):
        (g,) = torch.autograd.grad(out[:, a].sum(), leaf, retain_graph=True)  # rows do not interact: all gradients at once
        total += float(g.square().sum(dtype=torch.float64))
    return total, out.numel()


def _check_real(x: Tensor) -> None:
    if not x.is_floating_point():
        msg = f"x must be real, as noise is added to it: pass tokens as one-hot vectors. Got {x.dtype}."
        raise ValueError(msg)
