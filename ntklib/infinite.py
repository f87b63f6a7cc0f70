"""Kernels of multilayer perceptrons of infinite width."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ntklib.checks import check_inputs, check_pair
from ntklib.text import check_known

# one layer's pre-activations or activations: variances over first inputs [n1] and over second inputs [n2], and the angle of each
# pair [n1, n2], cos t = covariance / sqrt(variances), which tells near inputs apart where their covariance rounds to the variance
Moments = tuple[Tensor, Tensor, Tensor]


def infinite_nngp(
    x1: Float[Tensor, "n1 *input"],
    x2: Float[Tensor, "n2 *input"] | None = None,
    *,
    depth: int,
    activation: str = "relu",
    weight_std: float = math.sqrt(2),
    bias_std: float = 0.0,
) -> Float[Tensor, "n1 n2"]:
    r"""Covariance of the outputs of an infinitely wide MLP over random initializations (conjugate or NNGP kernel).

    .. math:: \Sigma^1 = \frac{\sigma_w^2}{d} x^\top x' + \sigma_b^2, \qquad
        \Sigma^{l+1} = \sigma_w^2\, E[a(u) a(u')] + \sigma_b^2, \quad (u, u') \sim N(0, \Sigma^l)

    and the result is Sigma^{depth+1} (Lee et al. 2018, arXiv:1711.00165v3; Jacot et al. 2018, arXiv:1806.07572v4, Proposition 1).
    Outputs are independent: the covariance of f_a(x) and f_b(x') is the result times delta_ab. Weights have variance sigma_w^2 /
    fan_in and biases sigma_b^2, whether the factors are in the weights (standard parameterization) or in front (NTK
    parameterization). The expectation is in closed form for ReLU (Cho & Saul 2009, arc-cosine kernels of degree 1 and 0) and erf
    (Williams 1998). Computed in float64.

    Args:
        x1: First inputs, flattened to d numbers each.
        x2: Second inputs. Default: ``x1``, and the kernel is then exactly symmetric.
        depth: Number of hidden layers, ``len(widths)`` of ``ntklib.models.MLP``; 0 is a linear model.
        activation: ``"relu"``, ``"erf"`` or ``"identity"``.
        weight_std: sigma_w; sqrt(2) is the scheme ``"he"`` of ``initialize``.
        bias_std: sigma_b; 0 is the scheme ``"he"``, where biases start at 0.

    Returns:
        The covariance of one output, in the dtype of the inputs.

    Raises:
        ValueError: If the activation is unknown, inputs are empty, not finite or of unlike shape, or a number is negative.
    """
    moments = _inputs(x1, x2, depth, activation, weight_std, bias_std)
    for layer in range(depth + 1):
        if layer > 0:
            moments = ACTIVATIONS[activation](moments)[0]
        moments = _affine(moments, weight_std, bias_std)
    return _symmetric(_covariance(moments), x2 is None).to(x1.dtype)


def infinite_ntk(
    x1: Float[Tensor, "n1 *input"],
    x2: Float[Tensor, "n2 *input"] | None = None,
    *,
    depth: int,
    activation: str = "relu",
    weight_std: float = math.sqrt(2),
    bias_std: float = 0.0,
    widths: Sequence[int] | None = None,
    bias: bool = True,
) -> Float[Tensor, "n1 n2"]:
    r"""NTK of an infinitely wide MLP at initialization: the mean of its empirical NTK, which no longer fluctuates.

    .. math:: \Theta^1 = G^1, \qquad \Theta^{l+1} = G^{l+1} + \sigma_w^2\, E[a'(u) a'(u')] \, \Theta^l

    up to l + 1 = depth + 1, with (u, u') of covariance Sigma^l as in ``infinite_nngp`` (Jacot et al. 2018, arXiv:1806.07572v4,
    Theorem 1). What one layer's own parameters add, G, depends on the parameterization:

    - NTK parameterization, W h sigma_w / sqrt(fan_in) + sigma_b b with W, b ~ N(0, 1), the default here: G^l = Sigma^l.
    - standard parameterization, that of ``ntklib.models.MLP``, when ``widths`` are given: G^1 = x.x' + 1 and G^{l+1} = m_l E[a(u)
      a(u')] + 1, with m_l units in hidden layer l and 1 the gradient of the bias (Sohl-Dickstein et al. 2020, arXiv:2001.07301v3).
      This kernel grows in proportion to the width; the relative error of ``empirical_ntk(MLP(d, widths, c), x)`` to it, with
      weights as in the scheme ``"he"``, falls as width^(-1/2).

    The result is the kernel of one output; the kernel [n1, n2, c, c] of c outputs is Theta (x) I_c, so its ``reduce="trace"`` is
    c Theta. No other normalisation. PyTorch's default initialization (``"standard"``) has biases that vanish with the width and
    uniform first-layer weights, whose sums over d inputs are only nearly Gaussian: there is no closed form for it.

    Args:
        x1: First inputs, flattened to d numbers each.
        x2: Second inputs. Default: ``x1``, and the kernel is then exactly symmetric.
        depth: Number of hidden layers; 0 is a linear model.
        activation: ``"relu"``, ``"erf"`` or ``"identity"``.
        weight_std: sigma_w.
        bias_std: sigma_b. In NTK parameterization, 0 also means that biases do not train.
        widths: Units of each hidden layer in standard parameterization. Default: NTK parameterization.
        bias: Whether the layers have biases; only standard parameterization asks.

    Returns:
        The kernel of one output, in the dtype of the inputs.

    Raises:
        ValueError: As in ``infinite_nngp``, or if ``widths`` are not ``depth`` positive numbers.
    """
    moments = _inputs(x1, x2, depth, activation, weight_std, bias_std)
    if widths is not None and (len(widths) != depth or min(widths, default=1) < 1):
        msg = f"widths must be {depth} positive numbers, one for each hidden layer. Got {list(widths)}."
        raise ValueError(msg)
    fan_in = None if widths is None else [x1[0].numel(), *widths]
    kernel = torch.zeros_like(moments[2])
    for layer in range(depth + 1):
        if layer > 0:
            moments, slope = ACTIVATIONS[activation](moments)
            kernel = weight_std**2 * slope * kernel
        below = _covariance(moments)
        moments = _affine(moments, weight_std, bias_std)
        kernel = kernel + (_covariance(moments) if fan_in is None else fan_in[layer] * below + float(bias))
    return _symmetric(kernel, x2 is None).to(x1.dtype)


def _inputs(
    x1: Tensor, x2: Tensor | None, depth: int, activation: str, weight_std: float, bias_std: float
) -> tuple[Float[Tensor, " n1"], Float[Tensor, " n2"], Float[Tensor, "n1 n2"]]:
    """Check the arguments and return the moments of the inputs, with the factor 1/d."""
    check_known("activation", activation, ACTIVATIONS)
    if depth < 0 or not all(std >= 0 and math.isfinite(std) for std in (weight_std, bias_std)):
        got = f"{depth}, {weight_std} and {bias_std}"
        msg = f"depth, weight_std and bias_std must be finite and not negative. Got {got}."
        raise ValueError(msg)
    check_inputs(x1, "x1")
    if x2 is not None:
        check_inputs(x2, "x2")
        check_pair(x1, x2)
    a, b = (x.detach().double().reshape(len(x), -1) for x in (x1, x1 if x2 is None else x2))
    d = a.shape[1]
    u, v = (torch.nn.functional.normalize(x, eps=torch.finfo(x.dtype).tiny) for x in (a, b))
    # by differences of unit vectors, and sums of nearly opposite ones, not by products: accurate for angles near 0 and pi
    minus = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
    plus = (4 - minus.square()).clamp(min=0).sqrt()
    if bool((minus > 1.99).any()):
        plus = torch.cdist(u, -v, compute_mode="donot_use_mm_for_euclid_dist")
    return a.square().sum(1) / d, b.square().sum(1) / d, 2 * torch.atan2(minus, plus)


def _affine(moments: Moments, weight_std: float, bias_std: float) -> Moments:
    """Variances and angle of W h + b: the bias adds the same to variances and covariance."""
    a, b, t = moments
    w, added = weight_std**2, bias_std**2
    r, s = a.sqrt()[:, None], b.sqrt()
    covariance = w * r * s * torch.cos(t) + added
    # variance times variance - covariance^2, as a sum of squares
    rest = (w * r * s * torch.sin(t)).square() + w * added * ((r - s).square() + 4 * r * s * torch.sin(t / 2).square())
    return w * a + added, w * b + added, torch.atan2(rest.sqrt(), covariance)


def _symmetric(kernel: Tensor, one_set: bool) -> Float[Tensor, "n1 n2"]:
    """Exactly symmetric, which vectorized functions and products in another order are not."""
    return (kernel + kernel.T) / 2 if one_set else kernel


def _covariance(moments: Moments) -> Float[Tensor, "n1 n2"]:
    a, b, t = moments
    return a.sqrt()[:, None] * b.sqrt() * torch.cos(t)


def _relu(moments: Moments) -> tuple[Moments, Float[Tensor, "n1 n2"]]:
    """E[a(u) a(u')] = |u||u'| (sin t + (pi - t) cos t) / 2 pi and E[a'(u) a'(u')] = (pi - t) / 2 pi."""
    a, b, t = moments
    # 1 - (sin t + (pi - t) cos t) / pi is 2 sin^2 of half the new angle
    lost = 2 * torch.sin(t / 2).square() - (torch.sin(t) - t * torch.cos(t)) / math.pi
    slope = torch.where(a[:, None] * b > 0, (math.pi - t) / (2 * math.pi), 0)  # a'(0) = 0
    return (a / 2, b / 2, 2 * torch.asin((lost.clamp(min=0) / 2).sqrt())), slope


def _erf(moments: Moments) -> tuple[Moments, Float[Tensor, "n1 n2"]]:
    """E[a(u) a(u')] = (2/pi) arcsin(2 S / sqrt(p p')) and E[a'(u) a'(u')] = (4/pi) / sqrt(p p' - 4 S^2), p = 1 + 2 variance."""
    a, b, t = moments
    rest = 1 + 2 * (a[:, None] + b) + 4 * a[:, None] * b * torch.sin(t).square()  # p p' - 4 S^2
    mean = 2 / math.pi * torch.atan2(2 * _covariance(moments), rest.sqrt())
    left, right = (2 / math.pi * torch.atan2(2 * v, (1 + 4 * v).sqrt()) for v in (a, b))
    angle = torch.atan2((left[:, None] * right - mean.square()).clamp(min=0).sqrt(), mean)
    return (left, right, angle), 4 / math.pi / rest.sqrt()


def _identity(moments: Moments) -> tuple[Moments, Float[Tensor, "n1 n2"]]:
    return moments, torch.ones_like(moments[2])


ACTIVATIONS = {"relu": _relu, "erf": _erf, "identity": _identity}
