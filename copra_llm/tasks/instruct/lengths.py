"""What happens to examples that are too long, and what became of every record?

    read = kept + dropped + broken

A cut example keeps its beginning; if no trained token is left in it, it is dropped. Nothing is changed that is not
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.encode import Encoded
from copra_llm.tasks.instruct.records import Broken, Record, digest

TOO_LONG = ("cut", "drop")


@dataclass
class Counts:
    """How many records there were, and what became of them; counted up while they pass."""

    read: int = 0
    """All records, the broken ones too."""
    kept: int = 0
    """Examples that are trained on."""
    cut: int = 0
    """Of the kept: shortened to the greatest length."""
    dropped: int = 0
    """Too long, or without a trained token once cut."""
    broken: int = 0
    duplicates: int = 0
    """Records equal to an earlier one, in text, roles and tools. They are kept."""

    def __str__(self) -> str:
        return (
            f"{self.read:,} read, {self.kept:,} kept ({self.cut:,} of them cut), {self.dropped:,} dropped, "
            f"{self.broken:,} broken, {self.duplicates:,} equal to an earlier one"
        )


def counted(records: Iterable[Record | Broken], counts: Counts) -> Iterator[Record | Broken]:
    """Pass records on and count `read` and `duplicates`; 16 bytes a record are remembered."""
    seen = set()
    for record in records:
        counts.read += 1
        if not isinstance(record, Broken):
            key = digest(record)
            counts.duplicates += key in seen
            seen.add(key)
        yield record


def fit(
    examples: Iterable[Encoded | Broken], counts: Counts, max_length: int | None = None, too_long: str = "cut"
) -> Iterator[Encoded | Broken]:
    """Pass on what fits, and count `kept`, `cut`, `dropped` and `broken`.

    Args:
        examples: of `Encoder.stream`.
        counts: counted up.
        max_length: greatest length in tokens; None: any.
        too_long: "cut" or "drop" examples above it.

    Raises:
        InputError: for a length below 1, or another value of `too_long`.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"--max_length is {max_length}, but must be at least 1 token")
    if too_long not in TOO_LONG:
        raise InputError(f'--too_long is "{too_long}", but must be {" or ".join(TOO_LONG)}')
    return _fit(examples, counts, max_length, too_long)


def _fit(examples, counts: Counts, max_length: int | None, too_long: str) -> Iterator[Encoded | Broken]:
    for example in examples:
        if isinstance(example, Broken):
            counts.broken += 1
            yield example
            continue
        long = max_length is not None and len(example) > max_length
        if long and too_long == "cut":
            example = replace(example, input_ids=example.input_ids[:max_length], trained=example.trained[:max_length])
        if (long and too_long == "drop") or not example.trained.any():
            counts.dropped += 1
            continue
        counts.kept += 1
        counts.cut += long
        yield example
