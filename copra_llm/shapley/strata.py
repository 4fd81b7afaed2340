"""What does every evaluation tell of every player?

With pairs (S, N - S) drawn size by size, g(S) = (v(S) - v(N - S)) / 2 and x_i = +1 in S, -1 outside:

    stratified:  phi_i = (v(N) - v(empty)) / n + sum_s c_s (mean of g over S with i - mean of g over S without i)
                 c_s = 2 / n, and 1 / n for 2 s = n
    regression:  phi   = argmin sum_pairs w(S) (g(S) - sum_i phi_i x_i / 2)^2,   sum_i phi_i = v(N) - v(empty)
                 w(S) = (n - 1) / (C(n, s) s (n - s)), Shapley's kernel

The difference of means is n^2 / (s (n - s)) times the covariance of membership and g within the size. The
sample covariance estimates it without bias, and every coalition counts for all n players. The regression
exploits in addition what the sizes have in common; it is consistent. Both draw without replacement and are
exact once all pairs are in.

Standard errors: of the means, by size, with the finite-population factor 1 - m_s / N_s; for the regression the
sandwich estimator with residuals scaled by their leverage, 1 / (1 - h) (HC3), infinite where a leverage is 1.

Source: Maleki et al. 2013 and Kolpaczki et al. 2024 (strata; SVARM); Lundberg and Lee 2017, Covert and Lee
2021 (regression, paired); Musco and Witter 2024 (equal numbers by size: leverage scores; no replacement).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from copra_llm.shapley.designs import count_pairs, odd_part, pairs, with_complements

Ends = tuple[float, float]


class Paired:
    """Draws pairs in turns of their sizes, without replacement."""

    def minimum(self, n_players: int) -> int:
        """The smallest budget: more pairs than players, at least two of every size."""
        return 2 * n_players + 4

    def rounds(self, n_players: int, seed: int, budget: int) -> Iterator[np.ndarray]:
        """One pair `(2, n)` a round."""
        for _, half in zip(range((budget - 2) // 2), pairs(n_players, seed), strict=False):
            yield with_complements(half[None])


@dataclass(frozen=True)
class Stratified(Paired):
    """Differences of means within each size; efficient."""

    unbiased: ClassVar[bool] = True

    def solve(self, ends: Ends, coalitions: np.ndarray, values: np.ndarray):
        """Values and standard errors, each `(n,)`."""
        halves, g = odd_part(coalitions, values)
        phi = np.full(halves.shape[1], (ends[1] - ends[0]) / halves.shape[1])
        variance = np.zeros_like(phi)
        for rows, drawn, total, contrast in strata(halves):
            if drawn == total:
                phi += (contrast * g[rows, None]).mean(0)
                continue
            if 2 * halves[rows[0]].sum() == len(phi):  # with their complements in the same size, both means are 0
                terms = contrast * g[rows, None]  # (m_s, n)
            else:
                # Of the population a covariance divides by N_s, while a sample's estimates that by N_s - 1.
                scale = drawn / (drawn - 1) * (total - 1) / total
                terms = scale * (contrast - contrast.mean(0)) * (g[rows] - g[rows].mean())[:, None]
            phi += terms.mean(0)
            variance += terms.var(0, ddof=1) / drawn * (1 - drawn / total)
        return phi, np.sqrt(variance)


@dataclass(frozen=True)
class Regression(Paired):
    """Weighted least squares (KernelSHAP) on pairs; efficient."""

    unbiased: ClassVar[bool] = False

    def solve(self, ends: Ends, coalitions: np.ndarray, values: np.ndarray):
        """Values and standard errors, each `(n,)`."""
        halves, g = odd_part(coalitions, values)
        n_players = halves.shape[1]
        weight, unseen = np.zeros(len(g)), np.zeros(len(g))
        for rows, drawn, total, _ in strata(halves):
            size = halves[rows[0]].sum()
            weight[rows] = (1 if 2 * size == n_players else 2) / (size * (n_players - size)) / drawn
            unseen[rows] = 1 - drawn / total
        even = (ends[1] - ends[0]) / n_players
        x = np.where(halves, 0.5, -0.5)
        target = g - even * x.sum(1)
        # Without their row means the rows see deviations from `even` alone, and those sum to 0.
        x = x - x.mean(1, keepdims=True)
        inverse = np.linalg.pinv((x.T * weight) @ x, rcond=1e-10, hermitian=True)  # (n, n), of rank n - 1
        pull = (x @ inverse) * weight[:, None]  # (m, n): what a pair's g moves
        deviation = pull.T @ target
        leverage = (pull * x).sum(1)
        if ((leverage > 1 - 1e-6) & (unseen > 0)).any():  # as many effects as pairs: nothing is left to judge by
            return even + deviation, np.full(n_players, np.inf)
        residual = (target - x @ deviation) / np.maximum(1 - leverage, 1e-6)
        return even + deviation, np.sqrt((pull**2).T @ (residual**2 * unseen))


def strata(halves: np.ndarray) -> Iterator[tuple[np.ndarray, int, int, np.ndarray]]:
    """By size: the rows of `halves (m, n)`, their number, that of all pairs of the size, and the contrast.

    The mean over a size of `contrast (m_s, n)` times g is its term of the stratified formula.
    """
    n_players, sizes = halves.shape[1], halves.sum(1)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        scale = (1 if 2 * size == n_players else 2) / n_players
        contrast = scale * np.where(halves[rows], n_players / size, -n_players / (n_players - size))
        yield rows, len(rows), count_pairs(n_players, int(size)), contrast
