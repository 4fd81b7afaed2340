"""How far can a mean over pairs of seeds be trusted?

Each pair {i, j} of n seeds gives a value h(i, j); the mean over all pairs is a U-statistic of order 2. Pairs
share seeds, so they are not independent: with n = 3 seeds there are three pairs, each two of them with a seed
in common, and Student's t over the three is too narrow (where the seeds' own values are all that varies, it
holds the truth in 83 % of cases, with five seeds in 59 %). The delete-one-seed jackknife counts seeds instead:

    U_-k  = mean over the pairs without seed k
    var U = (n - 1) / n * sum_k (U_-k - mean U_-k)^2,        interval U +- t_{n-1} sqrt(var U)

If h(i, j) is a mean of two values, one a seed (as at the ends of a line), this is exactly Student's t over the
seeds. Where no two pairs share a seed, the pairs themselves are independent, and Student's t over them is used.
The intervals are about other seeds on the same test examples: which examples are drawn is not in them.

Sources: Arvesen, "Jackknifing U-statistics" (Annals of Mathematical Statistics 40, 1969); Efron and Stein,
"The jackknife estimate of variance" (Annals of Statistics 9, 1981): it is biased upwards, if at all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from copra_llm.estimates import t_975
from copra_llm.results import Result


@dataclass(frozen=True)
class Band:
    """A mean with its 95 % interval; `low` and `high` are NaN where there is none."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def pair_band(values: np.ndarray, pairs: Sequence[tuple[Hashable, Hashable]] | None = None) -> Band:
    """Mean over pairs of seeds with a 95 % interval.

    Args:
        values: `(pairs, ...)`, one row a pair; rows of one pair in both orders count as one, their mean.
        pairs: the two seeds of every row; None: no two rows share a seed.

    Raises:
        ValueError: if there is no row, or `pairs` has another length.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0 or (pairs is not None and len(pairs) != len(values)):
        raise ValueError(f"{len(values)} values were given for {len(pairs or ())} pairs")
    if pairs is None:
        return _student(values)
    members: dict[frozenset, list[int]] = {}
    for row, pair in enumerate(pairs):
        members.setdefault(frozenset(pair), []).append(row)
    values = np.stack([values[rows].mean(0) for rows in members.values()])
    seeds = list(dict.fromkeys(seed for pair in members for seed in pair))
    if len(seeds) == sum(map(len, members)):
        return _student(values)
    without = [[row for row, pair in enumerate(members) if seed not in pair] for seed in seeds]
    mean, n = values.mean(0), len(seeds)
    if not all(without):  # every pair has this seed in common: nothing says how much another one would change
        return _around(mean, np.nan)
    left_out = np.stack([values[rows].mean(0) for rows in without])  # (n, ...)
    variance = (n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0)
    return _around(mean, t_975(n - 1) * np.sqrt(variance))


def curve_band(records: Sequence[Result], quantity: str) -> tuple[np.ndarray, Band]:
    """Several lines as one curve with a band: weights of the first adapter `(points,)`, and values over them.

    Which of a pair's adapters is the first says nothing, so lines whose seeds are known are averaged with their
    mirror image; at both ends the curve is then the mean over the seeds.

    Args:
        records: of protocol "interpolation", on one grid; others than the first one's grid are left out.
        quantity: "accuracy" (percent) or "loss" (nats); a value that was not finite leaves a gap.
    """
    alpha = np.array(records[0].data["alpha"])
    records = [r for r in records if len(r.data["alpha"]) == len(alpha)]
    values = np.array([r.data[quantity] for r in records], dtype=float)  # (pairs, points)
    if not all("seeds" in r.config for r in records):
        return alpha, pair_band(values)
    return alpha, pair_band((values + values[:, ::-1]) / 2, [tuple(r.config["seeds"]) for r in records])


def _student(values: np.ndarray) -> Band:
    mean, n = values.mean(0), len(values)
    return _around(mean, t_975(n - 1) * values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.nan)


def _around(mean: np.ndarray, half: np.ndarray | float) -> Band:
    return Band(mean, mean - half, mean + half)
