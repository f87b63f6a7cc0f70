"""Words for messages: what was required, what was got, what to do."""

import difflib
from collections.abc import Collection, Iterable


def unknown(kind: str, got: object, known: Iterable[str]) -> str:
    """Message for a name that is not one of ``known``: names them and the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {got!r}.{hint} Known: {', '.join(names)}."


def check_known(kind: str, got: object, known: Collection[str]) -> None:
    """Raise ``ValueError``, with the message of ``unknown``, unless a name is one of ``known``."""
    if got not in known:
        raise ValueError(unknown(kind, got, known))
