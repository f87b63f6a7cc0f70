"""Four instruments with sliders: trace, spectrum, edge of stability, and the map of a deep linear network."""

from ntklib.playground.instruments import (
    bifurcation,
    edge_path,
    kernel_spectrum,
    map_orbit,
    one_unit_sharpness,
    trace_along_training,
)
from ntklib.playground.panel import INSTRUMENTS, Panel, show

__all__ = [
    "INSTRUMENTS", "Panel", "bifurcation", "edge_path", "kernel_spectrum", "map_orbit", "one_unit_sharpness", "show",
    "trace_along_training",
]  # fmt: skip
