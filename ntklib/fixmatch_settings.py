"""Settings of FixMatch runs."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ntklib import text
from ntklib.settings import Positive, TracedSettings


class FixMatchSettings(TracedSettings):
    """One FixMatch run, or with ``lambda_u = 0`` a supervised run on the same labelled batches, and what is measured along it.

    ``num_train`` counts images labelled or not, ``batch_size`` labelled ones per step, and ``num_probe`` images of each kind.

    Attributes:
        shrink: Images are averaged over squares of this many pixels.
        num_labels: Labelled training images, a multiple of the number of classes.
        reuse_labelled: Whether they are among the unlabelled images, too.
        nesterov: Nesterov's variant.
        decayed: ``"weights"`` or ``"all"``: parameters that weight decay acts on, see ``fixmatch``.
        mu: Unlabelled images per labelled one.
        threshold: Probability from which on a prediction is a pseudo-label.
        lambda_u: Weight of the unlabelled loss.
        steps: Steps.
        padding: Largest shift of the weak augmentation, in pixels.
        flip: Whether it mirrors images.
        strong: ``"geometric"`` or ``"rand_augment"``.
        labelled_augment: ``"weak"`` or ``"strong"``.
        eval_every: Steps between measurements.
        num_early: Further measurements before the first of these, evenly spaced on a logarithmic axis.
    """

    shrink: Positive = 1
    num_labels: Positive
    reuse_labelled: bool = False
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    decayed: str = "weights"
    mu: int
    threshold: float = 0.95
    lambda_u: float = 1.0
    steps: Positive
    schedule: str = "cosine_7_16"
    padding: Annotated[int, Field(ge=0)]
    flip: bool
    strong: str
    labelled_augment: str = "weak"
    eval_every: Positive
    num_early: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_fixmatch(self) -> Self:
        from ntklib.data.strong import strong_by_name
        from ntklib.training.fixmatch import check_fixmatch

        strong_by_name(self.strong)
        check_fixmatch(self.mu, self.threshold, self.lambda_u, self.decayed, self.labelled_augment)
        text.check_known("method", self.method, ("exact", "output", "jvp"))
        if self.num_train and self.num_labels > self.num_train:
            msg = f"num_labels must be at most num_train = {self.num_train}, the training images there are. Got {self.num_labels}."
            raise ValueError(msg)
        if self.nesterov and not self.momentum:
            msg = "nesterov requires a positive momentum. Got momentum = 0."
            raise ValueError(msg)
        return self
