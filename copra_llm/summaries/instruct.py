"""How well do adapters learn conversations, and what is left of a skill when two are merged? Tables and a plot.

Losses are means of -log p over the assistant's tokens, in nats. Means over seeds with 95 % intervals (Student's t);
what is compared with LoRA is compared seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from copra_llm.estimates import paired_estimate
from copra_llm.figures.groups import Group, by_place
from copra_llm.figures.runs import dev_losses, run_groups, seeds_of
from copra_llm.figures.together import merged_by, multitask_groups
from copra_llm.report.curves import COLOURS, require_matplotlib, save_figure
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result


def learning_table(results: Iterable[Result]) -> str:
    """Markdown, a row a setting: dev loss along the run, at its end, and test loss."""
    groups = run_groups(results)
    losses = [dev_losses(g) for g in groups]
    steps = sorted({step for of in losses for step in of})
    rows = [
        (g.model, g.task, g.name, f"{g.learning_rate:g}, {g.steps}", *(of.get(step) for step in steps),
         seeds_of(g, "dev", "loss"), seeds_of(g, "test", "loss"))
        for g, of in zip(groups, losses, strict=True)
    ]  # fmt: skip
    columns = [("model",), ("task",), ("method",), ("lr, steps",), *((f"step {step}", ".3f") for step in steps),
               ("dev loss at the end", ".3f"), ("test loss", ".3f")]  # fmt: skip
    return markdown_table(columns, rows)


def skills_table(results: Iterable[Result]) -> str:
    """Markdown, a row a group of tasks, rule and task: loss single and merged, and what merging adds against LoRA."""
    groups = multitask_groups(results)
    rows = []
    for g in groups:
        lora = next((o for o in groups if (o.label, o.model, o.task, o.values) == ("LoRA", *_place(g))), None)
        for task in g.records[0].config["tasks"]:
            added = _added(task)
            against = None
            if lora is not None and lora is not g:
                against = paired_estimate(g.by_seed(added), lora.by_seed(added))
            rows.append((g.model, g.task, merged_by(g), task, g.name, g.estimate(_loss(task, "single")),
                         g.estimate(_loss(task, "merged")), g.estimate(added), against))  # fmt: skip
    columns = [("model",), ("skills",), ("merged by",), ("evaluated on",), ("method",), ("single loss", ".3f"),
               ("merged loss", ".3f"), ("added by merging", ".3f"), ("minus LoRA's", ".3f")]  # fmt: skip
    return markdown_table(columns, rows)


def plot_learning(results: Sequence[Result], stem: Path) -> list[Path]:
    """Dev loss over steps, a column a task, one line a method (mean over seeds), as PNG and SVG.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    places = by_place(g for g in run_groups(results) if dev_losses(g))
    figure = Figure(figsize=(3.6 * len(places) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(places), squeeze=False)[0]
    for axis, (place, here) in zip(axes, places, strict=True):
        for g in here:
            losses = dev_losses(g)
            means = [e.mean for e in losses.values()]
            axis.plot(list(losses), means, label=g.name, color=COLOURS.get(g.label), marker="o", markersize=3)
        axis.set_title(place, fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("dev loss [nats]")
    return save_figure(figure, stem)


def _place(g: Group) -> tuple:
    return g.model, g.task, g.values


def _loss(task: str, which: str):
    return lambda r: r.metrics[f"{r.config['split']}/{task}/loss/{which}"]


def _added(task: str):
    return lambda r: _loss(task, "merged")(r) - _loss(task, "single")(r)
