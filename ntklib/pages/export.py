"""The ledger for machines: a list of objects in JSON, on the command line and beside the book's pages."""

import json
import math
from typing import Any

from ntklib import claims
from ntklib.pages.places import all_places, command, judged_anchor, ledger_anchor

NAME = "claims.json"  # beside the book's first page
FIELDS = {  # field -> meaning, as the ledger page explains it
    "id": "name of the claim; does not change between versions",
    "source": f"key of the source in the bibliography; `{claims.OWN}` for a finding of this book",
    "place": "theorem, figure or section of the source",
    "statement": "the claim in our words, with LaTeX between dollar signs",
    "kind": "`identity`, `statistic`, `confounded` (needs a control) or `qualitative`",
    "verdict": "`holds`, `fails`, `inconclusive` or `not judged`",
    "chapter": "notebook that judges it; `preset` is the preset at which it is judged",
    "quantity": "the measured quantity that decided the verdict, with its `value`, `sem` (standard error) and `threshold`",
    "reason": "why `value` or `sem` is null where something was measured; else null",
    "criteria": "all quantities, each with the bounds `low` and `high` (null: none), `value`, `sem`, `interval` (value plus and "
    f"minus {claims.Z:g} standard errors), `verdict` and `reason`",
    "seeds": "number of independent runs behind the numbers; 1 for a computation without randomness",
    "hardware": "machine of the runs; null where nothing was trained",
    "run": "names of the runs in the store",
    "commit": "version of the code that measured, with the `date` of the measurement",
    "note": "what the claim leaves open, or why its criterion is what it is",
    "command": "measures it again",
    "figure": "address, in the book, of the figure that shows it; null if none does",
    "code": "address of the cell that judged it, and `entry` of the claim in the ledger",
}


def entries() -> list[dict[str, Any]]:
    """The ledger with addresses, commands and intervals; every number is finite or null."""
    places = all_places()
    listed = claims.load_claims()
    found = []
    for entry in claims.ledger():
        chapter, claim = entry["chapter"], listed[entry["id"]]
        figure = places[chapter].figure_of(claim) if chapter in places else None
        page = f"executed/{chapter}.html"
        judged = chapter in places and claim.id in places[chapter].judged
        criteria = [c | _interval(c) for c in entry["criteria"]]
        found.append(
            entry
            | {"reason": _reason(entry["value"], entry["sem"]), "criteria": criteria}
            | {
                "command": command(chapter, claim.preset),
                "figure": f"{page}#{figure}" if figure else None,
                "code": f"{page}#{judged_anchor(claim.id)}" if judged else None,
                "entry": f"claims.html#{ledger_anchor(claim.id)}",
            }
        )
    return finite(found)


def as_json() -> str:
    """The entries as text."""
    return json.dumps(entries(), indent=1, allow_nan=False)


def finite(value: Any) -> Any:
    """The same structure with null for numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(criterion: dict[str, Any]) -> dict[str, Any]:
    value, sem = criterion.get("value"), criterion.get("sem")
    if value is None or sem is None or not math.isfinite(value) or not math.isfinite(sem):
        return {"interval": None, "reason": _reason(value, sem)}
    return {"interval": [value - claims.Z * sem, value + claims.Z * sem], "reason": None}


def _reason(value: float | None, sem: float | None) -> str | None:
    """Why a measured number cannot be written in JSON."""
    if value is None or sem is None:
        return None  # nothing was measured
    if math.isnan(value):
        return "value: not a number, as nothing could be measured"
    if math.isinf(value):
        return f"value: {'plus' if value > 0 else 'minus'} infinity"
    return None if math.isfinite(sem) else "sem: unknown" if math.isnan(sem) else "sem: infinite"
