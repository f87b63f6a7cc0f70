"""A measured interval beside the range that a claim requires, as a small drawing in a line of text."""

import math

from ntklib.claims import Criterion, Measured, Z

WIDTH, HEIGHT, MARGIN = 120, 14, 4  # CSS pixels


def drawing(criterion: Criterion, measured: Measured, verdict: str) -> str:
    """Inline SVG: the required range as a band, value and two standard errors on top; empty for numbers that are not finite.

    It repeats numbers that stand beside it in words, so that readers of a screen are spared it.
    """
    spread = Z * measured.sem
    if not math.isfinite(measured.value) or not math.isfinite(spread):
        return ""
    ends = [measured.value - spread, measured.value + spread]
    bounds = [b for b in (criterion.low, criterion.high) if math.isfinite(b)]
    low, high = min(ends + bounds), max(ends + bounds)
    if low == high:
        low, high = low - 1, high + 1
    room = 0.25 * (high - low)  # of which a one-sided range fills what lies beyond its bound
    low, high = low - room, high + room

    def x(value: float) -> float:
        inside = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(MARGIN + inside * (WIDTH - 2 * MARGIN), 1)

    middle = HEIGHT / 2
    left, right = x(criterion.low), x(criterion.high)
    band = f'<rect class="range" x="{left}" y="1" width="{round(max(right - left, 1), 1)}" height="{HEIGHT - 2}"></rect>'
    lines = "".join(f'<path class="bound" d="M{x(b)} 1V{HEIGHT - 1}"></path>' for b in bounds)
    bar = f'<path class="bar" d="M{x(ends[0])} {middle}H{x(ends[1])}"></path>'
    dot = f'<circle cx="{x(measured.value)}" cy="{middle}" r="3"></circle>'
    head = f'<svg class="interval interval-{verdict}" width="{WIDTH}" height="{HEIGHT}" aria-hidden="true" focusable="false">'
    return f"{head}{band}{lines}{bar}{dot}</svg>"
