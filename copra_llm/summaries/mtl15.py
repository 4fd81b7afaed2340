"""What do many tasks say together? One row a task, and the mean over them.

    gain_k = fused accuracy of CopRA (or CoTo) on task k minus that of LoRA,      mean gain +- t s / sqrt(tasks)

The interval is over tasks: would other tasks of this kind agree?  Source: CopRA (arXiv 2410.22911), figure 5c.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from copra_llm.estimates import seed_estimate
from copra_llm.figures.groups import NAMES, rank
from copra_llm.figures.merged import merge_name, merged_groups
from copra_llm.figures.pairs import mean_metric, single_metric
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

KINDS = ("single", "fusion", "mixture")
Row = dict[str, dict[str, float]]
"""By method, as it is shown: accuracies of `KINDS` in percent, of those that have records."""


def suite_rows(results: Iterable[Result], model: str, learning_rate: float, steps: int) -> dict[str, Row]:
    """By task: accuracies of every method at one setting, means over the pairs of seeds; variants are left out."""
    rows: dict[str, Row] = defaultdict(lambda: defaultdict(dict))
    for g in merged_groups(results):
        if (g.model, g.learning_rate, g.steps) == (model, learning_rate, steps) and g.label in NAMES.values():
            own = rows[g.task_key][g.label]
            own.setdefault("single", single_metric(g.records, "accuracy"))
            own[merge_name(g)] = mean_metric(g.records, "accuracy@0.5")
    return rows


def suite_table(results: Iterable[Result], model: str, tasks: Sequence[str], learning_rate: float, steps: int) -> str:
    """Markdown: a row a task with records, the mean over those that all methods have, and what is compared in words.

    Args:
        results: records; only those of the model at this learning rate and number of steps count.
        model: as the table calls it.
        tasks: all that belong to the suite; those without records are named below the table.
        learning_rate: the one setting's.
        steps: the one setting's.
    """
    found = suite_rows(results, model, learning_rate, steps)
    rows = {task: found[task] for task in tasks if task in found}
    if not rows:
        return ""
    methods = sorted({method for row in rows.values() for method in row}, key=rank)
    others = [method for method in methods if method != "LoRA"] if "LoRA" in methods else []
    whole = [row for row in rows.values() if _fused(row, methods)]
    lines = [
        (task, *(_cell([row[m]] if m in row else []) for m in methods),
         *(seed_estimate(_gains([row], m)) if _fused(row, [m, "LoRA"]) else None for m in others))
        for task, row in rows.items()
    ]  # fmt: skip
    said = []
    if len(whole) > 1:
        means = (_cell([row[m] for row in whole]) for m in methods)
        lines.append((f"**mean of {len(whole)}**", *means, *(seed_estimate(_gains(whole, m)) for m in others)))
        said.append(f"The mean is over the {len(whole)} tasks that all methods have; its intervals (95 %, Student's t) "
                    "are over tasks.")  # fmt: skip
        said += [_in_words(whole, m) for m in others]
    missing = [task for task in tasks if task not in rows]
    if missing:
        said.append(f"Not run at this setting yet: {', '.join(missing)}.")
    columns = [("task",), *((f"{m}: single / fused / mixture",) for m in methods),
               *((f"{m} minus LoRA, fused", ".1f") for m in others)]  # fmt: skip
    return markdown_table(columns, lines) + "".join(f"\n{sentence}\n" for sentence in said)


def _fused(row: Row, methods: Iterable[str]) -> bool:
    """Whether all of the methods have fused adapters."""
    return all("fusion" in row.get(method, {}) for method in methods)


def _gains(rows: Sequence[Row], method: str, kind: str = "fusion") -> list[float]:
    """The method minus LoRA, task by task."""
    return [row[method][kind] - row["LoRA"][kind] for row in rows]


def _in_words(rows: Sequence[Row], method: str) -> str:
    """The method minus LoRA over tasks: single, and what fusion keeps of it."""
    single, fused = (_gains(rows, method, kind) for kind in ("single", "fusion"))
    kept = seed_estimate([f - s for f, s in zip(fused, single, strict=True)])
    return f"{method} minus LoRA over these: single {seed_estimate(single):.1f}, drop when fused smaller by {kept:.1f}."


def _cell(values: Sequence[dict[str, float]]) -> str | None:
    """Means over tasks, "single / fused / mixture"; a dash for what not every task has."""
    if not values:
        return None
    means = [np.mean([v[kind] for v in values]) if all(kind in v for v in values) else None for kind in KINDS]
    return " / ".join("–" if mean is None else f"{mean:.1f}" for mean in means)
