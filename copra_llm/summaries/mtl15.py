"""What do many tasks say together? One row a task, and the mean over them.

    gain_k = fused accuracy of CopRA (or CoTo) on task k minus that of LoRA,      mean gain +- t s / sqrt(tasks)

The interval is over tasks: would other tasks of this kind agree?  Source: CopRA (arXiv 2410.22911), figure 5c.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from copra_llm.estimates import seed_estimate
from copra_llm.report import NAMES, ORDER, mean_metric
from copra_llm.results import Result

Row = dict[str, dict[str, float]]
"""By method: `single`, `fusion` and `mixture`, in percent."""


def suite_rows(results: Iterable[Result], learning_rate: float, steps: int) -> dict[tuple[str, str], Row]:
    """By (model, task): accuracies of every method at one setting, means over the pairs of seeds."""
    found: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        c = r.config
        if r.protocol != "interpolation" or c.get("variant") or c["method"] not in ORDER:
            continue
        if (c["learning_rate"], c["max_steps"]) == (learning_rate, steps):
            found[Path(c["model_name_or_path"]).name, c["task"], c["method"], c["merge_method"]].append(r)
    rows: dict[tuple[str, str], Row] = defaultdict(lambda: defaultdict(dict))
    for (model, task, method, rule), pairs in found.items():
        own = rows[model, task][method]
        own[rule] = mean_metric(pairs, "accuracy@0.5")
        own["single"] = (mean_metric(pairs, "accuracy@0") + mean_metric(pairs, "accuracy@1")) / 2
    return rows


def suite_table(results: Iterable[Result], learning_rate: float = 0.004, steps: int = 300) -> str:
    """Markdown: a row a task, every method single / fused / mixture; below, means over the tasks that all have,
    and each method minus LoRA with a 95 % interval over tasks (Student's t)."""
    rows = suite_rows(results, learning_rate, steps)
    methods = [m for m in ORDER if any(m in row for row in rows.values())]
    if not rows:
        return ""
    head = ["task", *(f"{NAMES[m]}: single / fused / mixture" for m in methods)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    gains: list[str] = []
    for model in dict.fromkeys(model for model, _ in sorted(rows)):
        own = {task: row for (m, task), row in sorted(rows.items()) if m == model}
        for task, row in own.items():
            lines.append("| " + " | ".join([task, *(_cell(row.get(m)) for m in methods)]) + " |")
        whole = [row for row in own.values() if all("fusion" in row.get(m, {}) for m in methods)]
        if len(whole) > 1:
            means = [{kind: float(np.mean([row[m][kind] for row in whole])) for kind in whole[0][m]} for m in methods]
            lines.append("| " + " | ".join([f"**mean of {len(whole)}**", *map(_cell, means)]) + " |")
            gains += [_gain_line(whole, m) for m in methods if m != "lora" and "lora" in methods]
    return "\n".join([*lines, "", *gains]) if gains else "\n".join(lines) + "\n"


def _gain_line(rows: list[Row], method: str) -> str:
    """The method minus LoRA over tasks: single, fused, and what fusion keeps of it."""
    single, fused = ([row[method][k] - row["lora"][k] for row in rows] for k in ("single", "fusion"))
    kept = [f - s for f, s in zip(fused, single, strict=True)]
    return (f"{NAMES[method]} minus LoRA, mean over {len(rows)} tasks: single {seed_estimate(single)!s}, "
            f"fused {seed_estimate(fused)!s}, drop when fused smaller by {seed_estimate(kept)!s}.\n")  # fmt: skip


def _cell(values: dict[str, float] | None) -> str:
    if not values:
        return "–"
    return " / ".join(f"{values[k]:.1f}" if k in values else "–" for k in ("single", "fusion", "mixture"))
