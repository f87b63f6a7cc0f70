"""Settings of gradient descent on small models over grids of learning rates."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ntklib.settings import Positive, Settings


class GridSettings(Settings):
    """Gradient descent from one start over a grid of learning rates.

    Attributes:
        init_scale: Size of the start.
        lr_low: Smallest learning rate, in units of an edge of stability that the subclass names.
        lr_high: Largest learning rate in the same unit.
        num_lr: Learning rates, evenly spaced.
        steps: Gradient steps.
    """

    init_scale: Annotated[float, Field(gt=0)]
    lr_low: Annotated[float, Field(gt=0)]
    lr_high: Annotated[float, Field(gt=0)]
    num_lr: Annotated[int, Field(ge=2)]
    steps: Positive

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.lr_low >= self.lr_high:
            msg = f"lr_low must be below lr_high = {self.lr_high:g}. Got {self.lr_low:g}."
            raise ValueError(msg)
        return self


class FactorizationSettings(GridSettings):
    """Gradient descent on a deep matrix factorization.

    Learning rates are in units of 2/S_1, the edge of the largest singular value.

    Attributes:
        depth: Layers L, 2 to 8.
        targets: Singular values of the target, positive.
        dim: Width of the square layers, at least 2; singular values that are not given are zero.
        init_scale: Product of the layers below the last at the start; the last layer is zero.
        keep: Last steps that are kept.
    """

    depth: Annotated[int, Field(ge=2, le=8)]
    targets: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    dim: Annotated[int, Field(ge=2)]
    keep: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if len(self.targets) > self.dim:
            msg = f"dim must be at least {len(self.targets)}, the number of singular values in targets. Got {self.dim}."
            raise ValueError(msg)
        if self.keep > self.steps:
            msg = f"keep must be at most steps = {self.steps}. Got {self.keep}."
            raise ValueError(msg)
        return self


class TwoLayerSettings(GridSettings):
    """Gradient descent of a two-layer linear network on inputs with a dominant direction, from a small random start.

    Learning rates are in units of 2 over the least sharpness of all minima.

    Attributes:
        num_inputs: Examples n, at least 2.
        dim: Input dimension d, at least n.
        top: Singular value of the dominant direction; the others are uniform in [0.5, 1.5].
        share: Cosine between the targets and the dominant direction.
        width: Hidden units.
        init_scale: Norm of the readout and of the hidden weights at the start.
        seed: Seed of inputs and start.
    """

    num_inputs: Annotated[int, Field(ge=2)]
    dim: Positive
    top: Annotated[float, Field(gt=0)]
    share: Annotated[float, Field(ge=0, le=1)]
    width: Positive
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.dim < self.num_inputs:
            msg = f"dim must be at least num_inputs = {self.num_inputs}, so that all targets can be fitted. Got {self.dim}."
            raise ValueError(msg)
        return self
