"""What does an estimator answer, and what is said of it?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Shapley values of one game, in the game's own unit."""

    estimator: str
    """Its name in `ESTIMATORS`, or "exact" where the budget reached every coalition."""
    values: np.ndarray
    """phi `(n_players,)`."""
    standard_errors: np.ndarray
    """Of `values`, `(n_players,)`: 0 where exact, infinite while unknown (a single round)."""
    v_empty: float
    v_full: float
    evaluations: int
    """Budget spent: different coalitions whose values were used, the empty and the full one among them."""
    new_evaluations: int
    """How many of these the game was asked for; the others stood in the cache already."""
    unbiased: bool
    """Whether the mean over seeds is the Shapley value at any budget; False: consistent, exact in the limit."""

    @property
    def efficiency_gap(self) -> float:
        """`sum(values) - (v_full - v_empty)`, 0 up to rounding where the estimator is efficient."""
        return float(self.values.sum() - (self.v_full - self.v_empty))
