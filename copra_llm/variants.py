"""How good are the smaller variants of an adapter? One record, and what is evaluated of it survives a stop.

Until the record is written, every finished variant is kept in a file beside it; the file is used again only for
the same adapter, model, data and seeds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.prune import BY_ENTRIES, Variant, size
from copra_llm.quantise import KINDS
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_atomic, write_result

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the curves, unless others are asked for."""


def figure_variants(
    keep: Iterable[str],
    seed: int,
    densities: Sequence[float] = DENSITIES,
    by: Sequence[str] = BY_ENTRIES,
    quantised: Sequence[str] = tuple(KINDS),
) -> list[Variant]:
    """What the paper's figure 4 shows of an adapter, and more: layers, entries, bits, and bits after pruning.

    Args:
        keep: structured variants, by name.
        seed: of random entries.
        densities: of the unstructured curves.
        by: how their entries are chosen, a curve each.
        quantised: kinds; each alone, the last one also after half of the layers and after half of the entries.
    """
    curves = [Variant(density=d, by=b, seed=seed) for b in by for d in densities]
    bits = [Variant(quantise=kind) for kind in quantised]
    both = [
        Variant(*half, quantise=kind)
        for kind in quantised[-1:]
        for half in (("every-other",), ("all", 0.5, "magnitude"))
    ]
    return [Variant(name) for name in keep] + curves + bits + both


def variants_record(
    weights: AdapterWeights,
    config: RunConfig,
    task: str,
    variants: Sequence[Variant],
    evaluator: AdapterEvaluator,
    *,
    checkpoint: str = "final",
    settings: dict[str, Any] | None = None,
    unfinished: Path | None = None,
    progress: Callable = iter,
) -> Result:
    """All variants of an adapter as a result record.

    Args:
        weights: the adapter.
        config: the run's settings, kept in the record.
        task: what is evaluated, on the evaluator's split.
        variants: what is made of the adapter.
        evaluator: the model and the split.
        checkpoint: "final" or "early".
        settings: more entries for the record's config.
        unfinished: file that keeps the finished variants while the others are evaluated.
        progress: wraps the iterable of variants.
    """
    own = {"split": evaluator.split, "task": task, "checkpoint": checkpoint, **(settings or {})}
    pattern = config.schedule.layer_pattern
    rows, seconds = evaluate_variants(weights, variants, evaluator, task, pattern, unfinished, progress)
    evaluator.attach(weights)  # the environment is the model's, which is not loaded yet if every row was kept
    return Result(
        protocol="pruning",
        config=own | config.flat(),
        metrics={f"{evaluator.split}/{task}/accuracy/{r['name']}@{r['density']:g}": r["accuracy"] for r in rows},
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        data={"rows": rows, "random_seeds": sorted({v.seed for v in variants if v.by == "random"})},
        environment=evaluator.environment(),
    )


def evaluate_variants(
    weights: AdapterWeights,
    variants: Sequence[Variant],
    evaluator: AdapterEvaluator,
    task: str,
    layer_pattern: str | None = None,
    unfinished: Path | None = None,
    progress: Callable = iter,
) -> tuple[list[dict[str, Any]], float]:
    """A row a variant, and the seconds they took, those before a stop included.

    A row holds kind, name, density, accuracy [percent], loss [nats], correct, parameters and bytes.
    """
    stamp = _stamp(weights, evaluator, task, repr((sorted({v.seed for v in variants}), layer_pattern)))
    done, seconds = _unfinished_rows(unfinished, stamp)
    started = time.time() - seconds
    for variant in progress(variants):
        key = (variant.name, variant.density)
        if key in done:
            continue
        # At density 1 nothing is chosen: what has been evaluated without choosing is the same adapter.
        same = replace(variant, by=None) if variant.density == 1.0 else variant
        row = done.get((same.name, same.density)) or _evaluate(weights, same, evaluator, task, layer_pattern)
        done[key] = row | {"kind": variant.kind, "name": variant.name}
        if unfinished is not None:
            kept = {"of": stamp, "seconds": time.time() - started, "rows": list(done.values())}
            write_atomic(unfinished, json.dumps(kept))
    return [done[variant.name, variant.density] for variant in variants], time.time() - started


def unfinished_file(record: Path) -> Path:
    """The file that keeps an adapter's finished variants until its record is written."""
    return record.with_name(f"{record.name}.partial")


def finish(record: Path, result: Result) -> None:
    """Write the record; what was kept until then goes."""
    write_result(record, result)
    unfinished_file(record).unlink(missing_ok=True)


def _evaluate(
    weights: AdapterWeights, variant: Variant, evaluator: AdapterEvaluator, task: str, layer_pattern: str | None
) -> dict[str, Any]:
    pruned = variant.of(weights, layer_pattern)
    outcome = evaluator(pruned, task)
    return {
        "kind": variant.kind,
        "name": variant.name,
        "density": variant.density,
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "correct": pack_bits(outcome.correct),
        "parameters": size(pruned).parameters,
        "bytes": variant.bytes_of(pruned),
    }


def loaded_by(config: RunConfig) -> tuple:
    """What an evaluator has loaded."""
    return config.model, config.data, config.instruct, config.image


def _stamp(weights: AdapterWeights, evaluator: AdapterEvaluator, task: str, more: str) -> str:
    """Tells an unfinished file of this adapter, model and data from that of others."""
    of = (weights.fingerprint(), loaded_by(evaluator.config), evaluator.split, task, more)
    return hashlib.sha256(repr(of).encode()).hexdigest()


def _unfinished_rows(file: Path | None, stamp: str) -> tuple[dict[tuple[str, float], dict[str, Any]], float]:
    """By name and density; and the seconds they took."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    if kept.get("of") != stamp:
        return {}, 0.0
    return {(row["name"], row["density"]): row for row in kept["rows"]}, kept["seconds"]
