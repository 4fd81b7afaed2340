"""Points on a plane, and dots with intervals in rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copra_llm.estimates import Estimate
from copra_llm.report.markup import Html, el, joined, leaf
from copra_llm.report.plots.axes import WIDTH, Box, Drawing, Scale, label, limits, room, ticks, words, x_axis
from copra_llm.report.plots.marks import colour, error_bar, marker


@dataclass(frozen=True)
class Point:
    """A place with its series' style and what is said when a pointer rests on it."""

    x: float
    y: float
    style: int
    text: str
    tag: str = ""
    """Written beside the point."""


def scatter(points: Sequence[Point]) -> Drawing:
    """Points in a frame without numbers: only nearness means something."""
    height = 320
    box = Box(8, 8, WIDTH - 8, height - 8)
    x_scale, y_scale = (
        Scale(*limits([getattr(p, axis) for p in points]), start, stop)
        for axis, start, stop in (("x", box.left + 12, box.right - 30), ("y", box.bottom - 12, box.top + 12))
    )
    frame = leaf("path", class_="grid", d=f"M{box.left} {box.top}H{box.right}V{box.bottom}H{box.left}z")
    marks = [
        el("g", marker(p.style, x_scale(p.x), y_scale(p.y), tip=p.text),
           label(x_scale(p.x) + 7, y_scale(p.y) + 4, p.tag, class_="tiny") if p.tag else None,
           class_=colour(p.style))
        for p in points
        if math.isfinite(p.x) and math.isfinite(p.y)
    ]  # fmt: skip
    return Drawing(joined(frame, *marks), height)


@dataclass(frozen=True)
class Dot:
    """A series' value in a row, with its interval and a text beside it."""

    name: str
    style: int
    value: Estimate
    text: str


def dots(rows: Sequence[tuple[str, Sequence[Dot]]], title: str, *, spec: str = ".1f") -> Drawing:
    """A row a name, in it a dot a series with its interval; 0 is marked."""
    every = [dot.value for _, row in rows for dot in row]
    low, high = limits([0.0, *(e.mean for e in every)], [end for e in every for end in (e.low, e.high)])
    thick, gap = 16.0, 12.0
    box = Box(
        14 + room(words(name, 16) for name, _ in rows),
        8,
        WIDTH - 102,
        8 + sum(thick * len(row) + gap for _, row in rows),
    )
    scale = Scale(low, high, box.left + 4, box.right - 4)
    zero = leaf("path", class_="mark", d=f"M{scale(0.0):.1f} {box.top}V{box.bottom:.1f}")
    parts = [x_axis(scale, box, title, ticks(low, high, 5), grid=True), zero]
    y = box.top
    for name, row in rows:
        parts.append(label(box.left - 8, y + (thick * len(row) + gap) / 2 + 4, words(name, 16), "end"))
        for i, dot in enumerate(row):
            parts.append(_dot(dot, f"{name}, {dot.name}", scale, y + gap / 2 + (i + 0.5) * thick, spec))
        y += thick * len(row) + gap
        parts.append(leaf("path", class_="grid", d=f"M{2 if y < box.bottom else box.left:.1f} {y:.1f}H{WIDTH}"))
    return Drawing(joined(*parts), box.bottom + 42)


def _dot(dot: Dot, name: str, scale: Scale, y: float, spec: str) -> Html:
    beside = label(WIDTH - 2.0, y + 4, dot.text, "end", "value")
    e = dot.value
    if not math.isfinite(e.mean):
        return beside
    interval = error_bar(y, e, scale, upright=False)
    mark = marker(dot.style, scale.clamped(e.mean), y, tip=f"{name}: {e:{spec}} ({dot.text})")
    return el("g", interval, mark, beside, class_=colour(dot.style))
