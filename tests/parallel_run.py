"""Training runs for the tests, alone or as a process of a job: torchrun ... parallel_run.py FOLDER TASK."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from ntklib import Run, data, models, sgd
from ntklib.data import Dataset
from ntklib.locks import BUSY, RunBusyError
from ntklib.random import stream
from ntklib.settings import resolve_device
from ntklib.training import loop_by_optimizer
from ntklib.training.parallel import ALONE, processes

torch.set_num_threads(1)
BATCHES = {"batch_size": 8, "epochs": 2}  # of 23 examples: 8, 8 and 7, so that shares of two processes differ in size


def images(n: int = 23, c: int = 3) -> Dataset:
    generator = stream(0, "data")
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(c, (n,), generator=generator)
    return Dataset("tiny", x, y, x, y, c)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def normed() -> nn.Module:
    """Batch normalisation of every kind: over maps and vectors, without parameters, with a cumulative average, untracked.

    No layer in front of one has a bias: its gradient would be 0 but for rounding errors, of which Adam makes steps.
    """
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=None, affine=False),
        nn.Flatten(), nn.Linear(144, 5, bias=False), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(),
        nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3),
    )  # fmt: skip


NETWORKS = {
    "plain": plain, "normed": normed, "resnet18": lambda: models.build("resnet18", input_shape=(2, 6, 6), num_classes=3, width=2)
}  # fmt: skip
CASES = {  # name -> network, optimizer, options
    "plain": ("plain", "sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "schedule": "cosine"}),
    "normed": ("normed", "sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "augment": "crop_flip", "loss": "half_mse"}),
    "averages": ("normed", "adamw", {"lr": 0.01, "ema_decays": (0.5, 0.9), "ema_buffers": "average"}),
    "resnet18": ("resnet18", "sgd", {"lr": 0.05, "momentum": 0.9, "augment": "crop_flip"}),
    "wild": ("plain", "sgd", {"lr": 1e200}),
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return NETWORKS[name]().double()


def train(case: str, together=ALONE, device: str = "cpu") -> dict:
    """States of a case: step, loss, whether diverged; and all tensors of the last one."""
    name, optimizer, options = CASES[case]
    states = []
    for state in loop_by_optimizer(optimizer)(
        network(name).to(device), images().to(device), **options, **BATCHES, seed=3, measure_at=range(7), processes=together
    ):
        states.append((state.step, state.loss, state.diverged))
    return {"states": states, "tensors": {k: v.cpu() for k, v in state.tensors().items()}}


def laws(folder: Path, device: str = "cpu") -> None:
    """Every case in this job."""
    together, device = processes(), resolve_device(device)
    found = {case: train(case, together, device) for case in CASES} | {"refusals": refusals(together)}
    torch.save(found, folder / f"process-{together.rank}.pt")


SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "batch_size": 32, "epochs": 6, "schedule": "cosine", "seed": 3}


def stored(root: Path, pause: float = 0.0, **changes) -> tuple[Run, list[int]]:
    """One run in the store, and the steps that this process has measured."""
    digits = data.load("digits", num_train=90, num_test=50, seed=0)
    digits = Dataset("digits", digits.x_train.double(), digits.y_train, digits.x_test.double(), digits.y_test, 10)
    net = models.build("resnet18", input_shape=digits.input_shape, num_classes=10, width=2, seed=3).double()
    steps = []
    with Run("parallel", SETTINGS | changes, save_every=0, root=root) as run:
        for state in run.states(sgd, net, digits):
            size = sum(float(w.detach().square().sum()) for w in net.parameters())
            run.log(state, loss=state.loss, size=size)
            steps.append(state.step)
            print(f"step {state.step}", flush=True)
            time.sleep(pause)
    return run, steps


def store(folder: Path) -> None:
    """A run, the same again, one that is left early, a measurement without training: what each process sees of them."""
    run, steps = stored(folder)
    again, none = stored(folder)
    net = network("plain")
    with Run("left", {"lr": 0.1, "seed": 1, **BATCHES}, root=folder) as left:
        for state in left.states(sgd, net, images()):
            left.log(state, loss=state.loss)
            if state.step == 3:
                break
    with Run("once", {"seed": 1}, root=folder) as once:
        for state in once.once():
            once.log(state, value=float(os.environ["RANK"]))
    with Run("alone", {"lr": 0.1, "seed": 1, "steps": 3}, root=folder) as alone:  # a loop that knows no processes
        for state in alone.states(no_processes, net, images()):
            alone.log(state, loss=state.loss, rank=float(os.environ["RANK"]))
    runs = (run, again, left, once, alone)
    seen = {
        "steps": steps, "none": none, "key": run.key, "status": [r.status for r in runs], "histories": [r.history for r in runs],
        "sessions": run.result.sessions, "busy": busy(Run("busy", {"seed": 1}, root=folder)),
    }  # fmt: skip
    torch.save(seen, folder / f"process-{os.environ['RANK']}.pt")


def busy(run: Run) -> str:
    """What a process sees of a run that another job is computing, if it does not want to wait."""
    run.folder.mkdir(parents=True, exist_ok=True)
    other = FileLock(run.folder / "lock")
    if os.environ["RANK"] == "0":
        other.acquire()
    os.environ[BUSY] = "skip"
    try:
        with run:
            return "free"
    except RunBusyError as error:
        return str(error)
    finally:
        other.release()


def no_processes(model, images, *, lr, steps, seed, resume=None):
    yield from sgd(model, images, lr=lr, batch_size=23, epochs=steps, seed=seed, resume=resume)


def endings(how: str) -> None:
    """A run whose process 1 ends badly at step 9."""
    net, together = network("normed"), processes()
    for state in sgd(net, images(), lr=0.01, batch_size=8, epochs=1000, measure_at=range(0, 3000, 3), processes=together):
        if state.step == 9 and together.rank == 1:
            if how == "raises":
                msg = "no luck"
                raise ArithmeticError(msg)
            os.kill(os.getpid(), signal.SIGKILL)


def refusals(together) -> dict[str, str]:
    """What is refused in a job, by its message."""
    dropout, said = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 3)).double(), {}
    for name, net, size in (("batch", network("plain"), 1), ("dropout", dropout, 8)):
        try:
            next(sgd(net, images(), lr=0.1, batch_size=size, epochs=1, processes=together))
        except ValueError as error:
            said[name] = str(error)
    return said


TASKS = {"laws": laws, "store": store}

if __name__ == "__main__":
    where, task = Path(sys.argv[1]), sys.argv[2]
    if task == "stored":
        result, measured = stored(where, float(sys.argv[3]))
        print(f"{result.status} {result.key} {measured}", flush=True)
    elif task in ("raises", "dies"):
        endings(task)
    else:
        TASKS[task](where, *sys.argv[3:])
