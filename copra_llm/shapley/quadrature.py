"""Which evaluations tell the most, and what do they say together with all others?

A prior over games (`surrogate`) makes Shapley values and evaluations jointly normal. From that follow two
estimators:

- **quadrature**: the posterior mean, averaged over decays in proportion to their evidence. The coalitions are
  chosen one by one, each the one that lowers the summed posterior variance of all Shapley values most:
      argmax_S sum_i cov(phi_i, g(S) | chosen)^2 / var(g(S) | chosen).
  The choice does not look at values, so it is the same for every game. Standard errors are the posterior's:
  right if the game looks like a draw from the prior in random order of players, too small for games with much
  structure of high degree (a vote with a quota), too large for nearly additive ones.
- **adjusted**: unbiased. With S_j a random draw and g_-j the posterior mean from all other draws,
      term_s(g) = mean over j of [term_s(g_-j) + (N_s - m_s + 1) / N_s contrast(S_j) (g(S_j) - g_-j(S_j))]
  is without bias for every j: given the others, S_j is uniform over the N_s - m_s + 1 coalitions of its size that
  are left, and on the others g_-j makes no error. The prior is a fixed one, for tuning it would look at S_j.

Leaving one out costs nothing: with K the covariance, g(S_j) - g_-j(S_j) = (K^-1 g)_j / (K^-1)_jj.

Source: O'Hagan 1991; Briol et al. 2019 (Bayesian quadrature); Witter, Liu and Musco 2025 (regression-adjusted
Monte Carlo for Shapley values, with folds instead of leaving one out).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from copra_llm.shapley.designs import odd_part, pairs, with_complements
from copra_llm.shapley.strata import Ends, Paired, strata
from copra_llm.shapley.surrogate import Prior, forward, posterior, prior

DECAYS = (0.25, 0.6, 1.2, 2.4, 4.2, 6.0, 8.4, 12.0)
"""Decays that are averaged over, times n: about the ratio of the third degree's variance to the first's, rooted."""
DESIGN_DECAY = 5.0
"""Decay times n for which coalitions are chosen and `adjusted` predicts; rather rough, so good for rough games."""
LARGEST = 10_000
"""Most evaluations: the systems that are solved have half as many unknowns."""
_POOL, _BLOCK = 512, 128  # candidates to choose from; choices after which the pool is filled up again


@dataclass(frozen=True)
class Quadrature(Paired):
    """Bayesian quadrature on a design of least posterior variance; efficient; the default."""

    unbiased: ClassVar[bool] = False
    largest: ClassVar[int] = LARGEST

    def rounds(self, n_players: int, seed: int, budget: int) -> Iterator[np.ndarray]:
        """One pair `(2, n)` a round."""
        law, source = prior(n_players, decay_of(DESIGN_DECAY, n_players)), pairs(n_players, seed)
        chosen = np.ones((1, n_players), dtype=bool)
        pool = np.zeros((0, n_players), dtype=bool)
        left = (budget - 2) // 2
        while left > 0:
            fresh = list(itertools.islice(source, _POOL - len(pool)))
            pool = np.vstack([pool, *fresh])
            if len(pool) == 0:
                return
            picked = most_telling(law, chosen, pool, min(_BLOCK, left))
            halves = pool[picked]
            chosen, pool = np.vstack([chosen, halves]), np.delete(pool, picked, axis=0)
            left -= len(halves)
            for half in halves:
                yield with_complements(half[None])

    def solve(self, ends: Ends, coalitions: np.ndarray, values: np.ndarray):
        """Posterior means and standard deviations, each `(n,)`."""
        halves, g = with_grand_pair(ends, coalitions, values)
        n_players = halves.shape[1]
        decays = sorted({decay_of(d, n_players) for d in DECAYS})
        evidence, means, variances = map(
            np.array, zip(*(posterior(prior(n_players, d), halves, g) for d in decays), strict=True)
        )
        weight = np.exp(evidence - evidence.max())
        weight /= weight.sum()
        mean = weight @ means
        return mean, np.sqrt(weight @ (variances + (means - mean) ** 2))


@dataclass(frozen=True)
class Adjusted(Paired):
    """Stratified sampling of what a surrogate leaves unexplained, each draw predicted from the others; efficient."""

    unbiased: ClassVar[bool] = True
    largest: ClassVar[int] = LARGEST

    def solve(self, ends: Ends, coalitions: np.ndarray, values: np.ndarray):
        """Values and standard errors, each `(n,)`."""
        halves, g = with_grand_pair(ends, coalitions, values)
        n_players = halves.shape[1]
        law = prior(n_players, decay_of(DESIGN_DECAY, n_players))
        root = forward(law.cholesky(halves), np.eye(len(g)))
        inverse = root.T @ root  # (m, m)
        pull = inverse @ g
        left_out = pull / np.diag(inverse)  # (m,): value minus its prediction from all others
        phi = np.full(n_players, (ends[1] - ends[0]) / n_players)
        variance = np.zeros(n_players)
        for rows, drawn, total, contrast in strata(halves[1:]):
            rows = rows + 1
            if drawn == total:
                phi += (contrast * g[rows, None]).mean(0)
                continue
            seen = law.with_shapley(halves, int(halves[rows[0]].sum()))  # (m, n)
            predicted = seen.T @ pull - (inverse[rows] @ seen) * left_out[rows, None]  # (m_s, n)
            terms = predicted + contrast * left_out[rows, None] * (total - drawn + 1) / total
            phi += terms.mean(0)
            variance += terms.var(0, ddof=1) / drawn
        return phi, np.sqrt(variance)


def decay_of(roughness: float, n_players: int) -> float:
    """A decay from its product with n, at most 1."""
    return min(roughness / n_players, 1.0)


def with_grand_pair(ends: Ends, coalitions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halves `(1 + m, n)` and g `(1 + m,)`, the full coalition first."""
    halves, g = odd_part(coalitions, values)
    full = np.ones((1, halves.shape[1]), dtype=bool)
    return np.vstack([full, halves]), np.append((ends[1] - ends[0]) / 2, g)


def most_telling(law: Prior, chosen: np.ndarray, pool: np.ndarray, count: int) -> list[int]:
    """Rows of `pool (k, n)` that lower the Shapley values' variance most after `chosen (m, n)`, greedily."""
    count = min(count, len(pool))
    factor = law.cholesky(chosen)
    white = np.zeros((len(chosen) + count, len(pool)))  # pool values in the directions chosen so far
    white[: len(chosen)] = forward(factor, law.covariance(chosen, pool))
    known = forward(factor, law.with_shapley(chosen))
    shared = law.with_shapley(pool) - white[: len(chosen)].T @ known  # (k, n), given the chosen
    floor = 10 * law.jitter
    variance = law.by_agreement[-1] + law.jitter - (white[: len(chosen)] ** 2).sum(0)  # (k,)
    free, picked = np.ones(len(pool), dtype=bool), []
    for step in range(len(chosen), len(chosen) + count):
        gain = np.where(free, (shared**2).sum(1) / np.maximum(variance, floor), -1.0)
        best = int(gain.argmax())
        picked.append(best)
        free[best] = False
        deviation = np.sqrt(max(variance[best], floor))
        covariance = law.covariance(pool[best : best + 1], pool)[0] - white[:step, best] @ white[:step]
        white[step] = covariance / deviation
        shared = shared - np.outer(white[step], shared[best] / deviation)
        variance = variance - white[step] ** 2
    return picked
