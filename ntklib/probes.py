"""One measurement for every training run: nine probes of a network on fixed examples, and how well it does its task."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntklib.alignment import target_modes
from ntklib.curvature import LossFunction, sharpness
from ntklib.directions import flatten_params, unflatten_params
from ntklib.functional import functional_model
from ntklib.input_noise import logit_perturbation
from ntklib.kernels import empirical_ntk
from ntklib.similarity import distances_to_earlier
from ntklib.training import one_hot, parameter_norm
from ntklib.training.critical import Hessian, critical_modes

MODES = 2  # eigenvectors of the Hessian that are followed, for the first of them

Pair = tuple[Tensor, Tensor]  # inputs and targets: labels [n], or numbers [n, c]


@dataclass(frozen=True)
class Gauges:
    """What networks along one training run are measured on; none of it changes while the run goes on.

    Attributes:
        probe: Training examples of the kernel, and their targets.
        train: Examples whose accuracy is that of training.
        test: Examples of the test set.
        objective: Examples of the training loss, whose Hessian is that of the sharpness.
        loss: The training loss of outputs and targets of ``objective``.
        real: The inputs of ``probe`` as numbers that noise can be added to. Default: these inputs.
    """

    probe: Pair
    train: Pair
    test: Pair
    objective: Pair
    loss: LossFunction
    real: Tensor | None = None


def targets_as_numbers(y: Tensor, c: int) -> Float[Tensor, "n c"]:
    """Targets as they are, or labels as one-hot vectors of length c."""
    return y if y.is_floating_point() else one_hot(y, c)


@torch.no_grad()
def task_accuracy(outputs: Float[Tensor, "n c"], y: Tensor) -> float:
    """Fraction of examples whose largest output is that of the label; for targets of +1 and -1, whose output has their sign.

    Raises:
        ValueError: If targets are numbers of more than one output.
    """
    if not y.is_floating_point():
        return float((outputs.argmax(1) == y).double().mean())
    if y.shape != outputs.shape or y.shape[1] != 1:
        msg = f"Targets must be labels [n] or signs [n, 1], as the outputs. Got {tuple(y.shape)} for {tuple(outputs.shape)}."
        raise ValueError(msg)
    return float((outputs * y > 0).double().mean())


@torch.no_grad()
def task_measures(model: nn.Module, gauges: Gauges) -> dict[str, float]:
    """Return ``loss`` (the objective), ``accuracy_train`` and ``accuracy_test`` of a network in eval mode."""
    (x_train, y_train), (x_test, y_test), (x, y) = gauges.train, gauges.test, gauges.objective
    return {
        "loss": float(gauges.loss(model(x), y)),
        "accuracy_train": task_accuracy(model(x_train), y_train),
        "accuracy_test": task_accuracy(model(x_test), y_test),
    }


def followed_sharpness(model: nn.Module, gauges: Gauges, memory: MutableMapping[str, Tensor]) -> float:
    """Largest eigenvalue of the Hessian of the objective, found from the eigenvectors of the last measured state.

    ``ntklib.sharpness`` needs no start, and is what this falls back on; along a run a few products of a block of vectors do. The
    relative residual is at most 2 %, as a rule 0.1 %, and the error of the eigenvalue of the order of its square.

    Args:
        model: Network in eval mode.
        gauges: Whose objective.
        memory: Holds the eigenvectors as ``"modes"``; replaced by the new ones.
    """
    f, params = functional_model(model)
    x, y = gauges.objective
    try:
        hessian = Hessian(lambda w: gauges.loss(f(unflatten_params(w, params), x), y), flatten_params(params))
        eigvals, modes = critical_modes(hessian, MODES, memory.get("modes"))
    except RuntimeError:
        return float(sharpness(model, gauges.loss, gauges.objective)[0])
    memory["modes"] = modes.detach().cpu()
    return float(eigvals[0])


def measure_probes(
    model: nn.Module, gauges: Gauges, memory: MutableMapping[str, Tensor]
) -> tuple[dict[str, float], Float[Tensor, "n n"]]:
    r"""Measure a network, and return its kernel for the probes that compare two times.

    With the kernel of n probe examples summed over the c outputs, :math:`K_{ij} = \sum_a \langle \nabla f_a(x_i), \nabla f_a(x_j)
    \rangle`, and targets Y of shape ``[n, c]``, uncentred:

    .. math:: \mathrm{trace} = \frac{\operatorname{Tr} K}{n c} , \qquad
        \mathrm{kta} = \frac{\langle K, Y Y^\top \rangle}{\lVert K \rVert_F \lVert Y Y^\top \rVert_F} , \qquad
        \mathrm{alignment} = \sum_{i \le c} \frac{\lVert Y^\top v_i \rVert^2}{\lVert Y \rVert_F^2} , \qquad
        \mathrm{perturbation} = \frac{1}{n c} \sum_{i,a} \lVert \nabla_x f_a(x_i) \rVert^2

    ``alignment`` is the share of the targets along the c leading eigenvectors of K; ``perturbation`` is the mean of the main
    paper's logit perturbation distance for small noise, per output; ``sharpness`` is the largest eigenvalue of the Hessian of the
    objective, in the scale of that loss (``followed_sharpness``); ``norm`` is that of all trainable parameters.

    Args:
        model: Network in eval mode, ``[n, *input] -> [n, c]``, left as it was.
        gauges: What to measure it on.
        memory: As for ``followed_sharpness``.

    Returns:
        The six numbers by name, and the kernel.
    """
    x, y = gauges.probe
    kernel = empirical_ntk(model, x, reduce="trace", progress=False).detach()
    with torch.no_grad():
        c = model(x[:1]).shape[1]
    modes = target_modes(kernel, targets_as_numbers(y, c))
    found = {
        "trace": float(kernel.diagonal().double().sum()) / (len(x) * c),
        "kta": modes.alignment,
        "alignment": modes.top(c),
        "sharpness": followed_sharpness(model, gauges, memory),
        "norm": parameter_norm(model),
        "perturbation": logit_perturbation(model, x if gauges.real is None else gauges.real).mean,
    }
    return found, kernel


def log_probes(log: Callable[..., None], state, model: nn.Module, gauges: Gauges, memory: MutableMapping[str, Tensor]) -> None:
    """Log everything at one measured state: task, probes, and the distances S of the kernel to all earlier ones.

    Args:
        log: ``Run.log``. Rows of probes have the split ``"probe"``; distances have the earlier step as layer.
        state: The state.
        model: The network at this state, in eval mode.
        gauges: What it is measured on.
        memory: ``Run.memory``.
    """
    log(state, **task_measures(model, gauges))
    found, kernel = measure_probes(model, gauges, memory)
    log(state, split="probe", **found)
    for earlier, distance in distances_to_earlier(memory, "kernel", state.step, kernel).items():
        log(state, split="probe", layer=str(earlier), distance=distance)
