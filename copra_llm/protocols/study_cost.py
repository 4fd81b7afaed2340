"""How many runs and evaluations does a study still need, and how long may they take?

    minutes = steps * (seconds of a step) + lines * (seconds of a line) + ...

Seconds are means over the records there are, of the same model and task, else of the model, else of any; they hold for
the machine that made them and one process on it. The study's own records come before those of other folders, which
serve as clocks alone: most runs are wanted with their adapters, so that a record elsewhere saves little.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from copra_llm.portable import portable_name
from copra_llm.protocols.comparisons import Comparison, Selection, cells, chosen_runs, tuning_runs
from copra_llm.protocols.layer_values import record_file as values_file
from copra_llm.protocols.runs import Run, Store
from copra_llm.protocols.study import distance_file, group_runs, missing_of_group, pruned_file, record_in
from copra_llm.report.records import find_results
from copra_llm.results import Result

KINDS = ("train", "interpolation", "pruning", "shapley", "distance", "multitask")
"""Protocols of the records that the study makes."""


@dataclass
class Needed:
    """What an entry lacks."""

    records: Counter = field(default_factory=Counter)
    """How many, by protocol."""
    seconds: float = 0.0
    unknown: bool = False
    """Whether something of it has never been timed."""
    untuned: bool = False
    """Whether settings are still to be chosen; until then the first candidates are counted."""


class Clock:
    """Mean seconds of a record, from those there are; of a training run by its steps, of a line by its points.

    Args:
        records: of one folder after the other; the first that has a model and task is asked.
    """

    def __init__(self, *records: Iterable[Result]):
        self._seen = [_times(of_folder) for of_folder in records]

    def seconds(self, protocol: str, model: str, task: str, parts: int) -> float | None:
        """Of a record with so many steps, points or variants; None if no such record has been made."""
        keys = ((protocol, model, task), (protocol, model), (protocol,))
        found = next((seen[key] for key in keys for seen in self._seen if key in seen), None)
        return None if found is None else parts * float(np.mean(found))


def _times(records: Iterable[Result]) -> dict[tuple, list[float]]:
    """Seconds of one part, by protocol, model and task, by protocol and model, and by protocol."""
    seen: dict[tuple, list[float]] = defaultdict(list)
    for r in records:
        if r.protocol not in KINDS or not r.seconds:
            continue
        task = r.config.get("task") or "+".join(r.config.get("tasks", []))
        model = portable_name(str(r.config.get("model_name_or_path")))
        for key in ((r.protocol, model, task), (r.protocol, model), (r.protocol,)):
            seen[key].append(r.seconds / _parts(r))
    return seen


def _parts(r: Result) -> int:
    """What the time of a record grows with."""
    count = {"train": r.steps, "interpolation": len(r.data.get("alpha", ())), "pruning": len(r.data.get("rows", ()))}
    return max(count.get(r.protocol, 1), 1)


def cost_lines(
    comparisons: dict[str, Comparison],
    results: Path,
    data_root: str | None,
    selection: Selection,
    others: tuple[Path, ...] = (),
) -> Iterator[str]:
    """A line an entry. What an entry before has counted is not counted again."""
    selection.check(list(comparisons.values()))
    clock = Clock(*(find_results([folder]) for folder in (results, *others) if any(folder.rglob("*.json"))))
    store, counted, minutes = Store(results, results), set(), 0.0
    for name, comparison in comparisons.items():
        needed = needed_of(store, comparison, selection, clock, counted, data_root)
        minutes += needed.seconds / 60
        what = ", ".join(f"{needed.records[kind]} {kind}" for kind in KINDS if needed.records[kind]) or "nothing"
        time = f"some {needed.seconds / 60:.0f} min on one process"
        more = [", without what has never been timed"] * needed.unknown + ["; still to be tuned"] * needed.untuned
        yield f"{name}: {what} to do, {time}{''.join(more)}"
    yield f"in all some {minutes:.0f} min on one process"


def needed_of(
    store: Store, comparison: Comparison, selection: Selection, clock: Clock, counted: set[Path], data_root: str | None
) -> Needed:
    """What an entry lacks; its files are added to `counted`, those that are in there are left out."""
    needed = Needed()
    seeds = selection.seeds_of(comparison)
    for cell in filter(selection.has, cells(comparison)):
        for run in tuning_runs(comparison, cell, data_root) if seeds else ():
            _need(needed, store, clock, counted, run, [(store.record_file(run), "train", run.config.train.max_steps)])
        for task in filter(selection.wants, comparison.tasks):
            runs = chosen_runs(comparison, cell, task, record_in(store), data_root)
            if not runs:
                needed.untuned, runs = True, [cell.run(task, *cell.candidates[0], data_root)]
            for run in runs:
                files = _files(store, comparison, run, seeds)
                _need(needed, store, clock, counted, run, files)
    wanted = [cell for cell in cells(comparison) if selection.has(cell)]
    for seed in seeds:
        for run in group_runs(store, comparison, wanted, seed, data_root):
            files = [(file, "multitask", 1) for file in missing_of_group(store, comparison, run).values()]
            if all(map(selection.wants, run.config.data.tasks)):
                _need(needed, store, clock, counted, run, files)
    return needed


def _files(store: Store, comparison: Comparison, run: Run, seeds: Sequence[int]) -> Iterator[tuple[Path, str, int]]:
    """The records of a run's seeds and pairs, with protocol and parts."""
    for seed in seeds:
        own = run.replace(seed=seed)
        yield store.record_file(own), "train", run.config.train.max_steps
        if comparison.smaller():
            yield pruned_file(store, own), "pruning", len(comparison.smaller())
        if comparison.shapley_samples:
            yield values_file(store.results / run.place, own.name, "loss"), "shapley", 1
        if comparison.distances:
            yield distance_file(store, own), "distance", 1
    for pair, (rule, points) in itertools.product(itertools.combinations(seeds, 2), comparison.points.items()):
        yield store.line_file(run, pair, rule), "interpolation", points


def _need(
    needed: Needed, store: Store, clock: Clock, counted: set[Path], run: Run, files: Iterable[tuple[Path, str, int]]
) -> None:
    model, task = portable_name(run.config.model.model_name_or_path), "+".join(run.config.data.tasks)
    for file, protocol, parts in files:
        if file.is_file() or file in counted:
            continue
        counted.add(file)
        needed.records[protocol] += 1
        seconds = clock.seconds(protocol, model, task, parts)
        needed.unknown |= seconds is None
        needed.seconds += seconds or 0.0
