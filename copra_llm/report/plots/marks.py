"""Marks of a series: a marker of its own shape, an error bar, a line with its dash, a band."""

from __future__ import annotations

from collections.abc import Sequence

from copra_llm.estimates import Estimate
from copra_llm.report.markup import Html, el, joined, leaf, number
from copra_llm.report.palette import DASHES, SERIES
from copra_llm.report.plots.axes import Scale

SHAPES = (
    "m-3.7 0a3.7 3.7 0 1 0 7.4 0a3.7 3.7 0 1 0-7.4 0z",  # circle
    "m0-4.6 4.4 7.8h-8.8z",  # triangle
    "m-3.4-3.4h6.8v6.8h-6.8z",  # square
    "m0-5 4.2 5-4.2 5-4.2-5z",  # diamond
    "m0 4.6 4.4-7.8h-8.8z",  # triangle, upside down
    "m-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",  # plus
    "m-4.4-1.8 4.4-2.8 4.4 2.8-1.7 5.6h-5.4z",  # pentagon
    "m-4.4-2.6h8.8v5.2h-8.8z",  # bar
)


def colour(style: int) -> str:
    """Class of a series' colour."""
    return f"c{style % len(SERIES['light'])}"


def dash(style: int) -> str | None:
    # Colours and markers repeat with one period, dashes with another: more series stay apart.
    return DASHES[(style + style // len(DASHES)) % len(DASHES)]


def marker(style: int, x: float, y: float, hollow: bool = False, tip: str | None = None) -> Html:
    """A marker at a place; `tip` is shown when a pointer rests on it."""
    d = f"M{number(round(x, 1))} {number(round(y, 1))}{SHAPES[style % len(SHAPES)]}"
    kind = "mo" if hollow else "mk"
    return el("path", el("title", tip), class_=kind, d=d) if tip else leaf("path", class_=kind, d=d)


def error_bar(x: float, e: Estimate, scale: Scale, cap: float = 3.0, upright: bool = True) -> Html | None:
    """An estimate's interval at the place `x`; an end that lies beyond the frame has no cap."""
    if not e.has_interval:
        return None
    low, high = scale.clamped(e.low), scale.clamped(e.high)
    capped = [place for place, end in ((low, e.low), (high, e.high)) if scale.low <= end <= scale.high]
    if upright:
        caps = "".join(f"M{x - cap:.1f} {place:.1f}h{2 * cap:g}" for place in capped)
        return leaf("path", class_="err", d=f"M{x:.1f} {low:.1f}V{high:.1f}{caps}")
    caps = "".join(f"M{place:.1f} {x - cap:.1f}v{2 * cap:g}" for place in capped)
    return leaf("path", class_="err", d=f"M{low:.1f} {x:.1f}H{high:.1f}{caps}")


def polyline(points: Sequence[tuple[float, float] | None], style: int) -> Html:
    """A line through points; None is a gap."""
    d, pen = "", "M"
    for point in points:
        d += f"{pen}{point[0]:.1f} {point[1]:.1f}" if point else ""
        pen = "L" if point else "M"
    return leaf("path", class_="ln", d=d, stroke_dasharray=dash(style))


def band(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> Html:
    """The area between two curves."""
    forth = [f"{x:.1f} {y:.1f}" for x, y in zip(xs, lows, strict=True)]
    back = [f"{x:.1f} {y:.1f}" for x, y in zip(reversed(xs), reversed(highs), strict=True)]
    return leaf("path", class_="band", d=f"M{'L'.join(forth + back)}z")


def swatch(style: int, kind: str = "line", hollow: bool = False) -> Html:
    """A series' mark for the legend; `kind` is line, bar or marker."""
    parts = {
        "line": polyline([(1, 8), (31, 8)], style),
        "bar": leaf("path", class_="bar", d="M1 4H31V12H1z"),
        "marker": None,
    }[kind]
    mark = joined(parts, marker(style, 16, 8, hollow))
    return el("svg", mark, viewBox="0 0 32 16", width=32, height=16, class_=colour(style), aria_hidden="true")
