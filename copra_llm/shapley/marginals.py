"""What does a player add, on average over random coalitions of the others?

    permutation:  phi_i = E_pi [v(before_i(pi) + i) - v(before_i(pi))],  pi a uniformly random order
    Owen:         phi_i = int_0^1 E_q [v(E + i) - v(E - i)] dq,          E keeps each player with probability q

Both are means of independent rounds, hence unbiased, and their standard errors are those of a mean: the
standard deviation over rounds, divided by the root of their number. Every round tells something of every
player: the n + 1 beginnings of an order give n marginals, and so do E and its n neighbours (the *paired
marginals* of the multilinear extension).

E_q[...] is a polynomial of degree n - 1 in q, which Gauss-Legendre with ceil(n/2) nodes integrates exactly:
`nodes="gauss"` has no error in q. `nodes="uniform"` draws q, a round costs n + 1 and not ceil(n/2) (n + 1).

*Antithetic* rounds evaluate the reversed order, or the complement at 1 - q, with each one: independent of it in
law, but with the game's even part cancelled.

Source: Castro et al. 2009 (permutations); Owen 1972, Okhrati and Lipani 2020 (multilinear extension);
CopRA (arXiv 2410.22911) uses the latter; Mitchell et al. 2022 (antithetic orders).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from copra_llm.errors import InputError
from copra_llm.shapley.designs import permutation_ranks, thresholds


@dataclass(frozen=True)
class Permutation:
    """Marginals along random orders; efficient (its values sum to v(N) - v(empty))."""

    unbiased: ClassVar[bool] = True
    antithetic: bool = True
    """Evaluate each order's reversal too."""

    def minimum(self, n_players: int) -> int:
        """The smallest budget: one round."""
        return 2 + self._chains * (n_players - 1)

    def rounds(self, n_players: int, seed: int, budget: int) -> Iterator[np.ndarray]:
        """A round's beginnings of 1 ... n - 1 players `(chains (n - 1), n)`.

        The number of rounds depends on the budget alone: what repeated coalitions save is handed back, since a
        number of rounds that depends on them would favour orders that repeat.
        """
        sizes = np.arange(1, n_players)[:, None]
        for index in range((budget - 2) // (self._chains * (n_players - 1))):
            ranks = permutation_ranks(n_players, seed, index)
            orders = (ranks, n_players - 1 - ranks)[: self._chains]
            yield np.concatenate([order < sizes for order in orders])

    def solve(self, ends: tuple[float, float], coalitions: np.ndarray, values: np.ndarray):
        """Values and standard errors, each `(n,)`; `ends` are v(empty) and v(N)."""
        n_players = coalitions.shape[1]
        chains = coalitions.reshape(-1, n_players - 1, n_players)
        ranks = n_players - 1 - chains.sum(1)  # a player of rank r is in the n - 1 - r longest beginnings
        inner = values.reshape(-1, n_players - 1)
        first, last = (np.full((len(inner), 1), end) for end in ends)
        marginals = np.diff(np.hstack([first, inner, last]), axis=1)  # (chains, n), by rank
        marginals = np.take_along_axis(marginals, ranks, axis=1)  # by player
        return mean_of_rounds(marginals.reshape(-1, self._chains, n_players).mean(1))

    @property
    def _chains(self) -> int:
        return 2 if self.antithetic else 1


@dataclass(frozen=True)
class Owen:
    """The multilinear extension with paired marginals; its values sum to v(N) - v(empty) only in the limit."""

    unbiased: ClassVar[bool] = True
    nodes: Literal["gauss", "uniform"] = "gauss"
    """Values of q: Gauss-Legendre nodes, or drawn uniformly."""
    antithetic: bool = True
    """Use a draw's complement for 1 - q (with "gauss" instead of a draw of its own, so at no cost)."""

    def __post_init__(self):
        if self.nodes not in ("gauss", "uniform"):
            raise InputError(f'the nodes are "{self.nodes}", but must be gauss or uniform')

    def minimum(self, n_players: int) -> int:
        """The smallest budget: one round."""
        return 2 + len(self._weights(n_players)) * (n_players + 1)

    def rounds(self, n_players: int, seed: int, budget: int) -> Iterator[np.ndarray]:
        """A round's draws, each followed by its n neighbours: `(draws (n + 1), n)`."""
        cost = len(self._weights(n_players)) * (n_players + 1)
        flips = np.vstack([np.zeros((1, n_players), dtype=bool), np.eye(n_players, dtype=bool)])
        for index in range((budget - 2) // cost):
            draws = self._draws(n_players, seed, index)  # (draws, n)
            yield (draws[:, None] ^ flips).reshape(-1, n_players)

    def solve(self, ends: tuple[float, float], coalitions: np.ndarray, values: np.ndarray):
        """Values and standard errors, each `(n,)`."""
        n_players = coalitions.shape[1]
        weights = self._weights(n_players)
        draws = coalitions.reshape(-1, n_players + 1, n_players)[:, 0]
        values = values.reshape(-1, n_players + 1)
        change = values[:, 1:] - values[:, :1]  # player i switched in E
        marginals = np.where(draws, -change, change).reshape(-1, len(weights), n_players)
        return mean_of_rounds(np.einsum("k,rki->ri", weights, marginals))

    def _draws(self, n_players: int, seed: int, index: int) -> np.ndarray:
        if self.nodes == "uniform":
            numbers = thresholds(n_players, seed, index)
            draw = numbers[None, :-1] < numbers[-1]
            return np.vstack([draw, ~draw]) if self.antithetic else draw
        q = gauss_legendre(n_players)[0]
        mirrored = len(q) // 2 if self.antithetic else 0
        own = len(q) - mirrored
        draws = np.stack([thresholds(n_players, seed, index * own + k)[:-1] < q[k] for k in range(own)])
        return np.vstack([draws, ~draws[:mirrored][::-1]])  # the node opposite to k is the k-th from the end

    def _weights(self, n_players: int) -> np.ndarray:
        if self.nodes == "uniform":
            return np.full(2, 0.5) if self.antithetic else np.ones(1)
        return gauss_legendre(n_players)[1]


def gauss_legendre(n_players: int) -> tuple[np.ndarray, np.ndarray]:
    """Increasing nodes in (0, 1) and weights `(ceil(n/2),)`, exact for polynomials of degree n - 1."""
    x, weights = np.polynomial.legendre.leggauss((n_players + 1) // 2)
    return (x + 1) / 2, weights / 2


def mean_of_rounds(rounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(n,)` of independent rounds `(m, n)` and its standard error, infinite for a single round."""
    m = len(rounds)
    errors = rounds.std(axis=0, ddof=1) / np.sqrt(m) if m > 1 else np.full(rounds.shape[1], np.inf)
    return rounds.mean(axis=0), errors
