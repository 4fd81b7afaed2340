"""Which coalitions are drawn?

Everything here is a pure function of the seed: Philox with key = seed and (stream, index) in its counter. So a
resumed run draws what the uninterrupted one would have drawn, and a larger budget goes on where a smaller one
ended.

A **pair** is a coalition and its complement. Shapley values depend on the odd part of a game alone,

    g(S) = (v(S) - v(N \\ S)) / 2,

so the two are always evaluated together, and a pair is named by its smaller half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

_PERMUTATION, _THRESHOLD, _SUBSET = 0, 1, 2  # streams: the first numbers of a counter's second word
_BLOCK = 64


def uniforms(seed: int, stream: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Doubles in [0, 1), a pure function of the arguments.

    Raw words are scaled here, since NumPy promises stable raw streams but no stable distributions over them.
    """
    raw = np.random.Philox(key=seed, counter=(stream << 128) + (index << 64)).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def permutation_ranks(n_players: int, seed: int, index: int) -> np.ndarray:
    """Place of every player in the permutation number `index`: int `(n_players,)`."""
    return uniforms(seed, _PERMUTATION, index, (n_players,)).argsort().argsort()


def thresholds(n_players: int, seed: int, index: int) -> np.ndarray:
    """Uniform numbers `(n_players + 1,)`, one a player and one for q: a player is kept where its own is below q."""
    return uniforms(seed, _THRESHOLD, index, (n_players + 1,))


def count_pairs(n_players: int, size: int) -> int:
    """Number of pairs whose smaller half has `size` players."""
    return math.comb(n_players, size) // (2 if 2 * size == n_players else 1)


def pairs(n_players: int, seed: int) -> Iterator[np.ndarray]:
    """Smaller halves bool `(n_players,)` of all pairs but the empty and the full coalition, none twice.

    The sizes 1 ... n/2 take turns, so their counts do not depend on chance; within a size the order is
    uniformly random. A size whose coalitions are used up drops out.
    """
    open_sizes = [subsets(n_players, size, seed) for size in range(1, n_players // 2 + 1)]
    while open_sizes:
        still_open = []
        for source in open_sizes:
            row = next(source, None)
            if row is not None:
                still_open.append(source)
                yield row
        open_sizes = still_open


def subsets(n_players: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Every coalition of one size, in random order; of two complementary ones that with the first player."""
    total, seen = count_pairs(n_players, size), set()
    for index in itertools.count():
        ranks = uniforms(seed, _SUBSET + size, index, (_BLOCK, n_players)).argsort(1).argsort(1)
        rows = ranks < size
        if 2 * size == n_players:
            rows ^= ~rows[:, :1]
        for row in rows:
            key = row.tobytes()
            if key not in seen:
                seen.add(key)
                yield row
            if len(seen) == total:
                return


def with_complements(halves: np.ndarray) -> np.ndarray:
    """Rows S, N - S, S', N - S', ... `(2 m, n_players)` of the halves `(m, n_players)`."""
    return np.stack([halves, ~halves], axis=1).reshape(-1, halves.shape[1])


def odd_part(coalitions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The halves `(m, n_players)` and g `(m,)` of what `with_complements` made and its values `(2 m,)`."""
    return coalitions[0::2], (values[0::2] - values[1::2]) / 2


def all_coalitions(n_players: int) -> np.ndarray:
    """bool `(2**n_players, n_players)`; row c holds the binary digits of c, the first player the lowest."""
    return (np.arange(2**n_players)[:, None] >> np.arange(n_players) & 1).astype(bool)
