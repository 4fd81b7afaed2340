"""How accurate are few-shot adapters of a dual encoder, alone and merged, beside what needs no adapter? A table.

Means over seeds with 95 % intervals (Student's t); against LoRA seed by seed. What two merged adapters have is over
pairs of seeds, as in the other tables of merging.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from copra_llm.estimates import paired_estimate
from copra_llm.figures.groups import Group, grouped, metric, rank
from copra_llm.figures.merged import KEYS, merged_figures
from copra_llm.figures.runs import seeds_of
from copra_llm.report.tables import Value, markdown_table
from copra_llm.results import Result
from copra_llm.tasks.clip.catalogue import get_image_task, image_task_names

BASELINES = {"zero-shot": "zero-shot", "linear-probe": "linear probe"}
"""Labels of what has no adapter, and as they are shown."""


def few_shot_table(results: Iterable[Result]) -> str:
    """Markdown, a row a model, task, number of shots and method: accuracies in percent, chance beside them.

    A method is compared with LoRA at the same learning rate and number of steps.
    """
    results = list(results)
    runs = grouped((r for r in results if r.protocol in ("train", "clip_baseline")), ("shots",))
    lines = {
        (_setting(g), g.label, g.values[0]): g
        for g in grouped((r for r in results if r.protocol == "interpolation"), (*KEYS, "shots"))
    }
    loras = {_setting(g): g for g in runs if g.label == "LoRA"}
    rows = []
    for g in sorted(runs, key=_order):
        # A baseline has no learning rate of its own, so it finds none.
        lora, value = loras.get(_setting(g), g), partial(metric, name="accuracy", task=g.task_key, split="test")
        against = None if lora is g else paired_estimate(g.by_seed(value), lora.by_seed(value))
        run = None if g.label in BASELINES else f"{g.learning_rate:g}, {g.steps}"
        rows.append((g.model, g.task, _chance(g.task_key), g.values[-1], BASELINES.get(g.label, g.name), run,
                     seeds_of(g, "test"), against, *_merged(lines, g)))  # fmt: skip
    columns = [
        ("model",), ("task",), ("chance", ".0f"), ("shots", "d"), ("method",), ("lr, steps",),
        ("accuracy", ".1f"), ("minus LoRA's", ".1f"), ("fused", ".1f"), ("drop when fused", ".1f"),
        ("fused minus LoRA's", ".1f"), ("aligned, fused", ".1f"), ("mixture", ".1f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _merged(lines: dict[tuple, Group], g: Group) -> list[Value]:
    """Fused accuracy, drop, against fused LoRA, fused after LoRA-align, mixture; None for what was not merged."""
    fused, aligned, mixture = (lines.get((_setting(g), g.label, rule)) for rule in ("fusion", "align", "mixture"))
    others = [merged_figures(of).accuracy.mean if of else None for of in (aligned, mixture)]
    if fused is None:
        return [None, None, None, *others]
    lora = lines.get((_setting(g), "LoRA", "fusion"))
    figures = merged_figures(fused, None if lora is fused else lora)
    return [figures.accuracy, figures.drop, figures.against_lora, *others]


def _place(g: Group) -> tuple:
    """Model, task and shots."""
    return g.model, g.task_key, g.values[-1]


def _setting(g: Group) -> tuple:
    """What a method and plain LoRA share when they are compared."""
    return *_place(g), g.learning_rate, g.steps


def _order(g: Group) -> tuple:
    model, task, shots = _place(g)
    baselines = list(BASELINES)
    own = (0, baselines.index(g.label)) if g.label in BASELINES else (1, *rank(g.label), g.learning_rate, g.steps)
    return model, task, -(shots or 0), own


def _chance(task: str) -> float | None:
    """Percent that guessing gets right; None for images of one's own, whose classes the records do not count."""
    if task not in image_task_names():
        return None
    known = get_image_task(task)
    return 100 / (len(known.classes) if known.classes else known.counts["classes"])
