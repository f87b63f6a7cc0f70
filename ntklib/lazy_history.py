"""What the histories of the chapter on the lazy regime say: exponents, decay rates, and when a constant kernel may be trusted."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ntklib.phases import log_slope


def decay_rate(t: Sequence[float], component: Sequence[float]) -> float:
    """Return the rate of an exponential decay: minus the least-squares slope of log abs(component) in t; nan below three points.

    Raises:
        ValueError: If lengths differ, or a component is zero or not finite.
    """
    time, size = np.asarray(t, dtype=float), np.abs(np.asarray(component, dtype=float))
    if len(time) != len(size) or not ((size > 0).all() and np.isfinite(size).all()):
        msg = f"t and component must have one length, components finite and not zero. Got lengths {len(time)} and {len(size)}."
        raise ValueError(msg)
    return -float(np.polyfit(time, np.log(size), 1)[0]) if len(np.unique(time)) > 2 else math.nan


def seed_exponents(table: pd.DataFrame) -> list[float]:
    """Return the exponent of a power law for every seed: fits of the columns against the index, without missing and zero values."""
    columns = [pd.Series(table[seed]).replace([np.inf, -np.inf, 0.0], np.nan).dropna() for seed in table]
    return [log_slope([float(v) for v in column.index], column.tolist()) for column in columns]


def mode_rates(history: pd.DataFrame, *, max_drift: float = 0.01, span: float = 2.0) -> pd.DataFrame:
    """Fit the decay of the residual along every followed direction of one run, as long as its kernel stays where it was.

    Args:
        history: Rows of one run of the chapter on the lazy regime: ``time``, ``drift``, and ``component`` and ``eigenvalue`` by
            layer.
        max_drift: Only measured times up to the first with this drift count.
        span: Only times up to ``span`` over the first eigenvalue count, after which little of the direction is left.

    Returns:
        One row per direction, index ``mode``: ``eigenvalue`` of the first kernel, ``share`` of the first residual along it
        (absolute component over norm), ``points`` fitted, ``rate`` and relative ``error`` of the rate to the eigenvalue.
    """
    of = lambda quantity: pd.DataFrame(history[history["quantity"] == quantity])  # noqa: E731
    time, drift = (pd.Series(of(q).set_index("step")["value"]).sort_index() for q in ("time", "drift"))
    moved = [int(step) for step in pd.Series(drift[drift >= max_drift]).index.tolist()]
    still = time[time.index < min(moved, default=math.inf)]
    parts, eigvals = (of(q).pivot(index="step", columns="layer", values="value") for q in ("component", "eigenvalue"))
    rows = []
    for mode in sorted(parts, key=int):
        eigenvalue = float(eigvals[mode].iloc[0])
        times = pd.Series(still[still * eigenvalue <= span])
        rate = decay_rate(times.tolist(), parts[mode].loc[times.index].tolist())
        share = abs(float(parts[mode].iloc[0]))
        rows.append((int(mode), eigenvalue, share, len(times), rate, rate / eigenvalue - 1))
    return pd.DataFrame(rows, columns=["mode", "eigenvalue", "share", "points", "rate", "error"]).set_index("mode")


def drift_while_learning(history: pd.DataFrame, residual: float = 0.1) -> float:
    """Return the drift at the first measured step with at most this residual, over the drift at the last one.

    Args:
        history: Rows of one run with ``residual`` and ``drift``. Without a residual so small the result is 1.
        residual: Relative to the first one.
    """
    kept = pd.DataFrame(history[history["quantity"].isin(["residual", "drift"])])
    table = kept.pivot(index="step", columns="quantity", values="value").sort_index()
    done = table[table["residual"] <= residual]
    at = done.index[0] if len(done) else table.index[-1]
    return float(table["drift"][at] / table["drift"].iloc[-1])


def scale_share(drift: pd.Series, growth: pd.Series) -> pd.Series:
    r"""Return the part of a kernel's squared change that is one of scale, not of direction: :math:`(q - 1)^2 / d^2`.

    The identity of ``kernel_change``, divided by :math:`\lVert K_0 \rVert^2`, reads :math:`d^2 = (q - 1)^2 + 2 S q`.

    Args:
        drift: Relative drift d, positive.
        growth: Ratio q of the Frobenius norms, now over first.
    """
    return ((growth - 1) ** 2 / drift**2).clip(0, 1)


def forecast_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the errors of forecasts from the kernel at each measured step.

    Args:
        frame: Rows of several runs with ``variant`` and ``seed``: ``forecast``, whose layer is the step of the kernel as text, and
            ``lr_top``.

    Returns:
        One row per run and step: ``run``, ``step``, ``variant``, ``seed``, ``error`` and ``top`` (eta lambda_1 / 2 at the step).
        An error that is undefined because infinities met is infinite.
    """
    rows = pd.DataFrame(frame[frame["quantity"] == "forecast"])
    tops = pd.DataFrame(frame[frame["quantity"] == "lr_top"]).rename(columns={"value": "top"})
    rows = rows.assign(step=rows["layer"].astype(int), error=rows["value"].fillna(np.inf))
    kept = rows[["run", "step", "variant", "seed", "error"]]
    return kept.merge(tops[["run", "step", "top", "variant"]], on=["run", "step", "variant"])


def first_stable(table: pd.DataFrame) -> pd.DataFrame:
    """Return for every run that was unstable and is so no more the first row after the last unstable one.

    Args:
        table: As ``forecast_errors`` returns it. The last measured step, whose forecast is trivial, does not count.
    """
    found = []
    for _, run in table.sort_values("step").groupby("run"):
        out = run[run["top"] > 1]
        back = run[run["step"] > out["step"].max()].iloc[:-1]
        if len(out) and len(back):
            found.append(back.iloc[0])
    return pd.DataFrame(found, columns=table.columns)
