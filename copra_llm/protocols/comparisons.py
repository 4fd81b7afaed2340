"""What does an entry of the study compare, and which of its runs come first?

    cell = variant (settings of a method or schedule) x level of each factor (rank, initialisation, modules, ...)
    run  = cell x task x learning rate x steps x seed

Learning rate and steps are tuned for each cell on dev, with the single adapter: never on test, never merged. A cell's
name is the variant's with the levels that change something, "copra-r8": it names the folder of its runs, so that
entries that mean the same runs share them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.config import RunConfig, typed_settings
from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.protocols.plans import check_points, check_runs, need_entries, read_plans
from copra_llm.protocols.runs import Run
from copra_llm.prune import Variant
from copra_llm.results import Result
from copra_llm.saved_runs import dev_score

TUNE = ("over_tasks", "per_task", "none")


@dataclass(frozen=True)
class Comparison:
    """One entry of the study's plan: variants on one model, and what is measured of them."""

    model: str
    tasks: list[str]
    variants: dict[str, dict[str, Any]]
    """`{name: {setting: value}}`; a variant's own learning_rate or max_steps stands in place of the candidates."""
    seeds: list[int]
    learning_rate: list[float]
    """Candidates; with `tune: none` a factor."""
    max_steps: list[int]
    """Candidates; with `tune: none` a factor."""
    settings: dict[str, Any]
    """What all runs share, by the flags' names."""
    factors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`{factor: {level: {setting: value}}}`, beside the variants as they are."""
    crossed: bool = False
    """Whether levels of different factors are combined; else one factor is changed at a time."""
    tune: str = "over_tasks"
    """One choice a cell by its mean over tasks, one `per_task`, or "none": every rate and number of steps is run."""
    tuning_tasks: list[str] = field(default_factory=list)
    """Whose mean decides `over_tasks`; empty: all of `tasks`."""
    tuning_seeds: list[int] = field(default_factory=list)
    """Empty: the first of `seeds`."""
    points: dict[str, int] = field(default_factory=dict)
    """Points of the line between two seeds, for each merge method; 3 are the ends and the middle."""
    pruned: list[str] = field(default_factory=list)
    """Layers or modules that are kept, as `copra_llm.prune` names them."""
    densities: list[float] = field(default_factory=list)
    """Of entries kept by magnitude."""
    shapley_samples: int = 0
    """Dev examples on which the layers' Shapley values are computed, in loss; 0: they are not."""
    distances: bool = False
    """Whether the length of Delta W, and its distance from the checkpoint at T/4, are recorded."""
    groups: list[list[str]] = field(default_factory=list)
    """Tasks whose adapters of one seed are merged with each other, by the rules of `points`."""
    reference: str = "lora"
    """The variant that the others are compared with."""
    screening: bool = False
    """Whether this only says what to look at more closely: few seeds, short runs."""

    def __post_init__(self):
        need_entries(self, "tasks", "variants", "seeds", "learning_rate", "max_steps")
        if self.tune not in TUNE:
            raise InputError(f"the plan's tune is {self.tune!r}, but must be one of {', '.join(TUNE)}")
        if self.reference not in self.variants:
            raise InputError(f"the plan's reference is {self.reference}{nearest(self.reference, self.variants)}, but "
                             f"must be one of its variants, {', '.join(self.variants)}")  # fmt: skip
        check_points(self.points)
        self.smaller()
        for group in self.groups:
            if len(group) < 2 or not set(group) <= set(self.tasks):
                raise InputError(f"the plan's groups have {shown(group)}, but must hold two or more of its tasks each")
        if self.groups and self.tune == "per_task":
            raise InputError("the plan's groups merge adapters of one setting; give tune: over_tasks or none")
        for name, own in self._named():
            if not isinstance(own, dict):
                raise InputError(f"the plan's {name} is {shown(own)}, but must hold `setting: value` entries")
            if not re.fullmatch(r"\w[\w.+-]{0,60}", name):
                raise InputError(f"the plan's variant {named(name)} names a folder; give letters, digits, _, -, +, .")
        for cell in cells(self):
            check_runs(self.tasks, [cell.settings.get("method", "copra")], cell.settings)

    def smaller(self) -> list[Variant]:
        """What is evaluated of an adapter beside itself."""
        entries = [Variant(density=density, by="magnitude") for density in self.densities]
        return [Variant(name) for name in self.pruned] + entries

    @property
    def tuned_on(self) -> list[str]:
        """The tasks whose runs decide about learning rate and steps together."""
        return self.tuning_tasks or self.tasks

    @property
    def tuned_with(self) -> list[int]:
        """The seeds of these runs."""
        return self.tuning_seeds or self.seeds[:1]

    def _named(self) -> Iterator[tuple[str, Any]]:
        yield from self.variants.items()
        for levels in self.factors.values():
            yield from levels.items()


@dataclass(frozen=True)
class Cell:
    """One variant at one level of each factor."""

    name: str
    variant: str
    levels: tuple[str, ...]
    """Those that change something."""
    settings: dict[str, Any]
    """All of its runs', without task, seed, rate and steps."""
    candidates: list[tuple[float, int]]
    """Learning rates and steps that come into question."""
    plain: bool
    """Whether the variant is a method and nothing else, whose runs lie where every protocol has them."""

    def run(self, task: str, rate: float, steps: int, data_root: str | None = None) -> Run:
        """A run of this cell; its seed is 0."""
        own = {"tasks": [task], "learning_rate": rate, "max_steps": steps, "data_root": data_root}
        return Run(RunConfig().replace(**self.settings | own), None if self.plain else self.name)


def read_study(path: Path, entries: Sequence[str] | None = None) -> dict[str, Comparison]:
    """The entries of a plan, or some of them.

    Raises:
        InputError: if the plan is wrong, or has no entry of a name.
    """
    plans = read_plans(path, Comparison)
    unknown = next((name for name in entries or () if name not in plans), None)
    if unknown is not None:
        raise InputError(f"--entries names {shown(unknown)}{nearest(unknown, plans)}, but {path} has "
                         f"{', '.join(plans)}; name some of these")  # fmt: skip
    return {name: plan for name, plan in plans.items() if entries is None or name in entries}


def cells(comparison: Comparison) -> list[Cell]:
    """All cells, the variants as they are first.

    Raises:
        InputError: for a setting that is unknown, or two cells of one name.
    """
    shared = comparison.settings | {"model_name_or_path": comparison.model}
    found: dict[str, Cell] = {}
    for levels, (variant, own) in itertools.product(_levels(comparison), comparison.variants.items()):
        base = _flat(shared | own)
        changing = tuple(name for name, level in levels.items() if _flat(shared | own | level) != base)
        settings = shared | typed_settings(Path("the plan"), own)
        for name in changing:
            settings |= typed_settings(Path("the plan"), levels[name])
        cell = _cell(comparison, variant, changing, settings, plain=own == {"method": variant} and not changing)
        if found.setdefault(cell.name, cell) != cell:
            raise InputError(f"the plan has two cells of the name {cell.name}, but it names their folder; rename a "
                             "variant or a level")  # fmt: skip
    return list(found.values())


def _cell(comparison: Comparison, variant: str, levels: tuple[str, ...], settings: dict[str, Any], plain: bool) -> Cell:
    rates = [settings.pop("learning_rate")] if "learning_rate" in settings else comparison.learning_rate
    steps = [settings.pop("max_steps")] if "max_steps" in settings else comparison.max_steps
    candidates = list(itertools.product(rates, steps))
    return Cell("-".join((variant, *levels)), variant, levels, settings, candidates, plain)


def _levels(comparison: Comparison) -> list[dict[str, dict[str, Any]]]:
    """`{level: settings}` of every cell, none first."""
    if comparison.crossed:
        grid = itertools.product(*(levels.items() for levels in comparison.factors.values()))
        return [{}, *map(dict, grid)]
    return [{}, *({name: own} for levels in comparison.factors.values() for name, own in levels.items())]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return RunConfig().replace(**typed_settings(Path("the plan"), settings)).flat()


def tuning_runs(comparison: Comparison, cell: Cell, data_root: str | None = None) -> list[Run]:
    """The runs that decide about a cell's learning rate and steps, seed by seed; none where nothing is to be chosen."""
    if comparison.tune == "none" or len(cell.candidates) == 1:
        return []
    tasks = comparison.tuned_on if comparison.tune == "over_tasks" else comparison.tasks
    return [
        cell.run(task, rate, steps, data_root).replace(seed=seed)
        for seed, (rate, steps), task in itertools.product(comparison.tuned_with, cell.candidates, tasks)
    ]


def chosen_runs(
    comparison: Comparison,
    cell: Cell,
    task: str,
    record: Callable[[Run], Result | None],
    data_root: str | None = None,
) -> list[Run]:
    """A cell's runs on one task at its tuned settings, their seed 0; none while runs to choose by are missing.

    Chosen is the highest mean dev accuracy of single adapters, then the smallest mean dev loss; the first candidate
    among equals.

    Args:
        comparison, cell, task: whose runs.
        record: of a run; None if it has none.
        data_root: of the runs.
    """
    deciding = tuning_runs(comparison, cell, data_root)
    if comparison.tune == "per_task":
        deciding = [run for run in deciding if run.config.data.tasks == [task]]
    if not deciding:
        return [cell.run(task, *candidate, data_root) for candidate in cell.candidates]
    scores: dict[tuple[float, int], list[tuple[float, float]]] = {}
    for run in deciding:
        result = record(run)
        if result is None:
            return []
        train = run.config.train
        scores.setdefault((train.learning_rate, train.max_steps), []).append(
            dev_score(result, run.config.data.tasks[0])
        )
    best = max(scores, key=lambda candidate: tuple(np.mean(scores[candidate], axis=0)))
    return [cell.run(task, *best, data_root)]


@dataclass(frozen=True)
class Selection:
    """What is wanted of an entry now; None: all."""

    tasks: Sequence[str] | None = None
    variants: Sequence[str] | None = None
    """Names of variants, with all of their levels, or of single cells."""
    seeds: Sequence[int] | None = None

    def check(self, comparisons: Sequence[Comparison]) -> None:
        """Refuse what no entry has.

        Raises:
            InputError: for a task, variant or seed that is in none of the entries.
        """
        for flag, wanted, known in (
            ("tasks", self.tasks, [task for c in comparisons for task in c.tasks]),
            (
                "variants",
                self.variants,
                [n for c in comparisons for cell in cells(c) for n in (cell.variant, cell.name)],
            ),
            ("seeds", self.seeds, [seed for c in comparisons for seed in c.seeds]),
        ):
            unknown = next((name for name in wanted or () if name not in known), None)
            if unknown is not None:
                all_of_them = ", ".join(map(str, dict.fromkeys(known)))
                raise InputError(f"--{flag} names {shown(unknown)}, but the chosen entries have {all_of_them}; "
                                 "name some of these")  # fmt: skip

    def seeds_of(self, comparison: Comparison) -> list[int]:
        """The seeds that are wanted of an entry."""
        return [seed for seed in comparison.seeds if self.seeds is None or seed in self.seeds]

    def has(self, cell: Cell) -> bool:
        return self.variants is None or not {cell.name, cell.variant}.isdisjoint(self.variants)

    def wants(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks
