"""Empirical neural tangent kernels of finite-width networks."""

from ntklib.kernels.empirical import empirical_ntk, flatten_kernel, ntk_by_layer, ntk_diagonal

__all__ = ["empirical_ntk", "flatten_kernel", "ntk_by_layer", "ntk_diagonal"]
