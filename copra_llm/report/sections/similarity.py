"""How alike are adapters over seeds and learning rates, and how far have they moved since a quarter of the run?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from copra_llm.estimates import seed_estimate
from copra_llm.figures.groups import model_of, rank, styles, tasks_of
from copra_llm.figures.similarity import COMPARED, kinds_of_pairs, method_of, ordered
from copra_llm.report.document import Figure, Key, Panel, Section
from copra_llm.report.plots.bars import Bars, lying_bars
from copra_llm.report.plots.heat import heat_map
from copra_llm.report.plots.points import Point, scatter
from copra_llm.report.tables import Table, table
from copra_llm.results import Result


def similarity_section(results: Sequence[Result]) -> Section | None:
    records = sorted((r for r in results if r.protocol == "similarity"), key=_title)
    if not records:
        return None
    text = (
        "Adapters of several seeds and learning rates against each other: what training leaves alike, and what the "
        "seed decides."
    )
    blocks: list[Figure | Table] = []
    if any(_placed(r) for r in records):
        blocks.append(_scatter_figure(records))
    blocks += [_cosine_figure(records), _cosine_table(records)]
    if any(r.data.get("early_distance") for r in records):
        blocks.append(_early_figure(records))
    return Section("Similarity of adapters", text, blocks)


def _title(r: Result) -> str:
    of = COMPARED.get(r.config.get("on"), r.config.get("on"))
    return f"{' + '.join(tasks_of(r))}, {model_of(r)}" + (f", {of}" if of else "")


def _who(point: dict[str, Any]) -> str:
    rate, steps = point.get("learning_rate"), point.get("steps")
    settings = ("" if rate is None else f", lr {rate:g}") + (f", {steps} steps" if steps else "")
    return f"{method_of(point)}{settings}, seed {point.get('seed')}"


def _rate(point: dict[str, Any]) -> str:
    """Empty of an adapter that came without its run's record."""
    rate = point.get("learning_rate")
    return "" if rate is None else f"{rate:g}"


def _series(records: Sequence[Result]) -> list[str]:
    return sorted({method_of(p) for r in records for p in r.data["points"]}, key=rank)


def _placed(r: Result) -> list[dict[str, Any]]:
    """Points that t-SNE has given a place."""
    return [p for p in r.data["points"] if all(isinstance(p.get(k), int | float) and math.isfinite(p[k]) for k in "xy")]


def _scatter_figure(records: Sequence[Result]) -> Figure:
    names = _series(records)
    style = styles(names)
    panels, rows, tagged = [], [], False
    for r in (r for r in records if _placed(r)):
        placed = _placed(r)
        rates = sorted({p.get("learning_rate") for p in placed if p.get("learning_rate") is not None})
        points = [
            Point(p["x"], p["y"], style[method_of(p)], _who(p), _rate(p) if len(rates) > 1 else "") for p in placed
        ]
        tagged = tagged or len(rates) > 1
        counts = ", ".join(f"{name} {sum(method_of(p) == name for p in placed)}" for name in names)
        near = sum(method_of(_nearest(p, placed)) == method_of(p) for p in placed)
        words = (
            f"{len(placed)} adapters on a plane ({counts}), near ones near. The nearest neighbour of {near} of them is "
            "of the same method."
        )
        panels.append(Panel(_title(r), words, scatter(points)))
        rows += [
            (_title(r), method_of(p), p.get("learning_rate"), str(p.get("seed")), float(p["x"]), float(p["y"]))
            for p in placed
        ]
    columns = [("of",), ("method",), ("learning rate", "g"), ("seed",), ("x", ".2f"), ("y", ".2f")]
    note = "t-SNE keeps near adapters near; its axes and the size of its gaps mean nothing."
    if tagged:
        note += " Numbers: learning rates."
    keys = [Key(name, style[name], "marker") for name in names]
    return Figure("Adapters by t-SNE", note, panels, table("Adapters by t-SNE", columns, rows, 2), keys)


def _nearest(point: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    others = [p for p in points if p is not point] or [point]
    return min(others, key=lambda p: math.hypot(p["x"] - point["x"], p["y"] - point["y"]))


def _cosine_figure(records: Sequence[Result]) -> Figure:
    panels, rows = [], []
    for r in records:
        order, cosine = ordered(r), r.data["cosine"]
        names = [_who(r.data["points"][i]) for i in order]
        cells = [[cosine[i][j] for j in order] for i in reversed(order)]
        apart = [cosine[i][j] for i in order for j in order if i != j] or [1.0]
        columns, limit = _blocks(r, order), (min(0.0, *apart), 1.0)
        drawing = heat_map(cells, columns, columns[::-1], "", "", limit=limit, spec=".2f", square=True)
        means = "; ".join(f"{kind} {e:.2f}" for kind, _, e in kinds_of_pairs(r))
        words = (
            f"Cosine of every two of {len(order)} adapters, from {min(apart):.2f} to {max(apart):.2f}. Means: {means}."
        )
        panels.append(Panel(_title(r), words, drawing))
        rows += [
            (_title(r), names[a], names[b], float(cosine[i][j]))
            for a, i in enumerate(order)
            for b, j in enumerate(order)
            if a < b
        ]
    columns = [("of",), ("adapter",), ("other adapter",), ("cosine", ".3f")]
    note = "Ordered by method, then learning rate, steps and seed. 1: the same direction; 0: nothing in common."
    made = table("Cosine of every two adapters", columns, rows, 3)
    return Figure("Cosine similarity", note, panels, made)


def _blocks(r: Result, order: Sequence[int]) -> list[str]:
    """A name in the middle of each method's adapters; of few adapters each one's."""
    names = [method_of(r.data["points"][i]) for i in order]
    if len(names) <= 6:
        return [f"{n} {r.data['points'][i].get('seed')}" for n, i in zip(names, order, strict=True)]
    middles = {names.index(name) + (names.count(name) - 1) // 2: name for name in names}
    return [middles.get(i, "") for i in range(len(names))]


def _cosine_table(records: Sequence[Result]) -> Table:
    rows = [(_title(r), kind, n, mean) for r in records for kind, n, mean in kinds_of_pairs(r)]
    note = "Without intervals: pairs of adapters are not independent of each other."
    return table("Mean cosine", [("of",), ("pairs of",), ("pairs", "d"), ("mean cosine", ".2f")], rows, 2, note)


def _early_figure(records: Sequence[Result]) -> Figure:
    names = sorted({method_of(e) for r in records for e in r.data.get("early_distance") or []}, key=rank)
    style = styles(names)
    panels, rows, seen = [], [], set()
    for r in (r for r in records if r.data.get("early_distance")):
        place = f"{' + '.join(tasks_of(r))}, {model_of(r)}"
        # The distance is of Delta W whatever the cosines are of: once is enough.
        content = (place, str(r.data["early_distance"]))
        if content in seen:
            continue
        seen.add(content)
        of = {n: [float(e["distance"]) for e in r.data["early_distance"] if method_of(e) == n] for n in names}
        known = [n for n in names if of[n]]
        series = [Bars(n, style[n], [seed_estimate(of[n]) if m == n else None for m in known]) for n in known]
        drawing = lying_bars(series, known, "relative distance", spec=".2f", lanes=1)
        said = ", ".join(f"{n} {seed_estimate(of[n]):.2f} ({len(of[n])} adapters)" for n in known)
        words = f"Distance of the final adapter from its checkpoint at T/4, relative to its length: {said}."
        panels.append(Panel(place, words, drawing))
        rows += [(place, _who(e), float(e["distance"])) for e in r.data["early_distance"]]
    columns = [("of",), ("adapter",), ("‖ΔW(T) − ΔW(T/4)‖ / ‖ΔW(T)‖", ".3f")]
    note = (
        "0: nothing has changed since; 1: as far as from nothing. Means over adapters with 95 % intervals (Student's "
        "t)."
    )
    made = table("Distance from the checkpoint at T/4", columns, rows, 2)
    return Figure("Distance from the checkpoint at a quarter of the run", note, panels, made)
