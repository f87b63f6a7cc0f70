"""Training loops (generators of states), losses and schedules."""

from ntklib.training.batches import BatchOrder, steps_per_epoch
from ntklib.training.ema import ExponentialAverages
from ntklib.training.fixmatch import FixMatchState, fixmatch, pseudo_label_loss
from ntklib.training.flows import central_flow, gradient_flow
from ntklib.training.full_batch import full_batch_adamw, gradient_descent
from ntklib.training.losses import LOSSES, cross_entropy, half_mse, loss_by_name, mse, one_hot, precise_cross_entropy
from ntklib.training.measure import accuracy, parameter_norm
from ntklib.training.minibatch import OPTIMIZERS, adamw, loop_by_optimizer, sgd
from ntklib.training.normalized import log_logistic_loss, normalized_descent
from ntklib.training.options import PRECISIONS, TrainingOptions
from ntklib.training.replicas import Replicas, StackedMLP, replicated_gradient_descent, replicated_minibatches
from ntklib.training.schedules import SCHEDULES, gradient_flow_time, learning_rate, log_steps, measured_steps
from ntklib.training.state import State

__all__ = [
    "LOSSES", "OPTIMIZERS", "PRECISIONS", "SCHEDULES", "BatchOrder", "ExponentialAverages", "FixMatchState", "Replicas",
    "StackedMLP", "State", "TrainingOptions", "accuracy", "adamw", "central_flow", "cross_entropy", "fixmatch", "full_batch_adamw",
    "gradient_descent", "gradient_flow", "gradient_flow_time", "half_mse", "learning_rate", "log_logistic_loss", "log_steps",
    "loop_by_optimizer", "loss_by_name", "measured_steps", "mse", "normalized_descent", "one_hot", "parameter_norm",
    "precise_cross_entropy", "pseudo_label_loss", "replicated_gradient_descent", "replicated_minibatches", "sgd", "steps_per_epoch",
]  # fmt: skip
