"""The same function over a list of settings, side by side in processes; settings that differ in a value and the seed."""

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ntklib import progress, torchrun
from ntklib.locks import BUSY, RunBusyError
from ntklib.paths import runs_root
from ntklib.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from ntklib.runs import RunResult

Result = TypeVar("Result")
AnySettings = TypeVar("AnySettings", bound=Settings)
Value = TypeVar("Value", bound=Hashable)
JOBS = "NTKLIB_JOBS"  # environment variable: processes a chapter may use
PREFIX = "NTKLIB_"  # of all environment variables of the package
SHARE = "NTKLIB_SHARE"  # environment variable "k/n": this process is the k-th of n (from 1) that work on the same sweeps


def sweep(function: Callable[[Any], Result], settings: Sequence[Any], *, jobs: int | None = None) -> list[Result]:
    """Apply ``function`` to each of the settings, in parallel processes, and return the results in order.

    Every call runs on one thread of the CPU, so its numbers do not depend on how many run at a time. Runs on CUDA go one after
    the other, and so do all in a job of ``torchrun``, whose processes train each run together. The first error stops the sweep and
    is raised here; finished runs are kept and found again.

    Several processes, on one machine or on many with a common folder of runs, can work on one sweep: with ``NTKLIB_SHARE=k/n``
    the k-th of n begins at another place of the list, leaves a run that another process is computing for later, and in the end
    has all results like the others.

    Args:
        function: One run: settings -> result. It may be defined in a notebook.
        settings: One entry per run.
        jobs: Processes. Default: ``NTKLIB_JOBS`` or the number of cores.
    """
    if not settings:
        return []
    on_gpu = any(str(getattr(s, "device", "cpu")).startswith("cuda") for s in settings)
    jobs = jobs or int(os.environ.get(JOBS, "0")) or os.cpu_count() or 1
    jobs = 1 if on_gpu or torchrun.size() > 1 else min(jobs, len(settings))
    share = os.environ.get(SHARE)
    order = _order(len(settings), share)
    with progress.bar("sweep", len(settings), runs_root()):
        progress.expect(len(settings))
        found = dict(zip(order, _map(function, [settings[i] for i in order], jobs, {BUSY: "skip"} if share else {}), strict=True))
        later = [i for i in order if isinstance(found[i], RunBusyError)]
        found |= dict(zip(later, _map(function, [settings[i] for i in later], jobs, {BUSY: "wait"}), strict=True))
    return [found[i] for i in range(len(settings))]


def _map(function: Callable[[Any], Result], settings: Sequence[Any], jobs: int, environment: dict[str, str]) -> list[Any]:
    if jobs == 1 or not settings:
        return [_single_threaded(function, s, environment) for s in settings]
    from joblib import Parallel, delayed

    environment = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)} | environment
    calls = (delayed(_in_worker)(function, s, environment) for s in settings)
    with warnings.catch_warnings():  # loky replaces a worker whose memory has grown, and starts its job anew
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
        results: Any = Parallel(n_jobs=jobs, backend="loky")(calls)
    return list(results)


def read_share(text: str) -> tuple[int, int]:
    """Read ``"k/n"``, the k-th of n processes that share the work.

    Raises:
        ValueError: If it is not two numbers with 1 <= k <= n.
    """
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        msg = f"A share must be 'k/n' with whole numbers 1 <= k <= n, for example 1/4. Got {text!r}."
        raise ValueError(msg)
    return int(k), int(n)


def _order(count: int, share: str | None) -> list[int]:
    """Indices in the order in which this process goes through them: the processes of a sweep begin far from each other."""
    k, n = read_share(share) if share else (1, 1)
    start = count * (k - 1) // n
    return [(start + i) % count for i in range(count)]


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

    A run that several sweeps, or values of one, share has rows under each. A value without seeds has no row.
    """
    import pandas as pd

    from ntklib.runs import COLUMNS, combine

    frames = [combine([results[s] for s in each], "seed", *columns).assign(variant=value) for value, each in one.items() if each]
    if not frames:
        return pd.DataFrame(columns=[*COLUMNS, "seed", *columns, "status", "variant"]).astype(COLUMNS)
    return pd.concat(frames, ignore_index=True)


def _in_worker(function: Callable[[Any], Result], settings: Any, environment: dict[str, str]) -> Any:
    """Call in a process that may be older than the caller's settings: its variables of the package become the caller's."""
    old = {name: None for name in os.environ if name.startswith(PREFIX)}
    with _variables(old | environment):
        return _single_threaded(function, settings, {})


def _single_threaded(function: Callable[[Any], Result], settings: Any, environment: dict[str, str]) -> Any:
    """Call on one thread; a run that another process holds comes back as ``RunBusyError`` where the environment asks for that."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _variables(environment):
            return function(settings)
    except RunBusyError as error:
        return error
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of the environment, or remove those that are ``None``; in the end all are as before."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
