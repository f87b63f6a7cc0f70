"""How training steps are computed: memory layout, precision, compilation, determinism. What is measured never depends on them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from ntklib.text import check_known
from ntklib.training.parallel import ALONE, Alone

PRECISIONS = ("float32", "tf32", "bf16")
WORKSPACES = (":4096:8", ":16:8")  # values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS adds in a fixed order


P = ParamSpec("P")


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training loop's steps.

    Attributes:
        channels_last: Images, and weights of convolutions, with the channels innermost in memory. Without it the layout of the
            model is left as it is (``models.build`` makes channels-last weights) and images stay as they are stored.
        precision: Of matrix products and convolutions in the forward and backward pass of training steps: ``"float32"``;
            ``"tf32"``, which on a GPU rounds their factors to 11 bits and elsewhere changes nothing; or ``"bf16"``, which rounds
            them, and what lies between them, to 8 bits (PyTorch's autocast). Parameters, their gradients, the optimizer and the
            loss of the outputs stay float32.
        compile: Evaluate the network of training steps by ``torch.compile``, one compilation per shape of a batch.
        deterministic: Only operations whose result is the same every time, from the start of the loop to its end, measurements
            between its states included.

    Raises:
        ValueError: If the precision is unknown.
    """

    channels_last: bool = False
    precision: str = "float32"
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_known("precision", self.precision, PRECISIONS)


class Forward:
    """The network as a training step evaluates it: outputs, in the precision of the parameters, of a batch.

    The model itself stays what it was: its ``state_dict`` has the same names, and who measures it calls it uncompiled and in full
    precision.

    Args:
        model: The network in training; its weights are laid out anew for ``channels_last``.
        options: See there.
        processes: Those that take each step together.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, processes: Alone = ALONE) -> None:
        self.options = options
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        network = processes.prepare(model)
        self._call = compiled(network) if options.compile else network

    def __call__(self, x: Tensor) -> Tensor:
        if self.options.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.options.precision != "bf16":
            return self._call(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = self._call(x)
        return outputs.to(x.dtype)


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """On a GPU, compute products of float32 numbers as they are, or, where the precision is lower, from TF32 factors, for a while.

    PyTorch's own default is TF32 for convolutions and float32 for matrix products.
    """
    if device.type != "cuda":
        yield
        return
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee" if precision == "float32" else "tf32"
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


def in_float32(loop: Callable[Concatenate[nn.Module, P], Iterator[Any]]) -> Callable[Concatenate[nn.Module, P], Iterator[Any]]:
    """Let a training loop compute with ``float32_products`` that are exact, measurements between its states included."""

    @wraps(loop)
    def run(model: nn.Module, *arguments: P.args, **more: P.kwargs) -> Iterator[Any]:
        with float32_products("float32", next(model.parameters()).device):
            yield from loop(model, *arguments, **more)

    return run


def compiled(function: Callable[..., Tensor], *, mode: str = "default") -> Callable[..., Tensor]:
    """Compile a function of tensors, once per shape, with the random numbers of the eager one.

    Args:
        function: Evaluated by Inductor.
        mode: Of ``torch.compile``.
    """
    from torch._inductor import list_mode_options

    call = torch.compile(function, dynamic=False, options={**list_mode_options(mode), "fallback_random": True})
    # without this, the ninth shape of a process would be evaluated eagerly, with other rounding than in a process of its own
    return torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)(call)


def full_loss(forward: Callable[[Tensor], Tensor], loss_fn, device: torch.device, *, compile: bool) -> Callable[..., Tensor]:
    """Return the loss as a function of all inputs and labels; compiled, on a GPU it is replayed as CUDA graphs."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(forward(x), y)

    if not compile:
        return loss
    if device.type != "cuda":
        return compiled(loss)
    graphs = compiled(loss, mode="reduce-overhead")

    def replayed(x: Tensor, y: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned is used up
        return graphs(x, y)

    return replayed


def check_determinism(device: str | torch.device) -> None:
    """Raise ``ValueError`` if cuBLAS, on a GPU, was not told in time to add in a fixed order."""
    value = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if torch.device(device).type == "cuda" and value not in WORKSPACES:
        msg = (
            "deterministic=True on CUDA requires the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 from before Python "
            f"starts. Got {value!r}. Set it, or use deterministic=False."
        )
        raise ValueError(msg)


@contextmanager
def determinism(wanted: bool, device: torch.device) -> Iterator[None]:
    """Where wanted, allow deterministic operations only, and restore PyTorch's settings afterwards.

    Raises:
        ValueError: If the device cannot be deterministic, or an operation on the way has no deterministic form.
    """
    if not wanted:
        yield
        return
    check_determinism(device)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        msg = f"deterministic=True is impossible here: {str(error).partition('. ')[0]}. Use deterministic=False."
        raise ValueError(msg) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
