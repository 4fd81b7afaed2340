"""Which coalitions have been evaluated, so that none is paid twice and a stopped run goes on?

Coalitions are drawn by a pure function of the seed, never by looking at a clock or at what is stored. So a run
that finds its earlier values here asks for the remaining ones only, and ends with the numbers of an
uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from copra_llm.errors import InputError

Game = Callable[[np.ndarray], np.ndarray]
"""`game(coalitions: bool (n_coalitions, n_players)) -> values (n_coalitions,)`, deterministic."""


class CoalitionCache:
    """Values by coalition, in the order in which they came.

    Args:
        n_players: length of a coalition.
        entries: pairs of bits and value, as `items` gives them: what an earlier run has evaluated.
        on_new: called with the new pairs after every batch that a game has evaluated, to store them.

    Bits are text, one 0 or 1 a player, so that they can stand in a JSON file as they are.
    """

    def __init__(
        self,
        n_players: int,
        entries: Iterable[tuple[str, float]] = (),
        on_new: Callable[[list[tuple[str, float]]], None] | None = None,
    ):
        self.n_players = n_players
        self.on_new = on_new
        self._values: dict[str, float] = {}
        for bits, value in entries:
            if len(bits) != n_players or set(bits) - {"0", "1"}:
                raise InputError(
                    f'the stored coalition "{bits}" is not one of {n_players} players; start anew without the log'
                )
            self._values[bits] = _finite(value, bits)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, bits: str) -> bool:
        return bits in self._values

    def items(self) -> Iterable[tuple[str, float]]:
        """Pairs of bits and value."""
        return self._values.items()


class Evaluations:
    """One run's view of a game: every coalition goes through the cache and is counted.

    Args:
        game: what is evaluated.
        cache: what is known already; grows.
        batch_size: coalitions that the game is given at once, at most.
    """

    def __init__(self, game: Game, cache: CoalitionCache, batch_size: int):
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}, but must be at least 1")
        self.game, self.cache, self.batch_size = game, cache, batch_size
        self._used: set[str] = set()
        self.asked = 0
        """Coalitions that the game has been given."""

    @property
    def used(self) -> int:
        """Different coalitions whose values this run has used."""
        return len(self._used)

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        """Values float `(n_coalitions,)` of bool `(n_coalitions, n_players)`; repeated rows are evaluated once.

        Raises:
            InputError: if the game's answer has another length or is not finite.
        """
        known, keys = self.cache._values, bits_of(coalitions)
        fresh = {key: row for row, key in enumerate(keys) if key not in known}  # each once, in order
        rows = list(fresh.values())
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            self._evaluate(coalitions[batch], [keys[row] for row in batch])
        self._used.update(keys)
        return np.array([known[key] for key in keys])

    def _evaluate(self, coalitions: np.ndarray, keys: list[str]) -> None:
        values = np.asarray(self.game(coalitions), dtype=float)
        if values.shape != (len(keys),):
            raise InputError(f"the game answered {len(keys)} coalitions with values of shape {values.shape}; "
                             "it must give one value a coalition")  # fmt: skip
        pairs = [(key, _finite(value, key)) for key, value in zip(keys, values, strict=True)]
        self.cache._values.update(pairs)
        self.asked += len(pairs)
        if self.cache.on_new is not None:
            self.cache.on_new(pairs)


def bits_of(coalitions: np.ndarray) -> list[str]:
    """Each row of bool `(n_coalitions, n_players)` as text."""
    n_players = coalitions.shape[1]
    text = (np.ascontiguousarray(coalitions, dtype=np.uint8) + ord("0")).tobytes().decode("ascii")
    return [text[i : i + n_players] for i in range(0, len(text), n_players)]


def _finite(value: float, bits: str) -> float:
    if not np.isfinite(value):
        raise InputError(f"the value of the coalition {bits} is {value}; a game must have finite values")
    return float(value)
