"""The plane through three adapters: how good is everything between and around them?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from copra_llm.figures.groups import Group, grouped
from copra_llm.report.document import Figure, Panel, Section
from copra_llm.report.plots.heat import heat_map
from copra_llm.report.tables import table
from copra_llm.results import Result

UNITS = {"accuracy": ("percent", ".1f"), "loss": ("nats", ".2f")}


def plane_section(results: Sequence[Result]) -> Section | None:
    groups = grouped((r for r in results if r.protocol == "plane"), ("split",))
    if not groups:
        return None
    text = (
        "Every point of a plane is an adapter: three trained ones span it, in the space of their factors. A valley "
        "that holds all three corners means that they merge."
    )
    return Section("Planes through three adapters", text, [_figure(q, groups) for q in UNITS])


def _figure(quantity: str, groups: Sequence[Group]) -> Figure:
    unit, spec = UNITS[quantity]
    panels, rows = [], []
    for g in groups:
        for r in g.records:
            limit = _shared([o for o in groups if (o.model, o.task) == (g.model, g.task)], quantity)
            panels.append(_panel(g, r, quantity, unit, spec, limit))
            rows += [
                (g.model, g.task, g.label, _corner_names(r), x, y, value)
                for y, line in zip(r.data["y"], r.data[quantity], strict=True)
                for x, value in zip(r.data["x"], line, strict=True)
            ]
    columns = [("model",), ("task",), ("method",), ("corners",), ("x", ".3g"), ("y", ".3g"), (quantity, spec)]
    made = table(f"Planes, {quantity}", columns, rows, 3)
    note = (
        "The corners of the triangle are the adapters; distances are those in the space of their factors. Panels of "
        "one model and task share their scale."
    )
    return Figure(f"{quantity.capitalize()} on the plane", note, panels, made)


def _panel(g: Group, r: Result, quantity: str, unit: str, spec: str, limit: tuple[float, float]) -> Panel:
    x, y = r.data["x"], r.data["y"]
    corners = [(str(c.get("label", "?")), _index(x, c["x"]), _index(y, c["y"])) for c in r.data["corners"]]
    columns, names = ([f"{v:.3g}" for v in axis] for axis in (x, y))
    drawing = heat_map(r.data[quantity], columns, names, "x", "y", limit=limit, spec=spec, square=True, corners=corners)
    values = np.array(r.data[quantity], dtype=float)
    at = [f"{name} {_nearest(values, cx, cy):{spec}}" for name, cx, cy in corners]
    middle = _nearest(values, *np.mean([place for _, *place in corners], 0))
    words = (
        f"{quantity.capitalize()} in {unit}. Near the corners: {', '.join(at)}; in the middle of the three "
        f"{middle:{spec}}; on the whole grid {np.nanmin(values):{spec}} to {np.nanmax(values):{spec}}."
    )
    return Panel(f"{g.name}: {g.place}", words, drawing)


def _shared(groups: Sequence[Group], quantity: str) -> tuple[float, float]:
    values = [v for g in groups for r in g.records for row in r.data[quantity] for v in row if v is not None]
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    # Far outside the triangle losses explode; the scale is for what lies within.
    return min(finite), float(np.percentile(finite, 95)) if quantity == "loss" else max(finite)


def _index(grid: Sequence[float], value: float) -> float:
    """Where a coordinate lies, in units of cells."""
    return float(np.interp(value, grid, range(len(grid))))


def _nearest(values: np.ndarray, column: float, row: float) -> float:
    return float(values[round(row), round(column)])


def _corner_names(r: Result) -> str:
    return ", ".join(str(c.get("label", "?")) for c in r.data["corners"])
