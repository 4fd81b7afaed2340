"""Adapters that belong together: of the clients of one federated run, of several tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, by_place, styles
from copra_llm.figures.together import (
    at_end,
    federated_groups,
    mean_at_end,
    mean_task_accuracy,
    merged_by,
    multitask_groups,
)
from copra_llm.report.document import Figure, Panel, Section, keys_of
from copra_llm.report.plots.bars import Bars, bars_in_words, lying_bars
from copra_llm.report.plots.lines import Line, line_plot
from copra_llm.report.plots.points import Dot, dots
from copra_llm.report.tables import GROUP_COLUMNS, Table, table
from copra_llm.results import Result


def federated_section(results: Sequence[Result]) -> Section | None:
    groups = federated_groups(results)
    if not groups:
        return None
    text = (
        "Clients train on their own part of the data with their own seed; their adapters are merged. Origin: the mean "
        "over clients of the last round; merged: their merge. Test accuracies in percent, losses in nats, with 95 % "
        "intervals over runs of different seeds (Student's t)."
    )
    blocks: list[Figure | Table] = [_federated_figure(groups)]
    if any(len(r.data["rounds"]) > 1 for g in groups for r in g.records):
        blocks.append(_rounds_figure(groups))
    return Section("Federated", text, blocks)


def _division(g: Group) -> str:
    """How the data is divided, in short."""
    case, clients, kind, beta, rounds = g.values[3:]
    split = f"Dirichlet {beta:g}" if kind == "dirichlet" and beta is not None else "IID" if kind == "iid" else str(kind)
    named = f"{case}: " if case else ""
    return f"{named}{clients} clients, {split}" + (f", {rounds} rounds" if (rounds or 1) > 1 else "")


def _drop(g: Group) -> Estimate:
    """Accuracy of the clients minus that of their merge, in percentage points."""
    return g.estimate(lambda r: at_end(r, "origin", "accuracy") - at_end(r, "merged", "accuracy"))


def _from_to(g: Group) -> str:
    return " → ".join(f"{mean_at_end(g, which, 'accuracy').mean:.1f}" for which in ("origin", "merged"))


def _federated_figure(groups: Sequence[Group]) -> Figure:
    style = styles(g.name for g in groups)
    panels, rows = [], []
    for (division, place), rules in _by_rule(groups, _division).items():
        drawn = [
            (rule, [Dot(g.name, style[g.name], _drop(g), _from_to(g)) for g in here]) for rule, here in rules.items()
        ]
        said = [f"{rule}: {dot.name} {dot.value:.1f} ({dot.text})" for rule, row in drawn for dot in row]
        words = f"Percentage points of accuracy lost by merging (origin → merged accuracy). {'; '.join(said)}."
        panels.append(Panel(f"{place}: {division}", words, dots(drawn, "accuracy lost [points]")))
    for g in groups:
        accuracy, loss = ([mean_at_end(g, which, of) for which in ("origin", "merged")] for of in ("accuracy", "loss"))
        rows.append((*g.heads, g.values[0] or g.values[1], *g.values[2:], len(g.records), *accuracy, _drop(g), *loss))
    columns = [
        *GROUP_COLUMNS, ("merged by",), ("merge options",), ("case",), ("clients", "d"), ("split",), ("beta", "g"),
        ("rounds", "d"), ("runs", "d"), ("origin acc.", ".1f"), ("merged acc.", ".1f"), ("drop", ".1f"),
        ("origin loss", ".2f"), ("merged loss", ".2f"),
    ]  # fmt: skip
    return Figure(
        "What merging the clients costs",
        "Accuracy of the clients' own adapters minus that of the merged one, last round; right of the broken line "
        "merging costs, left of it it gains. An interval without caps goes on beyond the frame. Beside: origin → "
        "merged.",
        panels,
        table("Federated", columns, rows, 3),
        keys_of(style, [g.name for g in groups], "marker"),
        unfolded=True,
    )


def _rounds_figure(groups: Sequence[Group]) -> Figure:
    style = styles(g.name for g in groups)
    panels, rows = [], []
    longer = [g for g in groups if len(g.records[0].data["rounds"]) > 1]
    for (division, place), rules in _by_rule(longer, _division).items():
        for rule, here in rules.items():
            title = f"{rule}, {division}"
            lines, said = [], []
            for g in here:
                steps = [entry["round"] for entry in g.records[0].data["rounds"]]
                values = [
                    seed_estimate([r.data["rounds"][i]["merged"]["accuracy"] for r in g.records])
                    for i in range(min(len(r.data["rounds"]) for r in g.records))
                ]
                lines.append(Line(g.name, style[g.name], steps[: len(values)], values))
                said.append(f"{g.name}: {values[0]:.1f} after the first round, {values[-1]:.1f} after the last")
                rows += [(g.model, g.task, g.label, title, step, v) for step, v in zip(steps, values, strict=False)]
            drawing = line_plot(
                lines, "round", "accuracy [%]", within=(0, 100), bars=True, x_ticks=steps if len(steps) <= 8 else None
            )
            panels.append(Panel(f"{place}: {title}", f"Merged accuracy in percent. {'; '.join(said)}.", drawing))
    columns = [("model",), ("task",), ("method",), ("setting",), ("round", "d"), ("merged acc.", ".1f")]
    made = table("Federated, merged accuracy by round", columns, rows, 3)
    keys = keys_of(style, [g.name for g in longer])
    return Figure("Merged accuracy by round", "Means over runs of different seeds.", panels, made, keys)


def _by_rule(groups: Sequence[Group], kind: Callable[[Group], str]) -> dict[tuple[str, str], dict[str, list[Group]]]:
    """Groups of a panel, by (what `kind` says of them, place), and in it by merge rule."""
    found: dict[tuple[str, str], dict[str, list[Group]]] = {}
    for what, rule in itertools.product(*(dict.fromkeys(map(name, groups)) for name in (kind, merged_by))):
        for place, here in by_place(g for g in groups if (kind(g), merged_by(g)) == (what, rule)):
            found.setdefault((what, place), {})[rule] = here
    return found


# --- several tasks ----------------------------------------------------------------------------------------


def multitask_section(results: Sequence[Result]) -> Section | None:
    groups = multitask_groups(results)
    if not groups:
        return None
    text = (
        "One adapter a task, all merged into one, evaluated on every task. Normalised: merged accuracy in percent of "
        "the single adapter's. Accuracies in percent, with 95 % intervals over seeds (Student's t)."
    )
    return Section("Several tasks in one adapter", text, [_multitask_figure(groups)])


def _multitask_figure(groups: Sequence[Group]) -> Figure:
    style = styles(g.name for g in groups)
    panels = []
    for (_, place), rules in _by_rule(groups, lambda g: "").items():
        tasks = next(iter(rules.values()))[0].records[0].config["tasks"]
        # Of one rule every task is a row; of several each rule is one, with its mean over the tasks.
        cases = [(t, next(iter(rules)), t) for t in [*tasks, "mean"]] if len(rules) == 1 else [
            (rule, rule, "mean") for rule in rules]  # fmt: skip
        series = []
        for name in dict.fromkeys(g.name for here in rules.values() for g in here):
            of = {rule: next((g for g in here if g.name == name), None) for rule, here in rules.items()}
            values = [mean_task_accuracy(of[rule], task, "normalised") if of[rule] else None for _, rule, task in cases]
            series.append(Bars(name, style[name], values))
        names = [name for name, _, _ in cases]
        top = max([100.0, *(v.mean for s in series for v in s.values if v is not None)])
        of_what = "" if len(rules) == 1 else ", mean over the tasks"
        words = f"Merged accuracy in percent of the single adapters'{of_what}. {bars_in_words(series, names)}."
        drawing = lying_bars(series, names, "normalised accuracy [%]", limit=(0.0, top), reference=100.0)
        title = f"{place}: {cases[0][1]}" if len(rules) == 1 else place
        panels.append(Panel(title, words, drawing))
    rows = [
        (g.model, t, g.label, g.learning_rate, g.steps, g.settings, g.values[0] or g.values[1], g.values[2], g.task,
         len(g.records), *(mean_task_accuracy(g, t, which) for which in ("single", "merged", "normalised")))
        for g in groups for t in [*g.records[0].config["tasks"], "mean"]
    ]  # fmt: skip
    columns = [
        *GROUP_COLUMNS, ("merged by",), ("merge options",), ("of the tasks",), ("seeds", "d"), ("single acc.", ".1f"),
        ("merged acc.", ".1f"), ("normalised", ".1f"),
    ]  # fmt: skip
    note = "The broken line is the single adapters' accuracy. Of several merge rules the mean over tasks is drawn."
    keys = keys_of(style, [g.name for g in groups], "bar")
    made = table("Several tasks in one adapter", columns, rows, 3)
    return Figure("Normalised accuracy", note, panels, made, keys, unfolded=True)
