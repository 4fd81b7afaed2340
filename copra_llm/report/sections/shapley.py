"""How much does each layer's adapter contribute, and how evenly?

The values of all layers add up to v(all) - v(none), so what is compared between methods is evenness: the share of
the top third, and Gini's coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, by_place, short_names, styles
from copra_llm.figures.shapley import mean_evenness, shapley_groups
from copra_llm.report.document import Figure, Panel, Section, keys_of
from copra_llm.report.plots.axes import limits
from copra_llm.report.plots.bars import Bars, upright_bars
from copra_llm.report.tables import GROUP_COLUMNS, Table, table
from copra_llm.results import Result

NORMAL_975 = 1.959964
"""97.5 % quantile of the normal distribution."""


def shapley_section(results: Sequence[Result]) -> Section | None:
    groups = shapley_groups(results)
    if not groups:
        return None
    text = (
        "A layer's Shapley value is its mean contribution over all sets of other layers that may act with it. Values "
        "of all layers add up to what the whole adapter changes, so methods are compared by how evenly it is spread."
    )
    blocks = [_figure(name, [g for g in groups if _kind(g) == name]) for name in dict.fromkeys(map(_kind, groups))]
    return Section("Shapley values of layers", text, [*blocks, _evenness(groups)])


def _kind(g: Group) -> str:
    metric, _, granularity, split = g.values
    return f"{metric or 'value'} on {split}, by {granularity or 'layer'}"


def _unit(g: Group) -> tuple[str, str]:
    return ("Shapley value [points]", ".1f") if g.values[0] == "accuracy" else ("Shapley value [nats]", ".3f")


def values_of(g: Group) -> list[Estimate]:
    """One a player: over adapters Student's t; of one adapter the estimator's own error, 95 %."""
    table_of = np.array([r.data["values"] for r in g.records], dtype=float)  # (adapters, players)
    if len(table_of) > 1:
        return [seed_estimate(column) for column in table_of.T]
    errors = g.records[0].data.get("standard_errors") or [None] * table_of.shape[1]
    halves = [math.nan if e is None else NORMAL_975 * e for e in errors]
    return [Estimate(float(v), float(v - h), float(v + h)) for v, h in zip(table_of[0], halves, strict=True)]


def _figure(name: str, groups: Sequence[Group]) -> Figure:
    style = styles(g.name for g in groups)
    panels, rows = [], []
    for title, here in by_place(groups):
        values = {id(g): values_of(g) for g in here}
        every = [e for column in values.values() for e in column]
        shared = limits([0.0, *(e.mean for e in every)], [end for e in every for end in (e.low, e.high)])
        for g in here:
            players = short_names(g.records[0].data["players"])
            y_title, spec = _unit(g)
            drawing = upright_bars(
                [Bars(g.name, style[g.name], values[id(g)])], players, "layer", y_title, limit=shared, spec=spec
            )
            panels.append(Panel(f"{g.name}: {title}", _words(g, players, values[id(g)], spec), drawing))
            rows += [
                (*g.heads, g.values[1], len(g.records), player, e)
                for player, e in zip(g.records[0].data["players"], values[id(g)], strict=True)
            ]
    columns = [*GROUP_COLUMNS, ("estimator",), ("adapters", "d"), ("player",), ("Shapley value", _unit(groups[0])[1])]
    return Figure(
        f"Shapley values: {name}",
        "A bar a layer, from the first to the last. Panels of one model and task share their scale. Error bars are "
        "95 %: over adapters of several seeds (Student's t), or of one adapter the estimator's own error (none where "
        "the values are exact).",
        panels,
        table(f"Shapley values, {name}", columns, rows, 3),
        keys_of(style, [g.name for g in groups], "bar"),
    )


def _words(g: Group, players: Sequence[str], values: Sequence[Estimate], spec: str) -> str:
    said = ", ".join(f"{player}: {e:{spec}}" for player, e in zip(players, values, strict=True))
    top = players[int(np.nanargmax([e.mean for e in values]))] if any(math.isfinite(e.mean) for e in values) else "?"
    share = mean_evenness(g.records, "top_third_share")
    even = f" The top third of the layers holds {100 * share.mean:.0f} % of it." if share else ""
    return f"Shapley value of each layer, the largest that of {top}: {said}.{even}"


def _data(g: Group, name: str) -> Estimate | None:
    found = [r.data[name] for r in g.records if r.data.get(name) is not None]
    return seed_estimate(found) if len(found) == len(g.records) else None


def _evenness(groups: Sequence[Group]) -> Table:
    rows = [
        (*g.heads, *g.values[:3], len(g.records),
         len(g.records[0].data["players"]), *(mean_evenness(g.records, name) for name in ("top_third_share", "gini")),
         *(_data(g, name) for name in ("v_empty", "v_full", "evaluations")), _worst_gap(g))
        for g in groups
    ]  # fmt: skip
    columns = [
        *GROUP_COLUMNS, ("metric",), ("estimator",), ("players are",), ("adapters", "d"), ("players", "d"),
        ("share of the top third", ".2f"), ("Gini", ".2f"), ("v(none)", ".3f"), ("v(all)", ".3f"),
        ("evaluations", ".0f"), ("efficiency gap", ".1e"),
    ]  # fmt: skip
    note = (
        "Share of the top third: of the sum of all values; 0.33 if all layers contribute alike. Gini: 0 if alike, "
        "towards 1 if one layer does it all. Efficiency gap: the largest distance of the sum of the values from "
        "v(all) − v(none). Intervals 95 % over adapters (Student's t)."
    )
    return table("Evenness of the Shapley values", columns, rows, 3, note)


def _worst_gap(g: Group) -> float | None:
    gaps = [abs(r.data["efficiency_gap"]) for r in g.records if r.data.get("efficiency_gap") is not None]
    return max(gaps, default=None)
