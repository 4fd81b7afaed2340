"""Over which layers is an adapter's effect spread, and how evenly?

Values add up to v(all layers) - v(no layer), which differs between adapters; what is compared is relative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, grouped
from copra_llm.results import Result

KEYS = ("metric", "estimator", "granularity", "split")


def shapley_groups(results: Iterable[Result]) -> list[Group]:
    """Adapters of one method and settings, all seeds together."""
    return grouped((r for r in results if r.protocol == "shapley"), KEYS)


def evenness(r: Result, name: str) -> float | None:
    """`top_third_share` or `gini` of a record; None where it has none."""
    return next((value for key, value in r.metrics.items() if key.rsplit("/", 1)[-1] == name), None)


def mean_evenness(records: Sequence[Result], name: str) -> Estimate | None:
    """Mean over adapters; None where not every record has it."""
    found = [evenness(r, name) for r in records]
    return seed_estimate(found) if found and None not in found else None


def thirds(r: Result) -> np.ndarray:
    """Parts `(3,)` of the sum of a record's values in the lowest, middle and highest third of its players.

    Where three does not divide their number, a player on a border counts on both sides with its fractions.
    """
    values = np.array(r.data["values"])
    edges = np.linspace(0, len(values), 4)
    cumulated = np.interp(edges, np.arange(len(values) + 1), np.append(0.0, values.cumsum()))
    return np.diff(cumulated) / values.sum()
