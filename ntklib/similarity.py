"""How alike two kernels are, regardless of scale."""

import torch
from jaxtyping import Float
from torch import Tensor


def kernel_distance(k1: Tensor, k2: Tensor) -> float:
    r"""Return :math:`S = 1 - \langle K_1, K_2 \rangle / (\lVert K_1 \rVert_F \lVert K_2 \rVert_F)`.

    (Fort et al. 2020, arXiv:2010.15110v1, section 3; the main paper's section 4.) Uncentred; in [0, 1] for positive semidefinite
    kernels; 0 exactly when one is a positive multiple of the other, so S does not see the scale. Computed in float64 as
    ||K_1/|K_1| - K_2/|K_2|||^2 / 2, which keeps small distances exact where 1 - cosine would round to 0.

    Args:
        k1: First kernel, any shape.
        k2: Second kernel, the same shape.

    Raises:
        ValueError: If shapes differ or a kernel is zero (S is then undefined).
    """
    a, b = _normalised(k1, k2)
    return 0.5 * float((a - b).square().sum())


def kernel_angle(k1: Tensor, k2: Tensor) -> float:
    r"""Return the angle :math:`\arccos(1 - S)` between two kernels, in radians.

    Unlike S it obeys the triangle inequality, and along a smooth path it grows in proportion to time.

    Raises:
        ValueError: As in ``kernel_distance``.
    """
    a, b = _normalised(k1, k2)
    return 2 * float(torch.atan2((a - b).norm(), (a + b).norm()))  # accurate for small angles


def _normalised(k1: Tensor, k2: Tensor) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    if k1.shape != k2.shape:
        msg = f"Two kernels must have the same shape. Got {tuple(k1.shape)} and {tuple(k2.shape)}."
        raise ValueError(msg)
    a, b = k1.double(), k2.double()
    norms = a.norm(), b.norm()
    for norm in norms:
        if not torch.isfinite(norm) or norm == 0:
            msg = f"A kernel must be finite and not zero, for its direction to exist. Got Frobenius norm {float(norm)}."
            raise ValueError(msg)
    return a / norms[0], b / norms[1]
