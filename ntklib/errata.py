"""Numbers behind the errata: a printed form beside its correction, and the small exact cases that tell them apart.

Nothing here is used by a run: every number is computed anew when the page is executed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.func import jacrev, vmap

from ntklib.averaging import GradientBound, gradient_bound
from ntklib.functional import functional_model
from ntklib.models import MLP, initialize
from ntklib.random import stream
from ntklib.training import ExponentialAverages, gradient_descent

Outputs = Callable[[Tensor], Tensor]  # all parameters as one vector -> all outputs as one vector


@dataclass(frozen=True)
class Comparison:
    """A number found without either formula, what the printed form says it is, and what the corrected one says.

    Attributes:
        section: Label of the section of the page.
        quantity: What was measured, in words.
        measured: The number.
        printed: Value by the printed form.
        corrected: Value by the corrected form.
        tolerance: Error that the corrected form may have, and the printed one must exceed.
        printed_bound: The printed form says "at most ``printed``" rather than "equal".
        corrected_bound: The same for the corrected form.
    """

    section: str
    quantity: str
    measured: float
    printed: float
    corrected: float
    tolerance: float
    printed_bound: bool = False
    corrected_bound: bool = False

    @property
    def printed_error(self) -> float:
        """Relative error of the printed form, see ``relative_error``."""
        return relative_error(self.measured, self.printed, bound=self.printed_bound)

    @property
    def corrected_error(self) -> float:
        """Relative error of the corrected form."""
        return relative_error(self.measured, self.corrected, bound=self.corrected_bound)

    @property
    def decides(self) -> bool:
        """Whether the corrected form is right within the tolerance, and the printed one is not."""
        return self.corrected_error <= self.tolerance < self.printed_error

    def __repr__(self) -> str:
        sides = [
            f"{name:9} {'<= ' if bound else ''}{value:.10g}  (error {error:.1e})"
            for name, value, bound, error in (
                ("printed", self.printed, self.printed_bound, self.printed_error),
                ("corrected", self.corrected, self.corrected_bound, self.corrected_error),
            )
        ]
        return "\n  ".join([self.quantity, f"measured  {self.measured:.10g}", *sides])


def relative_error(measured: float, stated: float, *, bound: bool = False) -> float:
    """Return the distance of two numbers over the larger one's size, in [0, 2]; with ``bound``, only what exceeds ``stated``."""
    if math.isnan(measured) or math.isnan(stated):
        return math.nan
    if measured == stated or (bound and measured < stated):
        return 0.0
    return abs(measured - stated) / max(abs(measured), abs(stated))


class Comparisons:
    """The comparisons of a page in order; displays itself as a table."""

    def __init__(self) -> None:
        self.rows: list[Comparison] = []

    def add(
        self, section: str, quantity: str, measured: float, printed: float, corrected: float,
        *, tolerance: float = 1e-9, printed_bound: bool = False, corrected_bound: bool = False,
    ) -> Comparison:  # fmt: skip
        """Print one comparison and keep it; the arguments are the fields of ``Comparison``.

        Raises:
            ValueError: If the tolerance is not positive.
        """
        if not tolerance > 0:
            msg = f"tolerance must be positive, for rounding is never nothing. Got {tolerance}."
            raise ValueError(msg)
        numbers = (float(measured), float(printed), float(corrected))
        row = Comparison(section, quantity, *numbers, tolerance, printed_bound, corrected_bound)
        self.rows.append(row)
        print(row)
        return row

    def _repr_markdown_(self) -> str:
        titles = ["section", "quantity", "measured", "printed form", "its error", "corrected form", "its error", "decides"]
        lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for r in self.rows:
            stated = ((r.printed, r.printed_bound), (r.corrected, r.corrected_bound))
            printed, corrected = (f"{'≤ ' if bound else ''}{value:.6g}" for value, bound in stated)
            lines.append(
                f"| [{r.section}](#errata-{r.section}) | {r.quantity} | {r.measured:.6g} | {printed} | {r.printed_error:.1e} "
                f"| {corrected} | {r.corrected_error:.1e} | {'yes' if r.decides else 'no'} |"
            )
        return "\n".join(lines)


def small_network(d: int, widths: list[int], c: int, seed: int, *, activation: str = "tanh", bias: bool = False) -> MLP:
    """A network in double precision and eval mode, standard initialization from ``stream(seed, "errata")``."""
    net = MLP(d, widths, c, activation=activation, bias=bias)
    return initialize(net, "standard", stream(seed, "errata")).double().eval()  # pyright: ignore[reportReturnType]


def normal(seed: int, use: str, *shape: int) -> Tensor:
    """Standard normal numbers in double precision, from ``stream(seed, "errata", use)``."""
    return torch.randn(*shape, generator=stream(seed, "errata", use), dtype=torch.float64)


def flat_function(model: nn.Module, x: Tensor) -> tuple[Outputs, Float[Tensor, " p"]]:
    """Return all outputs on ``x``, example-major, as a function of one vector of parameters, and the present vector."""
    f, params = functional_model(model)
    sizes = [w.numel() for w in params.values()]

    def outputs(w: Tensor) -> Tensor:
        parts = zip(params.items(), w.split(sizes), strict=True)
        return f({name: part.view(old.shape) for (name, old), part in parts}, x).flatten()

    return outputs, torch.cat([w.flatten() for w in params.values()])


def gaussian_mean(function: Callable[[Tensor], Tensor], dim: int, order: int) -> float:
    r"""Return the mean of a function of ``dim`` independent standard normal numbers, by a grid of Gauss-Hermite nodes.

    Exact for polynomials of degree up to 2 order - 1 in every variable.

    Args:
        function: From one point ``[dim]`` to a number; it is applied to many points by ``vmap``.
        dim: Number of variables; order^dim points are taken.
        order: Nodes per variable.

    Raises:
        ValueError: If there would be more than two million points.
    """
    if order**dim > 2_000_000:
        msg = f"order ** dim must be at most 2,000,000 points. Got {order} ** {dim}: use fewer variables."
        raise ValueError(msg)
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    points = torch.cartesian_prod(*[torch.from_numpy(nodes)] * dim).reshape(-1, dim)
    mass = torch.cartesian_prod(*[torch.from_numpy(weights / weights.sum())] * dim).reshape(-1, dim).prod(1)
    values = torch.cat([vmap(function)(part) for part in points.split(2**15)])
    return float(mass @ values)


def perturbed_trace(f: Outputs, w: Float[Tensor, " p"], epsilon: float, order: int | None = None) -> float:
    r"""Return the mean of the one-draw estimate, :math:`E \lVert f(w + \epsilon z) - f(w) \rVert^2 / \epsilon^2`, by quadrature.

    ``order`` nodes per parameter; default: 20, or fewer so that there are at most 50,000 points.
    """
    base, order = f(w), order or min(20, int(50_000 ** (1 / len(w)) + 1e-9))
    return gaussian_mean(lambda z: (f(w + epsilon * z) - base).square().sum(), len(w), order) / epsilon**2


def trace_and_bias(f: Outputs, w: Float[Tensor, " p"]) -> tuple[float, float]:
    r"""Return Tr K and the coefficient C of :math:`E \hat T = \operatorname{Tr} K + C \epsilon^2 + O(\epsilon^4)`.

    .. math:: C = \sum_a \Bigl[ \tfrac14 (\operatorname{tr} H_a)^2 + \tfrac12 \lVert H_a \rVert_F^2
        + \langle J_a, \nabla \operatorname{tr} H_a \rangle \Bigr]

    over all outputs a of all examples, with gradients J_a and Hessians H_a, by automatic differentiation.
    """
    hessians = jacrev(jacrev(f))  # reverse mode alone: torch's forward mode warns on its first use
    laplacian = lambda v: hessians(v).diagonal(dim1=1, dim2=2).sum(1)  # noqa: E731
    gradients, curvature = jacrev(f)(w), hessians(w)
    mixed = (gradients * jacrev(laplacian)(w)).sum()
    return float(gradients.square().sum()), float(laplacian(w).square().sum() / 4 + curvature.square().sum() / 2 + mixed)


def kernel_along(f: Outputs, w: Float[Tensor, " p"], direction: Float[Tensor, " p"]) -> Callable[[Tensor], Tensor]:
    """Return the NTK along a straight line of parameters, t -> K(w + t direction), by differentiable Jacobians."""

    def kernel(t: Tensor) -> Tensor:
        jacobian = jacrev(f)(w + t * direction)
        return jacobian @ jacobian.T

    return kernel


def angular_speed(kernel: Callable[[Tensor], Tensor]) -> float:
    r"""Return the speed at t = 0 of the direction of a kernel, in radians per unit of t.

    .. math:: \omega = \frac{1}{\lVert K \rVert}
        \Bigl\lVert \dot K - \frac{\langle K, \dot K \rangle}{\lVert K \rVert^2} K \Bigr\rVert
    """
    zero = torch.zeros((), dtype=torch.float64)
    k, change = kernel(zero), jacrev(kernel)(zero)
    return float((change - (k * change).sum() / k.square().sum() * k).norm() / k.norm())


def equal_traces(n: int, angle: float) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    r"""Two positive semidefinite kernels of equal trace at an angle, whose norms differ as much as that allows.

    .. math:: K_1 = \bigl( \cos\theta + \sqrt{n - 1} \sin\theta \bigr) e_1 e_1^\top , \qquad
        K_2 = \cos\theta \, e_1 e_1^\top + \frac{\sin\theta}{\sqrt{n - 1}} \sum_{i \ge 2} e_i e_i^\top

    Raises:
        ValueError: If n is less than 2 or the angle is not in [0, pi/2].
    """
    if n < 2 or not 0 <= angle <= math.pi / 2:
        msg = f"Two kernels at an angle need n >= 2 and an angle in [0, pi/2]. Got n = {n}, angle = {angle}."
        raise ValueError(msg)
    second = torch.full((n,), math.sin(angle) / math.sqrt(n - 1), dtype=torch.float64)
    second[0] = math.cos(angle)
    first = torch.zeros(n, dtype=torch.float64)
    first[0] = second.sum()
    return torch.diag(first), torch.diag(second)


def block_kernel(y: Float[Tensor, " n"], within: float, across: float) -> Float[Tensor, "n n"]:
    """The kernel that is one number for examples of the same label and another for different ones."""
    same = (y[:, None] == y).double()
    return within * same + across * (1 - same)


def separable_flow(depth: int, f_0: float, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    r"""Output along gradient flow of the logistic loss of one example, for a product of ``depth`` equal positive weights.

    .. math:: f = u^L, \qquad \dot f = \frac{\operatorname{Tr} K}{1 + e^f} , \qquad \operatorname{Tr} K = L f^{2 - 2/L}

    Integrated in log t.

    Args:
        depth: L, at least 2.
        f_0: Positive output at time 0.
        times: Ascending, from 1 on.
    """
    speed = lambda log_t, f: depth * f ** (2 - 2 / depth) * np.exp(log_t - np.logaddexp(0, f))  # noqa: E731
    early = solve_ivp(
        lambda _, f: depth * f ** (2 - 2 / depth) * np.exp(-np.logaddexp(0, f)), (0, 1), [f_0], rtol=1e-11, atol=1e-12
    )
    logs = np.log(np.asarray(times, float))
    late = solve_ivp(speed, (0, logs[-1]), early.y[:, -1], t_eval=logs, rtol=1e-11, atol=1e-12)
    return late.y[0]


def late_output(depth: int, time: float) -> float:
    r"""The output of ``separable_flow`` after a long time, whatever the start, to second order in 1/f.

    .. math:: f = \log t + \log \bigl( L f^b \bigr) - \log \Bigl( 1 + \frac{b}{f} + \frac{b (b + 1)}{f^2} \Bigr) ,
        \qquad b = 2 - 2/L

    from :math:`t \simeq \int e^f / (L f^b) \, df`, integrated by parts twice; solved by iteration.
    """
    b, f = 2 - 2 / depth, math.log(time)
    for _ in range(100):
        f = math.log(time) + math.log(depth * f**b) - math.log(1 + b / f + b * (b + 1) / f**2)
    return f


def mode_flow(speed: float, rate: float, t: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    r"""Average, in continuous time, of a mode that gradient flow makes decay like :math:`e^{-kt}`, both started at 1.

    .. math:: z^2 = \frac{a}{a - k} e^{-kt} - \frac{k}{a - k} e^{-at}

    the solution of :math:`\dot z^2 = a (e^{-kt} - z^2)`. Time is in steps: k = lr times curvature, a = 1 - tau.

    Raises:
        ValueError: If the two rates are equal or one is not positive.
    """
    if not (speed > 0 and rate > 0) or speed == rate:
        msg = f"Two different positive rates are required. Got {speed:g} and {rate:g}."
        raise ValueError(msg)
    return (rate * np.exp(-speed * t) - speed * np.exp(-rate * t)) / (rate - speed)


@dataclass(frozen=True)
class AveragedStep:
    """One step of an average along gradient descent, beside the bounds on it.

    Attributes:
        left: (1 - tau)/tau times the distance of parameters and average: the length of the average's last step.
        bound: Gradient and its bound at the average, the right-hand side that the main paper prints.
        safe: lr (1 - tau) sum_k tau^k times the right-hand sides at the parameters k steps ago, which always bounds ``left``.
    """

    left: float
    bound: GradientBound
    safe: float


def averaged_descent(model: nn.Module, x: Tensor, y: Tensor, *, lr: float, tau: float, steps: int) -> Iterator[AveragedStep]:
    r"""Gradient descent on the cross-entropy with an average, updated after every step, and what Theorem 5.1 compares.

    The steps of an average are the average of the steps, so with :math:`\theta_n` the parameters and B their gradient bound

    .. math:: \frac{1 - \tau}{\tau} \lVert z^1_n - z^2_n \rVert = \lVert z^2_n - z^2_{n-1} \rVert
        \le \eta (1 - \tau) \sum_{k=0}^{n-1} \tau^k B(\theta_{n-1-k})

    Yields:
        One ``AveragedStep`` after each step.
    """
    averages, safe = ExponentialAverages(model, [tau]), 0.0
    for state in gradient_descent(model, x, y, lr=lr, steps=steps, loss="cross_entropy"):
        if state.step:
            averages.update()
            bound = gradient_bound(averages.averaged_model(tau), x, y)
            yield AveragedStep((1 - tau) / tau * averages.distance(tau), bound, safe)
        safe = tau * safe + lr * (1 - tau) * gradient_bound(model, x, y).right
