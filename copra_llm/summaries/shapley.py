"""Over which layers is an adapter's effect spread, and how evenly? A table from the records.

Values add up to v(all layers) - v(no layer), which differs between adapters. So what is shown is relative: the part
of that sum in the lowest, middle and highest third of the layers, the share of the third with the largest
magnitudes, and Gini's coefficient of the magnitudes. Means over adapters, with 95 % intervals (Student's t).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from copra_llm.report import NAMES, ORDER, seed_estimate
from copra_llm.results import Result

EVERY = "all"
"""Stands for the task in the rows over all of them."""
Groups = dict[tuple[str, str, str], dict[str, list[Result]]]
"""Records by (model, task, method) and metric."""


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


def _table(groups: Groups, shown: Callable[[str, str], bool]) -> str:
    if not groups:
        return ""
    lines = [
        "| model | task | method | adapters | loss undone | low / middle / high third of it | top third's share, loss "
        "| minus LoRA's | Gini, loss | minus LoRA's | top third's share, accuracy | Gini, accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, task, method), by_metric in groups.items():
        if not shown(model, task):
            continue
        loss, accuracy = by_metric.get("loss", []), by_metric.get("accuracy", [])
        base = groups.get((model, task, "lora"), {}).get("loss", []) if method != "lora" else []
        row = (
            model, task, NAMES.get(method, method), str(max(len(loss), len(accuracy))),
            f"{np.mean([r.data['v_full'] - r.data['v_empty'] for r in loss]):.2f}" if loss else "–",
            " / ".join(f"{100 * part:.0f} %" for part in np.mean([thirds(r) for r in loss], axis=0)) if loss else "–",
            *(cell for name in ("top_third_share", "gini") for cell in (_mean(loss, name), _minus(loss, base, name))),
            *(_mean(accuracy, name) for name in ("top_third_share", "gini")),
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def thirds(r: Result) -> np.ndarray:
    """Parts `(3,)` of the sum of a record's values in the lowest, middle and highest third of its players.

    Where three does not divide their number, a player on a border counts on both sides with its fractions.
    """
    values = np.array(r.data["values"])
    edges = np.linspace(0, len(values), 4)
    cumulated = np.interp(edges, np.arange(len(values) + 1), np.append(0.0, values.cumsum()))
    return np.diff(cumulated) / values.sum()


def evenness(r: Result, name: str) -> float:
    """`top_third_share` or `gini` of a record."""
    return r.metrics[f"{r.config['split']}/{r.config['task']}/{name}"]


def _groups(results: Iterable[Result]) -> Groups:
    """The records in the order of the rows; `EVERY` joins the tasks of a model with several."""
    found: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in (r for r in results if r.protocol == "shapley" and r.config["granularity"] == "layer"):
        found[r.config["model_name_or_path"], r.config["task"], r.config["method"]][r.config["metric"]].append(r)
    tasks = {model: {t for m, t, _ in found if m == model} for model, _, _ in found}
    for model, task, method in list(found):
        if len(tasks[model]) > 1:
            for metric, records in found[model, task, method].items():
                found[model, EVERY, method][metric] += records
    rank = {method: i for i, method in enumerate(ORDER)}
    return {key: found[key] for key in sorted(found, key=lambda k: (k[0], k[1] == EVERY, k[1], rank.get(k[2], 9)))}


def _mean(records: Sequence[Result], name: str) -> str:
    return f"{seed_estimate([evenness(r, name) for r in records]):.2f}" if records else "–"


def _minus(records: Sequence[Result], base: Sequence[Result], name: str) -> str:
    """The difference to other records of the same tasks and seeds."""
    key: Callable = lambda r: (r.config["task"], r.config["seed"])  # noqa: E731
    theirs = {key(r): evenness(r, name) for r in base}
    pairs = [evenness(r, name) - theirs[key(r)] for r in records if key(r) in theirs]
    return f"{seed_estimate(pairs):.2f}" if pairs else "–"
