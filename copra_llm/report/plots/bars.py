"""Bars with error bars: upright over numbered things (layers), lying beside named ones (kinds of pruning)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copra_llm.estimates import Estimate
from copra_llm.report.markup import el, joined, leaf
from copra_llm.report.plots.axes import (
    TEXT,
    WIDTH,
    Box,
    Drawing,
    Scale,
    base,
    label,
    left_margin,
    limits,
    room,
    ticks,
    words,
    x_axis,
    x_title,
    y_axis,
)
from copra_llm.report.plots.marks import colour, error_bar, marker

HEIGHT = 250


@dataclass(frozen=True)
class Bars:
    """A series: one value a category, in the order of the categories; None where there is none."""

    name: str
    style: int
    values: Sequence[Estimate | None]


def _limits(series: Sequence[Bars], limit: tuple[float, float] | None) -> tuple[float, float]:
    if limit:
        return limit
    values = [e for s in series for e in s.values if e is not None]
    low, high = limits([0.0, *(e.mean for e in values)], [end for e in values for end in (e.low, e.high)])
    return (0.0 if low < 0 and all(e.mean >= 0 and not e.low < 0 for e in values) else low), high


def bars_in_words(series: Sequence[Bars], names: Sequence[str]) -> str:
    """Every bar's value by the name of its row."""
    said = []
    for i, name in enumerate(names):
        values = (f"{s.name} {s.values[i]:.1f}" for s in series if s.values[i] is not None)
        said.append(f"{name}: {', '.join(values)}")
    return "; ".join(said)


def upright_bars(
    series: Sequence[Bars],
    categories: Sequence[str],
    category_title: str,
    y_title: str,
    *,
    limit: tuple[float, float] | None = None,
    spec: str = ".1f",
) -> Drawing:
    """Bars from 0, beside each other where there are several series; `limit` is a range shared between panels."""
    low, high = _limits(series, limit)
    box = Box(left_margin(low, high), 24, WIDTH - 8, HEIGHT - 42)
    y_scale = Scale(low, high, box.bottom, box.top)
    slot = (box.right - box.left) / max(len(categories), 1)
    width = 0.82 * slot / max(len(series), 1)
    parts = [y_axis(y_scale, box, y_title)]
    for i, s in enumerate(series):
        bars = []
        for k, e in enumerate(s.values):
            if e is None or not math.isfinite(e.mean):
                continue
            x = box.left + k * slot + 0.09 * slot + i * width
            top, zero = y_scale.clamped(e.mean), y_scale.clamped(0.0)
            tip = f"{s.name}, {categories[k]}: {e:{spec}}"
            d = f"M{x:.1f} {zero:.1f}V{top:.1f}h{width * 0.92:.1f}V{zero:.1f}z"
            bars.append(el("path", el("title", tip), class_="bar", d=d))
            middle = x + 0.46 * width
            bars.append(error_bar(middle, e, y_scale, cap=min(3.0, width / 3)))
            if width > 11.0:
                bars.append(marker(s.style, middle, top))
        parts.append(el("g", *bars, class_=colour(s.style)))
    every = math.ceil(len(categories) * (room(words(c, 12) for c in categories) + 5) / (box.right - box.left))
    for k, name in enumerate(categories):
        if k % max(every, 1) == 0:
            parts.append(label(box.left + (k + 0.5) * slot, box.bottom + 17, words(name, 12), "middle"))
    zero = base(box, y_scale.clamped(0.0))
    return Drawing(joined(*parts, zero, x_title(box, category_title)), HEIGHT)


def lying_bars(
    series: Sequence[Bars],
    categories: Sequence[str],
    title: str,
    *,
    limit: tuple[float, float] | None = None,
    spec: str = ".1f",
    reference: float | None = None,
    lanes: int | None = None,
) -> Drawing:
    """A row of bars a category.

    Args:
        series: the bars.
        categories: names of the rows.
        title: of the x-axis.
        limit: of the x-axis; default: what shows all values, and 0.
        spec: format of the number beside a bar.
        reference: where to draw a line across all rows.
        lanes: bars a row has room for; default: one a series. With fewer, series share them.
    """
    low, high = _limits(series, limit)
    lanes = lanes or max(len(series), 1)
    thick = 15.0 if lanes < 3 else 13.0
    step = thick * lanes + 12
    box = Box(14 + room(words(c, 20) for c in categories), 8, WIDTH - 52, 8 + step * len(categories))
    scale = Scale(low, high, box.left, box.right)
    parts = [x_axis(scale, box, title, ticks(low, high, 6), grid=True)]
    if reference is not None:
        x = scale.clamped(reference)
        parts.append(leaf("path", class_="mark", d=f"M{x:.1f} {box.top}V{box.bottom:.1f}"))
    zero = scale.clamped(0.0)
    for i, s in enumerate(series):
        bars = []
        for k, e in enumerate(s.values):
            if e is None or not math.isfinite(e.mean):
                continue
            y = box.top + k * step + 6 + i % lanes * thick
            end = scale.clamped(e.mean)
            d = f"M{zero:.1f} {y:.1f}H{end:.1f}v{thick - 2:g}H{zero:.1f}z"
            bars.append(el("path", el("title", f"{s.name}, {categories[k]}: {e:{spec}}"), class_="bar", d=d))
            middle, far = y + thick / 2 - 1, scale.clamped(e.high) if e.has_interval else end
            bars.append(error_bar(middle, e, scale, upright=False))
            bars.append(marker(s.style, end, middle))
            bars.append(label(max(far, end, zero) + 8, middle + 4, f"{e.mean:{spec}}", class_="value"))
        parts.append(el("g", *bars, class_=colour(s.style)))
    for k, name in enumerate(categories):
        y = box.top + (k + 0.5) * step + TEXT / 3
        parts.append(label(box.left - 8, y, words(name, 20), "end"))
    parts.append(leaf("path", class_="frame", d=f"M{zero:.1f} {box.top}V{box.bottom:.1f}"))
    return Drawing(joined(*parts), box.bottom + 42)
