"""Single runs: how good each is before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from copra_llm.figures.groups import Group
from copra_llm.figures.runs import run_groups, seeds_of
from copra_llm.report.document import Section
from copra_llm.report.tables import GROUP_COLUMNS, markdown_table, table
from copra_llm.results import Result


def training_table(results: Iterable[Result]) -> str:
    """Markdown: one row a model, task, method and settings; mean over seeds."""
    rows = [
        (g.model, g.task, g.name, f"{g.learning_rate:g}, {g.steps}", str(len(g.records)), seeds_of(g, "dev"),
         seeds_of(g, "test"), f"{_mean(g, 'test', 'loss'):.2f}", f"{_seconds(g):.0f}")
        for g in run_groups(results)
    ]  # fmt: skip
    columns = [("model",), ("task",), ("method",), ("lr, steps",), ("seeds",), ("dev acc.", ".1f"),
               ("test acc.", ".1f"), ("test loss",), ("seconds",)]  # fmt: skip
    return markdown_table(columns, rows)


def runs_section(results: Sequence[Result]) -> Section | None:
    groups = run_groups(results)
    if not groups:
        return None
    rows = [
        (*g.heads, len(g.records), seeds_of(g, "dev"), seeds_of(g, "test"), seeds_of(g, "test", "loss"), _seconds(g),
         max(r.peak_memory_bytes for r in g.records) / 2**20 or None,
         sum(r.data.get("skipped_steps", 0) for r in g.records))
        for g in groups
    ]  # fmt: skip
    columns = [
        *GROUP_COLUMNS, ("seeds", "d"), ("dev acc.", ".1f"), ("test acc.", ".1f"), ("test loss", ".2f"),
        ("seconds", ".0f"), ("peak memory [MiB]", ".0f"), ("skipped steps", "d"),
    ]  # fmt: skip
    note = (
        "Accuracies in percent, losses in nats; intervals 95 % over seeds (Student's t). Seconds: median over seeds. "
        "Skipped: steps whose loss was not finite, over all seeds."
    )
    text = "Every training run by itself, before its adapter is merged or pruned."
    return Section("Single runs", text, [table("Single runs", columns, rows, 3, note)])


def _mean(g: Group, split: str, name: str) -> float:
    return float(np.mean([r.metrics[f"{split}/{g.task_key}/{name}"] for r in g.records]))


def _seconds(g: Group) -> float:
    return float(np.median([r.seconds for r in g.records]))
