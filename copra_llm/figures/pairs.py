"""What do pairs of adapters say together? Means over pairs of seeds, with 95 % intervals.

Pairs share seeds and are not independent, so intervals over pairs are the jackknife's over seeds
(`copra_llm.bands`). Differences in accuracy that every example takes part in are bootstrapped over pairs and
examples; there pairs that share a seed count as if they did not, so with few seeds these are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copra_llm.bands import Band, curve_band, pair_band
from copra_llm.estimates import Estimate, bootstrap_pairs, exact
from copra_llm.figures.groups import metric
from copra_llm.results import Result, unpack_bits


def over_pairs(records: Sequence[Result], values: Sequence) -> list[Estimate]:
    """Means over the records' pairs of seeds.

    Args:
        records: of pairs; where one does not say its seeds, all count as independent.
        values: `(pairs, n)`.

    Returns:
        n estimates.
    """
    known = all("seeds" in r.config for r in records)
    band = pair_band(np.asarray(values, dtype=float), [tuple(r.config["seeds"]) for r in records] if known else None)
    return estimates_of(band)


def estimates_of(band: Band) -> list[Estimate]:
    """A band of n means as n estimates."""
    return [Estimate(*map(float, ends)) for ends in zip(band.mean, band.low, band.high, strict=True)]


def pair_metric(records: Sequence[Result], name: str) -> Estimate:
    """`<split>/<task>/<name>` over pairs."""
    return over_pairs(records, [[metric(r, name)] for r in records])[0]


def pair_outcomes(curves: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of the ends (their mean) and of the middle: two float arrays `(pairs, examples)`."""
    ends, middle = [], []
    for curve in curves:
        rows = curve.data["correct"]
        half = int(np.argmin(abs(np.array(curve.data["alpha"]) - 0.5)))
        first, last, between = (np.array(unpack_bits(rows[i]), dtype=float) for i in (0, -1, half))
        ends.append((first + last) / 2)
        middle.append(between)
    return np.array(ends), np.array(middle)


def drop_estimate(curves: Sequence[Result]) -> Estimate:
    """Accuracy of the ends minus the middle, in percentage points; bootstrap over pairs and examples."""
    ends, middle = pair_outcomes(curves)
    return bootstrap_pairs(100.0 * (ends - middle))


def difference_estimate(first: Sequence[Result], second: Sequence[Result]) -> Estimate:
    """Merged accuracy of the first minus the second, on the same examples, in percentage points."""
    a, b = pair_outcomes(first)[1], pair_outcomes(second)[1]
    if a.shape != b.shape:
        return exact(100.0 * (a.mean() - b.mean()))
    return bootstrap_pairs(100.0 * (a - b))


def metric_difference(first: Sequence[Result], second: Sequence[Result], name: str) -> Estimate:
    """`<split>/<task>/<name>` of the first minus the second's; over the pairs of equal seeds, if there are."""
    by_seeds = [{tuple(c.config["seeds"]): c for c in curves if "seeds" in c.config} for curves in (first, second)]
    shared = sorted(by_seeds[0].keys() & by_seeds[1].keys())
    if not shared:
        return exact(mean_metric(first, name) - mean_metric(second, name))
    ours, theirs = ([metric(curves[seeds], name) for seeds in shared] for curves in by_seeds)
    return over_pairs([by_seeds[0][seeds] for seeds in shared], [[a - b] for a, b in zip(ours, theirs, strict=True)])[0]


def mean_metric(curves: Sequence[Result], name: str) -> float:
    """Mean over pairs of `<split>/<task>/<name>`."""
    return float(np.mean([metric(c, name) for c in curves]))


def single_metric(curves: Sequence[Result], name: str) -> float:
    """Mean over pairs and their two ends."""
    return (mean_metric(curves, f"{name}@0") + mean_metric(curves, f"{name}@1")) / 2


def curve_estimates(records: Sequence[Result], quantity: str) -> tuple[list[float], list[Estimate]]:
    """Weights of the first adapter and the mean line over them; a loss that was not finite leaves a gap.

    Which of two seeds is the first says nothing, so each line counts in both directions.
    """
    alpha, band = curve_band(finest_lines(records), quantity)
    return alpha.tolist(), estimates_of(band)


def finest_lines(records: Sequence[Result]) -> list[Result]:
    """The lines with the most points: those on another grid have no value at theirs."""
    most = max(len(r.data["alpha"]) for r in records)
    return [r for r in records if len(r.data["alpha"]) == most]
