"""What are the Shapley values, exactly?

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))

Every coalition is evaluated: 2^n values, so up to 16 players.
"""

from __future__ import annotations

import math

import numpy as np

MAX_PLAYERS = 16


def exact_values(coalitions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """phi `(n,)` from all coalitions `(2**n, n)`, in any order, and their values `(2**n,)`."""
    n_players = coalitions.shape[1]
    weight = np.array([1 / (n_players * math.comb(n_players - 1, size)) for size in range(n_players)])
    sizes = coalitions.sum(1)
    joined = weight[sizes - 1] * values  # as S + i, where i is in it (the empty coalition never is)
    left = weight[np.minimum(sizes, n_players - 1)] * values  # as S, where i is not in it
    return np.where(coalitions, joined[:, None], -left[:, None]).sum(0)
