"""How sure is a mean? 95 % intervals over seeds, pairs of seeds and examples.

    over n seeds:            mean +- t_{n-1, 0.975} s / sqrt(n)        (Student)
    over pairs and examples: percentiles 2.5 and 97.5 of the mean, both resampled      (bootstrap)

Sources: Student, "The probable error of a mean" (Biometrika 6, 1908); Efron, "Bootstrap methods" (Annals of
Statistics 7, 1979); Abramowitz and Stegun 26.7.5 for the expansion of t around the normal quantile.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; `low` and `high` are NaN where there is none."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        return f"{self:.1f}"

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def t_975(df: int) -> float:
    """97.5 % quantile of Student's t with `df` degrees of freedom; beyond the table by its expansion around z."""
    z = 1.959964
    return T_975.get(df) or z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def exact(value: float) -> Estimate:
    """One number that has no interval."""
    return Estimate(float(value), math.nan, math.nan)


def seed_estimate(values: Sequence[float]) -> Estimate:
    """Mean over seeds with a 95 % interval (Student's t); no interval for one seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return exact(mean)
    half = t_975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def paired_estimate(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Estimate | None:
    """Mean of the first minus the second over what both have (seeds, say); None where they share nothing."""
    shared = [key for key in first if key in second]
    return seed_estimate([first[key] - second[key] for key in shared]) if shared else None


def bootstrap_mean(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values (n,)` and its 95 % percentile bootstrap interval over resampled examples."""
    rng, n = np.random.default_rng(seed), len(values)
    # One draw at a time: all of them at once are gigabytes for the larger test sets.
    means = [values[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def bootstrap_pairs(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of `values (pairs, examples)` with a 95 % percentile interval; pairs and examples are both resampled.

    Outcomes take few values, so many examples are alike in all pairs: what is drawn is how often each kind of them
    occurs, which is the same law and takes a hundredth of the time.
    """
    rng = np.random.default_rng(seed)
    pairs, examples = values.shape
    kinds, occurs = np.unique(values, axis=1, return_counts=True)  # (pairs, kinds), (kinds,)
    of_pairs = rng.multinomial(pairs, np.full(pairs, 1 / pairs), draws)  # (draws, pairs)
    of_kinds = rng.multinomial(examples, occurs / examples, draws)  # (draws, kinds)
    means = ((of_pairs @ kinds) * of_kinds).sum(1) / (pairs * examples)
    return Estimate(float(values.mean()), *map(float, np.percentile(means, [2.5, 97.5])))
