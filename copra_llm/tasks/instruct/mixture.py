"""Which records does an epoch over several sources read, and in which order?

A source of n records and weight w gives  floor(w)  copies of each record and one more of  round((w - floor(w)) n)
records, drawn anew each epoch; all are shuffled together. Weight 1 everywhere is one pass over everything. A pure
function of its arguments; no global generator moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_USE = 3
"""Counter word 2: masks have 0 there, the classification tasks' batches 1 and 2."""


def epoch_order(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch, in order.

    Args:
        sizes: records of each source.
        weights: positive, one a source.
        seed: of the data order, in [0, 2**64).
        epoch: 0, 1, ...

    Returns:
        `(n, 2)`: index of the source, index of the record in it.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, epoch, _USE, 0]))
    parts = []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole = int(weight)
        extra = rng.permutation(size)[: round((weight - whole) * size)]
        records = np.concatenate([np.tile(np.arange(size), whole), extra])
        parts.append(np.stack([np.full(len(records), source), records], axis=1))  # (copies, 2)
    return rng.permutation(np.concatenate(parts))
