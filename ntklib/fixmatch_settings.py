"""Settings of FixMatch runs."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ntklib import text
from ntklib.settings import ImageSettings, Positive


class FixMatchSettings(ImageSettings):
    """One FixMatch run, or with ``lambda_u = 0`` a supervised run on the same labelled batches, and what is measured along it.

    Attributes:
        num_train: Class-balanced subset of the training images, labelled or not; 0 for all.
        num_test: The same for test images.
        shrink: Images are averaged over squares of this many pixels.
        num_labels: Labelled training images, a multiple of the number of classes.
        reuse_labelled: Whether they are among the unlabelled images, too.
        model: Name in ``ntklib.models``.
        width: Channels of the first stage, or hidden units.
        lr: Learning rate at the first step.
        momentum: Momentum.
        nesterov: Nesterov's variant.
        weight_decay: Weight decay, added to the gradient.
        decayed: ``"weights"`` or ``"all"``: parameters it acts on, see ``fixmatch``.
        batch_size: Labelled images per step.
        mu: Unlabelled images per labelled one.
        threshold: Probability from which on a prediction is a pseudo-label.
        lambda_u: Weight of the unlabelled loss.
        steps: Steps.
        schedule: ``"constant"``, ``"cosine"`` or ``"cosine_7_16"``.
        padding: Largest shift of the weak augmentation, in pixels.
        flip: Whether it mirrors images.
        strong: ``"geometric"`` or ``"rand_augment"``.
        labelled_augment: ``"weak"`` or ``"strong"``.
        ema_decays: Decay rates of moving averages of the parameters.
        ema_buffers: ``"copy"`` or ``"average"``, see ``ExponentialAverages``.
        eval_every: Steps between measurements.
        num_early: Further measurements before the first of these, evenly spaced on a logarithmic axis.
        num_probe: Images of each kind on which the trace is measured.
        method: Trace estimator, see ``ntk_trace``.
        num_samples: Its draws.
        epsilon: Standard deviation of the main paper's weight perturbation.
        num_perturbations: Draws of the main paper's estimator.
    """

    num_train: Annotated[int, Field(ge=0)] = 0
    num_test: Annotated[int, Field(ge=0)] = 0
    shrink: Positive = 1
    num_labels: Positive
    reuse_labelled: bool = False
    model: str
    width: Positive
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decayed: str = "weights"
    batch_size: Positive
    mu: int
    threshold: float = 0.95
    lambda_u: float = 1.0
    steps: Positive
    schedule: str = "cosine_7_16"
    padding: Annotated[int, Field(ge=0)]
    flip: bool
    strong: str
    labelled_augment: str = "weak"
    ema_decays: tuple[float, ...] = ()
    ema_buffers: str = "copy"
    eval_every: Positive
    num_early: Annotated[int, Field(ge=0)] = 0
    num_probe: Positive
    method: str = "output"
    num_samples: Positive = 1
    epsilon: Annotated[float, Field(gt=0)] = 0.01
    num_perturbations: Positive = 1

    @model_validator(mode="after")
    def _check_fixmatch(self) -> Self:
        from ntklib import models
        from ntklib.data.strong import strong_by_name
        from ntklib.training import SCHEDULES
        from ntklib.training.ema import BUFFERS, check_decays
        from ntklib.training.fixmatch import check_fixmatch

        models.check_name(self.model)
        strong_by_name(self.strong)
        check_fixmatch(self.mu, self.threshold, self.lambda_u, self.decayed, self.labelled_augment)
        if self.ema_decays:
            check_decays(self.ema_decays)
        text.check_known("schedule", self.schedule, SCHEDULES)
        text.check_known("choice of buffers", self.ema_buffers, BUFFERS)
        text.check_known("method", self.method, ("exact", "output", "jvp"))
        if self.num_train and self.num_labels > self.num_train:
            msg = f"num_labels must be at most num_train = {self.num_train}, the training images there are. Got {self.num_labels}."
            raise ValueError(msg)
        if self.nesterov and not self.momentum:
            msg = "nesterov requires a positive momentum. Got momentum = 0."
            raise ValueError(msg)
        return self
