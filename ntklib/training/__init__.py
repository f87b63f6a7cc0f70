"""Training loops (generators of states), losses and schedules."""

from ntklib.training.ema import ExponentialAverages
from ntklib.training.fixmatch import FixMatchState, fixmatch, pseudo_label_loss
from ntklib.training.loops import gradient_descent
from ntklib.training.losses import LOSSES, cross_entropy, half_mse, loss_by_name, one_hot
from ntklib.training.measure import accuracy, parameter_norm
from ntklib.training.minibatch import OPTIMIZERS, adamw, loop_by_optimizer, sgd, steps_per_epoch
from ntklib.training.normalized import log_logistic_loss, normalized_descent
from ntklib.training.schedules import SCHEDULES, gradient_flow_time, learning_rate, measured_steps
from ntklib.training.state import State

__all__ = [
    "LOSSES", "OPTIMIZERS", "SCHEDULES", "ExponentialAverages", "FixMatchState", "State", "accuracy", "adamw", "cross_entropy",
    "fixmatch", "gradient_descent", "gradient_flow_time", "half_mse", "learning_rate", "log_logistic_loss", "loop_by_optimizer",
    "loss_by_name", "measured_steps", "normalized_descent", "one_hot", "parameter_norm", "pseudo_label_loss", "sgd",
    "steps_per_epoch",
]  # fmt: skip
