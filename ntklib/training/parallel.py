"""Data-parallel training: each process takes a share of every batch, and together they take the step of the whole batch."""

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ntklib import torchrun

Message = TypeVar("Message")
Loss = Callable[[Tensor, Tensor], Tensor]
PATIENCE = timedelta(days=30)  # how long processes wait for process 0, which may measure for hours; a dead one ends the job at once


class Alone:
    """One process, which takes every batch as a whole: what a training loop asks of ``Processes``, answered by doing nothing.

    Attributes:
        size: Number of processes.
        rank: Number of this one.
    """

    size: int = 1
    rank: int = 0

    def check(self, smallest: int) -> None:
        """Raise ``ValueError`` unless a batch of ``smallest`` examples has one for each process."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the network that training steps evaluate; it has the parameters and buffers of the model."""
        return model

    def share(self, n: int) -> slice:
        """Rows of this process in a batch of ``n`` examples."""
        return slice(0, n)

    def part(self, loss: Loss, n: int) -> Loss:  # noqa: ARG002
        """Loss of this process's share of a batch of ``n``, scaled so that its mean over processes is that of the batch."""
        return loss

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        return value

    def agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        return yes

    def broadcast(self, message: Message) -> Message:
        """What process 0 says, in all processes; any object that can be pickled."""
        return message


ALONE = Alone()


class Processes(Alone):
    r"""The processes of a job that ``torchrun`` has started, trained together through Hugging Face Accelerate.

    A batch of n examples is cut into shares of n_r examples, in order, whose sizes differ by at most one. With l_r the mean loss
    of share r,

    .. math:: \nabla L = \frac{1}{n} \sum_i \nabla \ell_i = \frac{1}{P} \sum_r \nabla \Bigl( \frac{P n_r}{n} \, l_r \Bigr) ,

    so the plain mean over the P processes, which Accelerate's ``DistributedDataParallel`` takes, is the gradient of the whole
    batch also where shares differ. Loss and parameters equal those of one process to rounding, whatever P is; that is why P is no
    setting of a run.

    Batch normalisation takes the statistics of the whole batch: PyTorch's ``SyncBatchNorm`` on GPUs, ``JointBatchNorm`` on the
    CPU. Augmentations are drawn for the whole batch, then cut. Dropout modules are refused: masks drawn by each process would
    make the numbers depend on P. (A dropout that a network calls as a function is not seen.)

    Process r of a machine uses its GPU r. Gradients go through NCCL on GPUs, with its own time limit, and through gloo on the
    CPU; what process 0 tells the others goes through gloo with a limit of ``PATIENCE``. When a process ends with an error,
    ``torchrun`` ends the others.

    Raises:
        ValueError: If ``torchrun`` has not started this process.
        ModuleNotFoundError: If Accelerate is not installed.
    """

    def __init__(self) -> None:
        if torchrun.size() < 2:
            msg = (
                "Data-parallel training needs processes that torchrun has started. Got one process without torchrun. "
                "Start it as: torchrun --standalone --nproc-per-node 8 -m ntklib run CHAPTER"
            )
            raise ValueError(msg)
        self._library = _accelerate()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._messages: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.size, self.rank = torchrun.size(), torchrun.rank()

    def check(self, smallest: int) -> None:
        if smallest < self.size:
            msg = (
                f"Every batch needs an example for each process. Got a batch of {smallest} for {self.size} processes (the last one "
                "of an epoch may be the smallest). Start fewer processes, or choose another batch_size."
            )
            raise ValueError(msg)

    def prepare(self, model: nn.Module) -> nn.Module:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            msg = "Networks with dropout train in one process: its masks would depend on the number of processes. Set p to 0."
            raise ValueError(msg)
        on_gpu = any(w.is_cuda for w in model.parameters())
        accelerator = self._library.Accelerator(cpu=not on_gpu, mixed_precision="no")
        return accelerator.prepare_model(joint_twin(model, on_gpu), device_placement=False)

    def share(self, n: int) -> slice:
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def part(self, loss: Loss, n: int) -> Loss:
        mine = self.share(n)
        weight = self.size * (mine.stop - mine.start) / n
        return lambda outputs, targets: weight * loss(outputs, targets)

    def mean(self, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total / self.size

    def agree(self, yes: bool) -> bool:
        return float(self.mean(torch.tensor(float(yes)))) == 1.0

    def broadcast(self, message: Message) -> Message:
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0, group=self._messages)
        return box[0]


@cache
def processes() -> Alone:
    """The processes of this job, joined at the first call; ``ALONE`` in a process that ``torchrun`` has not started."""
    return ALONE if torchrun.size() == 1 else Processes()


def joint_twin(model: nn.Module, on_gpu: bool) -> nn.Module:
    """A second tree of modules over the same parameters and buffers, in training mode, that normalises by the joint batch.

    The model itself stays one that a single process can evaluate.

    Args:
        model: The network in training.
        on_gpu: Whether to use PyTorch's ``SyncBatchNorm``, which needs a GPU.
    """
    tensors = chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(t): t for t in tensors}).train()
    if on_gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = JointBatchNorm  # the attributes are those of every batch normalisation
    return twin


class JointBatchNorm(_BatchNorm):
    r"""Batch normalisation in training by mean and variance over the examples of all processes, for any device and backend.

    .. math:: m = \frac{1}{N} \sum_r \sum_{i \in r} x_i, \qquad v = \frac{1}{N} \sum_r \sum_{i \in r} (x_i - m)^2

    with N the number of values of a channel in the whole batch. Running statistics follow m and v N/(N - 1), as in PyTorch.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))  # [n, channels, *positions]
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        sums = total_over_processes(torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])]))
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centered = x - mean.reshape(shape)
        var = total_over_processes(centered.square().sum(dims)) / count
        self._follow(mean.detach(), var.detach() * count / (count - 1))
        out = centered * (var + self.eps).rsqrt().reshape(shape)
        if self.affine:
            out = out * self.weight.reshape(shape) + self.bias.reshape(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        means, variances, steps = self.running_mean, self.running_var, self.num_batches_tracked
        if means is None or variances is None or steps is None:
            return
        steps.add_(1)
        rate = self.momentum if self.momentum is not None else 1 / steps.double()  # no number: compilation would stop here
        means.add_(rate * (mean - means))
        variances.add_(rate * (var - variances))


class _Total(torch.autograd.Function):
    """Sum over processes; what the losses of all processes change by is also a sum over them."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


total_over_processes: Callable[[Tensor], Tensor] = _Total.apply


def _accelerate() -> Any:
    try:
        return import_module("accelerate")
    except ModuleNotFoundError as error:
        msg = "Data-parallel training needs the package accelerate: pip install -c constraints.txt -e '.[cluster]'"
        raise ModuleNotFoundError(msg) from error
