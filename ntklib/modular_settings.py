"""Settings of runs on modular addition."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ntklib.settings import NetworkSettings, Positive


class ModularSettings(NetworkSettings):
    """One transformer trained on modular addition with full-batch AdamW, and what is measured along it.

    Attributes:
        p: Modulus.
        train_fraction: Share of the p^2 pairs that is trained on.
        width: Dimension of the residual stream, a multiple of the heads.
        heads: Attention heads.
        hidden: Units of the perceptron.
        lr: Learning rate after the warm-up.
        weight_decay: Decoupled weight decay, in units of the learning rate.
        beta2: Decay rate of the average of the squared gradient.
        warmup: Steps over which the learning rate rises from 0.
        loss: ``"precise_cross_entropy"``, or another name in ``ntklib.training``.
        steps: Optimizer steps.
        num_measured: Measured steps, evenly spaced on a logarithmic axis, at most.
        num_probe: Pairs of either split on which kernel quantities are measured; the whole split where it is smaller.
        num_kernel: The first so many of these for kernel distances.
        epsilon: Standard deviation of the noise of the main paper's two estimates.
        num_samples: Draws of each.
        compile: Compile the training steps; on a GPU they are replayed as CUDA graphs.
    """

    p: Positive
    train_fraction: Annotated[float, Field(gt=0, lt=1)]
    width: Positive
    heads: Positive
    hidden: Positive
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    warmup: Annotated[int, Field(ge=0)] = 10
    loss: str = "precise_cross_entropy"
    steps: Positive
    num_measured: Positive
    num_probe: Positive
    num_kernel: Positive
    epsilon: Annotated[float, Field(gt=0)]
    num_samples: Positive = 4
    compile: bool = False

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        from ntklib.data import check_modular_task
        from ntklib.training import loss_by_name

        loss_by_name(self.loss)
        if self.width % self.heads:
            msg = f"width must be a multiple of heads = {self.heads}. Got {self.width}."
            raise ValueError(msg)
        check_modular_task(self.p, self.train_fraction)
        return self
