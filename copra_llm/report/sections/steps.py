"""Training steps: what one costs here and in others' loops, relative to the frozen base's forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from copra_llm.figures.steps import CONTENDERS, device_of, ratio_of, step_records
from copra_llm.report.document import Section
from copra_llm.report.tables import markdown_table, table
from copra_llm.results import Result


def step_table(results: Iterable[Result]) -> str:
    """Markdown: milliseconds of the frozen base's forward and backward, and each contender's step relative to it."""
    others = [name for name in CONTENDERS if name != "base"]
    rows = [
        (r.config["model"], r.config["precision"], device_of(r), 1000 * r.metrics["seconds_per_step/base"],
         *(ratio_of(r, f"{name}/base") for name in others))
        for r in step_records(results)
    ]  # fmt: skip
    columns = [("model",), ("precision",), ("on",), (f"{CONTENDERS['base']} [ms]", ".0f"),
               *((CONTENDERS[name], ".2f") for name in others)]  # fmt: skip
    return markdown_table(columns, rows)


def step_section(results: Sequence[Result]) -> Section | None:
    rows = [
        (r.config["model"], r.config["precision"], device_of(r), label, 1000 * r.metrics[f"seconds_per_step/{name}"],
         ratio_of(r, f"{name}/base"))
        for r in step_records(results)
        for name, label in CONTENDERS.items()
        if f"seconds_per_step/{name}" in r.metrics
    ]  # fmt: skip
    columns = [("model",), ("precision",), ("on",), ("loop",), ("a step [ms]", ".0f"), ("× frozen base", ".2f")]
    note = "Ratios: medians over interleaved rounds; in brackets the range over rounds."
    made = table("Time of a step", columns, rows, 4, note)
    return Section("Time of a step", "Whole optimizer steps over the same batches.", [made]) if rows else None
