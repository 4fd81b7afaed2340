"""What does merging two adapters cost, and what does a method gain over LoRA?

Single: the mean of the two ends of a line; merged: its middle, weight 1/2; drop: single minus merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copra_llm.estimates import Estimate, exact
from copra_llm.figures.groups import Group, grouped
from copra_llm.figures.pairs import difference_estimate, drop_estimate, metric_difference, pair_metric, single_metric
from copra_llm.results import Result

KEYS = ("merge_method", "merge_options", "split")


@dataclass(frozen=True)
class Merged:
    """All pairs of seeds of one method at one setting: accuracies in percent, losses in nats."""

    single: Estimate
    accuracy: Estimate
    drop: Estimate
    against_lora: Estimate | None
    """Merged accuracy minus LoRA's, on the same examples; None if there is no LoRA, or it is this."""
    single_loss: Estimate
    loss: Estimate
    loss_against_lora: Estimate | None


def merged_figures(g: Group, lora: Group | None = None) -> Merged:
    """The figures of a group of `merged_groups`; `lora` as `lora_of` finds it."""
    curves = g.records
    return Merged(
        exact(single_metric(curves, "accuracy")),
        pair_metric(curves, "accuracy@0.5"),
        drop_estimate(curves),
        difference_estimate(curves, lora.records) if lora else None,
        exact(single_metric(curves, "loss")),
        pair_metric(curves, "loss@0.5"),
        metric_difference(curves, lora.records, "loss@0.5") if lora else None,
    )


def merged_groups(results: Iterable[Result]) -> list[Group]:
    """Lines between two adapters, all pairs of seeds together."""
    return grouped((r for r in results if r.protocol == "interpolation"), KEYS)


def merge_name(g: Group) -> str:
    """Merge method with its options."""
    method, options, split = g.values
    name = f"{method} ({options})" if options else str(method)
    return name if split == "test" else f"{name}, on {split}"


def lora_of(g: Group, groups: Sequence[Group]) -> Group | None:
    """LoRA under the same merge method, on the same task; None if there is none, or `g` is it.

    Each method has its own tuned settings; where LoRA has several, the one with the same settings is meant.
    """
    if g.label == "LoRA":
        return None
    like = [o for o in groups if (o.label, o.model, o.task, o.values) == ("LoRA", g.model, g.task, g.values)]
    same = [o for o in like if (o.learning_rate, o.steps, o.settings) == (g.learning_rate, g.steps, g.settings)]
    return like[0] if len(like) == 1 else same[0] if same else None
