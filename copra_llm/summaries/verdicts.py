"""What follows from the study, claim by claim and use by use? Said by the intervals, not by hand.

    yes        the 95 % interval of the difference from LoRA lies on the better side of 0
    no: worse  it lies on the other side
    not shown  it holds 0, or there are fewer than three seeds, whose spread may be small by chance

Differences are those of the tables of `summaries.study`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from copra_llm.estimates import Estimate
from copra_llm.figures.groups import NAMES
from copra_llm.figures.study import OverTasks, against
from copra_llm.portable import portable_name
from copra_llm.protocols.comparisons import Comparison
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result
from copra_llm.summaries.study import COLUMNS, Row, reference_of, rows_of

JUDGED = ("headline", "half_long", "smollm2", "clip")
"""Entries of the plan with seeds enough for a verdict."""
LEAST_SEEDS = 3
"""For a verdict."""


@dataclass(frozen=True)
class Claim:
    """Something an adapter should do better than LoRA's."""

    what: str
    outcome: str
    """As `copra_llm.figures.study.outcomes` names it."""
    larger: bool = True
    """Whether more of it is better."""


CLAIMS = (
    Claim("an adapter alone is better", "single"),
    Claim("two seeds, fused, are better", "fusion"),
    Claim("fusing two seeds loses less", "fusion drop", False),
    Claim("the barrier between two seeds is lower", "fusion barrier", False),
    Claim("two seeds' mixture is better", "mixture"),
    Claim("two seeds, aligned and fused, are better", "align"),
    Claim("several tasks' adapters, fused, are better", "together fusion"),
    Claim("several tasks' mixture is better", "together mixture"),
    Claim("every other layer does better", "pruned every-other"),
    Claim("the low third of the layers does better", "pruned low"),
    Claim("the middle third does better", "pruned middle"),
    Claim("the high third does better", "pruned high"),
    Claim("layers share the effect more evenly", "top_third_share", False),
    Claim("it ends nearer to where it was at T/4", "from_early", False),
)
"""The paper's, and what a user would ask."""

USES = {
    "serve it alone": "single",
    "average runs of one task (seeds, clients), rank as it is": "fusion",
    "add up the updates of runs of one task (rank grows)": "mixture",
    "fuse adapters of several tasks": "together fusion",
    "mix adapters of several tasks": "together mixture",
    "keep half of the layers": "pruned every-other",
    "keep the low third of the layers": "pruned low",
}
"""What somebody may want of an adapter -> the outcome that says how good it is."""


def verdict(difference: Estimate, larger: bool, seeds: int) -> str:
    """What an interval over so many seeds says of "better" (see the head of this file)."""
    if seeds < LEAST_SEEDS or not difference.has_interval or difference.low <= 0.0 <= difference.high:
        return "not shown"
    return "yes" if (difference.low > 0.0) == larger else "no: worse"


def verdicts_table(results: Iterable[Result], comparisons: Mapping[str, Comparison], reference: str = "lora") -> str:
    """Markdown, a row a claim and model: each variant minus a reference with its interval, and what that says.

    Args:
        results: of the study.
        comparisons: the entries of its plan.
        reference: a variant of all judged entries that has the place of LoRA, which is left out then.
    """
    results, lines, variants = list(results), [], []
    found = {name: _differences(results, comparisons[name], reference) for name in JUDGED}
    for name in JUDGED:
        variants += [variant for variant in found[name] if variant not in variants]
    for claim in CLAIMS:
        for name in JUDGED:
            cells = [_judged(found[name].get(variant, {}).get(claim.outcome), claim) for variant in variants]
            if any(difference for difference, _ in cells):
                lines.append((claim.what, _label(name, comparisons), *(cell for pair in cells for cell in pair)))
    name = NAMES.get(reference, reference)
    heads = [head for variant in variants for head in ((f"{variant} − {name} (tasks, seeds)",), ("",))]
    return markdown_table([(f"claim, against {name}",), ("model",), *heads], lines)


def advice_table(results: Iterable[Result], comparisons: Mapping[str, Comparison]) -> str:
    """Markdown, a row a use: on each model the variant that is better than LoRA for certain, the largest gain first.

    Where none is, LoRA, which is the simplest.
    """
    results = list(results)
    found = {name: _differences(results, comparisons[name], "lora") for name in JUDGED}
    names = [name for name in JUDGED if found[name]]
    lines = [(use, *(_advised(found[name], outcome) for name in names)) for use, outcome in USES.items()]
    heads = [(_label(name, comparisons),) for name in names]
    return markdown_table([("to",), *heads], lines) if names else ""


def _label(name: str, comparisons: Mapping[str, Comparison]) -> str:
    """An entry's model; with its numbers of steps where another entry has the same model."""
    own = comparisons[name]
    alike = [other for other in JUDGED if comparisons[other].model == own.model]
    model, steps = portable_name(own.model), " or ".join(map(str, own.max_steps))
    return f"{model}, {steps} steps" if len(alike) > 1 else model


def _differences(results: list[Result], comparison: Comparison, reference: str) -> dict[str, dict[str, OverTasks]]:
    """Each variant of an entry -> its outcomes minus the reference's.

    Levels of factors are left out, and so is the entry's own reference where another has its place.
    """
    rows, found = [row for row in rows_of(results, comparison) if not row.cell.levels], {}
    referred = replace(comparison, reference=reference)
    for row in rows:
        other = reference_of(row, rows, referred)
        if other is not None and row.cell.variant != comparison.reference:
            found[row.cell.variant] = _of_row(row, other)
    return found


def _of_row(row: Row, other: Row) -> dict[str, OverTasks]:
    ours, theirs = row.outcomes, other.outcomes
    differences = {name: against(ours[name], theirs[name]) for name in ours if name in theirs}
    return {name: found for name, found in differences.items() if found is not None}


def _judged(found: OverTasks | None, claim: Claim) -> tuple[str | None, str | None]:
    if found is None:
        return None, None
    seeds, difference = len(found.seeds), format(found.estimate, COLUMNS[claim.outcome][1])
    return f"{difference} ({len(found.tasks)}, {seeds})", verdict(found.estimate, claim.larger, seeds)


def _advised(variants: Mapping[str, Mapping[str, OverTasks]], outcome: str) -> str | None:
    there = {name: own[outcome] for name, own in variants.items() if outcome in own}
    better = {name: own.estimate for name, own in there.items() if verdict(own.estimate, True, len(own.seeds)) == "yes"}
    if not better:
        return "lora" if there else None
    best = max(better, key=lambda name: better[name].mean)
    return f"{best}: {better[best]:+.1f}"
