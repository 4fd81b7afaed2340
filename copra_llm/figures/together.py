"""What is lost when adapters that belong together are merged: of one federation's clients, of several tasks?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, grouped
from copra_llm.results import Result

MERGED_BY = ("merge_name", "merge_method", "merge_options")
FEDERATED = (*MERGED_BY, "case", "clients", "split_kind", "beta", "rounds")


def federated_groups(results: Iterable[Result]) -> list[Group]:
    """Federated runs of one way of dividing the data and one merge rule, all seeds together."""
    return grouped((r for r in results if r.protocol == "federated"), FEDERATED)


def multitask_groups(results: Iterable[Result]) -> list[Group]:
    """Merges of one group of tasks by one rule, all seeds together."""
    found = (r for r in results if r.protocol == "multitask")
    return grouped(found, MERGED_BY, tasks=lambda r: [" + ".join(r.config["tasks"])])


def merged_by(g: Group) -> str:
    """The rule's own name, or its method with its options."""
    name, method, options = g.values[:3]
    return str(name) if name else f"{method} ({options})" if options else str(method)


def at_end(r: Result, which: str, name: str) -> float:
    """A federation's accuracy (percent) or loss (nats) in its last round: "origin" (mean over clients) or "merged"."""
    key = f"test/{r.config['task']}/{name}/{which}"
    if key in r.metrics:
        return r.metrics[key]
    last = r.data["rounds"][-1]
    found = [c[name] for c in last["clients"]] if which == "origin" else [last["merged"][name]]
    return float(np.mean(np.array(found, dtype=float)))


def mean_at_end(g: Group, which: str, name: str) -> Estimate:
    """`at_end` over seeds."""
    return g.estimate(lambda r: at_end(r, which, name))


def task_accuracy(r: Result, task: str, which: str) -> float | None:
    """Accuracy of a task or "mean": "single", "merged" or "normalised", in percent; None where the record has none."""
    return r.metrics.get(f"{r.config.get('split', 'test')}/{task}/accuracy/{which}")


def mean_task_accuracy(g: Group, task: str, which: str) -> Estimate | None:
    """Over seeds; None where not every record has it."""
    found = [task_accuracy(r, task, which) for r in g.records]
    return seed_estimate(found) if None not in found else None
