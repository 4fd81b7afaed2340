"""What became of runs that were killed? A table of the records of kill-and-resume trials."""

from __future__ import annotations

from collections.abc import Iterable

from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

PHASES = ("start", "step", "save", "evaluation", "end")
"""Of a run: until its first step; steps; writing a checkpoint or the best adapter; evaluating; after its last step."""


def faults_table(results: Iterable[Result]) -> str:
    """Markdown, one row for all records: trials, kills by phase, and how often something was wrong, by what it was."""
    records = [r for r in results if r.protocol == "faults"]
    names = ("trials", "kills", *(f"kills/{phase}" for phase in PHASES), "lost", "torn", "different", "left_behind")
    rows = [tuple(f"{sum(r.metrics[name] for r in records):.0f}" for name in names)] if records else []
    columns = [("trials",), ("kills",), *((f"in {phase}",) for phase in PHASES), ("saved steps lost",),
               ("torn checkpoint",), ("other bytes in the end",), ("files left behind",)]  # fmt: skip
    return markdown_table(columns, rows)
