"""The book's page of benchmark results, from the file that ``python -m benchmarks --save`` keeps."""

from collections.abc import Iterable, Sequence
from typing import Any

from ntklib import storage
from ntklib.paths import project_root

Row = dict[str, Any]
HEAD = """# Benchmarks

The kernels and traces of this package beside those of other packages, on the same machine, in the same run. Every method runs in a
process of its own on one thread; rounds go through all methods in turn, and the median over rounds counts. *Range* is the least and
the most, and of how many rounds; a method that takes long has one, and a slow or quick phase of the machine can change that by a
third. *Ratio* is the time of a method over ours for the same number of examples: above 1, ours is faster. *Memory* is what the
process grows by during the call. *Errors* are relative, in the Frobenius norm, against loops over plain automatic differentiation
in float64. The *floor* is the time that the operations of the best order of plain sums and products would take at the measured
speed of a large matrix product; convolutions that need fewer multiplications (Winograd's), in a library or in our passes, can beat
it.

Run it yourself: `make bench`, or `python -m benchmarks --help`.
"""


def benchmarks_page() -> str:
    """Markdown of the page; says so where nothing was measured yet."""
    folder = project_root() / "book" / "reference"
    parts = [HEAD]
    for name, device in (("benchmarks.json", "CPU"), ("benchmarks_cuda.json", "GPU")):
        stored = storage.read_json(folder / name)
        if stored is None:
            parts.append(f"No {device} measurement is stored.\n")
            continue
        parts += [_targets(stored["targets"]), *(_workload(w) for w in stored["workloads"]), _probes(stored["probes"])]
    for path in sorted(folder.glob("benchmarks_*.json")):
        stored = None if path.name == "benchmarks_cuda.json" else storage.read_json(path)
        if stored is not None:
            parts.append(_elsewhere(stored))
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def _number(value: float | None, form: str = "", unit: str = "") -> str:
    """In ``form``; unless given, three digits or all before the point. A dash for None."""
    if value is None:
        return "–"
    form = form or (".0f" if abs(value) >= 1000 else ".3g")
    return format(value, form).replace("e-", "e\u2011") + unit  # a hyphen that does not break


def _targets(targets: Sequence[Row]) -> str:
    return "## Targets\n\n" + _target_table(targets)


def _target_table(targets: Sequence[Row]) -> str:
    verdict = {True: "met", False: "**not&nbsp;met**", None: "not measured"}
    rows = [
        [t["text"], t["required"].replace(">=", "≥").replace("<=", "≤"), _number(t["found"]), verdict[t["met"]]] for t in targets
    ]
    return _table(("target", "required", "found", ""), rows)


def _elsewhere(stored: Row) -> str:
    """What was measured on a further processor, with the targets that this decides."""
    workloads = stored["workloads"]
    machines = dict.fromkeys(f"{w['machine']['cpu']} with {w['versions']['instruction set']}" for w in workloads)
    head = f"## On another processor: {', '.join(machines)}\n\nRatios and fractions depend on the processor.\n"
    decided = [t for t in stored["targets"] if t["met"] is not None]
    sections = [*(_workload(w) for w in workloads), _probes(stored["probes"])]
    return "\n".join([head, _target_table(decided), *("#" + section for section in sections if section)])


def _workload(w: Row) -> str:
    flops, rate = w["flops"].get(str(w["n"])), w["gemm_flops_per_second"]
    floor = (
        f" Floor: {flops['total'] / 1e9:.3g} GF at {rate / 1e9:.0f} GF/s, {flops['total'] / rate:.2g} s." if flops and rate else ""
    )
    clock = "wall_seconds" if w["device"] == "cuda" else "cpu_seconds"
    header = ("method", "n", "seconds", "range (rounds)", "ratio", "memory, MiB", "error float32", "error float64", "of the floor")
    rows = [
        [
            r["label"] + (f"<br>*{r['status']}*" if r["status"] else ""),
            str(r["n"]), _number(r[clock]), _range(r, clock), _number(r["ratio"]),
            _number(r["peak_mib"], ".0f"), _number(r["error_float32"], ".1e"), _number(r["error_float64"], ".1e"),
            _number(r["floor_fraction"], ".0%"),
        ]
        for r in w["methods"]
    ]  # fmt: skip
    said = f"n = {w['n']}. Errors on {w['compared']} examples.{floor} {_origin(w)}"
    return f"## {w['name']}: {w['title']}\n\n{said}\n\n{_table(header, rows)}"


def _range(r: Row, clock: str) -> str:
    """Least and most seconds of the rounds that count, where these are kept, and how many they are."""
    found = r.get(f"all_{clock}", [])
    return f"{min(found):.3g}–{max(found):.3g} ({len(found)})" if len(found) > 1 else f"({r['repeats']})"


def _origin(w: Row) -> str:
    machine, git = w["machine"], w["git"]
    state = " with changes" if git.get("dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in w["versions"].items() if name in PACKAGES)
    return (
        f"{machine['cpu']}, {machine['threads']} thread, {w['repeats']} rounds, {w['written'][:10]}, "
        f"commit {str(git.get('commit'))[:10]}{state}; {versions}."
    )


PACKAGES = ("torch", "instruction set", "nngeometry", "backpack-for-pytorch", "curvlinops-for-pytorch", "neural-tangents", "jax")


def _probes(probes: Row | None) -> str:
    if probes is None:
        return ""
    header = (
        "estimator",
        "relative standard deviation of one draw",
        "closed form",
        "mean over exact",
        "cost alone",
        "cost of one of many",
    )
    keys = ("relative_sd", "relative_sd_closed_form", "mean_over_exact", "cost", "cost_amortised")
    rows = [[name, *(_number(row[key]) for key in keys)] for name, row in probes["estimators"].items()]
    said = (
        f"{probes['title']}, n = {probes['n']}, {probes['draws']} draws. Costs are times, in forward passes. {probes['outputs']} "
        f"orthogonal probes are exact: relative error {probes['orthogonal_error']:.1e} in float32."
    )
    return f"## One draw of each trace estimator\n\n{said}\n\n{_table(header, rows)}"
