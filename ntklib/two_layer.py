r"""Two-layer linear network with one output: kernel, sharpness and alignment in closed form, and its gradient descent.

:math:`f(x) = a^\top W x` with hidden weights of rank one along the readout, :math:`W = \hat a\, w^\top`, :math:`\hat a = a / q`,
:math:`q = \lVert a \rVert`. Gradient descent on :math:`\tfrac12 \lVert X W^\top a - y \rVert^2` (a sum, with a factor 1/2) keeps
this form, so the network is the pair (q, w). The size of the readout is given as :math:`t = q^2`. Arrays are float64.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from ntklib.models.mlp import MLP

Inputs = Float64[ndarray, "n d"]
Targets = Float64[ndarray, " n"]


def dominant_inputs(n: int, d: int, top: float, share: float, seed: int = 0) -> tuple[Inputs, Targets]:
    """Inputs with one dominant singular value, the others uniform in [0.5, 1.5], and targets of norm sqrt(n).

    Args:
        n: Examples, at most d.
        d: Input dimension.
        top: Singular value of the dominant direction.
        share: Cosine between the targets and the dominant left singular vector, in [0, 1].
        seed: Directions and the other singular values are drawn from it.

    Raises:
        ValueError: If n is not in 2..d or the share is not in [0, 1].
    """
    if not 2 <= n <= d or not 0 <= share <= 1:
        msg = f"Inputs need 2 <= n <= d and 0 <= share <= 1. Got n = {n}, d = {d}, share = {share}."
        raise ValueError(msg)
    draw = np.random.default_rng(seed)
    left = np.linalg.qr(draw.standard_normal((n, n)))[0]
    right = np.linalg.qr(draw.standard_normal((d, n)))[0]
    rest = left[:, 1:] @ draw.standard_normal(n - 1)
    y = share * left[:, 0] + np.sqrt(1 - share**2) * rest / np.linalg.norm(rest)
    return left * np.r_[top, draw.uniform(0.5, 1.5, n - 1)] @ right.T, np.sqrt(n) * y


def two_layer_network(q: float, w: Float64[ndarray, " d"], width: int = 4, seed: int = 0) -> MLP:
    """A torch network x -> a^T W x of ``width`` hidden units with W = (a/q) w^T and a random direction of a, norm q."""
    direction = np.random.default_rng(seed).standard_normal(width)
    direction /= np.linalg.norm(direction)
    net = MLP(len(w), [width], 1, activation="identity", bias=False).double()
    with torch.no_grad():
        hidden, readout = net.parameters()
        hidden.copy_(torch.from_numpy(np.outer(direction, w)))
        readout.copy_(torch.from_numpy(q * direction[None]))
    return net.eval()


def kernel(q: float, w: Float64[ndarray, " d"], x: Inputs) -> Float64[ndarray, "n n"]:
    r"""The NTK, :math:`K = (Xw)(Xw)^\top + q^2 X X^\top`: the readout's part and the hidden layer's part."""
    out = x @ w
    return np.outer(out, out) + q**2 * x @ x.T


def interpolator(x: Inputs, y: Targets) -> Float64[ndarray, " d"]:
    """The vector of least norm with X theta = y.

    Raises:
        ValueError: If the targets are zero or no linear function of the inputs takes them.
    """
    theta = np.linalg.lstsq(x, y, rcond=None)[0]
    size = float(np.linalg.norm(y))
    error = float(np.linalg.norm(x @ theta - y))
    if not size > 0 or error > 1e-9 * size:
        msg = f"Targets must be non-zero values of a linear function of the inputs. Got norm {size:.3g}, distance {error:.3g}."
        raise ValueError(msg)
    return theta


def minimum_kernel(x: Inputs, y: Targets, t: float) -> Float64[ndarray, "n n"]:
    r"""The NTK at the minimum with readout :math:`q^2 = t`: :math:`K = y y^\top / t + t\, X X^\top`.

    At a minimum :math:`q X w = y`, whatever the inputs.
    """
    interpolator(x, y)
    _check_readout(t)
    return np.outer(y, y) / t + t * x @ x.T


def minimum_alignment(x: Inputs, y: Targets, t: float) -> float:
    r"""Kernel target alignment at that minimum.

    .. math:: \mathrm{KTA} = \frac{1 + \rho g}{\sqrt{(1 + \rho g)^2 + \rho^2 (\lVert G \rVert_F^2 - g^2)}} , \qquad
        \rho = \frac{t^2}{\lVert y \rVert^2} , \quad G = X X^\top , \quad g = \frac{y^\top G y}{\lVert y \rVert^2}

    It falls with t: its logarithm has the derivative :math:`-\rho (\lVert G \rVert_F^2 - g^2)` times positive factors in rho. The
    limits are 1 for a vanishing readout and the alignment of G itself for a vanishing hidden layer.
    """
    interpolator(x, y)
    _check_readout(t)
    gram, size = x @ x.T, float(y @ y)
    g, rho = float(y @ gram @ y) / size, t**2 / size
    return (1 + rho * g) / float(np.sqrt((1 + rho * g) ** 2 + rho**2 * (np.square(gram).sum() - g**2)))


def minimum_sharpness(x: Inputs, y: Targets, t: float) -> float:
    """Sharpness at that minimum: the largest eigenvalue of the kernel. As a function of t it is convex."""
    return float(np.linalg.eigvalsh(minimum_kernel(x, y, t))[-1])


def flattest_readout(x: Inputs, y: Targets) -> float:
    r"""The t of least sharpness, by golden-section search.

    It is :math:`\lVert y \rVert / s_1` if y is along the top left singular vector of X, and never above the readout
    :math:`\lVert \theta \rVert` at which gradient flow from a balanced start ends: there the slope of the sharpness along its top
    eigenvector v is :math:`\lVert X^\top v \rVert^2 - (v^\top X \theta)^2 / \lVert \theta \rVert^2 \ge 0`.
    """
    top = float(np.linalg.norm(x, 2))
    ends = np.log(float(np.linalg.norm(y)) / top) + np.array([-12.0, 12.0])
    golden = (5**0.5 - 1) / 2
    low, high = ends
    for _ in range(90):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if minimum_sharpness(x, y, float(np.exp(a))) < minimum_sharpness(x, y, float(np.exp(b))):
            high = b
        else:
            low = a
    return float(np.exp((low + high) / 2))


def edge_readout(x: Inputs, y: Targets, lr: float, start: float) -> float:
    """The readout at which the sharpness is 2/lr, on the side of the flattest minimum on which ``start`` lies.

    ``start`` itself if its minimum is stable, and the flattest readout if no minimum is: where gradient descent goes if it follows
    the valley of minima just as far as stability forces it.
    """
    if minimum_sharpness(x, y, start) <= 2 / lr:
        return start
    flattest = flattest_readout(x, y)
    if minimum_sharpness(x, y, flattest) > 2 / lr:
        return flattest
    outer, inner = start, flattest
    for _ in range(100):
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if minimum_sharpness(x, y, middle) > 2 / lr else (outer, middle)
    return float(inner)


def flow_readout(q: float, w: Float64[ndarray, " d"], x: Inputs, y: Targets) -> float:
    r"""The readout at which gradient flow ends: :math:`t - \lVert \theta \rVert^2 / t = q^2 - \lVert w \rVert^2`.

    Gradient flow conserves the balance :math:`q^2 - \lVert w \rVert^2`; at a minimum :math:`w = \theta / q` with the interpolator
    of least norm, provided that w starts in the span of the inputs.
    """
    balance, size = q**2 - float(w @ w), float(np.linalg.norm(interpolator(x, y)))
    return (balance + float(np.hypot(balance, 2 * size))) / 2


def rank_one_descent(
    q: Float64[ndarray, " b"], w: Float64[ndarray, "b d"], x: Inputs, y: Targets, lr: Float64[ndarray, " b"], steps: int
) -> Iterator[tuple[Float64[ndarray, " b"], Float64[ndarray, "b d"]]]:
    r"""Gradient descent of the network, reduced to (q, w), for a batch of learning rates.

    .. math:: q \leftarrow q - \eta\, w^\top g , \quad w \leftarrow w - \eta\, q\, g , \qquad g = X^\top (q X w - y)

    Yields:
        (q, w) before each step and after the last one; nan where a run diverged.
    """
    for step in range(steps + 1):
        yield q, w
        if step < steps:
            with np.errstate(over="ignore", invalid="ignore"):
                g = (q[:, None] * (w @ x.T) - y) @ x
                q, w = q - lr * (w * g).sum(1), w - (lr * q)[:, None] * g


def two_layer_descent(
    readout: Float64[ndarray, "b m"],
    hidden: Float64[ndarray, "b m d"],
    x: Inputs,
    y: Targets,
    lr: Float64[ndarray, " b"],
    steps: int,
) -> Iterator[tuple[Float64[ndarray, "b m"], Float64[ndarray, "b m d"]]]:
    r"""Gradient descent of all weights, for a batch of learning rates; no assumption on their form.

    .. math:: a \leftarrow a - \eta\, W g , \quad W \leftarrow W - \eta\, a\, g^\top , \qquad g = X^\top (X W^\top a - y)

    Yields:
        (a, W) before each step and after the last one; nan where a run diverged.
    """
    for step in range(steps + 1):
        yield readout, hidden
        if step < steps:
            with np.errstate(over="ignore", invalid="ignore"):
                g = ((readout[:, None] @ hidden)[:, 0] @ x.T - y) @ x  # [b, d]
                moved = readout - lr[:, None] * (hidden @ g[:, :, None])[:, :, 0]
                hidden = hidden - (lr[:, None] * readout)[:, :, None] * g[:, None]
                readout = moved


def random_start(
    width: int, d: int, scale: float, batch: int, seed: int = 0
) -> tuple[Float64[ndarray, "b m"], Float64[ndarray, "b m d"]]:
    """A Gaussian readout and Gaussian hidden weights, each of Frobenius norm ``scale``, the same for the whole batch."""
    draw = np.random.default_rng(seed)
    readout, hidden = draw.standard_normal(width), draw.standard_normal((width, d))
    readout, hidden = scale * readout / np.linalg.norm(readout), scale * hidden / np.linalg.norm(hidden)
    return np.tile(readout, (batch, 1)), np.tile(hidden, (batch, 1, 1))


def measures(readout: Float64[ndarray, " m"], hidden: Float64[ndarray, "m d"], x: Inputs, y: Targets) -> tuple[float, float]:
    """KTA of the kernel, and its largest eigenvalue over the least sharpness of all rank-one minima; nan if the run diverged."""
    with np.errstate(over="ignore", invalid="ignore"):
        k = general_kernel(readout, hidden, x)
    if not np.isfinite(k).all():
        return float("nan"), float("nan")
    least = minimum_sharpness(x, y, flattest_readout(x, y))
    return float(y @ k @ y / np.linalg.norm(k) / (y @ y)), float(np.linalg.eigvalsh(k)[-1]) / least


def general_kernel(readout: Float64[ndarray, " m"], hidden: Float64[ndarray, "m d"], x: Inputs) -> Float64[ndarray, "n n"]:
    r"""The NTK for any weights, :math:`K = X W^\top W X^\top + \lVert a \rVert^2 X X^\top`."""
    features = x @ hidden.T
    return features @ features.T + float(readout @ readout) * x @ x.T


def _check_readout(t: float) -> None:
    if not (np.isfinite(t) and t > 0):
        msg = f"The readout t = q^2 must be positive and finite. Got {t}."
        raise ValueError(msg)
