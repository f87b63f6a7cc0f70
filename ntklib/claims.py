"""Verdicts on the sources' claims, computed from measured numbers, and the ledger that lists them."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ntklib import provenance, storage, text, torchrun
from ntklib.chapters import Chapter
from ntklib.paths import project_root, runs_root

if TYPE_CHECKING:
    from ntklib.runs import RunResult  # importing it at run time would import torch

HOLDS, FAILS, INCONCLUSIVE = "holds", "fails", "inconclusive"
NOT_JUDGED, OTHER_PRESET = "not judged", "not judged at this preset"
SOURCES = {  # key in book/references.bib -> what the source is about
    "trace": "The trace of the NTK",
    "eos": "NTK eigenvectors at the edge of stability",
    "stability": "Stability of training dynamics",
    "cone": "The cone effect",
    "deep_linear": "Deep linear networks beyond the edge of stability",
}
OWN = "book"  # source of this book's own findings
Z = 2.0  # standard errors on either side


@dataclass(frozen=True)
class Measured:
    """A number with the standard error of its mean; 0 for one that has no sampling error, nan for an unknown one."""

    value: float
    sem: float = 0.0

    def __post_init__(self) -> None:
        for name in ("value", "sem"):  # a count may come as an integer of NumPy, which JSON does not know
            object.__setattr__(self, name, float(getattr(self, name)))


def over_seeds(values: Iterable[float]) -> Measured:
    """Mean and standard error over seeds (standard deviation with n - 1, over the square root of n); nan over none."""
    numbers = [float(v) for v in values]
    if not numbers:
        return Measured(math.nan, math.nan)
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return Measured(mean, math.nan)
    variance = math.fsum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1)
    return Measured(mean, math.sqrt(variance / len(numbers)))


@dataclass(frozen=True)
class Criterion:
    """One quantity and the range in which the claim puts it."""

    quantity: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def threshold(self) -> str:
        """The range in words."""
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.low == -math.inf else f"between {self.low:g} and {self.high:g}"

    def verdict(self, measured: Measured) -> str:
        """Compare value +- 2 standard errors with the range: inside holds, outside fails, across or undefined is inconclusive."""
        if math.isnan(measured.value) or math.isnan(measured.sem):
            return INCONCLUSIVE
        low, high = measured.value - Z * measured.sem, measured.value + Z * measured.sem
        if self.low <= low and high <= self.high:
            return HOLDS
        return FAILS if high < self.low or low > self.high else INCONCLUSIVE


@dataclass(frozen=True)
class Claim:
    """One falsifiable statement of a source, as listed in ``book/claims.yml``."""

    id: str
    source: str
    place: str
    statement: str
    kind: str
    chapter: str
    preset: str
    seeds: int
    criteria: list[Criterion]
    note: str = ""
    figure: str = ""  # name of the figure that shows it, where that is not the one of its section; "none" if no figure does


def load_claims(path: Path | None = None) -> dict[str, Claim]:
    """Read the claims, by id, in the order of the file."""
    entries = yaml.safe_load((path or project_root() / "book" / "claims.yml").read_text(encoding="utf-8"))
    claims = {}
    for entry in entries:
        criteria = [_criterion(c) for c in entry.pop("criteria")]
        claims[entry["id"]] = Claim(**entry, criteria=criteria)
    return claims


def _criterion(entry: dict[str, Any]) -> Criterion:
    low, high = entry.get("between", [entry.get("at_least", -math.inf), entry.get("at_most", math.inf)])
    return Criterion(entry["quantity"].strip(), float(low), float(high))


@dataclass(frozen=True)
class Judgement:
    """A claim with what was measured, at one preset; displays itself as a table in a notebook."""

    claim: Claim
    measured: list[Measured]
    seeds: int
    preset: str
    runs: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """One verdict per criterion."""
        return [c.verdict(m) for c, m in zip(self.claim.criteria, self.measured, strict=True)]

    @property
    def verdict(self) -> str:
        """Verdict on the whole claim: the worst of its criteria, and none at another preset or with too few seeds."""
        if self.preset != self.claim.preset:
            return OTHER_PRESET
        if FAILS in self.parts:
            return FAILS
        return INCONCLUSIVE if INCONCLUSIVE in self.parts or self.seeds < self.claim.seeds else HOLDS

    @property
    def deciding(self) -> int:
        """Index of the criterion that decided: the first failing one, else the first inconclusive one, else the first."""
        return next((self.parts.index(v) for v in (FAILS, INCONCLUSIVE) if v in self.parts), 0)

    def __repr__(self) -> str:
        return f"claim {self.claim.id}: {self.verdict} ({'; '.join(map(number, self.measured))})"

    def _repr_markdown_(self) -> str:
        rows = "\n".join(
            f"| {c.quantity} | {c.threshold} | {number(m)} | {v} |"
            for c, m, v in zip(self.claim.criteria, self.measured, self.parts, strict=True)
        )
        head = f"**Claim {self.claim.id}** ({self.claim.place}). {self.claim.statement.strip()}"
        note = f"\n\n{self.claim.note.strip()}" if self.claim.note else ""
        seeds = f"{self.seeds} seed{'s' if self.seeds != 1 else ''}, preset {self.preset}"
        return (
            f"{head}\n\n| quantity | required | measured | |\n|---|---|---|---|\n{rows}\n\n"
            f"Verdict: {badge(self.verdict)} ({seeds}).{note}"
        )


def badge(verdict: str) -> str:
    """A verdict as a coloured word."""
    kind = "unjudged" if verdict.startswith(NOT_JUDGED) else verdict
    return f'<span class="verdict verdict-{kind}">{escape(verdict)}</span>'


def number(measured: Measured) -> str:
    """Value with its standard error, to two digits of the error; large numbers with an exponent."""
    if not math.isfinite(measured.value):
        return str(measured.value)
    if math.isnan(measured.sem):
        return f"{measured.value:.3g} (standard error unknown)"
    if abs(measured.value) >= 1e5 or not math.isfinite(measured.sem):
        return f"{measured.value:.3g} ± {measured.sem:.2g}"
    if measured.sem <= 1e-12 * abs(measured.value):  # none, or rounding
        return f"{measured.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(measured.sem)))
    return f"{measured.value:.{digits}f} ± {measured.sem:.{digits}f}"


class Verdicts:
    """The judgements of one chapter, collected and handed to the ledger.

    Args:
        chapter: The chapter that judges.
    """

    def __init__(self, chapter: Chapter) -> None:
        self.chapter = chapter
        self.judgements: dict[str, Judgement] = {}
        self._claims = load_claims()

    def judge(self, claim: str, measured: Sequence[Measured], *, seeds: int = 1, runs: "Iterable[RunResult]" = ()) -> Judgement:
        """Judge a claim by one measured number per criterion.

        Args:
            claim: Id.
            measured: Numbers, in the order of the claim's criteria.
            seeds: Number of seeds behind them.
            runs: Runs behind them.

        Raises:
            ValueError: If the claim is unknown or the count of numbers is not that of its criteria.
        """
        text.check_known("claim", claim, self._claims)
        expected = len(self._claims[claim].criteria)
        if len(measured) != expected:
            msg = f"Claim {claim} has {expected} criteria, so {expected} numbers are needed. Got {len(measured)}."
            raise ValueError(msg)
        count = operator.index(seeds)  # a plain int, also of numpy's
        self.judgements[claim] = Judgement(self._claims[claim], list(measured), count, self.chapter.preset, [r.key for r in runs])
        return self.judgements[claim]

    def save(self, results: "Iterable[RunResult]" = ()) -> Path:
        """Write all judgements of the chapter with their provenance, atomically, for the ledger."""
        results = list(results)
        sessions = [s for r in results for s in r.sessions]
        record = {
            "chapter": self.chapter.name, "preset": self.chapter.preset, "parameters": self.chapter.parameters,
            "claims": {k: {"measured": [asdict(m) for m in j.measured], "seeds": j.seeds, "runs": j.runs}
                       for k, j in self.judgements.items()},
            "runs": [r.key for r in results], "hardware": hardware(sessions),
            "wall_seconds": round(sum(s["wall_seconds"] for s in sessions), 1),
            "git": provenance.git_state(), "versions": provenance.versions(), "written": provenance.utc_now(),
        }  # fmt: skip
        path = runs_root() / "results" / self.chapter.preset / f"{self.chapter.name}.json"
        if torchrun.rank() == 0:
            storage.write_json(path, record)
        return path


def hardware(sessions: Sequence[dict[str, Any]]) -> str:
    """The machines of some runs, each once."""
    return "; ".join(
        dict.fromkeys(
            s.get("gpu") or f"{s['cpu']}, {s['threads']} thread{'s' if s['threads'] > 1 else ''} per run" for s in sessions
        )
    )


def ledger() -> list[dict[str, Any]]:
    """All claims with the verdicts there are: this machine's results first, committed reference results otherwise."""
    return [_entry(claim, _find_record(claim)) for claim in load_claims().values()]


def _find_record(claim: Claim) -> dict[str, Any] | None:
    """Result file of the claim's chapter and preset that judges the claim."""
    folders = (runs_root() / "results", project_root() / "book" / "reference")
    for folder in folders:
        record = storage.read_json(folder / claim.preset / f"{claim.chapter}.json")
        if record and claim.id in record["claims"]:
            return record
    return None


def _entry(claim: Claim, record: dict[str, Any] | None) -> dict[str, Any]:
    entry = {
        "id": claim.id, "source": claim.source, "place": claim.place, "statement": claim.statement.strip(), "kind": claim.kind,
        "chapter": claim.chapter, "preset": claim.preset, "quantity": claim.criteria[0].quantity, "value": None, "sem": None,
        "seeds": None, "threshold": claim.criteria[0].threshold, "verdict": NOT_JUDGED, "run": None, "hardware": None,
        "commit": None, "date": None, "criteria": [_bounds(c) for c in claim.criteria], "note": claim.note.strip(),
    }  # fmt: skip
    if record is None:
        return entry
    found = record["claims"][claim.id]
    judgement = Judgement(claim, [Measured(**m) for m in found["measured"]], found["seeds"], record["preset"], found["runs"])
    i = judgement.deciding
    criteria = [
        _bounds(c) | asdict(m) | {"verdict": v} for c, m, v in zip(claim.criteria, judgement.measured, judgement.parts, strict=True)
    ]
    return entry | {
        "quantity": claim.criteria[i].quantity, "value": judgement.measured[i].value, "sem": judgement.measured[i].sem,
        "seeds": judgement.seeds, "threshold": claim.criteria[i].threshold, "verdict": judgement.verdict,
        "run": judgement.runs, "hardware": record["hardware"] or None, "commit": record["git"]["commit"],
        "date": record["written"], "criteria": criteria,
    }  # fmt: skip


def _bounds(criterion: Criterion) -> dict[str, Any]:
    return {"quantity": criterion.quantity, "threshold": criterion.threshold, "low": criterion.low, "high": criterion.high}
