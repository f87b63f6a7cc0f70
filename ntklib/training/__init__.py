"""Training loops (generators of states), losses and schedules."""

from ntklib.training.loops import gradient_descent, sgd
from ntklib.training.losses import LOSSES, cross_entropy, half_mse, loss_by_name, one_hot
from ntklib.training.measure import accuracy, parameter_norm
from ntklib.training.normalized import log_logistic_loss, normalized_descent
from ntklib.training.schedules import SCHEDULES, learning_rate
from ntklib.training.state import State

__all__ = [
    "LOSSES", "SCHEDULES", "State", "accuracy", "cross_entropy", "gradient_descent", "half_mse", "learning_rate",
    "log_logistic_loss", "loss_by_name", "normalized_descent", "one_hot", "parameter_norm", "sgd",
]  # fmt: skip
