"""Is one layer alone connected? Barriers of lines on which a single layer is interpolated.

    barrier            max over alpha of  alpha m(1) + (1 - alpha) m(0) - m(alpha)
    averaging barrier  (a + b) / 2 - m(1/2), a and b the metric of the two whole adapters

Of losses with the sign turned; means over pairs of seeds, each in both orders. Source: CopRA (arXiv 2410.22911),
section 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from copra_llm.estimates import Estimate
from copra_llm.figures.groups import Group, grouped
from copra_llm.figures.merged import KEYS
from copra_llm.figures.pairs import over_pairs
from copra_llm.results import Result


def layer_groups(results: Iterable[Result]) -> list[Group]:
    """Layer-wise lines, all pairs of seeds together."""
    return grouped((r for r in results if r.protocol == "layerwise"), KEYS)


def barrier(alpha: Sequence[float], values: Sequence[float], quantity: str) -> float:
    """Deepest dip below the chord between the ends: percentage points, or nats with the sign turned."""
    a, m = np.array(alpha, dtype=float), np.array(values, dtype=float)
    below = a * m[-1] + (1 - a) * m[0] - m
    return float(np.max(below if quantity == "accuracy" else -below))


def layer_barriers(g: Group, quantity: str, kind: str = "averaging_barrier") -> list[Estimate] | None:
    """A barrier a layer; None where the records have none of this kind.

    Args:
        g: of `layer_groups`.
        quantity: "accuracy" (percentage points) or "loss" (nats).
        kind: "barrier", computed from the lines, or "averaging_barrier", the records' own.
    """
    if kind == "barrier":
        lines = [[barrier(r.data["alpha"], line, quantity) for line in r.data[quantity]] for r in g.records]
        return over_pairs(g.records, lines)
    return _metrics(g, [f"{quantity}_{kind}/{layer}" for layer in g.records[0].data["layers"]])


def whole_barrier(g: Group, quantity: str, kind: str = "averaging_barrier", part: str = "whole") -> Estimate | None:
    """The barrier of all layers at once, or `part="mean"`: the mean over single layers."""
    found = _metrics(g, [f"{quantity}_{kind}_{part}"])
    return found[0] if found else None


def _metrics(g: Group, names: Sequence[str]) -> list[Estimate] | None:
    """Metrics over pairs, named with their split and task or without; None where a record lacks one."""
    full = [[_metric_name(r, name) for name in names] for r in g.records]
    if any(name is None for row in full for name in row):
        return None
    return over_pairs(g.records, [[r.metrics[name] for name in row] for r, row in zip(g.records, full, strict=True)])


def _metric_name(r: Result, name: str) -> str | None:
    full = f"{r.config['split']}/{r.config['task']}/{name}"
    return next((n for n in (full, name) if n in r.metrics), None)
