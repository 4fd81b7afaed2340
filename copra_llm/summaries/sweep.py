"""What do learning rate, steps and the schedule do to merging? Tables from the records.

Means over seeds or pairs of seeds with 95 % intervals. Stability is the spread over seeds, at the same step, of the
logged training loss and gradient norm: the mean over log entries of their standard deviation, relative to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from copra_llm.figures.groups import Group, rank
from copra_llm.figures.merged import merged_groups
from copra_llm.figures.pairs import drop_estimate, mean_metric, metric_difference, single_metric
from copra_llm.figures.runs import along_steps, run_groups, same_steps, spread, step_groups
from copra_llm.figures.shapley import mean_evenness, shapley_groups
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

Cell = tuple[str, str, str, int, float]
"""Model, task, variant, steps, learning rate."""


def sweep_table(results: Iterable[Result]) -> str:
    """Markdown: fused and single accuracy, a row a model, task, variant and number of steps, a column a rate."""
    cells = _fused(results)
    rates = sorted({rate for *_, rate in cells})
    rows = [
        (*row, *(_single_and_fused(cells.get((*row, rate))) for rate in rates))
        for row in dict.fromkeys(key[:4] for key in cells)
    ]
    columns = [("model",), ("task",), ("variant",), ("steps",), *((f"lr {rate:g}: single, fused",) for rate in rates)]
    return markdown_table(columns, rows)


def schedules_table(results: Iterable[Result]) -> str:
    """Markdown, a row a variant: single, fused, the drop, fused minus LoRA's, stability over seeds, evenness of layers.

    The top third's share is that of Shapley values in loss.
    """
    results = list(results)
    cells, runs = _fused(results), {_cell(g): g.records for g in run_groups(results)}
    values = {_cell(g): g.records for g in shapley_groups(results) if g.values[0] == "loss"}
    rows = []
    for (model, task, variant, steps, rate), g in cells.items():
        lora = cells.get((model, task, "LoRA", steps, rate))
        spreads = (spread(runs.get(_cell(g), []), name) for name in ("loss", "grad_norm"))
        rows.append((
            model, task, variant, f"{rate:g}, {steps}", single_metric(g.records, "accuracy"),
            mean_metric(g.records, "accuracy@0.5"), drop_estimate(g.records),
            metric_difference(g.records, lora.records, "accuracy@0.5") if lora and lora is not g else None,
            mean_metric(g.records, "loss@0.5"),
            *(None if math.isnan(value) else f"{100 * value:.0f} %" for value in spreads),
            mean_evenness(values.get(_cell(g), []), "top_third_share"),
        ))  # fmt: skip
    columns = [
        ("model",), ("task",), ("variant",), ("lr, steps",), ("single acc.", ".1f"), ("fused acc.", ".1f"),
        ("drop when fused", ".1f"), ("fused acc. minus LoRA's", ".1f"), ("fused loss", ".2f"), ("spread of loss",),
        ("spread of gradient norm",), ("top third's share", ".2f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def along_table(results: Iterable[Result]) -> str:
    """Markdown: single and merged accuracy along the run, a row a model, task, variant and rule."""
    lines = []
    for g in step_groups(results):
        single, merged = (along_steps(same_steps(g), which) for which in ("single", "merged"))
        method, options = g.values
        row = (g.model, g.task, g.name, f"{method} ({options})" if options else method)
        lines.append((row, {step: f"{single[step].mean:.1f}, {merged[step].mean:.1f}" for step in single}))
    steps = sorted({step for _, at in lines for step in at})
    rows = [(*row, *(at.get(step) for step in steps)) for row, at in lines]
    columns = [("model",), ("task",), ("variant",), ("rule",), *((f"step {s}: single, merged",) for s in steps)]
    return markdown_table(columns, rows)


def _fused(results: Iterable[Result]) -> dict[Cell, Group]:
    """Fused pairs of every cell, in the order of the rows."""
    cells = {_cell(g): g for g in merged_groups(results) if g.values[0] == "fusion"}
    return {key: cells[key] for key in sorted(cells, key=lambda key: (*key[:2], rank(key[2]), *key[3:]))}


def _cell(g: Group) -> Cell:
    return g.model, g.task, g.name, g.steps, g.learning_rate


def _single_and_fused(g: Group | None) -> str | None:
    if g is None:
        return None
    return f"{single_metric(g.records, 'accuracy'):.1f}, {mean_metric(g.records, 'accuracy@0.5'):.1f}"
