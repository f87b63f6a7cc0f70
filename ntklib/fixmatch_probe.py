"""The four kinds of images on which the main paper measures the trace of the NTK along FixMatch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.data.partial import PartlyLabelled, WeakAndStrong
from ntklib.random import stream

KINDS = {
    "labelled": "labelled, weak",
    "weak": "unlabelled, weak",
    "strong": "unlabelled, strong",
    "pseudo": "pseudo-labelled, strong",
}


@dataclass(frozen=True)
class FixMatchProbe:
    r"""Fixed images, augmented once, on which networks along training are compared.

    Sup, Unsup Weak, Unsup Strong and Pseudo of the main paper (section 5.3.1, Figure 7): weakly augmented labelled images, weakly
    and strongly augmented unlabelled ones, and those strongly augmented ones whose weakly augmented version has a largest
    probability of at least the threshold. The last set depends on the network; the others do not change along training.

    Attributes:
        labelled: ``[n_l, channels, height, width]``.
        weak: ``[n_u, channels, height, width]``.
        strong: The same shape, of the same images.
    """

    labelled: Float[Tensor, "n_l channels height width"]
    weak: Float[Tensor, "n_u channels height width"]
    strong: Float[Tensor, "n_u channels height width"]

    @classmethod
    def draw(cls, data: PartlyLabelled, augment: WeakAndStrong, num: int, seed: int) -> "FixMatchProbe":
        """Draw ``num`` unlabelled images and as many labelled ones as there are up to ``num``, and augment them.

        Raises:
            ValueError: If there are fewer than ``num`` unlabelled images.
        """
        if not 1 <= num <= len(data.x_unlabelled):
            msg = f"num_probe must be between 1 and the {len(data.x_unlabelled)} unlabelled images. Got {num}."
            raise ValueError(msg)
        choose = lambda x, use: x[torch.randperm(len(x), generator=stream(seed, use))[:num].to(x.device)]  # noqa: E731
        labelled, unlabelled = choose(data.x_labelled, "probe_labelled"), choose(data.x_unlabelled, "probe_unlabelled")
        return cls(
            augment.weak(labelled, stream(seed, "probe_augment", 0)),
            augment.weak(unlabelled, stream(seed, "probe_augment", 1)),
            augment.strong(unlabelled, stream(seed, "probe_augment", 2)),
        )

    @property
    def mixture(self) -> Tensor:
        """All fixed images: what a batch of training is made of, for the statistics of batch normalisation."""
        return torch.cat([self.labelled, self.weak, self.strong])

    @torch.no_grad()
    def sets(self, model: nn.Module, threshold: float) -> dict[str, Tensor]:
        """Images by kind, see ``KINDS``; without ``"pseudo"`` if the network in its present mode is sure of none."""
        sure = model(self.weak).softmax(1).amax(1) >= threshold
        found = {"labelled": self.labelled, "weak": self.weak, "strong": self.strong}
        return found | ({"pseudo": self.strong[sure]} if sure.any() else {})
