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
    "string_type": "must be text", "bool_type": "must be true or false", "bool_parsing": "must be true or false",
    "missing": "is required",
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


class TracedSettings(ImageSettings):
    """What every run on mini-batches has whose trace is measured along it.

    Attributes:
        num_train: Class-balanced training subset; 0 for all.
        num_test: The same for test images.
        model: Name in ``ntklib.models``.
        width: Channels of the first stage, or hidden units.
        lr: Learning rate at the first step.
        momentum: Momentum.
        weight_decay: Weight decay.
        batch_size: Examples per step.
        schedule: A name in ``ntklib.training.SCHEDULES``.
        ema_decays: Decay rates of moving averages of the parameters that the run carries, see ``ExponentialAverages``.
        ema_buffers: ``"copy"`` or ``"average"``, see there.
        num_probe: Images on which the trace is measured.
        method: Trace estimator, see ``ntk_trace``.
        num_samples: Its draws.
        epsilon: Standard deviation of the main paper's weight perturbation.
        num_perturbations: Draws of the main paper's estimator where it is measured beside another.
    """

    num_train: Annotated[int, Field(ge=0)] = 0
    num_test: Annotated[int, Field(ge=0)] = 0
    model: str
    width: Positive
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive
    schedule: str = "constant"
    ema_decays: tuple[float, ...] = ()
    ema_buffers: str = "copy"
    num_probe: Positive
    method: str = "output"
    num_samples: Positive = 1
    epsilon: Annotated[float, Field(gt=0)] = 0.01
    num_perturbations: Positive = 1

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        from ntklib import models
        from ntklib.training import SCHEDULES
        from ntklib.training.ema import BUFFERS, check_decays

        models.check_name(self.model)
        if self.ema_decays:
            check_decays(self.ema_decays)
        text.check_known("schedule", self.schedule, SCHEDULES)
        text.check_known("choice of buffers", self.ema_buffers, BUFFERS)
        return self


class SupervisedSettings(TracedSettings):
    """One supervised training run on images, and what is measured along it.

    Attributes:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``; momentum is of ``"sgd"`` alone, and weight decay is added to the gradient
            but for ``"adamw"``.
        epochs: Passes over the training data.
        loss: ``"cross_entropy"`` or ``"half_mse"``.
        augment: ``"none"``, ``"crop_flip"`` or ``"resized_crop_flip"``.
        storage: How images are kept: ``"float32"``, ``"uint8"`` or ``"stream"``, see ``data.load``.
        channels_last: See ``TrainingOptions``, and so for the next three.
        precision: ``"float32"``, ``"tf32"`` or ``"bf16"``, of training steps.
        compile: Compile the network for training steps.
        deterministic: Refuse operations whose result is not the same every time.
    """

    optimizer: str = "sgd"
    epochs: Positive
    loss: str = "cross_entropy"
    augment: str = "none"
    storage: str = "float32"
    channels_last: bool = False
    precision: str = "float32"
    compile: bool = False
    deterministic: bool = False

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        from ntklib.data import STORAGES
        from ntklib.data.augment import augment_by_name
        from ntklib.training import OPTIMIZERS, PRECISIONS, loss_by_name
        from ntklib.training.options import check_determinism

        loss_by_name(self.loss)
        augment_by_name(self.augment)
        text.check_known("optimizer", self.optimizer, OPTIMIZERS)
        text.check_known("storage", self.storage, STORAGES)
        text.check_known("precision", self.precision, PRECISIONS)
        if self.deterministic:
            check_determinism(self.device)
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
        compile: Compile them; on a GPU they are replayed as CUDA graphs.
    """

    num_train: Positive
    width: Positive
    lr_fraction: Annotated[float, Field(gt=0)]
    steps: Positive
    compile: bool = False


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


class LargeSettings(ImageSettings):
    """One kernel of many images, in blocks; see ``large_ntk``.

    Attributes:
        num_train: Class-balanced training subset; 0 for all.
        model: Name in ``ntklib.models``.
        width: Channels of the first stage, or hidden units.
        memory_mib: Memory of each device that may be used, MiB; 0 for half of what is free.
        num_check: Examples of each side of the block that is checked against float64.
        tf32: Allow TensorFloat-32 on a GPU.
    """

    num_train: Annotated[int, Field(ge=0)]
    model: str
    width: Positive
    memory_mib: Annotated[int, Field(ge=0)] = 0
    num_check: Positive = 16
    tf32: bool = False

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        from ntklib import models

        models.check_name(self.model)
        return self


def resolve_device(device: str) -> str:
    """Return a device that is there: ``"auto"`` is CUDA when torch sees a card and the CPU otherwise.

    Raises:
        ValueError: If the device is of another kind, CUDA was asked for and is absent, or one of several processes names a GPU.
    """
    import torch

    from ntklib import torchrun

    if ":" in device and torchrun.size() > 1:
        msg = f"device must be 'auto', 'cpu' or 'cuda' where torchrun has started several processes. Got {device!r}."
        raise ValueError(msg)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        if torchrun.size() > 1:
            torch.cuda.set_device(torchrun.local_rank())  # "cuda" is another GPU in each process of a job
    return device
