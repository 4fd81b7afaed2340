"""Heat maps: a number in every cell where there is room for it, and a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from copra_llm.report.markup import Html, el, joined, leaf
from copra_llm.report.palette import LEVELS, level
from copra_llm.report.plots.axes import TEXT, WIDTH, Box, Drawing, label, room, words, x_title
from copra_llm.report.plots.marks import colour, marker

Cells = Sequence[Sequence[float | None]]


def heat_map(
    cells: Cells,
    columns: Sequence[str],
    rows: Sequence[str],
    x_name: str,
    y_name: str,
    *,
    limit: tuple[float, float] | None = None,
    spec: str = ".1f",
    square: bool = False,
    corners: Sequence[tuple[str, float, float]] = (),
) -> Drawing:
    """`cells[row][column]`, the first row at the bottom; None or NaN is an empty cell.

    Args:
        cells: `(rows, columns)`.
        columns, rows: their names; where there is no room, only some are written.
        x_name, y_name: what the names are.
        limit: lowest and highest value of the scale; default: of the cells.
        spec: format of a cell's number.
        square: cells as high as they are wide.
        corners: (text, column, row) of places to mark, in units of cells, joined by a line.
    """
    known = [v for row in cells for v in row if v is not None and math.isfinite(v)]
    low, high = limit or (min(known, default=0.0), max(known, default=1.0))
    box_left, box_right = 12 + room(words(name, 14) for name in rows), WIDTH - 8.0
    width = (box_right - box_left) / max(len(columns), 1)
    height = width if square else 34.0
    box = Box(box_left, 24, box_right, 24 + height * len(rows))
    numbers = not corners and width >= room([f"{low:{spec}}", f"{high:{spec}}"]) + 3 and height >= 16
    parts: list[Html | None] = []
    for r, row in enumerate(cells):
        for c, value in enumerate(row):
            x, y = box.left + c * width, box.bottom - (r + 1) * height
            tip = f"{y_name} {rows[r]}, {x_name} {columns[c]}".strip() if len(known) <= 450 and y_name else None
            parts.append(_cell(value, x, y, width, height, (low, high), spec if numbers else None, tip, spec))
    parts += _names(columns, rows, box, width, height)
    parts += [label(2.0, 13.0, y_name, class_="axis") if y_name else None, x_title(box, x_name) if x_name else None]
    parts.append(_corners(corners, box, width, height))
    parts.append(_legend(low, high, box.bottom + 46, spec))
    return Drawing(joined(*parts), box.bottom + 84)


def _cell(value, x, y, width, height, limit, shown, tip, spec) -> Html:
    # Neighbouring cells overlap by a hair, so that no background shows between them; those with numbers stand apart.
    gap = 1.0 if shown else -0.2
    size = {"x": round(x, 2), "y": round(y, 2), "width": round(width - gap, 2), "height": round(height - gap, 2)}
    if value is None or not math.isfinite(value):
        return leaf("rect", class_="none", **size)
    k = level(value, *limit)
    text = f"{value:{spec}}"
    title = el("title", f"{tip}: {text}") if tip else None
    cell = el("rect", title, class_=f"h{k}", **size) if title else leaf("rect", class_=f"h{k}", **size)
    number = label(x + (width - gap) / 2, y + height / 2 + 4, text, "middle", f"t{k}") if shown else None
    return joined(cell, number)


def _names(columns, rows, box: Box, width: float, height: float) -> list[Html]:
    every_column = math.ceil((room(words(c, 14) for c in columns) + 6) / width)
    every_row = math.ceil((TEXT + 2) / height)
    below = [
        label(box.left + (c + 0.5) * width, box.bottom + 17, words(name, 14), "middle")
        for c, name in enumerate(columns)
        if name and (c % every_column == 0 or "" in columns)
    ]
    beside = [
        label(box.left - 6, box.bottom - (r + 0.5) * height + 4, words(name, 14), "end")
        for r, name in enumerate(rows)
        if name and (r % every_row == 0 or "" in rows)
    ]
    return below + beside


def _corners(corners, box: Box, width: float, height: float) -> Html | None:
    if not corners:
        return None
    places = [(box.left + (x + 0.5) * width, box.bottom - (y + 0.5) * height) for _, x, y in corners]
    outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [leaf("path", class_="halo", d=f"M{outline}z"), leaf("path", class_="edge", d=f"M{outline}z")]
    middle = (box.top + box.bottom) / 2
    for i, ((text, _, _), (x, y)) in enumerate(zip(corners, places, strict=True)):
        parts.append(marker(i, x, y, hollow=True, tip=text))
        beside = y + 20 if y > middle else y - 11
        parts.append(label(min(max(x, box.left + 30), box.right - 30), beside, words(text, 16), "middle", "tag"))
    return el("g", *parts, class_=f"corners {colour(7)}")


def _legend(low: float, high: float, y: float, spec: str) -> Html:
    """The ramp with its ends."""
    left, right = WIDTH / 2 - 84, WIDTH / 2 + 84
    step = (right - left) / LEVELS
    cells = [leaf("rect", class_=f"h{k}", x=left + k * step, y=y, width=step + 0.3, height=9.0) for k in range(LEVELS)]
    ends = [label(left - 6, y + 9, f"{low:{spec}}", "end"), label(right + 6, y + 9, f"{high:{spec}}")]
    return joined(*cells, *ends)
