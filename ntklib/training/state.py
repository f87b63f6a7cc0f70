"""What a training loop yields: the model at a measured step, and all that is needed to go on from it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from ntklib.training.ema import ExponentialAverages

Checkpoint = tuple[int, dict[str, Tensor]]  # step, State.tensors()


@dataclass
class State:
    """A training run at one measured step, before the step is taken.

    Attributes:
        step: Optimizer steps taken so far.
        epoch: Passes over the training data so far (a fraction between epochs).
        model: The network at this step, in eval mode. Training goes on with it: read it, do not change it.
        loss: Mean training loss of the steps since the last measured one, each before its update; at step 0, of nothing: nan.
        lr: Learning rate of the next step.
        optimizer: The optimizer, whose state a checkpoint holds.
        total_steps: Steps of the whole run.
        diverged: Whether a loss or a parameter has stopped being finite; the loop ends after such a state.
        averages: Moving averages of the parameters at this step, where the loop was asked for some.
    """

    step: int
    epoch: float
    model: nn.Module
    loss: float
    lr: float
    optimizer: optim.Optimizer | None = None
    total_steps: int = 0
    diverged: bool = False
    averages: ExponentialAverages | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors a resumed run needs, by name: ``model.<name>``, ``optimizer.<index>.<slot>`` and ``average.<...>``."""
        out = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.optimizer is not None:
            for index, slots in self.optimizer.state_dict()["state"].items():
                out |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        if self.averages is not None:
            out |= {f"average.{k}": v for k, v in self.averages.tensors().items()}
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what ``tensors`` returned into the model, the optimizer and the averages of this state."""
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(model)
        if self.averages is not None:
            self.averages.restore({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
        if self.optimizer is None:
            return
        slots: dict[int, dict[str, Tensor]] = {}
        params = [w for group in self.optimizer.param_groups for w in group["params"]]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, slot = key.split(".", 2)
                # a copy, as the optimizer updates what it is given; in the parameter's memory layout, as it was before
                like = params[int(index)]
                copy = torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value.clone()
                slots.setdefault(int(index), {})[slot] = copy.detach()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
