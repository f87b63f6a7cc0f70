"""All cases of the engine's tests, each with its gradients computed once."""

from functools import cache

from engine_case import Truth
from engine_layers import CONVOLUTION, EMBEDDING, LINEAR, NORM
from engine_networks import ATTENTION, NETWORKS, SHARED, USES

CASES = {**LINEAR, **CONVOLUTION, **NORM, **EMBEDDING, **ATTENTION, **SHARED, **USES, **NETWORKS}


@cache
def truth(name: str) -> Truth:
    return CASES[name].truth()
