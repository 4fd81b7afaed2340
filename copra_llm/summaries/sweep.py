"""What do learning rate, steps and the schedule do to merging? Tables from the records.

Means over seeds or pairs of seeds with 95 % intervals. Stability is the spread over seeds, at the same step, of the
logged training loss and gradient norm: the mean over log entries of their standard deviation, relative to the mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from copra_llm.figures.pairs import over_pairs
from copra_llm.report import NAMES, ORDER, drop_estimate, mean_metric
from copra_llm.results import Result


def sweep_table(results: Iterable[Result]) -> str:
    """Markdown: fused and single accuracy, a row a model, task, variant and number of steps, a column a rate."""
    cells = _cells(results)
    if not cells:
        return ""
    rates = sorted({rate for *_, rate in cells})
    lines = [
        "| model | task | variant | steps | " + " | ".join(f"lr {rate:g}: single, fused" for rate in rates) + " |",
        "|---" * (4 + len(rates)) + "|",
    ]
    rows = sorted({key[:4] for key in cells}, key=lambda key: (*key[:2], _rank(key[2]), key[3]))
    for model, task, variant, steps in rows:
        row = [model, task, NAMES.get(variant, variant), str(steps)]
        for rate in rates:
            pairs = cells.get((model, task, variant, steps, rate), [])
            row.append(f"{_single(pairs):.1f}, {mean_metric(pairs, 'accuracy@0.5'):.1f}" if pairs else "–")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def schedules_table(results: Iterable[Result]) -> str:
    """Markdown: a row a variant: single, fused, the drop, fused minus LoRA's, and the stability over seeds."""
    results = list(results)
    cells = _cells(results)
    runs: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        if r.protocol == "train":
            runs[_key(r, r.config["tasks"][0])].append(r)
    lines = [
        "| model | task | variant | lr, steps | single acc. | fused acc. | drop when fused | fused acc. minus LoRA's "
        "| fused loss | spread of loss | spread of gradient norm |",
        "|---" * 11 + "|",
    ]
    for key in sorted(cells, key=lambda key: (*key[:2], _rank(key[2]), *key[3:])):
        pairs, (model, task, variant, steps, rate) = cells[key], key
        lora = cells.get((model, task, "lora", steps, rate), [])
        against = "–" if variant == "lora" or not lora else _difference(pairs, lora)
        row = [model, task, NAMES.get(variant, variant), f"{rate:g}, {steps}", f"{_single(pairs):.1f}",
               f"{mean_metric(pairs, 'accuracy@0.5'):.1f}", str(drop_estimate(pairs)), against,
               f"{mean_metric(pairs, 'loss@0.5'):.2f}",
               *(_percent(spread(runs[key], name)) for name in ("loss", "grad_norm"))]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def along_table(results: Iterable[Result]) -> str:
    """Markdown: single and merged accuracy along the run, a row a model, task and variant."""
    records = [r for r in results if r.protocol == "merge_over_steps"]
    if not records:
        return ""
    steps = sorted({step for r in records for step in r.data["steps"]})
    lines = ["| model | task | variant | rule | " + " | ".join(f"step {step}: single, merged" for step in steps) + " |",
             "|---" * (4 + len(steps)) + "|"]  # fmt: skip
    for r in sorted(records, key=lambda r: (_model(r), r.config["task"], _rank(_variant(r)), r.config["merge_method"])):
        at = dict(zip(r.data["steps"], zip(r.data["single"], r.data["merged"], strict=True), strict=True))
        values = [f"{at[step][0]:.1f}, {at[step][1]:.1f}" if step in at else "–" for step in steps]
        name = NAMES.get(_variant(r), _variant(r))
        lines.append("| " + " | ".join([_model(r), r.config["task"], name, r.config["merge_method"], *values]) + " |")
    return "\n".join(lines) + "\n"


def spread(runs: Sequence[Result], name: str) -> float:
    """Standard deviation over seeds of a logged quantity, relative to its mean, averaged over the log entries.

    NaN where fewer than two runs have logged it, or their log entries are at other steps.
    """
    logs = [r.data.get("log", []) for r in runs]
    if len(logs) < 2 or not all(log and all(name in entry for entry in log) for log in logs):
        return float("nan")
    if len({tuple(entry["step"] for entry in log) for log in logs}) > 1:
        return float("nan")
    values = np.array([[entry[name] for entry in log] for log in logs], dtype=float)  # (seeds, entries)
    return float(np.mean(values.std(0, ddof=1) / values.mean(0)))


def _cells(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Fused pairs by (model, task, variant, steps, rate)."""
    cells: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        if r.protocol == "interpolation" and r.config["merge_method"] == "fusion":
            cells[_key(r, r.config["task"])].append(r)
    return {key: sorted(pairs, key=lambda r: r.config.get("seeds", [])) for key, pairs in cells.items()}


def _key(r: Result, task: str) -> tuple:
    return _model(r), task, _variant(r), r.config["max_steps"], r.config["learning_rate"]


def _model(r: Result) -> str:
    return Path(r.config["model_name_or_path"]).name


def _variant(r: Result) -> str:
    return r.config.get("variant") or r.config["method"]


def _rank(variant: str) -> tuple:
    return (ORDER.index(variant) if variant in ORDER else len(ORDER), variant)


def _single(pairs: Sequence[Result]) -> float:
    return (mean_metric(pairs, "accuracy@0") + mean_metric(pairs, "accuracy@1")) / 2


def _difference(pairs: Sequence[Result], base: Sequence[Result]) -> str:
    """Fused accuracy minus the base's, paired by seeds; the interval knows that pairs share seeds."""
    theirs = {tuple(r.config["seeds"]): mean_metric([r], "accuracy@0.5") for r in base}
    shared = [r for r in pairs if tuple(r.config["seeds"]) in theirs]
    if not shared:
        return "–"
    values = [[mean_metric([r], "accuracy@0.5") - theirs[tuple(r.config["seeds"])]] for r in shared]
    return str(over_pairs(shared, values)[0])


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.0f} %"
