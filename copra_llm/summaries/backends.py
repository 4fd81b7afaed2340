"""Is it the same run on every backend, and what does it cost? A table of the records, next to the plan's other rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

SAME = 1e-3
"""Largest relative difference of Delta W at which two adapters count as the same.

Sums over a batch in another order differ by a float32's rounding. In forty steps that made some 1e-6 of Delta W, and
once 4e-4 (of one module 2e-3): of 1536 entries of a B, one whose gradient was a rounding from 0 took Adam's first step,
which is as long for the smallest gradient, the other way. Other examples made 0.96."""


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
        for method in sorted(own, reverse=True):
            rows.append(_row(entry["label"], own[method], found.get((own[method].config["reference"], method))))
        if not own:
            rows.append((entry["label"], None, "needs a GPU" if entry.get("needs_gpu") else "not run yet",
                         *[None] * 7))  # fmt: skip
    columns = [
        ("backend",), ("method",), ("starts here",), ("same adapter",), ("difference",), ("of one module, at most",),
        ("sent a step",), ("a step's time, × one process", ".2f"), ("its CPU seconds, × one process", ".2f"),
        ("peak memory",),
    ]  # fmt: skip
    return markdown_table(columns, rows) if found else ""


def _row(label: str, r: Result, reference: Result | None) -> tuple:
    m, shown = r.metrics, {"lora": "LoRA", "copra": "CopRA"}.get(r.config["method"], r.config["method"])
    if not m["starts"]:
        return (label, shown, "no", *[None] * 7)

    def ratio(key: str) -> float | None:
        return None if reference is None else m[key] / reference.metrics[key]

    difference, sent = m["difference"], m.get("bytes_per_step")
    return (
        label, shown, "yes", "yes" if difference <= SAME else "no", _shown(difference), _shown(m["largest_difference"]),
        None if sent is None else f"{sent / 1e3:.0f} kB", ratio("seconds_per_step"), ratio("cpu_seconds_per_step"),
        f"{m['peak_memory_bytes'] / 1e6:.0f} MB",
    )  # fmt: skip


def _shown(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"
