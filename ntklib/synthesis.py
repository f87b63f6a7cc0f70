"""When the probes of a run come to rest, when its events happen, and whether the one tells of the other."""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import pandas as pd

from ntklib.claims import Measured, Z, over_seeds
from ntklib.cone import angles_from_distances, angles_to_axis, phase_boundary
from ntklib.phases import first_time, pairwise_distances, settling_time

LOGARITHMIC = {  # probe -> whether it is followed on a logarithmic scale
    "trace": True, "distance": False, "angle": False, "velocity": True, "kta": False, "alignment": False, "sharpness": True,
    "norm": True, "perturbation": True,
}  # fmt: skip
PROBES = tuple(LOGARITHMIC)
EVENTS = ("training accuracy", "test accuracy", "loss", "phase boundary")
SHARE_OF_FINAL = 0.99  # of its last value, that an accuracy has to reach
STEP_SHARE = 0.75  # of the variance of a straight line that two levels explain: more makes a boundary
CONE_SHARE = 0.5  # of the first kernel's angle to the axis of the late ones, within which a kernel is in their cone
SPLIT = "probe"


def probe_table(history: pd.DataFrame) -> pd.DataFrame:
    """Return the nine probes of one run as columns, one row per measured step.

    ``distance`` is S to the first kernel and ``angle`` that to the last one, in radians; ``velocity`` is the angle to the kernel
    measured before, over the steps between the two, and undefined (nan) at the first step. The others are as they were logged.

    Args:
        history: Rows that ``log_probes`` has written.
    """
    rows = pd.DataFrame(history[(history["split"] == SPLIT) & (history["layer"] == "")])
    table = rows.pivot(index="step", columns="quantity", values="value").sort_index()
    steps, angle = path_of(history)
    velocity = np.diagonal(angle, 1) / np.diff(steps)
    more = {"distance": 1 - np.cos(angle[0]), "angle": angle[-1], "velocity": [math.nan, *velocity]}
    return pd.DataFrame(table.assign(**more), columns=list(PROBES))


def path_of(history: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Measured steps of one run, and the pairwise angles of its kernels in radians."""
    traces = history[(history["split"] == SPLIT) & (history["quantity"] == "trace")]
    steps = sorted(int(step) for step in traces["step"])
    return np.array(steps), angles_from_distances(pairwise_distances(history, SPLIT, steps))


def rest_time(step: Sequence[float], value: Sequence[float], tolerance: float, *, logarithmic: bool = False) -> float:
    """Return when a curve comes to rest: ``settling_time`` in the range of the curve, or nan where it is not seen to rest.

    A steady drift, a straight line over the measurements, is within ``tolerance`` of its end for a share ``tolerance`` of them.
    So a curve counts as at rest only if it has settled by the time that a share of 2 ``tolerance`` of the measurements is still to
    come; otherwise the run is too short to tell (censored), and the time is nan. So it is for a constant curve.

    Args:
        step: Ascending steps, step 0 not among them, evenly spaced on the axis of time that counts.
        value: The curve at these steps; steps where it is not finite, or not positive for ``logarithmic``, are left out.
        tolerance: Share of the range, below 1/2.
        logarithmic: Whether to follow the logarithm.

    Raises:
        ValueError: If the tolerance is out of range.
    """
    if not 0 < tolerance < 0.5:
        msg = f"tolerance must be between 0 and 1/2. Got {tolerance}."
        raise ValueError(msg)
    t, v = np.asarray(step, dtype=float), np.asarray(value, dtype=float)
    kept = np.isfinite(v) & (v > 0 if logarithmic else True)
    t, v = t[kept], v[kept]
    if len(t) < 3 or np.ptp(v) == 0:
        return math.nan
    settled = settling_time(list(t), list(np.log(v) if logarithmic else v), tolerance=tolerance, measure="range")
    return _if_early(t, settled, tolerance)


def _if_early(t: np.ndarray, time: float, tolerance: float) -> float:
    """The time, if at least a share 2 tolerance of the measurements follows; nan otherwise."""
    left = (t > time).sum() / (len(t) - 1)
    return float(time) if math.isfinite(time) and left >= 2 * tolerance - 1e-12 else math.nan


def rest_times(history: pd.DataFrame, tolerance: float) -> dict[str, float]:
    """When each probe of a run comes to rest, see ``rest_time``; nan for a probe that is not seen to."""
    table = probe_table(history)
    table = pd.DataFrame(table[table.index > 0])
    return {p: rest_time(list(table.index), table[p].tolist(), tolerance, logarithmic=LOGARITHMIC[p]) for p in PROBES}


def event_times(history: pd.DataFrame, tolerance: float) -> dict[str, float]:
    """When the events of a run happen; nan for one that does not, or not long enough before the end (see ``rest_time``).

    An accuracy is there when it is first at least 99 % of its last value, the loss when its logarithm comes to rest. The phase
    boundary is that of the cone chapter, the best split of log velocity into two levels, where these explain more than the three
    quarters that they would of a straight line.
    """
    rows = pd.DataFrame(history[(history["split"] == "") & (history["step"] > 0)])
    table = rows.pivot(index="step", columns="quantity", values="value").sort_index()
    t = np.array(table.index, dtype=float)
    reached = lambda a: _if_early(t, first_time(list(t), a.tolist(), SHARE_OF_FINAL * a.iloc[-1]), tolerance)  # noqa: E731
    speed = probe_table(history)["velocity"].iloc[1:]
    border = math.nan
    if len(speed) >= 4 and (speed > 0).any():
        found = phase_boundary(np.array(speed.index), [speed.to_numpy()], num_resamples=2)
        border = _if_early(t, found.time, tolerance) if found.explained > STEP_SHARE else math.nan
    loss = rest_time(list(t), table["loss"].tolist(), tolerance, logarithmic=True)
    times = (reached(table["accuracy_train"]), reached(table["accuracy_test"]), loss, border)
    return dict(zip(EVENTS, times, strict=True))


def cone_entry(history: pd.DataFrame, late_share: float = 1 / 3) -> float:
    """Return the step from which on the kernel's direction stays in the cone of the late kernels; nan without a cone.

    The axis is the mean direction of the last ``late_share`` of the measured kernels. As in the criterion of the cone chapter
    (claim D4), a kernel is in the cone when its angle to the axis is at most half of that of the first kernel; there is no cone if
    a late kernel is outside, or if the first one never was.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < late_share < 1:
        msg = f"late_share must be between 0 and 1. Got {late_share}."
        raise ValueError(msg)
    steps, angle = path_of(history)
    late = np.arange(len(steps))[-max(2, math.ceil(late_share * (len(steps) - 1))) :]
    away = angles_to_axis(angle, late)
    outside = np.flatnonzero(away > CONE_SHARE * away[0])
    entry = int(outside[-1]) + 1 if len(outside) else 0
    return float(steps[entry]) if 0 < entry <= late[0] else math.nan


def coincidence(first: Sequence[float], second: Sequence[float], factor: float, needed: int = 2) -> tuple[Measured, int, bool]:
    """Compare two times over seeds: mean and error of log(first/second), the pairs that count, and whether they coincide.

    Two times coincide when the mean log ratio is within log ``factor`` of 0 at two standard errors, over at least ``needed`` pairs
    of which both are finite and positive, and these are more than half of all. The other pairs are censored and say nothing.
    Steps are measured on a grid, so that equal ratios in all seeds have no spread: the error is then that of the grid, which the
    caller's factor has to exceed.

    Raises:
        ValueError: If lengths differ or the factor is not above 1.
    """
    if len(first) != len(second) or not factor > 1:
        msg = f"Both must have one time per seed, and factor must be above 1. Got {len(first)}, {len(second)} and {factor}."
        raise ValueError(msg)
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if 0 < a < math.inf and 0 < b < math.inf]
    ratio = over_seeds(math.log(a / b) for a, b in pairs)
    enough = len(pairs) >= needed and 2 * len(pairs) > len(first)
    return ratio, len(pairs), bool(enough and abs(ratio.value) + Z * ratio.sem <= math.log(factor))


def coincidences(rests: pd.DataFrame, events: pd.DataFrame, factor: float) -> pd.DataFrame:
    """Tabulate ``coincidence`` of every probe with every event in every scenario.

    Args:
        rests: One row per run with index (scenario, seed), one column per probe.
        events: The same with one column per event.
        factor: See ``coincidence``.

    Returns:
        One row per scenario, probe and event: ``value`` and ``sem`` of the log ratio, probe over event, ``pairs`` and
        ``coincides``.
    """
    rows = []
    for name in rests.index.unique(0):
        for probe in rests:
            for event in events:
                a, b = (frame.loc[name, column].tolist() for frame, column in ((rests, probe), (events, event)))
                ratio, pairs, hit = coincidence(a, b, factor)
                rows.append((name, probe, event, ratio.value, ratio.sem, pairs, hit))
    return pd.DataFrame(rows, columns=["scenario", "probe", "event", "value", "sem", "pairs", "coincides"])


def chance_share(times: Sequence[float], event: float, factor: float, tolerance: float) -> float:
    """Share of the measured steps at which a curve may come to rest that are within ``factor`` of an event.

    What a probe that rests at a random measured step would score: the steps that ``rest_time`` can return are all but the last
    2 ``tolerance`` of them.

    Args:
        times: Measured steps, without step 0.
        event: Time of the event; nan gives nan.
        factor: As in ``coincidence``.
        tolerance: As in ``rest_time``.
    """
    if not math.isfinite(event):
        return math.nan
    t = np.asarray(times, dtype=float)
    allowed = np.array([math.isfinite(_if_early(t, time, tolerance)) for time in t])
    return float((np.abs(np.log(t[allowed] / event)) <= math.log(factor) + 1e-12).mean())


def shuffle_test(probe: Mapping[str, float], event: Mapping[str, float]) -> tuple[float, float]:
    """Mean absolute difference of probe and event over scenarios, and how often another assignment of scenarios does as well.

    Both are positions of a time on the measured axis of its own run, from 0 to 1. If the probe comes to rest at its own usual
    position whatever the event, it fits the events of other scenarios as well as its own: the second number, the share of all
    assignments of probes to events whose mean difference is at most the observed one, is then about uniform. An exact permutation
    test; the observed assignment is one of them.

    Args:
        probe: Scenario -> mean position of the probe's rest; scenarios without are left out.
        event: The same of the event.

    Returns:
        Difference and p-value; nan with fewer than three scenarios.
    """
    names = [n for n in probe if n in event and math.isfinite(probe[n]) and math.isfinite(event[n])]
    if len(names) < 3:
        return math.nan, math.nan
    a, b = np.array([probe[n] for n in names]), np.array([event[n] for n in names])
    observed = float(np.abs(a - b).mean())
    shuffled = np.array([np.abs(a[list(order)] - b).mean() for order in permutations(range(len(names)))])
    return observed, float((shuffled <= observed + 1e-12).mean())


def position(times: Sequence[float], time: float) -> float:
    """Position of a measured step among all of them, from 0 for the first to 1 for the last; nan for nan."""
    t = np.asarray(times, dtype=float)
    return float((t < time).sum() / (len(t) - 1)) if math.isfinite(time) else math.nan
