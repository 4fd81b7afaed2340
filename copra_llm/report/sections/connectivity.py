"""The README's table of adapters of two seeds, single and merged: one row a model, task and method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from copra_llm.figures.pairs import (
    difference_estimate,
    drop_estimate,
    loss_difference_estimate,
    mean_metric,
    single_metric,
)
from copra_llm.report.sections.merged import merge_name, merged_groups
from copra_llm.results import Result


@dataclass(frozen=True)
class Cell:
    """All pairs of one model, task and method at its tuned settings."""

    model: str
    task: str
    method: str
    learning_rate: float
    steps: int
    curves: dict[str, list[Result]]
    """By merge method."""


def connectivity_cells(results: Iterable[Result]) -> list[Cell]:
    """Group interpolation records; the settings with curves are the tuned ones."""
    cells: dict[tuple, dict[str, list[Result]]] = {}
    for g in merged_groups(results):
        cells.setdefault((g.model, g.task, g.name, g.learning_rate, g.steps), {})[merge_name(g)] = g.records
    return [Cell(*key, curves=curves) for key, curves in cells.items()]


def connectivity_table(results: Iterable[Result]) -> str:
    """Markdown: single and merged accuracy and loss, the drop, and each method against LoRA."""
    cells = connectivity_cells(results)
    if not cells:
        return ""
    lines = [
        "| model | task | method | lr, steps | single acc. | fused acc. | drop when fused | fused acc. minus LoRA's "
        "| mixture acc. | single / fused / mixture loss | fused loss minus LoRA's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        fusion, mixture = cell.curves.get("fusion"), cell.curves.get("mixture")
        lora = next((c for c in cells if (c.model, c.task, c.method) == (cell.model, cell.task, "LoRA")), None)
        both = fusion or mixture
        if both is None:
            continue
        against, loss_against = "–", "–"
        if lora is not None and lora is not cell and fusion and lora.curves.get("fusion"):
            against = str(difference_estimate(fusion, lora.curves["fusion"]))
            loss_against = f"{loss_difference_estimate(fusion, lora.curves['fusion']):.2f}"
        losses = [f"{mean_metric(c, 'loss@0.5'):.2f}" if c else "–" for c in (fusion, mixture)]
        row = (
            cell.model, cell.task, cell.method, f"{cell.learning_rate:g}, {cell.steps}",
            f"{single_metric(both, 'accuracy'):.1f}",
            f"{mean_metric(fusion, 'accuracy@0.5'):.1f}" if fusion else "–",
            str(drop_estimate(fusion)) if fusion else "–",
            against,
            f"{mean_metric(mixture, 'accuracy@0.5'):.1f}" if mixture else "–",
            " / ".join([f"{single_metric(both, 'loss'):.2f}", *losses]),
            loss_against,
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
