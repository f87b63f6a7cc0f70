"""What is measured, against whom, at which sizes. Plain data: importing this imports no torch."""

import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NT_FOLDER = ROOT / ".venv-nt"  # neural-tangents needs a JAX of its time, hence an environment of its own


@dataclass(frozen=True)
class Method:
    """One way to compute a kernel or a trace.

    Attributes:
        label: Its name in tables.
        peer: The package, as ``--peers`` names it.
        module: What must be importable; empty for what always is.
    """

    label: str
    peer: str
    module: str = ""

    @property
    def worker(self) -> str:
        """Module that runs it."""
        return "benchmarks.jax_worker" if self.peer == "neural-tangents" else "benchmarks.torch_worker"

    @property
    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.peer == "neural-tangents":
            return "" if nt_python().exists() else "not installed (python -m benchmarks install-neural-tangents)"
        return "" if not self.module or find_spec(self.module) else "not installed"


def nt_python() -> Path:
    """Interpreter of the neural-tangents environment."""
    return NT_FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


METHODS = {
    "ours": Method("ntklib", "ntklib"),
    "func-einsum": Method("torch.func einsum (published)", "torch.func"),
    "func-gemm": Method("torch.func GEMM, freed as it goes", "torch.func"),
    "func-vp": Method("torch.func NTK-vp (published)", "torch.func"),
    "func-chunks": Method("torch.func in chunks of 4", "torch.func"),
    "nngeometry": Method("nngeometry GramMatrix", "nngeometry", "nngeometry"),
    "backpack": Method("backpack BatchGrad + GEMM", "backpack", "backpack"),
    "backpack-l2": Method("backpack BatchL2Grad", "backpack", "backpack"),
    "curvlinops": Method("curvlinops J (J^T I)", "curvlinops", "curvlinops"),
    "nt-structured": Method("neural-tangents structured", "neural-tangents"),
    "nt-jacobian": Method("neural-tangents Jacobian", "neural-tangents"),
}
PEERS = tuple(dict.fromkeys(m.peer for m in METHODS.values() if m.peer != "ntklib"))


@dataclass(frozen=True)
class Workload:
    """One network at one number of examples.

    Attributes:
        name: As ``--only`` names it.
        title: In words.
        network: Key of ``networks.BUILDERS``.
        width: Its width.
        n: Examples.
        compared: The first so many of them are computed in float64 by loops.
        peers: Method -> number of examples, fewer than ``n`` where it would take too long; the ratio is to ours at that number.
        kind: ``"kernel"`` (``[n, n, c, c]``) or ``"trace"``.
        held_out: Whether the engine was never tuned on it.
        device: ``"cuda"`` for sizes that only a GPU does in reasonable time.
    """

    name: str
    title: str
    network: str
    width: int
    n: int
    compared: int
    peers: dict[str, int] = field(default_factory=dict)
    kind: str = "kernel"
    held_out: bool = False
    device: str = ""

    def sizes(self, chosen: tuple[str, ...]) -> list[tuple[str, int]]:
        """Methods of the chosen peers with their sizes, ours first and at every size that occurs."""
        peers = [(name, n) for name, n in self.peers.items() if METHODS[name].peer in chosen]
        ours = sorted({self.n, *(n for _, n in peers)}, reverse=True)
        return [("ours", n) for n in ours] + peers


def _func(n: int, vp: int = 0) -> dict[str, int]:
    return {"func-einsum": n, "func-gemm": n, **({"func-vp": vp} if vp else {})}


WORKLOADS = (
    Workload(
        "W1", "ReLU MLP 784-512-512-10", "mlp", 512, 256, 16,
        {"func-einsum": 256, "func-gemm": 64, "func-vp": 16, "nngeometry": 256, "backpack": 64, "curvlinops": 16,
         "nt-structured": 256, "nt-jacobian": 64},
    ),
    Workload(
        "W2", "ResNet-18, 32x32 inputs", "resnet18", 64, 16, 3,
        {"func-einsum": 16, "func-gemm": 16, "func-vp": 2, "nngeometry": 2, "backpack": 4, "curvlinops": 2, "nt-structured": 16},
    ),
    Workload(
        "W3", "CNN with 16, 32, 64 channels", "small_cnn", 16, 128, 16,
        {**_func(128, vp=8), "nngeometry": 8, "backpack": 128, "curvlinops": 8, "nt-structured": 128, "nt-jacobian": 128},
    ),
    Workload(
        "W4", "exact trace, ResNet-18", "resnet18", 64, 64, 3,
        {"func-chunks": 64, "backpack-l2": 8, "nt-structured": 8}, kind="trace",
    ),
    Workload("ViT", "vision transformer, 4 blocks of width 128", "vision_transformer", 128, 32, 3, _func(32), held_out=True),
    Workload("separable", "depthwise-separable CNN", "separable_cnn", 32, 64, 8, _func(64), held_out=True),
    Workload("WRN", "WideResNet-28-2", "wide_resnet", 16, 32, 3, _func(32), held_out=True),
    Workload("addition", "one-layer transformer, addition mod 113", "addition_transformer", 128, 16, 3, _func(16), held_out=True),
    Workload("W2-64", "ResNet-18, 64 examples", "resnet18", 64, 64, 3, {"func-gemm": 64}, device="cuda"),
    Workload("W2-256", "ResNet-18, 256 examples", "resnet18", 64, 256, 3, {"func-gemm": 256}, device="cuda"),
    Workload("W2-1024", "ResNet-18, 1024 examples", "resnet18", 64, 1024, 3, {"func-gemm": 1024}, device="cuda"),
)  # fmt: skip
SLOW_TO_COMPILE = ("nt-structured", "nt-jacobian")


def quick(workload: Workload) -> Workload:
    """Return the same at a few examples and narrow layers; JAX compiles only the perceptron."""
    skipped = SLOW_TO_COMPILE if workload.network != "mlp" else ()
    peers = {name: 3 for name in workload.peers if name not in skipped}
    narrow = {"mlp": 16, "vision_transformer": 8, "addition_transformer": 8, "wide_resnet": 2}.get(workload.network, 4)
    return replace(workload, width=narrow, n=3, compared=2, peers=peers)


def find(name: str, *, is_quick: bool = False) -> Workload:
    """Return the workload of this name."""
    workload = next(w for w in WORKLOADS if w.name == name)
    return quick(workload) if is_quick else workload
