"""The README's table of adapters of two seeds, single and merged: one row a model, task and method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from copra_llm.figures.groups import Group
from copra_llm.figures.merged import lora_of, merge_name, merged_figures, merged_groups
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result


@dataclass(frozen=True)
class Cell:
    """All pairs of one model, task and method at its tuned settings."""

    model: str
    task: str
    method: str
    learning_rate: float
    steps: int
    curves: dict[str, Group]
    """By merge method."""


def connectivity_cells(results: Iterable[Result]) -> list[Cell]:
    """Group interpolation records; the settings with curves are the tuned ones."""
    cells: dict[tuple, dict[str, Group]] = {}
    for g in merged_groups(results):
        cells.setdefault((g.model, g.task, g.name, g.learning_rate, g.steps), {})[merge_name(g)] = g
    return [Cell(*key, curves=curves) for key, curves in cells.items()]


def connectivity_table(results: Iterable[Result]) -> str:
    """Markdown: single and merged accuracy and loss, the drop, and each method against LoRA."""
    cells = connectivity_cells(results)
    fused = [cell.curves["fusion"] for cell in cells if "fusion" in cell.curves]
    rows = []
    for cell in cells:
        fusion, mixture = (
            merged_figures(g, lora_of(g, fused)) if (g := cell.curves.get(rule)) else None
            for rule in ("fusion", "mixture")
        )
        both = fusion or mixture
        if both is None:
            continue
        losses = [both.single_loss.mean, *(m and m.loss.mean for m in (fusion, mixture))]
        rows.append((
            cell.model, cell.task, cell.method, f"{cell.learning_rate:g}, {cell.steps}", both.single.mean,
            fusion and fusion.accuracy.mean, fusion and fusion.drop, fusion and fusion.against_lora,
            mixture and mixture.accuracy.mean, " / ".join("–" if v is None else f"{v:.2f}" for v in losses),
            fusion and fusion.loss_against_lora,
        ))  # fmt: skip
    columns = [
        ("model",), ("task",), ("method",), ("lr, steps",), ("single acc.", ".1f"), ("fused acc.", ".1f"),
        ("drop when fused", ".1f"), ("fused acc. minus LoRA's", ".1f"), ("mixture acc.", ".1f"),
        ("single / fused / mixture loss",), ("fused loss minus LoRA's", ".2f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)
