"""The same function over a list of settings, side by side in processes; settings that differ in a value and the seed."""

import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ntklib import progress
from ntklib.paths import runs_root
from ntklib.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from ntklib.runs import RunResult

Result = TypeVar("Result")
AnySettings = TypeVar("AnySettings", bound=Settings)
Value = TypeVar("Value", bound=Hashable)
JOBS = "NTKLIB_JOBS"  # environment variable: processes a chapter may use


def sweep(function: Callable[[Any], Result], settings: Sequence[Any], *, jobs: int | None = None) -> list[Result]:
    """Apply ``function`` to each of the settings, in parallel processes, and return the results in order.

    Every call runs on one thread of the CPU, so its numbers do not depend on how many run at a time. Runs on CUDA go one after
    the other. The first error stops the sweep and is raised here; finished runs are kept and found again.

    Args:
        function: One run: settings -> result. It may be defined in a notebook.
        settings: One entry per run.
        jobs: Processes. Default: ``NTKLIB_JOBS`` or the number of cores.
    """
    if not settings:
        return []
    from joblib import Parallel, delayed

    on_gpu = any(str(getattr(s, "device", "cpu")).startswith("cuda") for s in settings)
    jobs = jobs or int(os.environ.get(JOBS, "0")) or os.cpu_count() or 1
    jobs = 1 if on_gpu else min(jobs, len(settings))
    with progress.bar("sweep", len(settings), runs_root()):
        progress.expect(len(settings))
        if jobs == 1:
            return [_single_threaded(function, s, {}) for s in settings]
        environment = {progress.FILE: os.environ[progress.FILE]}
        calls = (delayed(_single_threaded)(function, s, environment) for s in settings)
        with warnings.catch_warnings():  # loky replaces a worker whose memory has grown, and starts its job anew
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
            results: Any = Parallel(n_jobs=jobs, backend="loky")(calls)
        return list(results)


def variants(base: AnySettings, changes: Mapping[Value, Mapping[str, Any]], num_seeds: int) -> dict[Value, list[AnySettings]]:
    """Return the settings of a sweep: for every value the base with its changes, once per seed 0..num_seeds-1.

    Raises:
        ValueError: If a change is not a legal setting.
    """
    return {value: [base.but(seed=seed, **change) for seed in range(num_seeds)] for value, change in changes.items()}


def distinct(*sweeps: Mapping[Any, Sequence[AnySettings]]) -> list[AnySettings]:
    """All settings of several sweeps, each once, in order: what sweeps share is run once."""
    return list(dict.fromkeys(s for each in sweeps for settings in each.values() for s in settings))


def gather(one: Mapping[Any, Sequence[AnySettings]], results: "Mapping[AnySettings, RunResult]", *columns: str) -> "pd.DataFrame":
    """Stack the histories of one sweep, with its value as column ``variant``, the named settings, seed and status.

    A run that several sweeps, or values of one, share has rows under each.
    """
    import pandas as pd

    from ntklib.runs import combine

    frames = [combine([results[s] for s in settings], "seed", *columns).assign(variant=value) for value, settings in one.items()]
    return pd.concat(frames, ignore_index=True)


def _single_threaded(function: Callable[[Any], Result], settings: Any, environment: dict[str, str]) -> Result:
    import torch

    os.environ.update(environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(settings)
    finally:
        torch.set_num_threads(threads)
