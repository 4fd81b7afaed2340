"""Curves with bands: a quantity over another, one line a series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copra_llm.estimates import Estimate
from copra_llm.report.markup import Html, el, joined
from copra_llm.report.plots.axes import WIDTH, Box, Drawing, Scale, left_margin, limits, x_axis, y_axis
from copra_llm.report.plots.marks import band, colour, error_bar, marker, polyline

HEIGHT = 250


@dataclass(frozen=True)
class Line:
    """A series: values over `x`, each with its interval if it has one."""

    name: str
    style: int
    x: Sequence[float]
    y: Sequence[Estimate]
    hollow: bool = False


def line_plot(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    x_ticks: Sequence[float] | None = None,
    bars: bool = False,
    spec: str = ".1f",
) -> Drawing:
    """All lines in one frame; intervals as bands, or as error bars."""
    means = [e.mean for line in lines for e in line.y]
    ends = [end for line in lines for e in line.y for end in (e.low, e.high)]
    low, high = limits(means, ends, within=within)
    xs = [x for line in lines for x in line.x if math.isfinite(x)] or [0.0, 1.0]
    box = Box(left_margin(low, high), 24, WIDTH - 10, HEIGHT - 42)
    pad = 0.0 if min(xs) < max(xs) else 1.0
    x_scale = Scale(min(xs) - pad, max(xs) + pad, box.left + 6, box.right - 6)
    y_scale = Scale(low, high, box.bottom, box.top)
    parts = [y_axis(y_scale, box, y_title), x_axis(x_scale, box, x_title, x_ticks)]
    parts += [_interval(line, x_scale, y_scale, bars) for line in lines]
    for line in lines:
        points = [
            (x_scale(x), y_scale.clamped(e.mean)) if math.isfinite(e.mean) else None
            for x, e in zip(line.x, line.y, strict=True)
        ]
        tips = [f"{line.name}, {x:g}: {e:{spec}}" for x, e in zip(line.x, line.y, strict=True)]
        marks = [marker(line.style, *p, line.hollow, tip) for p, tip in zip(points, tips, strict=True) if p]
        parts.append(el("g", polyline(points, line.style), *marks, class_=colour(line.style)))
    return Drawing(joined(*parts), HEIGHT)


def _interval(line: Line, x_scale: Scale, y_scale: Scale, bars: bool) -> Html | None:
    known = [(x_scale(x), e) for x, e in zip(line.x, line.y, strict=True) if e.has_interval and math.isfinite(e.mean)]
    if not known:
        return None
    if bars:
        return el("g", *(error_bar(x, e, y_scale) for x, e in known), class_=colour(line.style))
    lows, highs = ([y_scale.clamped(getattr(e, end)) for _, e in known] for end in ("low", "high"))
    return el("g", band([x for x, _ in known], lows, highs), class_=colour(line.style))
