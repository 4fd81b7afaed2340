"""How alike are adapters that differ in their seed, their settings or their method?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from copra_llm.bands import pair_band
from copra_llm.estimates import Estimate
from copra_llm.figures.groups import NAMES, rank
from copra_llm.figures.pairs import estimates_of
from copra_llm.results import Result

COMPARED = {"delta": "ΔW", "factors": "A and B"}
"""What cosines are of, by a record's setting `on`."""
SETTINGS = {"learning_rate": "learning rate", "steps": "steps", "seed": "seed"}
"""What adapters of one method may differ in."""


def method_of(point: Mapping[str, Any]) -> str:
    """Of a record's adapter: its method as it is shown; the adapter's own name where that is not known."""
    raw = point.get("method") or point.get("label") or "?"
    return NAMES.get(raw, str(raw))


def ordered(r: Result) -> list[int]:
    """Adapters by method, learning rate, steps and seed, so that what belongs together lies together."""

    def place(i: int) -> tuple:
        p = r.data["points"][i]
        return rank(method_of(p)), p.get("learning_rate") or 0, p.get("steps") or 0, str(p.get("seed"))

    return sorted(range(len(r.data["points"])), key=place)


def kinds_of_pairs(r: Result) -> list[tuple[str, int, float]]:
    """(which pairs, how many, mean cosine) over pairs of one method and settings, of one method, of two methods."""
    points, cosine = r.data["points"], r.data["cosine"]
    found: dict[str, list[float]] = defaultdict(list)
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            first, second = points[i], points[j]
            names = sorted({method_of(first), method_of(second)}, key=rank)
            differ = [word for key, word in SETTINGS.items() if first.get(key) != second.get(key)]
            kind = " and ".join(names) if len(names) > 1 else f"{names[0]}, other {' and '.join(differ) or 'run'}"
            found[kind].append(cosine[i][j])
    return [(kind, len(values), float(np.mean(values))) for kind, values in sorted(found.items())]


def between_seeds(r: Result) -> Iterator[tuple[str, float, int, Estimate, list[float]]]:
    """(method, learning rate, steps, cosine between seeds, distances from the checkpoints at T/4), where two have run.

    The cosine's interval knows that pairs share seeds (`copra_llm.bands`).
    """
    points, cosine = r.data["points"], r.data["cosine"]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, p in enumerate(points):
        groups[_settings(p)].append(i)
    for key in sorted(groups, key=lambda key: (rank(key[0]), *key[1:])):
        pairs = [(i, j) for i in groups[key] for j in groups[key] if i < j]
        if pairs:
            seeds = [(points[i]["seed"], points[j]["seed"]) for i, j in pairs]
            (alike,) = estimates_of(pair_band(np.array([[cosine[i][j]] for i, j in pairs]), seeds))
            yield *key, alike, [e["distance"] for e in r.data["early_distance"] if _settings(e) == key]


def _settings(point: Mapping[str, Any]) -> tuple[str, float, int]:
    return method_of(point), point["learning_rate"], point["steps"]
