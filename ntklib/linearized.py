"""Training as it would be if the kernel did not move."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntklib.kernels import flatten_kernel


def constant_kernel_flow(
    kernel: Float[Tensor, "n n c c"],
    f_0: Float[Tensor, "n c"],
    y: Float[Tensor, "n c"],
    t: Float[Tensor, " times"],
    *,
    lr: float | None = None,
) -> Float[Tensor, "times n c"]:
    r"""Outputs on the training inputs under a kernel that stays as it is.

    .. math:: f_t = y + e^{-Kt}(f_0 - y) \qquad\text{or}\qquad f_t = y + (I - \eta K)^{t/\eta}(f_0 - y)

    Gradient flow, or with ``lr`` gradient descent at times t = lr * step, for the loss :math:`\frac12 \sum_i \lVert f(x_i) - y_i
    \rVert^2`: a sum over examples and outputs with the factor 1/2 (poster, "Training dynamics"; Lee et al. 2019,
    arXiv:1902.06720v4, Eq. 9). For the mean (1/2n) pass t/n (and lr/n). Time is learning rate times steps.

    Args:
        kernel: Empirical NTK of the training inputs, positive semidefinite.
        f_0: Outputs at time 0.
        y: Targets.
        t: Times.
        lr: Learning rate of gradient descent; ``t / lr`` are then rounded to whole steps. Default: gradient flow.

    Raises:
        ValueError: If shapes do not fit or ``lr`` is not positive.
    """
    n, c = f_0.shape
    if kernel.shape != (n, n, c, c) or y.shape != f_0.shape:
        msg = f"kernel, f_0 and y must be [n, n, c, c], [n, c] and [n, c]. Got {[tuple(a.shape) for a in (kernel, f_0, y)]}."
        raise ValueError(msg)
    if lr is not None and lr <= 0:
        msg = f"lr must be positive. Got {lr}."
        raise ValueError(msg)
    eigvals, eigvecs = torch.linalg.eigh(flatten_kernel(kernel))
    coefficients = eigvecs.T @ (f_0 - y).reshape(-1)  # residual in the eigenbasis
    t = t[:, None]
    decay = torch.exp(-eigvals * t) if lr is None else (1 - lr * eigvals) ** torch.round(t / lr)  # [times, n c]
    return y + ((decay * coefficients) @ eigvecs.T).reshape(-1, n, c)
