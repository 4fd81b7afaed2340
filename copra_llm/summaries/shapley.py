"""Over which layers is an adapter's effect spread, and how evenly? A table from the records.

Values add up to v(all layers) - v(no layer), which differs between adapters. So what is shown is relative: the part
of that sum in the lowest, middle and highest third of the layers, the share of the third with the largest
magnitudes, and Gini's coefficient of the magnitudes. Means over adapters, with 95 % intervals (Student's t).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from copra_llm.estimates import Estimate, paired_estimate
from copra_llm.figures.groups import rank
from copra_llm.figures.shapley import evenness, mean_evenness, shapley_groups, thirds
from copra_llm.report.tables import Value, markdown_table
from copra_llm.results import Result

EVERY = "all"
"""Stands for the task in the rows over all of them."""
ByMetric = Mapping[str, list[Result]]


def shapley_table(results: Iterable[Result]) -> str:
    """Markdown: a row a model and method, over all tasks of the model. Columns as in `shapley_details`."""
    groups = _groups(results)
    several = {model for model, task, _ in groups if task == EVERY}
    return _table(groups, lambda model, task: task == EVERY or model not in several)


def shapley_details(results: Iterable[Result]) -> str:
    """Markdown: a row a model, task and method, and one a method over all tasks of a model.

    Differences to LoRA are paired: same task and seed.
    """
    return _table(_groups(results), lambda model, task: True)


def _table(groups: Mapping[tuple[str, str, str], ByMetric], shown: Callable[[str, str], bool]) -> str:
    rows = [
        (*key, *_cells(by_metric, groups.get((*key[:2], "LoRA"), {}) if key[2] != "LoRA" else {}))
        for key, by_metric in groups.items()
        if shown(*key[:2])
    ]
    columns = [
        ("model",), ("task",), ("method",), ("adapters",), ("loss undone", ".2f"),
        ("low / middle / high third of it",), ("top third's share, loss", ".2f"), ("minus LoRA's", ".2f"),
        ("Gini, loss", ".2f"), ("minus LoRA's", ".2f"), ("top third's share, accuracy", ".2f"),
        ("Gini, accuracy", ".2f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _cells(by_metric: ByMetric, lora: ByMetric) -> list[Value]:
    """From the number of adapters on."""
    loss, accuracy = by_metric.get("loss", []), by_metric.get("accuracy", [])
    cells: list[Value] = [max(len(loss), len(accuracy)), None, None]
    if loss:
        cells[1] = float(np.mean([r.data["v_full"] - r.data["v_empty"] for r in loss]))
        cells[2] = " / ".join(f"{100 * part:.0f} %" for part in np.mean([thirds(r) for r in loss], axis=0))
    for name in ("top_third_share", "gini"):
        cells += [mean_evenness(loss, name), _minus(loss, lora.get("loss", []), name)]
    return cells + [mean_evenness(accuracy, name) for name in ("top_third_share", "gini")]


def _minus(records: Sequence[Result], base: Sequence[Result], name: str) -> Estimate | None:
    """The difference to other records of the same tasks and seeds."""
    ours, theirs = (
        {(r.config["task"], r.config["seed"]): value for r in of if (value := evenness(r, name)) is not None}
        for of in (records, base)
    )
    return paired_estimate(ours, theirs)


def _groups(results: Iterable[Result]) -> dict[tuple[str, str, str], ByMetric]:
    """Records by (model, task, method) and metric in the order of the rows; `EVERY` joins a model's tasks."""
    groups = [g for g in shapley_groups(results) if g.records[0].config["granularity"] == "layer"]
    tasks = {model: {g.task for g in groups if g.model == model} for model in (g.model for g in groups)}
    found: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for g in groups:
        for task in [g.task, EVERY][: 2 if len(tasks[g.model]) > 1 else 1]:
            found[g.model, task, g.label][g.values[0]] += g.records
    return {key: found[key] for key in sorted(found, key=lambda k: (k[0], k[1] == EVERY, k[1], rank(k[2])))}
