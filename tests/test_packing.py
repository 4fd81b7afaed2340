"""Rows hold every example once, never overflow, and waste little."""

from __future__ import annotations

import numpy as np
import pytest

from copra_llm.packing import pack


@pytest.mark.parametrize("seed", range(20))
def test_every_example_once_and_no_row_too_full(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(8, 200))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 300))).tolist()
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    # Best fit never opens a row where an example would have gone into another one, so no two rows fit into one.
    smallest = sorted(filled)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity
    # Best-fit decreasing needs at most 11/9 of the least number of rows, and one more (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // capacity) + 1 or max(lengths) > capacity / 2


def test_the_fullest_row_that_has_room_is_taken():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_the_same_lengths_give_the_same_rows():
    assert pack([3, 3, 3, 1], 6) == pack([3, 3, 3, 1], 6) == [[0, 1], [2, 3]]
    assert pack([], 4) == []


def test_an_example_longer_than_a_row_is_no_row():
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        pack([2, 9], 8)
