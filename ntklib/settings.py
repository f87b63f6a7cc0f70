"""Settings of runs: validated before any work starts, hashable, and with messages a person can act on."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ntklib import text

Positive = Annotated[int, Field(ge=1)]
PHRASES = {  # pydantic's error type -> what was required
    "greater_than": "must be greater than {gt:g}", "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}", "less_than_equal": "must be at most {le:g}",
    "int_type": "must be a whole number", "int_from_float": "must be a whole number", "int_parsing": "must be a whole number",
    "float_type": "must be a number", "float_parsing": "must be a number", "finite_number": "must be finite",
    "string_type": "must be text", "missing": "is required",
}  # fmt: skip


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown names, errors as plain sentences.

    Raises:
        ValueError: With one sentence per mistake: what was required, what was got.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(" ".join(self._sentence(e) for e in error.errors())) from None

    @classmethod
    def _sentence(cls, error: Any) -> str:
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return text.unknown("setting", name, cls.model_fields)
        if error["type"] == "value_error":
            return str(error["ctx"]["error"])
        required = str(PHRASES.get(error["type"]) or error["msg"]).format(**error.get("ctx", {}))
        got = "" if error["type"] == "missing" else f" Got {error['input']!r}."
        return f"{name} {required}.{got}"

    def but(self, **changes: Any) -> Self:
        """Return the same settings with some values changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


class NetworkSettings(Settings):
    """What every run that trains a network has.

    Attributes:
        seed: Seed of all that is drawn: initialization, data, batches, noise.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; resolved when the settings are made.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _resolve_device(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "device": resolve_device(values.get("device", "auto"))}


class ImageSettings(NetworkSettings):
    """What every run on images has.

    Attributes:
        dataset: Name in ``ntklib.data``.
        init: Initialization scheme.
    """

    dataset: str
    init: str = "standard"

    @model_validator(mode="after")
    def _check_image_names(self) -> Self:
        from ntklib import data, models

        data.check_name(self.dataset)
        text.check_known("initialization", self.init, models.SCHEMES)
        return self


class SupervisedSettings(ImageSettings):
    """One supervised training run on images, and what is measured along it.

    Attributes:
        num_train: Class-balanced training subset; 0 for all.
        num_test: The same for test images.
        model: Name in ``ntklib.models``.
        width: Channels of the first stage, or hidden units.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate at the first step.
        momentum: Momentum, of ``"sgd"`` alone.
        weight_decay: Weight decay, added to the gradient but for ``"adamw"``.
        batch_size: Examples per step.
        epochs: Passes over the training data.
        schedule: ``"constant"``, ``"cosine"`` or ``"step"``.
        loss: ``"cross_entropy"`` or ``"half_mse"``.
        augment: ``"none"`` or ``"crop_flip"``.
        ema_decays: Decay rates of moving averages of the parameters that the run carries, see ``ExponentialAverages``.
        ema_buffers: ``"copy"`` or ``"average"``, see there.
        num_probe: Training images on which the trace is measured.
        method: Trace estimator, see ``ntk_trace``.
        num_samples: Its draws.
        epsilon: Standard deviation of the main paper's weight perturbation.
        num_perturbations: Draws of the main paper's estimator where it is measured beside another.
    """

    num_train: Annotated[int, Field(ge=0)] = 0
    num_test: Annotated[int, Field(ge=0)] = 0
    model: str
    width: Positive
    optimizer: str = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive
    epochs: Positive
    schedule: str = "constant"
    loss: str = "cross_entropy"
    augment: str = "none"
    ema_decays: tuple[float, ...] = ()
    ema_buffers: str = "copy"
    num_probe: Positive
    method: str = "output"
    num_samples: Positive = 1
    epsilon: Annotated[float, Field(gt=0)] = 0.01
    num_perturbations: Positive = 1

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        from ntklib import models
        from ntklib.data.augment import augment_by_name
        from ntklib.training import OPTIMIZERS, SCHEDULES, loss_by_name
        from ntklib.training.ema import BUFFERS, check_decays

        models.check_name(self.model)
        loss_by_name(self.loss)
        augment_by_name(self.augment)
        if self.ema_decays:
            check_decays(self.ema_decays)
        text.check_known("optimizer", self.optimizer, OPTIMIZERS)
        text.check_known("schedule", self.schedule, SCHEDULES)
        text.check_known("choice of buffers", self.ema_buffers, BUFFERS)
        text.check_known("method", self.method, ("exact", "output", "jvp", "perturbation"))
        if self.num_train and self.num_probe > self.num_train:
            msg = f"num_probe must be at most num_train = {self.num_train}, the training images there are. Got {self.num_probe}."
            raise ValueError(msg)
        return self


class ConeSettings(SupervisedSettings):
    """One training run whose kernels are compared with each other, and linearized trainings that branch off it.

    Attributes:
        interval: Steps between the equally spaced kernels.
        starts: Steps from which kernels are measured at lags 1, 2, 4, ...; those after the end are left out.
        num_lags: How many of these lags.
        switch_at: Steps at which training goes on linearized, to the end; those after the end are left out.
        centered_at: Steps at which it goes on with the centred linearized network.
    """

    interval: Positive
    starts: tuple[Annotated[int, Field(ge=0)], ...] = ()
    num_lags: Positive = 1
    switch_at: tuple[Annotated[int, Field(ge=0)], ...] = ()
    centered_at: tuple[Annotated[int, Field(ge=0)], ...] = ()


class FullBatchSettings(ImageSettings):
    """One full-batch gradient-descent run with squared loss.

    Attributes:
        num_train: Class-balanced training subset.
        width: Hidden units per layer of the MLP.
        lr_fraction: Learning rate as a fraction of the largest stable one at initialization, 2 n / lambda_max(K_0).
        steps: Gradient steps.
    """

    num_train: Positive
    width: Positive
    lr_fraction: Annotated[float, Field(gt=0)]
    steps: Positive


class MarginSettings(ImageSettings):
    """One binary classifier, trained by ``normalized_descent``.

    Attributes:
        classes: The two classes, as labels of the dataset.
        num_train: Class-balanced training subset of the two.
        width: Hidden units per layer of the MLP.
        depth: Weight layers L, the degree of homogeneity of a network without biases.
        activation: ``"relu"`` or ``"identity"`` (both homogeneous).
        bias: Whether layers have biases, which break homogeneity.
        lr: Fall of the logarithm of the loss per step.
        steps: Gradient steps.
    """

    classes: tuple[int, int]
    num_train: Annotated[int, Field(ge=4)]
    width: Positive
    depth: Annotated[int, Field(ge=2)] = 2
    activation: str = "relu"
    bias: bool = False
    lr: Annotated[float, Field(gt=0)]
    steps: Positive

    @model_validator(mode="after")
    def _check_activation(self) -> Self:
        text.check_known("activation", self.activation, ("relu", "identity"))
        return self


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


class TaskSettings(ImageSettings):
    """Full-batch gradient descent on a part of a dataset's classes, at an absolute learning rate.

    Attributes:
        num_classes: The first classes of the dataset that are kept, at least 2.
        num_train: Training examples, class-balanced.
        width: Hidden units per layer of the MLP.
        lr: Learning rate.
        steps: Gradient steps.
    """

    num_classes: Annotated[int, Field(ge=2)]
    num_train: Positive
    width: Positive
    lr: Annotated[float, Field(gt=0)]
    steps: Positive


def resolve_device(device: str) -> str:
    """Return a device that is there: ``"auto"`` is CUDA when torch sees a card and the CPU otherwise.

    Raises:
        ValueError: If the device is of another kind, or CUDA was asked for and is absent.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        msg = f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N'. Got {device!r}."
        raise ValueError(msg)
    if device.startswith("cuda"):
        index = int(device.split(":")[1]) if ":" in device else 0
        if index >= torch.cuda.device_count():
            msg = (
                f"device {device!r} was asked for, and torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. "
                "Use device='auto' or 'cpu', or install a CUDA build of torch and a driver."
            )
            raise ValueError(msg)
    return device
