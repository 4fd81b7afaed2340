"""Is the work spread evenly over the players?

    top-third share = sum of the n/3 largest |phi_i| / sum of |phi_i|
    Gini            = sum_ij ||phi_i| - |phi_j|| / (2 n sum_i |phi_i|)

The sum of the Shapley values is fixed by the game, v(N) - v(empty), so what can be compared between two
adapters is how evenly it is spread.

*Negative values*: a player that harms is as much a departure from "everyone does the same" as one that helps,
so magnitudes are taken; the metric's direction (loss or accuracy) then makes no difference.
*n/3*: where three does not divide n, the player in between counts with the fraction that is left (10 players:
the three largest and a third of the fourth). So an even game has exactly 1/3 for any n.

Source: CopRA (arXiv 2410.22911) and CoTo (ICML 2025) report the share of the top layers.
"""

from __future__ import annotations

import numpy as np


def top_third_share(values: np.ndarray) -> float:
    """Share in [1/3, 1] that the third of the players with the largest values has; NaN if all values are 0."""
    sizes = np.sort(np.abs(values))[::-1]
    if not sizes.any():
        return float("nan")
    third = len(sizes) / 3
    counted = np.clip(third - np.arange(len(sizes)), 0, 1)  # 1, 1, ..., the fraction that is left, 0, ...
    return float(counted @ sizes / sizes.sum())


def gini(values: np.ndarray) -> float:
    """Gini coefficient of the magnitudes: 0 if all are equal, (n - 1) / n if one has all; NaN if all are 0."""
    sizes = np.abs(values)
    if not sizes.any():
        return float("nan")
    return float(np.abs(sizes[:, None] - sizes).sum() / (2 * len(sizes) * sizes.sum()))
