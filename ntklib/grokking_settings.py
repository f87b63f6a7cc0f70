"""Settings of runs that grok images."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ntklib.settings import Positive, SupervisedSettings


class GrokkingSettings(SupervisedSettings):
    """A multilayer perceptron started with enlarged parameters and trained with weight decay, and what is measured along it.

    All settings of ``SupervisedSettings``, and:

    Attributes:
        init_scale: Factor on all initial parameters, biases included.
        num_measured: Measured steps, evenly spaced on a logarithmic axis, at most.
        num_kernel: The first so many probe images for kernel distances.
    """

    model: str = "mlp"
    optimizer: str = "adamw"
    loss: str = "mse"
    init_scale: Annotated[float, Field(gt=0)]
    num_measured: Positive
    num_kernel: Positive
    num_samples: Positive = 4

    @model_validator(mode="after")
    def _check_probes(self) -> Self:
        if self.num_test and self.num_probe > self.num_test:
            msg = f"num_probe must be at most num_test = {self.num_test}, the test images there are. Got {self.num_probe}."
            raise ValueError(msg)
        if self.num_kernel > self.num_probe:
            msg = f"num_kernel must be at most num_probe = {self.num_probe}, the probe images. Got {self.num_kernel}."
            raise ValueError(msg)
        return self
