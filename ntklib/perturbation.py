"""What a change of the outputs under weight noise measures when the noise is not small, and when it is the trace."""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.checks import check_inputs
from ntklib.directions import directional_derivative, plain_attention
from ntklib.estimators import per_draw
from ntklib.functional import Model, Params, functional_model, unwrap
from ntklib.kernels.evaluate import Request, evaluate, layers, unchanged
from ntklib.kernels.streaming import settings


def perturbation_response(
    model: nn.Module,
    x: Tensor,
    epsilons: Sequence[float],
    *,
    num_samples: int = 1,
    relative: bool = False,
    batch_statistics: bool = False,
    normalize: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "epsilons draws"]:
    r"""Squared change of the outputs under Gaussian weight noise over its variance, for several sizes of the same noise.

    .. math:: T(\epsilon, z) = \frac{1}{\epsilon^2} \lVert f(x; w + \epsilon s \odot z) - f(x; w) \rVert_F^2 , \qquad
        T(0, z) = \lVert J (s \odot z) \rVert^2 , \qquad z \sim \mathcal N(0, I)

    divided by n c when ``normalize``. With s = 1 it is the one-draw estimate of the main paper's Theorem 4.1, and T(0, z), of mean
    Tr K, is its limit; ``ntk_trace`` has both as methods ``perturbation`` and ``jvp``. As the rows share their draws z, the
    difference T(epsilon, z) - T(0, z) shows the bias of ``epsilon`` with far less noise than either row, and the mean of
    T(epsilon, z) and T(-epsilon, z) = T(epsilon, -z) with less noise still, as odd orders drop out.

    With ``relative`` every layer's noise is in units of the root mean square of its parameters, s = ``layer_rms``, and the mean of
    T(0, z) is the weighted trace sum_l s_l^2 Tr K^(l), which does not change when a layer is multiplied by a factor that later
    layers undo (batch normalisation, or the next layer of a ReLU network).

    With ``batch_statistics`` the function is that of training mode: batch normalisation takes the statistics of ``x`` itself, in
    both forward passes, so the outputs of one example depend on all others; everything else is in eval mode. Then the mean of
    T(0, z) is ``batch_trace``.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``; left exactly as it was. Any mode with ``batch_statistics``.
        x: Inputs, ``[n, *input]``.
        epsilons: Sizes of the noise; a negative one mirrors it, 0 is the limit, by forward-mode differentiation.
        num_samples: Draws of z.
        relative: Scale the noise by the layers' root mean squares.
        batch_statistics: Normalise by the statistics of ``x``.
        normalize: Divide by n c.
        generator: Source of randomness. Default: torch's global.

    Returns:
        One row per epsilon and one column per draw, in float64.

    Raises:
        ValueError: If rows interact in another way, an epsilon is not finite, or inputs are empty or not finite.
    """
    _check_noise(epsilons, num_samples)
    check_inputs(x, "x")
    generator = generator if generator is not None else torch.default_generator
    with settings(), unchanged(model), plain_attention(), torch.no_grad():
        f, params = batch_model(model) if batch_statistics else functional_model(model)
        scale = _scales(model, params) if relative else dict.fromkeys(params, 1.0)
        base = f(params, x)

        def measure(direction: Params) -> Tensor:
            z = {k: scale[k] * d for k, d in direction.items()}
            return torch.stack([_response(f, params, x, base, z, epsilon) for epsilon in epsilons])

        draws = per_draw(params, num_samples, generator, measure)
        state = generator.get_state()
    generator.set_state(state)  # the global one, too, moves on: the next call draws afresh
    return draws.double().T / (base.numel() if normalize else 1)


def _response(f: Model, params: Params, x: Tensor, base: Tensor, z: Params, epsilon: float) -> Tensor:
    if epsilon == 0:
        return directional_derivative(f, params, x, z).square().sum()
    moved = f({k: w + epsilon * z[k] for k, w in params.items()}, x)
    return (moved - base).square().sum() / epsilon**2


def _check_noise(epsilons: Sequence[float], num_samples: int) -> None:
    if not epsilons or not all(map(math.isfinite, epsilons)):
        msg = f"epsilons must be one or more finite numbers. Got {list(epsilons)}."
        raise ValueError(msg)
    if num_samples < 1:
        msg = f"num_samples must be at least 1. Got {num_samples}."
        raise ValueError(msg)


def response_ratio(
    model: nn.Module,
    x: Tensor,
    epsilons: Sequence[float],
    trace: float | None = None,
    *,
    num_samples: int,
    relative: bool = False,
    batch_statistics: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " epsilons"], Float[Tensor, " epsilons"]]:
    r"""Mean response to weight noise over the trace, E T(epsilon, z) / Tr K, for several epsilon, with standard errors.

    .. math:: 1 + \frac{1}{R \operatorname{Tr} K} \sum_{r=1}^R
        \Bigl[ \tfrac12 T(\epsilon, z_r) + \tfrac12 T(-\epsilon, z_r) - T(0, z_r) \Bigr]

    in the notation of ``perturbation_response``. T(0, z) has the mean Tr K, which is known, so subtracting it draw by draw changes
    no mean and removes most of the scatter (a control variate); mirrored noise removes the odd orders in epsilon.

    Args:
        model: As in ``perturbation_response``.
        x: Inputs, ``[n, *input]``.
        epsilons: Sizes of the noise, greater than 0.
        trace: The normalised trace that T(0, z) estimates, exact. Default: the mean of T(0, z) over the draws, whose own error the
            standard errors leave out.
        num_samples: Draws R of z, each used with both signs.
        relative: As in ``perturbation_response``.
        batch_statistics: As in ``perturbation_response``.
        generator: Source of randomness. Default: torch's global.

    Returns:
        Ratios and their standard errors, nan for a single draw.

    Raises:
        ValueError: As ``perturbation_response``, and if an epsilon is not positive.
    """
    if not all(epsilon > 0 for epsilon in epsilons):
        msg = f"epsilons must be greater than 0. Got {list(epsilons)}."
        raise ValueError(msg)
    noise = [0.0, *epsilons, *(-epsilon for epsilon in epsilons)]
    how = {"relative": relative, "batch_statistics": batch_statistics, "generator": generator}
    limit, *rows = perturbation_response(model, x, noise, num_samples=num_samples, **how)
    plus, minus = torch.stack(rows).chunk(2)
    change = ((plus + minus) / 2 - limit) / (float(limit.mean()) if trace is None else trace)
    sem = change.std(1) / math.sqrt(num_samples) if num_samples > 1 else torch.full_like(change[:, 0], math.nan)
    return 1 + change.mean(1), sem


def batch_model(model: nn.Module) -> tuple[Model, Params]:
    """Return f(params, x) of a network that normalises by the statistics of x, and its trainable parameters.

    Training mode as far as batch normalisation goes, without its side effects: no running statistics are kept, and dropout is off.
    """
    bare = copy.deepcopy(unwrap(model)).eval()
    for m in bare.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean = m.running_var = m.num_batches_tracked = None
            m.track_running_stats = False
    return functional_model(bare, independent=False)


def batch_trace(model: nn.Module, x: Tensor, *, normalize: bool = True) -> float:
    r"""Trace of J J^T for a network that normalises by the statistics of the batch, exact.

    .. math:: \sum_{i,a} \lVert \nabla_\theta f_a(x_i; X) \rVert^2

    Every output depends on the whole batch X, so this takes n c backward passes through it. Without batch normalisation it is
    ``ntk_trace``.

    Args:
        model: Network, ``[n, *input] -> [n, c]``, in any mode; left exactly as it was.
        x: The batch X, ``[n, *input]``.
        normalize: Divide by n c.
    """
    check_inputs(x, "x")
    with settings(), unchanged(model):
        f, params = batch_model(model)
        leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
        outputs = f(leaves, x).flatten()
        total = 0.0
        for output in outputs:
            gradients = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, allow_unused=True)
            total += sum(float(g.square().sum()) for g in gradients if g is not None)
    return total / (len(outputs) if normalize else 1)


def layer_rms(model: nn.Module) -> dict[str, float]:
    r"""Root mean square :math:`\lVert w_\ell \rVert / \sqrt{d_\ell}` of every layer's trainable parameters.

    Layers are those of ``ntk_by_layer``. Noise of standard deviation epsilon has the norm epsilon / rms relative to the layer that
    it is added to.
    """
    params = {k: w.detach() for k, w in unwrap(model).named_parameters() if w.requires_grad}
    squares: dict[str, list[Tensor]] = {}
    for name, layer in layers(model, params).items():
        squares.setdefault(layer, []).append(params[name].double().square().flatten())
    return {layer: float(torch.cat(parts).mean().sqrt()) for layer, parts in squares.items()}


def _scales(model: nn.Module, params: Params) -> dict[str, float]:
    rms = layer_rms(model)
    return {name: rms[layer] for name, layer in layers(model, params).items()}


def trace_by_layer(model: nn.Module, x: Tensor, *, normalize: bool = True) -> dict[str, float]:
    r"""Every layer's share :math:`\operatorname{Tr} K^{(\ell)}` of the trace, exact, in one pass.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``.
        x: Inputs, ``[n, *input]``.
        normalize: Divide by n c.

    Returns:
        Traces by module name as in ``ntk_by_layer``; they sum to ``ntk_trace``.
    """
    norms = evaluate(Request(model, x, None, "norms", progress=False, by_layer=True))
    return {k: float(v.sum(dtype=torch.float64)) / (v.numel() if normalize else 1) for k, v in norms.items()}


def relu_response(u: Float[Tensor, " units"], s: Float[Tensor, " units"], epsilon: float) -> Float[Tensor, " units"]:
    r"""Mean squared change of max(0, u) under noise of standard deviation epsilon s on u, over epsilon^2, in closed form.

    .. math:: \frac{1}{\epsilon^2} \mathbb E \bigl[ (u + \epsilon s g)_+ - u_+ \bigr]^2 = s^2
        \begin{cases} 1 - a \varphi(a) - (1 - a^2)\, \Phi(-a) & u > 0 \\ (1 + a^2)\, \Phi(-a) - a \varphi(a) & u < 0 \end{cases} ,
        \qquad a = \frac{|u|}{\epsilon s} , \; g \sim \mathcal N(0, 1)

    For one layer max(0, W x) with noise on W, u = W x and s is the norm of x. Averaged over u ~ N(0, sigma^2), and with t = epsilon s / sigma,
    it is s^2/2 times 1 - 2 (t - arctan t)/(pi t^2) = 1 - 2 t/(3 pi) + O(t^3): where units are that close to their kink, the bias of
    the perturbation estimate is of first order in epsilon, and negative.

    Args:
        u: Inputs of the units, float64.
        s: Standard deviation of their noise for epsilon = 1, positive.
        epsilon: Size of the noise, positive.
    """
    a = u.abs() / (epsilon * s)
    density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    tail = torch.erfc(a / math.sqrt(2)) / 2
    return s.square() * torch.where(u > 0, 1 - a * density - (1 - a.square()) * tail, (1 + a.square()) * tail - a * density)


def plateau(epsilons: Sequence[float], ratios: Sequence[float], tolerance: float = 0.1) -> tuple[float, float]:
    """Return the ends of the longest row of neighbouring epsilons whose ratios are within ``tolerance`` of 1.

    Of two rows of equal length the one with the smaller epsilons counts; without any the ends are nan.

    Args:
        epsilons: Sizes of the noise, in any order.
        ratios: Estimate over exact trace for each of them, as from ``response_ratio``.
        tolerance: Largest relative error.

    Raises:
        ValueError: If there are not as many ratios as epsilons.
    """
    if len(epsilons) != len(ratios):
        msg = f"There must be one ratio for each epsilon. Got {len(ratios)} for {len(epsilons)}."
        raise ValueError(msg)
    best: list[float] = []
    row: list[float] = []
    for epsilon, ratio in sorted(zip(epsilons, ratios, strict=True)):
        row = [*row, epsilon] if abs(ratio - 1) <= tolerance else []
        best = row if len(row) > len(best) else best
    return (best[0], best[-1]) if best else (math.nan, math.nan)
