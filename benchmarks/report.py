"""Tables for the terminal, and the file that the book reads."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.targets import Result, judge
from benchmarks.workloads import ROOT
from ntklib import provenance, storage


def path(name: str) -> Path:
    """Where results are kept: of ``"cpu"``, ``"cuda"``, or of a further processor under a name of its own."""
    return ROOT / "book" / "reference" / ("benchmarks.json" if name == "cpu" else f"benchmarks_{name}.json")


def origin(versions: dict[str, str], repeats: int) -> dict[str, Any]:
    """Commit, date, machine and versions of a measurement."""
    machine = {"cpu": provenance.cpu_name(), "cores": os.cpu_count(), "threads": 1, "system": platform.platform()}
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), "written": provenance.utc_now(), "repeats": repeats,
        "git": provenance.git_state(), "machine": machine, "versions": provenance.versions() | versions,
    }  # fmt: skip


def save(workloads: list[Result], probes: Result | None, name: str) -> Path:
    """Write results atomically; workloads that were not measured now keep what is stored."""
    stored = storage.read_json(path(name)) or {"workloads": [], "probes": None}
    merged = {w["name"]: w for w in [*stored["workloads"], *workloads]}
    probes = probes or stored["probes"]
    content = {"name": path(name).stem, "workloads": list(merged.values()), "probes": probes, "targets": judge(merged, probes)}
    storage.write_json(path(name), content)
    return path(name)


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def print_workload(console: Console, result: Result) -> None:
    """Table of one workload."""
    rate, flops = result["gemm_flops_per_second"], result["flops"].get(str(result["n"]))
    seconds = "wall s" if result["device"] == "cuda" else "CPU s"
    title = f"{result['name']}: {result['title']}, n = {result['n']}"
    if flops and rate:
        title += f"; floor {flops['total'] / 1e9:.4g} GF = {flops['total'] / rate:.3g} s at {rate / 1e9:.0f} GF/s"
    compared = (
        f"ratio: to ntklib at the same n. MiB: growth of memory. err: relative, against loops in float64 on {result['compared']} "
        "examples. floor: fraction of the floor reached."
    )
    table = Table(title=title, caption=compared, title_justify="left", caption_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("n", seconds, "runs", "ratio", "MiB", "err f32", "err f64", "floor"):
        table.add_column(name, justify="right")
    for row in result["methods"]:
        table.add_row(*cells(row, result["device"]))
        if row["status"]:
            table.add_row(f"    [dim]{row['status']}[/dim]")
    console.print(table)


def cells(row: Result, device: str) -> list[str]:
    """One line of the table."""
    return [
        row["label"], str(row["n"]), number(row["wall_seconds" if device == "cuda" else "cpu_seconds"]), str(row["repeats"]),
        number(row["ratio"], ".2f") + ("x" if row["ratio"] else ""), number(row["peak_mib"], ".0f"),
        number(row["error_float32"], ".1e"), number(row["error_float64"], ".1e"),
        "-" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}",
    ]  # fmt: skip


def print_probes(console: Console, probes: Result) -> None:
    """Table of the trace estimators."""
    title = f"one draw of each trace estimator, {probes['title']}, n = {probes['n']}, {probes['draws']} draws"
    caption = f"costs in forward passes; {probes['outputs']} orthogonal probes: relative error {probes['orthogonal_error']:.1e}"
    columns = ("method", "relative sd", "closed form", "mean / exact", "cost alone", "cost amortised")
    table = Table(*columns, title=title, caption=caption)
    for name, row in probes["estimators"].items():
        keys = ("relative_sd", "relative_sd_closed_form", "mean_over_exact", "cost", "cost_amortised")
        table.add_row(name, *(number(row[key]) for key in keys))
    console.print(table)


def print_targets(console: Console, targets: list[Result]) -> None:
    """Table of the goals that were measured."""
    measured = [t for t in targets if t["found"] is not None]
    table = Table("target", "required", "found", "", title="targets")
    for t in measured:
        table.add_row(t["text"], t["required"], number(t["found"]), "[green]met[/green]" if t["met"] else "[red]not met[/red]")
    console.print(table)
    if len(measured) < len(targets):
        console.print(f"{len(targets) - len(measured)} targets were not measured in this run.")
