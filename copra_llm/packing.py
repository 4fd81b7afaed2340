"""Which examples share a row of a batch, so that hardly any of it is padding?

Best fit, decreasing: the longest example left goes into the fullest row that still has room for it. Rows are filled
once for the whole run; the stream shuffles rows as it shuffles examples. Examples in one row do not see each other:
positions start anew with each, and transformers isolates the attention by them.

Source: Ding et al., Fewer Truncations Improve Language Modeling (arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of examples, by their indices.

    Args:
        lengths: tokens of each example, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        Every index once; within a row the longest example first.

    Raises:
        ValueError: if an example is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, and a row {capacity}")
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - length, row))
    return rows
