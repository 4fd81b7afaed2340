"""What does the study say? Tables of an entry of its plan, made from the records alone.

A row is a cell at the settings that the plan's rule chooses from the records on dev, as it does when the study is run.
Means over tasks, then over seeds or pairs of seeds; what is compared is compared at the same seeds and tasks. How the
intervals are made is in `copra_llm.figures.study`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import model_of, steps_of, tasks_of
from copra_llm.figures.study import OverTasks, against, outcomes, over_tasks
from copra_llm.portable import portable_name
from copra_llm.protocols.comparisons import Cell, Comparison, cells, chosen_runs
from copra_llm.protocols.runs import Run
from copra_llm.report.tables import Value, markdown, table
from copra_llm.results import Result
from copra_llm.summaries.sweep import schedules_table

Outcomes = dict[str, dict[str, dict]]
"""As `copra_llm.figures.study.outcomes` has them."""

COLUMNS: dict[str, tuple[str, str]] = {
    "single": ("single", ".1f"),
    "fusion": ("fused", ".1f"),
    "fusion drop": ("drop when fused", ".1f"),
    "fusion barrier": ("barrier", ".1f"),
    "mixture": ("mixture", ".1f"),
    "align": ("aligned, fused", ".1f"),
    "together fusion": ("tasks in one, fused", ".1f"),
    "together mixture": ("tasks in one, mixture", ".1f"),
    "pruned every-other": ("every other layer", ".1f"),
    "pruned low": ("low third", ".1f"),
    "pruned middle": ("middle third", ".1f"),
    "pruned high": ("high third", ".1f"),
    "pruned magnitude 0.5": ("largest 50 %", ".1f"),
    "pruned magnitude 0.1": ("largest 10 %", ".1f"),
    "top_third_share": ("top third's share", ".2f"),
    "from_initialisation": ("length of ΔW", ".1f"),
    "from_early": ("from T/4, relative", ".2f"),
}
"""Outcome -> heading and format. Accuracies in percent; lengths in the weights' unit."""
SCREENING = "**Screening**: few seeds, to see what deserves more; no claim rests on it.\n\n"


@dataclass
class Row:
    """A cell at one learning rate and number of steps, all tasks together."""

    cell: Cell
    settings: str
    """As it is shown; "tuned for each task" where tasks have their own."""
    records: list[Result] = field(default_factory=list)

    @cached_property
    def outcomes(self) -> Outcomes:
        """Of all records; ask when they are complete."""
        return outcomes(self.records)


def means_table(results: Iterable[Result], comparison: Comparison) -> str:
    """Markdown, a row a cell: what every outcome is on average, without intervals; "" where nothing has been run."""
    lines = []
    for row in rows_of(results, comparison):
        known = row.outcomes
        whole = over_tasks(known["single"])
        counts = None if whole is None else f"{len(whole.tasks)}, {len(whole.seeds)}"
        share = _mean(over_tasks(known["activation_prob"])) if "activation_prob" in known else None
        means = (_mean(over_tasks(known[name])) if name in known else None for name in COLUMNS)
        lines.append((row.cell.name, row.settings, counts, share, *means, _mean(over_tasks(known["seconds"]))))
    columns = [("variant",), ("lr, steps",), ("tasks, seeds",), ("mean p", ".2f"), *COLUMNS.values(),
               ("training, s", ".0f")]  # fmt: skip
    return _shown(columns, lines, comparison)


def against_table(results: Iterable[Result], comparison: Comparison) -> str:
    """Markdown, a row a cell: every outcome minus the reference's at the same levels, with 95 % intervals."""
    name = "LoRA" if comparison.reference == "lora" else comparison.reference
    return _differences_table(results, comparison, f"minus {name}", reference_of)


def levels_table(results: Iterable[Result], comparison: Comparison) -> str:
    """Markdown, a row a cell that a factor changes: every outcome minus the same variant's as it is, with intervals."""
    return _differences_table(results, comparison, "minus the same as it is", unchanged_of)


def _differences_table(
    results: Iterable[Result],
    comparison: Comparison,
    head: str,
    other_of: Callable[[Row, Iterable[Row], Comparison], Row | None],
) -> str:
    """A row a cell for which `other_of` names another: every outcome minus that one's on the same seeds and tasks."""
    rows = rows_of(results, comparison)
    lines = []
    for row in rows:
        other = other_of(row, rows, comparison)
        if other is None:
            continue
        ours, theirs = row.outcomes, other.outcomes
        differences = {name: against(ours[name], theirs[name]) for name in COLUMNS if name in ours and name in theirs}
        single = differences.get("single")
        counts = None if single is None else f"{len(single.tasks)}, {len(single.seeds)}"
        lines.append((row.cell.name, row.settings, counts, *(_estimate(differences.get(name)) for name in COLUMNS)))
    columns = [(head,), ("lr, steps",), ("tasks, seeds",), *COLUMNS.values()]
    return _shown(columns, lines, comparison)


def tasks_table(outcome: str) -> Callable[[Iterable[Result], Comparison], str]:
    """A table of one outcome, a row a task: the reference's mean, and each cell minus it with a 95 % interval.

    The last row is the mean over the tasks, and its interval is over them: would other tasks of this kind agree?
    """

    def made(results: Iterable[Result], comparison: Comparison) -> str:
        rows = rows_of(results, comparison)
        known = {id(row): row.outcomes.get(outcome, {}) for row in rows}
        others = [(row, other) for row in rows if (other := reference_of(row, rows, comparison)) is not None]
        heads = [(f"{row.cell.name} minus {other.cell.name}", ".1f") for row, other in others]
        reference = next((known[id(row)] for row in rows if row.cell.variant == comparison.reference), {})
        lines = []
        for task in comparison.tasks:
            differences = (against(_of_task(known[id(row)], task), known[id(other)]) for row, other in others)
            line = _mean(over_tasks(_of_task(reference, task))), *map(_estimate, differences)
            if any(value is not None for value in line):
                lines.append((task, *line))
        if len(lines) > 1:
            columns = list(zip(*lines, strict=True))[2:]
            lines.append(("**mean over tasks**", None, *map(_over_lines, columns)))
        return _shown([("task",), (comparison.reference, ".1f"), *heads], lines, comparison, heads=1)

    return made


def stability_table(results: Iterable[Result], comparison: Comparison) -> str:
    """Markdown, a row a task and cell: how far loss and gradient norm spread over seeds, beside what fusing costs.

    Of the tasks that decide about settings, which stand for the others.
    """
    rows = rows_of(results, comparison)
    return schedules_table(r for row in rows for r in row.records if set(tasks_of(r)) <= set(comparison.tuned_on))


def progress_table(results: Iterable[Result], comparisons: Mapping[str, Comparison]) -> str:
    """Markdown, a row an entry: how many of its runs and lines there are, and how long its records took to make.

    What two entries share counts in both; the runs that only decided about settings count in neither.
    """
    results, lines = list(results), []
    for name, comparison in comparisons.items():
        records = [r for row in rows_of(results, comparison) for r in row.records]
        each = sum(len(c.candidates) if comparison.tune == "none" else 1 for c in cells(comparison))
        each *= len(comparison.tasks)
        wanted = {"train": each * len(comparison.seeds),
                  "interpolation": each * math.comb(len(comparison.seeds), 2) * len(comparison.points)}  # fmt: skip
        there = (f"{sum(r.protocol == kind for r in records)} of {count}" for kind, count in wanted.items())
        model = portable_name(comparison.model)
        lines.append((name, model, len(comparison.tasks), len(cells(comparison)), len(comparison.seeds), *there,
                      sum(r.seconds for r in records) / 3600))  # fmt: skip
    columns = [("entry",), ("model",), ("tasks", "d"), ("cells", "d"), ("seeds", "d"), ("runs",),
               ("lines between seeds",), ("hours", ".1f")]  # fmt: skip
    return markdown(table("", columns, lines, heads=7)) if results else ""


def rows_of(results: Iterable[Result], comparison: Comparison) -> list[Row]:
    """The cells of an entry that have records, each at its settings; with `tune: none` once for each of them."""
    known: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        known[_key(r)].append(r)
    rows: dict[tuple[str, str], Row] = {}
    for cell in cells(comparison):
        for tasks in (*([task] for task in comparison.tasks), *comparison.groups):
            for run in chosen_runs(comparison, cell, tasks[0], _trained(known)):
                train = run.config.train
                shown = f"{train.learning_rate:g}, {train.max_steps}"
                if comparison.tune == "per_task" and len(cell.candidates) > 1:
                    shown = "tuned for each task"
                seeds = set(comparison.seeds)
                found = [r for r in known[_key_of(run, tasks)] if set(_seeds(r)) <= seeds]
                if found:
                    rows.setdefault((cell.name, shown), Row(cell, shown)).records.extend(found)
    return list(rows.values())


def reference_of(row: Row, rows: Iterable[Row], comparison: Comparison) -> Row | None:
    """What a row is compared with: the reference at the same levels, at its own settings or, untuned, at equal ones.

    None if it is not there, or the row is it.
    """
    if row.cell.variant == comparison.reference:
        return None
    return _alike(row, (o for o in rows if o.cell.variant == comparison.reference), row.cell.levels, comparison)


def unchanged_of(row: Row, rows: Iterable[Row], comparison: Comparison) -> Row | None:
    """The row of the same variant at no factor's level; None if it is not there, or the row is it."""
    if not row.cell.levels:
        return None
    return _alike(row, (o for o in rows if o.cell.variant == row.cell.variant), (), comparison)


def _alike(row: Row, others: Iterable[Row], levels: tuple[str, ...], comparison: Comparison) -> Row | None:
    """The one at these levels; untuned, where there may be several, at the settings of `row`."""
    like = [o for o in others if o.cell.levels == levels]
    if comparison.tune == "none" and len(like) > 1:
        like = [o for o in like if o.settings == row.settings]
    return like[0] if like else None


def _trained(known: dict[tuple, list[Result]]) -> Callable[[Run], Result | None]:
    def record(run: Run) -> Result | None:
        seed = run.config.train.seed
        return next((r for r in known[_key_of(run)] if r.protocol == "train" and r.config["seed"] == seed), None)

    return record


def _key(r: Result) -> tuple:
    """Which run a record is of, without its seed."""
    variant = r.config.get("variant") or r.config.get("method")
    return model_of(r), tuple(tasks_of(r)), variant, r.config.get("learning_rate"), steps_of(r)


def _key_of(run: Run, tasks: Sequence[str] | None = None) -> tuple:
    """The same of a run, or of its settings on other tasks."""
    c = run.config
    variant = run.variant or c.schedule.method
    model = portable_name(c.model.model_name_or_path)
    return model, tuple(tasks or c.data.tasks), variant, c.train.learning_rate, c.train.max_steps


def _seeds(r: Result) -> list[int]:
    return r.config.get("seeds") or [r.config["seed"]]


def _of_task(values: dict[str, dict], task: str) -> dict[str, dict]:
    return {task: values[task]} if task in values else {}


def _mean(found: OverTasks | None) -> float | None:
    return None if found is None else found.estimate.mean


def _estimate(found: OverTasks | None) -> Value:
    return None if found is None else found.estimate


def _over_lines(column: Sequence[Value]) -> Value:
    """Mean over the tasks of a column, with an interval over them; None while a task lacks it."""
    return seed_estimate([of.mean for of in column]) if all(isinstance(of, Estimate) for of in column) else None


def _shown(columns: list[tuple], lines: list[tuple], comparison: Comparison, heads: int = 3) -> str:
    if not lines:
        return ""
    return (SCREENING if comparison.screening else "") + markdown(table("", columns, lines, heads=heads))
