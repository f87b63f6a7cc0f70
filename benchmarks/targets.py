"""What the engine set out to reach, and whether a run shows it."""

from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
FUNC = ("func-einsum", "func-gemm")


def completed(result: Result) -> Result:
    """Add to each row its ratio to ours at the same size, its peak memory relative to ours, and the fraction of the floor."""
    clock = "wall_seconds" if result["device"] == "cuda" else "cpu_seconds"
    ours = {row["n"]: row for row in result["methods"] if row["method"] == "ours"}
    for row in result["methods"]:
        mine, flops = ours[row["n"]], result["flops"].get(str(row["n"]))
        row["ratio"] = _quotient(row[clock], mine[clock])
        row["peak_ratio"] = _quotient(row["peak_mib"], mine["peak_mib"])
        least = _quotient(flops and flops["total"], result["gemm_flops_per_second"])
        row["floor_fraction"] = _quotient(least, row[clock])
    return result


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        text: In words.
        workload: Where it is measured.
        quantity: ``"ratio"`` (peer's seconds over ours), ``"peak_ratio"`` (memory, likewise) or ``"floor_fraction"`` (ours).
        least: Value to reach.
        methods: The peer's forms, at the workload's full size where there are several; the smallest ratio counts.
    """

    text: str
    workload: str
    quantity: str
    least: float
    methods: tuple[str, ...] = ("ours",)

    def judge(self, results: dict[str, Result]) -> Result:
        """Return text, required and found value, and whether it is met; None where it was not measured."""
        result = results.get(self.workload, {"methods": [], "n": 0})
        rows = [r for r in result["methods"] if r["method"] in self.methods and not r["status"]]
        if len(self.methods) > 1 or self.methods == ("ours",):
            rows = [r for r in rows if r["n"] == result["n"]]
        found = min((r[self.quantity] for r in rows if r[self.quantity] is not None), default=None)
        return verdict(self.text, f">= {self.least:g}", found, found is not None and found >= self.least)


def verdict(text: str, required: str, found: float | None, met: bool) -> Result:
    """One line of the table of targets."""
    return {"text": text, "required": required, "found": found, "met": None if found is None else met}


TARGETS = (
    Target("W1 kernel against torch.func's published recipe", "W1", "ratio", 400, ("func-einsum",)),
    Target("W1 kernel against nngeometry", "W1", "ratio", 7, ("nngeometry",)),
    Target("W1 kernel against neural-tangents, structured", "W1", "ratio", 4, ("nt-structured",)),
    Target("W2 kernel against the best form of torch.func", "W2", "ratio", 6, FUNC),
    Target("W2 peak memory of that form over ours", "W2", "peak_ratio", 20, FUNC),
    Target("W2 kernel against neural-tangents, structured", "W2", "ratio", 2.5, ("nt-structured",)),
    Target("W3 kernel against the best form of torch.func", "W3", "ratio", 3, FUNC),
    Target("W4 exact trace against torch.func", "W4", "ratio", 5, ("func-chunks",)),
    Target("W4 exact trace against backpack", "W4", "ratio", 3, ("backpack-l2",)),
    Target("W1 fraction of the floor", "W1", "floor_fraction", 0.60),
    Target("W2 fraction of the floor", "W2", "floor_fraction", 0.65),
    Target("W3 fraction of the floor", "W3", "floor_fraction", 0.45),
    Target("vision transformer against the best form of torch.func", "ViT", "ratio", 2, FUNC),
    Target("depthwise-separable CNN against the best form of torch.func", "separable", "ratio", 2, FUNC),
    Target("WideResNet-28-2 against the best form of torch.func", "WRN", "ratio", 2, FUNC),
    Target("modular-addition transformer against the best form of torch.func", "addition", "ratio", 2, FUNC),
)


def judge_errors(results: dict[str, Result], most: float = 1e-12) -> Result:
    """Largest float64 error of ours over all workloads."""
    errors = [r["error_float64"] for w in results.values() for r in w["methods"] if r["method"] == "ours"]
    found = max(errors) if errors and None not in errors else None
    return verdict("float64 error on every workload", f"<= {most:g}", found, found is not None and found <= most)


def judge_probes(probes: Result | None) -> list[Result]:
    """Scatter of one output probe, measured and closed-form, and the error of orthogonal probes at c draws (float32)."""
    row = probes["estimators"]["output"] if probes else {}
    scatter = max(row["relative_sd"], row["relative_sd_closed_form"]) if row else None
    error = probes["orthogonal_error"] if probes else None
    return [
        verdict("relative sd of one output probe, W2", "<= 0.015", scatter, scatter is not None and scatter <= 0.015),
        verdict("error of c orthogonal probes in float32, W2", "<= 1e-05", error, error is not None and error <= 1e-5),
    ]


def judge(results: dict[str, Result], probes: Result | None) -> list[Result]:
    """All targets."""
    return [*(t.judge(results) for t in TARGETS), judge_errors(results), *judge_probes(probes)]
