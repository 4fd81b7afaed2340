"""What is a game likely to be where it has not been evaluated?

A game's odd part is a sum of Walsh functions of odd degree, g(x) = sum_T b_T prod_{i in T} x_i, with x_i = +1
for a member and -1 for the others. The prior holds the coefficients for independent and normal,

    b_T ~ N(0, decay^(|T| - 1)),     wider by FLAT for |T| = 1, so that main effects are not shrunk.

Its covariance depends on the number h of players on which two coalitions agree alone:

    k(h) = [(1 + decay)^h (1 - decay)^(n - h) - (1 - decay)^h (1 + decay)^(n - h)] / (2 decay) + FLAT (2 h - n)

Shapley values are linear in the game, so they are jointly normal with its values: given some values, their mean
and covariance are closed forms (Bayesian quadrature). Small decay: nearly additive games; decay = 1: noise.

Source: O'Hagan 1991 (quadrature); the Shapley value as a sum over odd degrees, phi_i = 2 sum_{T with i} b_T /
|T|, is classical; that paired evaluations see the odd part alone: Covert and Lee 2021.
"""

from __future__ import annotations

import functools
import math

import numpy as np

FLAT = 100.0
_JITTER = 1e-11  # of a value's prior variance: keeps the Cholesky factor real where games repeat themselves


class Prior:
    """The law above for one number of players and one decay in (0, 1]."""

    def __init__(self, n_players: int, decay: float):
        h = np.arange(n_players + 1.0)
        up, down = 1 + decay, 1 - decay
        self.n_players = n_players
        self.by_agreement = (up**h * down ** (n_players - h) - down**h * up ** (n_players - h)) / (2 * decay)
        self.by_agreement += FLAT * (2 * h - n_players)  # (n + 1,)
        self.stratum = agreement_contrasts(n_players) @ self.by_agreement  # (n // 2, n + 1, 2)
        # The full coalition agrees with a coalition on its members.
        total = self.stratum.sum(0) + 2 / n_players * self.by_agreement[:, None]  # (n + 1, 2)
        self.total = total
        scale = np.array([_scale(n_players, size) for size in range(1, n_players // 2 + 1)])
        inner = total[1 : n_players // 2 + 1]
        self.shapley_variance = float(2 / n_players * total[-1, 1] + scale @ (inner[:, 1] - inner[:, 0]))
        """Prior variance of a Shapley value, the same for every player."""

    def covariance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of g at the halves a `(m, n)` and b `(k, n)`: `(m, k)`."""
        signs_a, signs_b = np.where(a, 0.5, -0.5), np.where(b, 1.0, -1.0)
        agreement = np.rint(signs_a @ signs_b.T + self.n_players / 2).astype(np.intp)
        return self.by_agreement[agreement]

    def with_shapley(self, halves: np.ndarray, size: int | None = None) -> np.ndarray:
        """Covariance of g at `halves (m, n)` and the Shapley values, or one size's term of them: `(m, n)`."""
        table = self.total if size is None else self.stratum[size - 1]
        return np.where(halves, *(table[halves.sum(1), member][:, None] for member in (1, 0)))

    def cholesky(self, halves: np.ndarray) -> np.ndarray:
        """Lower factor `(m, m)` of the covariance at `halves`."""
        covariance = self.covariance(halves, halves)
        covariance[np.diag_indices(len(halves))] += self.jitter
        return np.linalg.cholesky(covariance)

    @property
    def jitter(self) -> float:
        return _JITTER * float(self.by_agreement[-1])


@functools.lru_cache(maxsize=32)
def prior(n_players: int, decay: float) -> Prior:
    """The prior, made once."""
    return Prior(n_players, decay)


def posterior(law: Prior, halves: np.ndarray, g: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, mean `(n,)` and variance `(n,)` of the Shapley values given `g (m,)` at `halves (m, n)`.

    The prior's scale is the one that the values suggest (its maximum-likelihood estimate; the flat main
    effects take n degrees of freedom).
    """
    factor = law.cholesky(halves)
    solved = forward(factor, np.column_stack([g, law.with_shapley(halves)]))  # (m, 1 + n)
    white, pull = solved[:, 0], solved[:, 1:]
    freedom = max(len(g) - halves.shape[1], 1)
    scale = white @ white / freedom
    evidence = -freedom / 2 * np.log(max(scale, 1e-300)) - np.log(np.diag(factor)).sum()
    variance = scale * np.maximum(law.shapley_variance - (pull**2).sum(0), 0.0)
    return float(evidence), pull.T @ white, variance


def forward(factor: np.ndarray, right: np.ndarray, block: int = 64) -> np.ndarray:
    """factor^-1 right for a lower triangle `(m, m)` and `(m, k)`, by blocks: NumPy has no triangular solver."""
    out = right.astype(float)
    for start in range(0, len(factor), block):
        rows = slice(start, start + block)
        out[rows] -= factor[rows, :start] @ out[:start]
        out[rows] = np.linalg.solve(factor[rows, rows], out[rows])
    return out


@functools.lru_cache(maxsize=8)
def agreement_contrasts(n_players: int) -> np.ndarray:
    """How a size's term of the Shapley value sees a coalition x: `(n // 2, n + 1, 2, n + 1)`.

    Entry [s - 1, p, member, h]: for x with p members, player i among them or not, the probability that x
    agrees with a random coalition of size s on h players if i is in that coalition, minus the same if i is
    not, times c_s. Agreements are counted from the overlap, which is hypergeometric.
    """
    n = n_players
    out = np.zeros((n // 2, n + 1, 2, n + 1))
    for size in range(1, n // 2 + 1):
        for p in range(n + 1):
            for member in (0, 1):
                if not member <= p <= n - 1 + member:
                    continue
                others = p - member  # members of x among the n - 1 other players
                for chosen, sign in ((1, 1.0), (0, -1.0)):
                    drawn = size - chosen
                    for overlap in range(max(0, drawn + others - n + 1), min(drawn, others) + 1):
                        ways = math.comb(others, overlap) * math.comb(n - 1 - others, drawn - overlap)
                        h = n - p - size + 2 * (overlap + (chosen & member))
                        out[size - 1, p, member, h] += sign * ways / math.comb(n - 1, drawn)
        out[size - 1] *= _scale(n, size)
    return out


def _scale(n_players: int, size: int) -> float:
    """Weight c_s of a size's difference of means; a middle size is its own complement."""
    return (1 if 2 * size == n_players else 2) / n_players
