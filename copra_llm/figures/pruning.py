"""What is left of the accuracy when part of an adapter is taken away?

Means over seeds. What is compared is compared seed by seed, since runs of one seed share initialisation and data order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from copra_llm.figures.groups import Group, grouped, label_of
from copra_llm.results import Result

LAYERS = ("every-other", "low", "middle", "high")
"""Structured variants that every adapter of some depth has; their mean is one number for a method."""
Variant = tuple[str, str, float | None]
"""(kind, name, density) of a pruned adapter."""


def pruning_groups(results: Iterable[Result]) -> list[Group]:
    """Pruned adapters, all seeds together; the checkpoint at a quarter of the run is a series of its own."""

    def label(r: Result) -> str:
        return f"Early {label_of(r)}" if r.config.get("checkpoint") == "early" else label_of(r)

    return grouped((r for r in results if r.protocol == "pruning"), ("split",), label=label)


def outcomes(g: Group) -> dict[Variant, list[dict[str, Any]]]:
    """Rows of all seeds by what was done, in the order of the records."""
    found: dict[Variant, list[dict[str, Any]]] = {}
    for r in g.records:
        for row in r.data["rows"]:
            found.setdefault((row["kind"], row["name"], row.get("density")), []).append(row)
    return found


@dataclass(frozen=True)
class Series:
    """The adapters of one model, method and checkpoint, of one task or averaged over several."""

    groups: tuple[Group, ...]
    """One a task."""

    @property
    def model(self) -> str:
        return self.groups[0].model

    @property
    def task(self) -> str:
        return self.groups[0].task if len(self.groups) == 1 else f"mean of {len(self.groups)}"

    @property
    def place(self) -> tuple[str, str]:
        return self.model, self.task

    @property
    def name(self) -> str:
        return self.groups[0].name

    @property
    def early(self) -> bool:
        return self.groups[0].label.startswith("Early ")

    @property
    def method(self) -> str:
        """As it is shown, without "Early"."""
        return self.groups[0].label.removeprefix("Early ")

    def value(self, what: str, name: str, density: float = 1.0) -> dict[int, float]:
        """ "accuracy" (percent) or "loss" (nats) of a variant by seed, of the seeds that every task has.

        Empty if a record has not this variant.
        """
        of_tasks = []
        for g in self.groups:
            rows = [row for key, found in outcomes(g).items() if key[1:] == (name, density) for row in found]
            if len(rows) != len(g.records):
                return {}
            of_tasks.append({r.config["seed"]: row[what] for r, row in zip(g.records, rows, strict=True)})
        seeds = sorted(set.intersection(*map(set, of_tasks)))
        return {seed: sum(part[seed] for part in of_tasks) / len(of_tasks) for seed in seeds}

    def accuracy(self, name: str, density: float = 1.0) -> dict[int, float]:
        """Percent by seed."""
        return self.value("accuracy", name, density)

    def worse(self, what: str, name: str, density: float = 1.0) -> dict[int, float]:
        """By seed: points of accuracy that the variant loses of the whole adapter's, or nats of loss that it gains."""
        whole, left = self.value(what, "all"), self.value(what, name, density)
        sign = 1 if what == "accuracy" else -1
        return {seed: sign * (whole[seed] - left[seed]) for seed in whole.keys() & left.keys()}

    def drop(self, name: str, density: float = 1.0) -> dict[int, float]:
        """Accuracy lost, in percentage points by seed."""
        return self.worse("accuracy", name, density)

    def over_layers(self, value: Callable[[str], dict[int, float]]) -> dict[int, float]:
        """Mean of a value over `LAYERS`, by seed; empty if one is missing."""
        parts = [value(name) for name in LAYERS]
        return {seed: sum(part[seed] for part in parts) / len(parts) for seed in parts[0]} if all(parts) else {}


def pruning_series(results: Iterable[Result]) -> list[Series]:
    """A series a group, in the order of the tables."""
    return [Series((g,)) for g in pruning_groups(results)]


def averaged(series: Sequence[Series]) -> list[Series]:
    """Each model's methods averaged over the tasks, seed by seed; only what every task of the model has."""
    found = []
    for model in dict.fromkeys(s.model for s in series):
        tasks = {s.task for s in series if s.model == model}
        for name in dict.fromkeys(s.name for s in series if s.model == model):
            parts = [s.groups[0] for s in series if (s.model, s.name) == (model, name)]
            whole = len(parts) == len(tasks) and {g.task for g in parts} == tasks
            if len(tasks) > 1 and whole and Series(tuple(parts)).accuracy("all"):
                found.append(Series(tuple(parts)))
    return found
