"""How good is a variant over several tasks, and how does it compare with another? Means with 95 % intervals over seeds.

    h(k) = mean over the tasks of an outcome of seed k, or of the pair of seeds k = {i, j}
    mean of h over seeds:   Student's t;       over pairs, which share seeds:   jackknife over seeds (`bands.py`)

Tasks and test examples are held fixed: the intervals are about other seeds on the same tasks. Two variants are compared
by the differences of h at the same seeds. A task counts once it has an outcome, and a seed or pair if all those tasks
have it: so an unfinished study is compared on what is whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from copra_llm.bands import pair_band
from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import metric, tasks_of
from copra_llm.figures.pairs import estimates_of
from copra_llm.results import Result

Key = tuple[int, ...]
"""A seed, `(i,)`, or a pair of seeds, `(i, j)`."""
Values = Mapping[str, Mapping[Key, float]]
"""`{task: {key: value}}` of one outcome."""


@dataclass(frozen=True)
class OverTasks:
    """A mean over tasks and seeds or pairs."""

    estimate: Estimate
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]


def outcomes(records: Iterable[Result]) -> dict[str, dict[str, dict[Key, float]]]:
    """Everything that was measured of one variant at one setting: `{outcome: {task: {key: value}}}`.

    Outcomes are "single", "seconds" (of training) and "activation_prob" (mean over the logged steps); of each merge
    rule `<rule>`, `<rule> drop` (mean of the two ends minus the middle) and `<rule> barrier`; `pruned <what>`;
    "top_third_share" and "gini" of Shapley values in loss; "from_initialisation" and "from_early"; of a group of tasks,
    which counts as a task, `together <rule>`: the mean accuracy of their merged adapter. Accuracies in percent, on
    test. What was not finite is left out.
    """
    found: dict[str, dict[str, dict[Key, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        for task in ["+".join(tasks_of(r))] if r.protocol == "multitask" else tasks_of(r):
            key = tuple(r.config["seeds"]) if "seeds" in r.config else (r.config["seed"],)
            for name, value in _measured(r, task):
                if math.isfinite(value):
                    found[name][task][key] = value
    return found


def over_tasks(values: Values) -> OverTasks | None:
    """Mean of an outcome over tasks, and over the seeds or pairs that all of them have; None if they share none."""
    values = {task: own for task, own in values.items() if own}
    if not values:
        return None
    keys = sorted(set.intersection(*(set(own) for own in values.values())))
    if not keys:
        return None
    means = np.array([np.mean([own[key] for own in values.values()]) for key in keys])
    estimate = seed_estimate(means) if len(keys[0]) == 1 else estimates_of(pair_band(means[:, None], keys))[0]
    return OverTasks(estimate, tuple(values), tuple(sorted({seed for key in keys for seed in key})))


def against(values: Values, reference: Values) -> OverTasks | None:
    """The outcome minus the reference's, at the same seeds or pairs of the tasks that both have."""
    both = {task: own.keys() & reference[task].keys() for task, own in values.items() if task in reference}
    return over_tasks({task: {k: values[task][k] - reference[task][k] for k in keys} for task, keys in both.items()})


def _measured(r: Result, task: str) -> Iterable[tuple[str, float]]:
    if r.protocol == "train":
        yield "single", metric(r, "accuracy", task, "test")
        yield "seconds", r.seconds
        if r.data.get("log"):
            yield "activation_prob", float(np.mean([entry["activation_prob"] for entry in r.data["log"]]))
    elif r.protocol == "interpolation" and r.config["split"] == "test":
        rule, middle = r.config["merge_method"], metric(r, "accuracy@0.5")
        yield rule, middle
        yield f"{rule} drop", (metric(r, "accuracy@0") + metric(r, "accuracy@1")) / 2 - middle
        yield f"{rule} barrier", metric(r, "accuracy_barrier")
    elif r.protocol == "pruning":
        for row in r.data["rows"]:
            kept = row["name"] if row["kind"] == "structured" else f"{row['name']} {row['density']:g}"
            yield f"pruned {kept}", row["accuracy"]
    elif r.protocol == "shapley" and r.config["metric"] == "loss":
        for name in ("top_third_share", "gini"):
            yield name, metric(r, name)
    elif r.protocol == "multitask":
        yield f"together {r.config['merge_name']}", r.metrics["test/mean/accuracy/merged"]
    elif r.protocol == "distance":
        yield from r.metrics.items()
