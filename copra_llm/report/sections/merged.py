"""Adapters that were merged: along the line between two, single against merged, every method against LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from copra_llm.estimates import Estimate
from copra_llm.figures.groups import Group, by_place, styles
from copra_llm.figures.merged import lora_of, merge_name, merged_figures, merged_groups
from copra_llm.figures.pairs import curve_estimates, finest_lines, single_metric
from copra_llm.report.document import Figure, Panel, Section, keys_of
from copra_llm.report.plots.lines import Line, line_plot
from copra_llm.report.plots.points import Dot, dots
from copra_llm.report.tables import GROUP_COLUMNS, Table, table
from copra_llm.results import Result


def merged_section(results: Sequence[Result]) -> Section | None:
    groups = merged_groups(results)
    if not groups:
        return None
    blocks: list[Figure | Table] = []
    for name in dict.fromkeys(merge_name(g) for g in groups):
        same = [g for g in groups if merge_name(g) == name]
        # Three points are the ends and the middle, which the overview shows.
        drawn = [g for g in same if len(finest_lines(g.records)[0].data["alpha"]) > 3]
        blocks.append(overview_figure(name, same))
        blocks += [curves_figure(name, drawn, quantity) for quantity in ("accuracy", "loss") if drawn]
    text = (
        "Two adapters of one kind, trained with different seeds, merged with weights α and 1 − α. Single: the mean of "
        "the two; merged: α = 0.5; drop: single minus merged. Accuracies in percent, losses in nats."
    )
    return Section("Merged adapters", text, blocks)


def overview_figure(name: str, groups: Sequence[Group]) -> Figure:
    """The drop of every model, task and method, and the table with every difference."""
    style = styles(g.name for g in groups)
    panels = []
    for model in dict.fromkeys(g.model for g in groups):
        rows, said = [], []
        for task in dict.fromkeys(g.task for g in groups if g.model == model):
            here = headline([g for g in groups if (g.model, g.task) == (model, task)])
            row = [_dot(g, style[g.name]) for g in here]
            rows.append((task, row))
            said.append(f"{task}: " + ", ".join(f"{dot.name} {dot.value:.1f} ({dot.text})" for dot in row))
        words = f"Percentage points of accuracy lost by merging (single → merged accuracy). {'; '.join(said)}."
        panels.append(Panel(model, words, dots(rows, "accuracy lost [points]")))
    several = len({(g.model, g.task, g.name) for g in groups}) < len(groups)
    choice = " Of a method's several settings the one with the most pairs, points and single accuracy is shown."
    return Figure(
        f"What merging costs: {name}",
        "Accuracy of single adapters minus that of the merged one, with its 95 % interval (bootstrap over pairs and "
        "examples); right of the broken line merging costs, left of it it gains. An interval without caps goes on "
        "beyond the frame. Beside: single → merged." + (choice if several else ""),
        panels,
        merged_table(f"Merged by {name}", groups),
        keys_of(style, [g.name for g in groups], "marker"),
        unfolded=True,
    )


def headline(groups: Sequence[Group]) -> list[Group]:
    """One group a name: that with the most pairs, then points, then the highest single accuracy."""

    def weight(g: Group) -> tuple:
        return len(g.records), len(finest_lines(g.records)[0].data["alpha"]), single_metric(g.records, "accuracy")

    return [max((g for g in groups if g.name == name), key=weight) for name in dict.fromkeys(g.name for g in groups)]


def merged_table(caption: str, groups: Sequence[Group]) -> Table:
    rows = [
        (*g.heads, len(g.records), m.single, m.accuracy, m.drop, m.against_lora, m.single_loss, m.loss,
         m.loss_against_lora)
        for g in groups for m in [merged_figures(g, lora_of(g, groups))]
    ]  # fmt: skip
    columns = [
        *GROUP_COLUMNS, ("pairs", "d"), ("single acc.", ".1f"), ("merged acc.", ".1f"), ("drop", ".1f"),
        ("merged acc. minus LoRA's", ".1f"), ("single loss", ".2f"), ("merged loss", ".2f"),
        ("merged loss minus LoRA's", ".2f"),
    ]  # fmt: skip
    note = (
        "Intervals 95 %: of the merged accuracy and of losses the jackknife over seeds; of the drop and of the "
        "difference in accuracy a bootstrap over pairs and examples, which, since pairs share seeds, is somewhat too "
        "narrow where seeds are few."
    )
    return table(caption, columns, rows, 3, note)


def curves_figure(name: str, groups: Sequence[Group], quantity: str = "accuracy") -> Figure:
    """A panel a model and task, a line a method."""
    unit, spec, within = ("%", ".1f", (0, 100)) if quantity == "accuracy" else ("nats", ".3f", (0, math.inf))
    style = styles(g.name for g in groups)
    panels, rows = [], []
    for title, here in by_place(groups):
        lines, said = [], []
        for g in here:
            alpha, values = curve_estimates(g.records, quantity)
            lines.append(Line(g.name, style[g.name], alpha, values))
            said.append(_curve_words(g.name, alpha, values, spec))
            rows += [(*g.heads, len(finest_lines(g.records)), a, value) for a, value in zip(alpha, values, strict=True)]
        drawing = line_plot(
            lines, "weight of the first adapter, α", f"{quantity} [{unit}]", within=within, spec=spec,
            x_ticks=[0.0, 0.25, 0.5, 0.75, 1.0],
        )  # fmt: skip
        words = f"{quantity.capitalize()} in {'percent' if unit == '%' else unit}. {'; '.join(said)}."
        panels.append(Panel(title, words, drawing))
    columns = [*GROUP_COLUMNS, ("pairs", "d"), ("weight", ".3g"), (quantity, spec)]
    return Figure(
        f"{quantity.capitalize()} along the line: {name}",
        "Line: mean over the pairs of seeds, each in both directions. Band: 95 % interval at each point (jackknife "
        "over seeds), cut where it would dwarf the lines.",
        panels,
        table(f"{quantity.capitalize()} along the line, {name}", columns, rows, 3),
        keys_of(style, [g.name for g in groups]),
    )


def _dot(g: Group, style: int) -> Dot:
    m = merged_figures(g)
    return Dot(g.name, style, m.drop, f"{m.single.mean:.1f} → {m.accuracy.mean:.1f}")


def _curve_words(name: str, alpha: Sequence[float], values: Sequence[Estimate], spec: str) -> str:
    means = np.array([v.mean for v in values])
    middle = int(np.argmin(abs(np.array(alpha) - 0.5)))
    said = f"{name}: ends {means[0]:{spec}} and {means[-1]:{spec}}, middle {values[middle]:{spec}}"
    if not np.isfinite(means).all():
        return said + ", with points that were not finite"
    return f"{said}, between {means.min():{spec}} (at α = {alpha[int(means.argmin())]:.2g}) and {means.max():{spec}}"
