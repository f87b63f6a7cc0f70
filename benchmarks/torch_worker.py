"""Child process for everything that runs on PyTorch."""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from benchmarks import floor, networks, peers, probes, workloads
from benchmarks.worker import Call, Job, Memory, corner, measured, serve

PACKAGES = ("torch", "nngeometry", "backpack-for-pytorch", "curvlinops-for-pytorch")
LARGEST = {True: 256, False: 2048}  # side of the matrices that the GEMM rate is measured with, in a quick run and otherwise


class DeviceMemory:
    """Growth of allocated GPU memory, in MiB."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def grown(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.before) / 2**20


def loaded(job: Job, n: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Model and first ``n`` inputs of a job, in its dtype, on its device."""
    workload = workloads.find(job["workload"], is_quick=job["quick"])
    dtype = getattr(torch, job["dtype"])
    x = networks.inputs(workload, n).to(job["device"])
    return networks.build(workload).to(job["device"], dtype), x.to(dtype) if x.is_floating_point() else x


@cache
def prepared(method: str, workload: str, quick: bool, n: int, dtype: str, device: str) -> Call:
    """A call that was made once on two examples, so that imports and first-use costs are not measured."""
    functions = peers.TRACES if workloads.find(workload).kind == "trace" else peers.KERNELS
    model, x = loaded({"workload": workload, "quick": quick, "dtype": dtype, "device": device}, n)
    functions[method](model, x[:2])
    return lambda: functions[method](model, x)


def run(job: Job) -> Job:
    """Time one call; store the block that is compared."""
    call = prepared(*(job[key] for key in ("method", "workload", "quick", "n", "dtype", "device")))
    on_gpu = job["device"] == "cuda"
    memory, finish = (DeviceMemory(), torch.cuda.synchronize) if on_gpu else (Memory(), lambda: None)
    result, found = measured(call, memory, finish)
    np.save(job["path"], corner(result.detach().cpu().numpy(), job["compared"]))
    return found


def reference(job: Job) -> Job:
    """Compute the compared block in float64 by loops, on the CPU."""
    model, x = loaded({**job, "dtype": "float64", "device": "cpu"}, job["compared"])
    by_loops = networks.trace_by_loops if workloads.find(job["workload"]).kind == "trace" else networks.kernel_by_loops
    np.save(job["path"], by_loops(model, x).numpy())
    return {}


def export(job: Job) -> Job:
    """Write parameters, buffers and inputs for a worker without PyTorch."""
    model, x = loaded({**job, "dtype": "float64", "device": "cpu"}, job["n"])
    arrays: dict[str, Any] = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(job["path"], inputs=x.numpy(), **arrays)
    return {"buffers": [name for name, _ in model.named_buffers()]}


def count(job: Job) -> Job:
    """FLOPs of the workload at each size, and the rate of matrix products."""
    workload = workloads.find(job["workload"], is_quick=job["quick"])
    layers, others, c = floor.walk(*loaded({**job, "dtype": "float64", "device": "cpu"}, 2))
    sizes = floor.gemm_sizes(layers, workload.n, c, LARGEST[job["quick"]])
    rate = floor.gemm_rate(sizes, job["device"], 0.02 if job["quick"] else 0.3)
    flops = {str(n): floor.flops(layers, others, n, c, workload.kind) for n in job["sizes"]}
    return {"flops": flops, "gemm_flops_per_second": rate, "outputs": c, "gemm_sizes": sizes}


def estimate(job: Job) -> Job:
    """Scatter and cost of the trace estimators."""
    return probes.measure(*loaded(job, job["n"]), job["draws"])


def versions() -> Job:
    """Versions of the packages that are installed, and the instruction set that PyTorch uses."""
    found = {"instruction set": torch.backends.cpu.get_cpu_capability()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | ({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {})


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the peers' own deprecations
    torch.set_num_threads(1)
    serve({"run": run, "reference": reference, "export": export, "count": count, "probes": estimate}, versions)
