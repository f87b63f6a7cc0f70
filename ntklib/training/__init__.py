"""Training loops (generators of states), losses and schedules."""

from ntklib.training.flows import central_flow, gradient_flow
from ntklib.training.loops import gradient_descent
from ntklib.training.losses import LOSSES, cross_entropy, half_mse, loss_by_name, one_hot
from ntklib.training.measure import accuracy, parameter_norm
from ntklib.training.minibatch import OPTIMIZERS, adamw, loop_by_optimizer, sgd, steps_per_epoch
from ntklib.training.normalized import log_logistic_loss, normalized_descent
from ntklib.training.schedules import SCHEDULES, gradient_flow_time, learning_rate
from ntklib.training.state import State

__all__ = [
    "LOSSES", "OPTIMIZERS", "SCHEDULES", "State", "accuracy", "adamw", "central_flow", "cross_entropy", "gradient_descent", "gradient_flow",
    "gradient_flow_time", "half_mse", "learning_rate", "log_logistic_loss", "loop_by_optimizer", "loss_by_name", "normalized_descent", "one_hot",
    "parameter_norm", "sgd", "steps_per_epoch",
]  # fmt: skip
