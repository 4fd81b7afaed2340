"""Is it the same run on every backend, and what does it cost? A table of the records, next to the plan's other rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

SAME = 1e-4
"""Largest relative difference of a Delta W at which two adapters count as the same.

Sums over a batch in another order differ by a float32's rounding (6e-8), and forty steps of Adam, which divides by the
size of a gradient however small it is, made up to some 1e-5 of it. Other examples or masks, or a layer that moved when
it should not, make 1e-1 and more."""


def backends_table(results: Iterable[Result], plan: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one row a backend and method; what the plan says needs a GPU, or has not been run, says so.

    Args:
        results: those of other protocols are passed over.
        plan: the entries by name, in the order of the rows.
    """
    found = {(r.config["backend"], r.config["method"]): r for r in results if r.protocol == "backends"}
    rows = []
    for name, entry in plan.items():
        own = {method: r for (backend, method), r in found.items() if backend == name}
        rows += [_row(entry["label"], own[method]) for method in sorted(own, reverse=True)]
        if not own:
            rows.append((entry["label"], None, "needs a GPU" if entry.get("needs_gpu") else "not run yet", *[None] * 6))
    columns = [("backend",), ("method",), ("starts here",), ("same adapter",), ("largest difference",),
               ("sent a step",), ("step, × one process", ".2f"), ("its CPU seconds, × one process", ".2f"),
               ("peak memory",)]  # fmt: skip
    return markdown_table(columns, rows) if found else ""


def _row(label: str, r: Result) -> tuple:
    m, shown = r.metrics, {"lora": "LoRA", "copra": "CopRA"}.get(r.config["method"], r.config["method"])
    if not m["starts"]:
        return (label, shown, "no", *[None] * 6)
    difference, sent = m["largest_difference"], m.get("bytes_per_step")
    return (
        label, shown, "yes", "yes" if difference <= SAME else "no", f"{difference:.0e}" if difference else "0",
        None if sent is None else f"{sent / 1e3:.0f} kB", m["ratio/seconds_per_step"],
        m["ratio/cpu_seconds_per_step"], f"{m['peak_memory_bytes'] / 1e6:.0f} MB",
    )  # fmt: skip
