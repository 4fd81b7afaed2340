"""How do learning rate, number of steps and schedule change what comes out, single and merged?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from copra_llm.estimates import Estimate
from copra_llm.figures.groups import NAMES, Group, by_place, styles
from copra_llm.figures.merged import merge_name, merged_figures, merged_groups
from copra_llm.figures.pairs import pair_metric
from copra_llm.figures.runs import along_steps, run_groups, same_steps, seeds_of, step_groups
from copra_llm.report.document import Figure, Key, Panel, Section
from copra_llm.report.plots.heat import heat_map
from copra_llm.report.plots.lines import Line, line_plot
from copra_llm.report.tables import Table, table
from copra_llm.results import Result

Grid = dict[tuple[float, int], Estimate]
"""By learning rate and steps."""


def sweep_section(results: Sequence[Result]) -> Section | None:
    """Heat maps of models, tasks and methods that were run at two learning rates and two numbers of steps or more."""
    figures = []
    of_test = _grids(run_groups(results), lambda g: seeds_of(g, "test"))
    of_single = of_test or _grids(run_groups(results), lambda g: seeds_of(g, "dev"))
    if of_single:
        split = "test" if of_test else "dev"
        figures.append(_heat_figure(f"Single accuracy on {split}", "accuracy of single adapters", of_single))
    lines = merged_groups(results)
    for name in dict.fromkeys(merge_name(g) for g in lines):
        same = [g for g in lines if merge_name(g) == name]
        of_merge = _grids(same, lambda g: pair_metric(g.records, "accuracy@0.5"))
        if of_merge:
            figures.append(_heat_figure(f"Merged accuracy: {name}", "accuracy of merged adapters", of_merge))
    text = "Each cell is a learning rate and a number of optimizer steps: the mean over seeds, in percent."
    return Section("Learning rate and steps", text, figures) if figures else None


def _grids(groups: Sequence[Group], value: Callable[[Group], Estimate | None]) -> dict[tuple, tuple[Grid, list[Group]]]:
    """Grids by (model, task, name), of those that are grids; only what has a rate and steps."""
    found: dict[tuple, tuple[Grid, list[Group]]] = {}
    for g in groups:
        estimate = value(g)
        if estimate is not None and g.learning_rate is not None and g.steps is not None:
            grid, members = found.setdefault((g.model, g.task, g.name), ({}, []))
            grid[g.learning_rate, g.steps] = estimate
            members.append(g)
    return {k: v for k, v in found.items() if min(len({key[i] for key in v[0]}) for i in (0, 1)) > 1}


def _heat_figure(title: str, what: str, grids: dict[tuple, tuple[Grid, list[Group]]]) -> Figure:
    panels, rows = [], []
    for (model, task, name), (grid, members) in grids.items():
        together = [
            e.mean for (m, t, _), (other, _) in grids.items() if (m, t) == (model, task) for e in other.values()
        ]
        finite = [v for v in together if math.isfinite(v)] or [0.0, 1.0]
        rates, steps = (sorted({key[i] for key in grid}) for i in (0, 1))
        cells = [[grid[r, s].mean if (r, s) in grid else None for s in steps] for r in rates]
        drawing = heat_map(
            cells, [str(s) for s in steps], [f"{r:g}" for r in rates], "steps", "learning rate",
            limit=(min(finite), max(finite)),
        )  # fmt: skip
        best = max(grid, key=lambda key: grid[key].mean if math.isfinite(grid[key].mean) else -math.inf)
        said = ", ".join(f"{grid[key]:.1f} at {key[0]:g} and {key[1]}" for key in sorted(grid))
        words = (
            f"{what.capitalize()} in percent by learning rate and steps: {said}. Best: {best[0]:g} and {best[1]} steps."
        )
        panels.append(Panel(f"{name}: {task}, {model}", words, drawing))
        rows += [
            (model, task, g.label, g.settings, g.learning_rate, g.steps, len(g.records), grid[g.learning_rate, g.steps])
            for g in members
        ]
    columns = [("model",), ("task",), ("method",), ("other settings",), ("learning rate", "g"), ("steps", "d"),
               ("records", "d"), (what, ".1f")]  # fmt: skip
    note = "Panels of one model and task share their scale. An empty cell was not run."
    return Figure(title, note, panels, table(f"Sweep: {title}", columns, rows, 3))


# --- along the training steps -----------------------------------------------------------------------------


def steps_section(results: Sequence[Result]) -> Section | None:
    groups = step_groups(results)
    if not groups:
        return None
    names = {g.name: f"{g.name}, " for g in groups}
    style = styles(g.name for g in groups)
    panels, rows = [], []
    for method in dict.fromkeys(g.values for g in groups):
        merge = f"{method[0]} ({method[1]})" if method[1] else str(method[0] or "merged")
        for place, here in by_place(g for g in groups if g.values == method):
            lines, said = [], []
            for g in here:
                same = same_steps(g)
                for which in ("single", "merged"):
                    values = along_steps(same, which)
                    at, shown = list(values), list(values.values())
                    lines.append(Line(names[g.name] + which, style[g.name], at, shown, which == "single"))
                    said.append(f"{g.name} {which} {shown[0]:.1f} at step {at[0]}, {shown[-1]:.1f} at step {at[-1]}")
                    rows += [
                        (g.model, g.task, g.label, g.learning_rate, g.settings, merge, len(same), which, step, v)
                        for step, v in values.items()
                    ]
            drawing = line_plot(lines, "training step", "accuracy [%]", within=(0, 100))
            panels.append(Panel(f"{merge}: {place}", f"Accuracy in percent. {'; '.join(said)}.", drawing))
    columns = [("model",), ("task",), ("method",), ("learning rate", "g"), ("other settings",), ("merged by",),
               ("records", "d"), ("of",), ("step", "d"), ("accuracy", ".1f")]  # fmt: skip
    made = table("Merged accuracy along training", columns, rows, 3)
    keys = [
        Key(n + w, style[n], hollow=w == ", single") for n in dict.fromkeys(names) for w in (", merged", ", single")
    ]
    note = "Hollow: single adapters. Filled: merged. Means over records; bands are 95 % intervals (Student's t)."
    figure = Figure("Accuracy along training", note, panels, made, keys)
    text = "Checkpoints of one run and of another, merged at the same step: when does merging begin to cost?"
    return Section("Along the training steps", text, [figure])


# --- schedules --------------------------------------------------------------------------------------------


def schedules_section(results: Sequence[Result]) -> Section | None:
    """Runs that name a variant of the schedule, beside the methods that were run with the same settings."""
    runs, lines = run_groups(results), merged_groups(results)
    variants = [g for g in [*runs, *lines] if g.label not in NAMES.values()]
    if not variants:
        return None
    # The methods at the variants' own rate and steps, not every cell of a sweep.
    settings = {(g.model, g.task, g.learning_rate, g.steps) for g in variants}
    runs, lines = (
        [g for g in groups if (g.model, g.task, g.learning_rate, g.steps) in settings] for groups in (runs, lines)
    )
    places = {setting[:2] for setting in settings}
    text = (
        "Variants of the schedule, single and merged. Spread: standard deviation over seeds of the test loss, a "
        "measure of stability. Accuracies in percent, losses in nats; intervals 95 %."
    )
    tables = []
    for place in sorted(places):
        here = [[g for g in groups if (g.model, g.task) == place] for groups in (runs, lines)]
        tables.append(_schedule_table(f"Schedules: {place[0]}, {place[1]}", *here))
    return Section("Schedules", text, tables)


def _schedule_table(caption: str, runs: Sequence[Group], lines: Sequence[Group]) -> Table:
    names = [name for name in dict.fromkeys(merge_name(g) for g in lines)]
    rows = []
    for key in dict.fromkeys((g.label, g.learning_rate, g.steps) for g in [*runs, *lines]):
        run = next((g for g in runs if (g.label, g.learning_rate, g.steps) == key), None)
        of = {merge_name(g): g for g in lines if (g.label, g.learning_rate, g.steps) == key}
        config = (run or next(iter(of.values()))).records[0].config
        losses = [r.metrics.get(f"test/{run.task_key}/loss", math.nan) for r in run.records] if run else []
        merged = []
        for name in names:
            g = of.get(name)
            merged += [m.single, m.accuracy, m.drop] if (m := g and merged_figures(g)) else [None] * 3
        rows.append((
            *key, *(_said(config.get(name)) for name in ("p_start", "p_end", "ramp_fraction", "ramp_shape")),
            config.get("granularity"), len(run.records) if run else None, seeds_of(run, "test") if run else None,
            seeds_of(run, "test", "loss") if run else None,
            float(np.std(losses, ddof=1)) if len(losses) > 1 else None, *merged,
        ))  # fmt: skip
    columns = [
        ("schedule",), ("learning rate", "g"), ("steps", "d"), ("p_start",), ("p_end",), ("ramp fraction",),
        ("ramp shape",), ("granularity",), ("seeds", "d"), ("test acc.", ".1f"), ("test loss", ".2f"),
        ("spread of the loss", ".3f"),
    ]  # fmt: skip
    for name in names:
        columns += [(f"single acc. ({name})", ".1f"), (f"merged acc. ({name})", ".1f"), (f"drop ({name})", ".1f")]
    return table(caption, columns, rows, 1)


def _said(value) -> str | None:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
