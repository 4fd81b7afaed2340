"""How good are single runs, and how stable over seeds?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, grouped
from copra_llm.results import Result


def run_groups(results: Iterable[Result]) -> list[Group]:
    """Training runs, all seeds of one setting together."""
    return grouped(r for r in results if r.protocol == "train")


def seeds_of(g: Group, split: str, name: str = "accuracy") -> Estimate | None:
    """A metric over seeds; None where not every run has it."""
    key = f"{split}/{g.task_key}/{name}"
    values = [r.metrics[key] for r in g.records if key in r.metrics]
    return seed_estimate(values) if len(values) == len(g.records) else None


def dev_losses(g: Group) -> dict[int, Estimate]:
    """Dev loss by step, of the evaluations during training that all seeds have made."""
    key = f"dev/{g.task_key}/loss"
    logs = [{entry["step"]: entry[key] for entry in r.data.get("dev", []) if key in entry} for r in g.records]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    return {step: seed_estimate([log[step] for log in logs]) for step in steps}


def spread(runs: Sequence[Result], name: str) -> float:
    """Standard deviation over seeds of a logged quantity, relative to its mean, averaged over the log entries.

    NaN where fewer than two runs have logged it, or their log entries are at other steps.
    """
    logs = [r.data.get("log", []) for r in runs]
    if len(logs) < 2 or not all(log and all(name in entry for entry in log) for log in logs):
        return math.nan
    if len({tuple(entry["step"] for entry in log) for log in logs}) > 1:
        return math.nan
    values = np.array([[entry[name] for entry in log] for log in logs], dtype=float)  # (seeds, entries)
    return float(np.mean(values.std(0, ddof=1) / values.mean(0)))


def step_groups(results: Iterable[Result]) -> list[Group]:
    """Adapters that were merged along their training, by merge rule."""
    return grouped((r for r in results if r.protocol == "merge_over_steps"), ("merge_method", "merge_options"))


def same_steps(g: Group) -> list[Result]:
    """The records at the first one's steps: others have no value at some of them."""
    return [r for r in g.records if r.data["steps"] == g.records[0].data["steps"]]


def along_steps(records: Sequence[Result], which: str) -> dict[int, Estimate]:
    """Accuracy ("single" or "merged") by step of records of the same steps; two adapters' count as their mean."""
    values = [[np.mean(np.array(at, dtype=float)) for at in r.data[which]] for r in records]  # (records, steps)
    steps = records[0].data["steps"]
    return {step: seed_estimate(at) for step, at in zip(steps, zip(*values, strict=True), strict=True)}
