"""Is one layer alone connected? Barriers of lines on which a single layer is interpolated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copra_llm.figures.groups import Group, by_place, short_names, styles
from copra_llm.figures.layers import layer_barriers, layer_groups, whole_barrier
from copra_llm.report.document import Figure, Panel, Section, keys_of
from copra_llm.report.plots.bars import Bars, upright_bars
from copra_llm.report.tables import GROUP_COLUMNS, table
from copra_llm.results import Result

UNITS = {"accuracy": ("points", ".1f"), "loss": ("nats", ".3f")}
KINDS = {
    "barrier": (
        "Layer-wise barriers",
        "Barrier: how far the line dips below the chord between its own ends, at its deepest point.",
    ),
    "averaging_barrier": (
        "Layer-wise averaging barriers",
        "Averaging barrier: how much worse the line's middle is than the mean of the two whole adapters.",
    ),
}


def layers_section(results: Sequence[Result]) -> Section | None:
    groups = layer_groups(results)
    if not groups:
        return None
    blocks = []
    for method in dict.fromkeys(str(g.values[0] or "fusion") for g in groups):
        same = [g for g in groups if str(g.values[0] or "fusion") == method]
        blocks += [_figure(kind, method, same) for kind in KINDS if any(layer_barriers(g, "loss", kind) for g in same)]
    text = (
        "One layer at a time is interpolated towards a second adapter; all others stay the first adapter's. "
        "Positive: the layer does not merge well by itself. Means over pairs of seeds, each in both orders, with 95 % "
        "intervals (jackknife over seeds)."
    )
    return Section("Layer-wise barriers", text, blocks)


def _figure(kind: str, method: str, groups: Sequence[Group]) -> Figure:
    style = styles(g.name for g in groups)
    title, note = KINDS[kind]
    panels, rows = [], []
    for place, here in by_place(groups):
        for quantity, (unit, spec) in UNITS.items():
            shown = [(g, values) for g in here if (values := layer_barriers(g, quantity, kind))]
            layers = short_names(here[0].records[0].data["layers"])
            bars = [Bars(g.name, style[g.name], values) for g, values in shown]
            drawing = upright_bars(bars, layers, "layer", f"{quantity} [{unit}]", spec=spec)
            panels.append(Panel(f"{place}: {quantity}", _words(shown, layers, quantity, kind, unit, spec), drawing))
            rows += [
                (*g.heads, len(g.records), quantity, layer, value)
                for g, values in shown
                for layer, value in [
                    *zip(layers, values, strict=True),
                    ("(whole adapter)", whole_barrier(g, quantity, kind)),
                ]
                if value is not None
            ]
    columns = [*GROUP_COLUMNS, ("pairs", "d"), ("of",), ("layer",), (kind.replace("_", " "), ".3f")]
    made = table(f"{title}, {method}", columns, rows, 3)
    keys = keys_of(style, [g.name for g in groups], "bar")
    return Figure(f"{title}: {method}", note, panels, made, keys)


def _words(shown, layers: Sequence[str], quantity: str, kind: str, unit: str, spec: str) -> str:
    said = []
    for g, values in shown:
        means = [v.mean for v in values]
        worst = int(np.nanargmax(means)) if np.isfinite(means).any() else 0
        whole = whole_barrier(g, quantity, kind)
        all_at_once = f", all layers at once {whole:{spec}}" if whole else ""
        said.append(f"{g.name}: mean {np.mean(means):{spec}}, largest {values[worst]:{spec}} at layer {layers[worst]}"
                    f"{all_at_once}")  # fmt: skip
    name = kind.replace("_", " ").capitalize()
    return f"{name} of the {quantity} in {unit}, by layer. {'; '.join(said)}."
