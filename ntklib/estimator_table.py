"""What the stored benchmark says about one draw of each trace estimator, for the page on choosing one."""

from pathlib import Path

from ntklib import storage
from ntklib.paths import project_root

HEADER = (
    "method",
    "relative standard deviation, measured",
    "by {eq}`eq-estimators-deviation`",
    "mean over exact",
    "cost alone",
    "cost of one of many",
)
KEYS = ("relative_sd", "relative_sd_closed_form", "mean_over_exact", "cost", "cost_amortised")


def source() -> Path:
    """The file of the stored measurement."""
    return project_root() / "book" / "reference" / "benchmarks.json"


def table() -> str:
    """Return the measurement as a Markdown table and a sentence on its circumstances; says so where nothing is stored."""
    stored = storage.read_json(source())
    probes = stored and stored.get("probes")
    if not probes:
        return "Nothing is stored yet: `python -m benchmarks --save` measures it.\n"
    rows = [
        " | ".join([f"`{name}`", *(f"{values[key]:.2g}" for key in KEYS)])
        for name, values in probes["estimators"].items()
    ]
    lines = [" | ".join(HEADER), "|".join(["---"] * len(HEADER)), *rows]
    said = (
        f"{probes['title']}, $n$ = {probes['n']}, $c$ = {probes['outputs']}, {probes['draws']} draws, "
        f"{probes['machine']['cpu']}, {probes['machine']['threads']} thread. The perturbation has $\\epsilon$ = 0.001. "
        f"With $c$ orthogonal probes the relative error is {probes['orthogonal_error']:.1e}, that of single precision."
    )
    return "\n".join([*(f"| {line} |" for line in lines), "", said, ""])
