"""Exponential moving averages of a network's parameters, for several decay rates at once."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ntklib.text import check_known, unknown

BUFFERS = ("copy", "average")


class ExponentialAverages:
    r"""Moving averages of the trainable parameters of a model in training, one per decay rate.

    .. math:: z^2_{n+1} = \tau z^2_n + (1 - \tau) z^1_{n+1}, \qquad z^2_0 = z^1_0

    with z^1 the parameters in training and z^2 the average: ``update`` is called after the optimizer's step, as public code of
    FixMatch does. The main paper writes z^1_n on the right (section 5.3.2): its average is this one, a step late (both start at
    z^1_0, and then z^2_{n+1} there is z^2_n here). The start is not corrected as in Adam: the initial network keeps the weight
    tau^n.

    The averages share no memory with the model, use no random numbers and leave training bit for bit as it was.

    Buffers, such as running statistics of batch normalisation, are no parameters, and an averaged network needs some:

    ========= =========================================================================================================
    copy      those of the model in training, at the moment ``averaged_model`` is called (public FixMatch code)
    average   moving averages with the same decay rate (a count of batches is copied)
    ========= =========================================================================================================

    Neither belongs to the averaged weights. ``models.recalibrated(averages.averaged_model(tau), x)`` computes statistics that do.

    Args:
        model: The network in training; the averages start at its parameters.
        decays: Decay rates tau in [0, 1), each once; 0 is the model itself. In steps, an average has the memory 1/(1 - tau).
        buffers: See the table.

    Raises:
        ValueError: If a decay rate is outside [0, 1) or occurs twice, there is none, or the choice of buffers is unknown.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float], buffers: str = "copy") -> None:
        check_decays(decays)
        check_known("choice of buffers", buffers, BUFFERS)
        self.model = model
        self.decays = tuple(float(tau) for tau in decays)
        self._sources = {name: w for name, w in model.named_parameters() if w.requires_grad}
        if buffers == "average":
            self._sources |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._raw = [w.detach() for w in self._sources.values()]  # views: they follow updates in place
        self._averages = [[w.clone() for w in self._raw] for _ in self.decays]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present parameters of the model."""
        for tau, average in zip(self.decays, self._averages, strict=True):
            torch._foreach_lerp_(average, self._raw, 1 - tau)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def averaged_model(self, tau: float) -> nn.Module:
        """Return a new network with the averaged parameters, in eval mode; training does not move it.

        Raises:
            ValueError: If ``tau`` is not one of the decay rates.
        """
        model = copy.deepcopy(self.model).eval()
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, average in self.averaged(tau).items():
            tensors[name].copy_(average)
        return model

    def averaged(self, tau: float) -> dict[str, Tensor]:
        """The average itself, by name: not a copy, read it only.

        Raises:
            ValueError: If ``tau`` is not one of the decay rates.
        """
        if tau not in self.decays:
            raise ValueError(unknown("decay rate", f"{tau:g}", [f"{t:g}" for t in self.decays]))
        return dict(zip(self._sources, self._averages[self.decays.index(tau)], strict=True))

    @torch.no_grad()
    def lag(self, tau: float) -> dict[str, Tensor]:
        """Parameters in training minus their average, both at the present step, by name; no buffers.

        Raises:
            ValueError: If ``tau`` is not one of the decay rates.
        """
        averages = self.averaged(tau)
        return {name: w.detach() - averages[name] for name, w in self.model.named_parameters() if name in averages}

    def distance(self, tau: float) -> float:
        """Euclidean norm of the ``lag``.

        Raises:
            ValueError: If ``tau`` is not one of the decay rates.
        """
        return math.sqrt(sum(float(d.double().square().sum()) for d in self.lag(tau).values()))

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name: ``decays`` and ``<index of the decay rate>.<name>``."""
        out = {"decays": torch.tensor(self.decays, dtype=torch.float64)}
        for i, average in enumerate(self._averages):
            out |= {f"{i}.{name}": a for name, a in zip(self._sources, average, strict=True)}
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what ``tensors`` returned.

        Raises:
            ValueError: If the tensors are of other decay rates or another network.
        """
        mine = self.tensors()
        got = tuple(tensors["decays"].tolist()) if "decays" in tensors else ()
        if got != self.decays or tensors.keys() != mine.keys():
            msg = (
                f"The tensors must be averages of this network with decay rates {self.decays}. Got {len(tensors)} tensors with "
                f"decay rates {got}. Resume with the settings the run was started with."
            )
            raise ValueError(msg)
        for name, value in mine.items():
            value.copy_(tensors[name])


def check_decays(decays: Sequence[float]) -> None:
    """Raise ``ValueError`` unless there are decay rates, all in [0, 1) and each once."""
    wrong = [tau for tau in decays if not 0 <= tau < 1]
    if wrong:
        msg = f"A decay rate must be in [0, 1): it is the weight of the old average. Got {wrong[0]:g}."
        raise ValueError(msg)
    if not decays or len(set(decays)) < len(decays):
        msg = f"At least one decay rate is required, each once. Got {tuple(decays)}."
        raise ValueError(msg)
