"""What is in instruction data, before anything is trained on it?

Formats, records and duplicates, turns; with a tokenizer, lengths and the share that is trained; every broken record.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from copra_llm.tasks.instruct.encode import Encoded, Encoder
from copra_llm.tasks.instruct.formats import get_format
from copra_llm.tasks.instruct.lengths import Counts, counted
from copra_llm.tasks.instruct.named import special_tokens
from copra_llm.tasks.instruct.records import Broken, Conversation, Record
from copra_llm.tasks.instruct.sources import Reader, Source


def _integers() -> array:
    """Eight bytes a number: there may be millions of records."""
    return array("q")


@dataclass
class Report:
    """What `check` found."""

    readers: list[Reader]
    """One a source, read to the end."""
    counts: Counts = field(default_factory=Counts)
    turns: array = field(default_factory=_integers)
    """Assistant turns of each conversation."""
    texts: int = 0
    """Records of plain text, or of prompt and completion as text."""
    with_system: int = 0
    with_tools: int = 0
    with_special: int = 0
    """Records whose messages hold a special token of the tokenizer: it will act as one."""
    first_special: str | None = None
    lengths: array = field(default_factory=_integers)
    """Tokens of each example; empty without a tokenizer."""
    trained: array = field(default_factory=_integers)
    """Trained tokens of each example."""
    endless: int = 0
    """Examples that end with no special token: they do not teach the model where to stop."""
    nothing_left: int = 0
    """Examples of which no trained token is within `max_length`."""
    max_length: int | None = None
    """Tokens."""
    broken: list[Broken] = field(default_factory=list)
    samples: list[Encoded] = field(default_factory=list)
    """The first examples, as many as asked for."""

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers and text. Lengths in tokens, shares in percent; no tokens, no such figures."""
        broken = len(self.broken)
        record: dict[str, Any] = {
            "sources": [_of_source(reader) for reader in self.readers],
            "records": {
                "read": self.counts.read,
                "good": self.counts.read - broken,
                "broken": broken,
                "duplicates": self.counts.duplicates,
            },
            "turns": {
                **summary(self.turns),
                "conversations": len(self.turns),
                "texts": self.texts,
                "with_system": self.with_system,
                "with_tools": self.with_tools,
            },
        }
        if self.lengths:
            record |= self._of_tokens()
        return record | {"broken": [{"place": b.place, "sentence": b.sentence} for b in self.broken]}

    def _of_tokens(self) -> dict[str, Any]:
        total, trained = sum(self.lengths), sum(self.trained)
        tokens = {**summary(self.lengths), "total": total}
        if self.max_length is not None:
            longer = sum(length > self.max_length for length in self.lengths)
            tokens |= {
                "max_length": self.max_length,
                "longer": longer,
                "longer_percent": 100 * longer / len(self.lengths),
                "nothing_trained_when_cut": self.nothing_left,
            }
        return {
            "tokens": tokens,
            "trained": {"tokens": trained, "percent": 100 * trained / total, "without_end": self.endless},
            "special": {"records": self.with_special, "first": self.first_special},
        }


def check(
    sources: list[Source],
    encoder: Encoder | None = None,
    *,
    max_length: int | None = None,
    samples: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Report:
    """Read everything and say what was there.

    Args:
        sources: of `parse_sources`.
        encoder: None: no figures of tokens.
        max_length: tokens; how many examples are longer is counted.
        samples: so many examples are kept for a preview.
        progress: wraps the records as they pass, for a bar.

    Raises:
        InputError: if a source itself cannot be read, or there is no chat template for conversations.
    """
    report = Report([Reader(source) for source in sources], max_length=max_length)
    special, special_ids = _special_tokens(encoder)
    records = counted(chain.from_iterable(report.readers), report.counts)
    passed = _look(progress(records), report, special)
    for example in encoder.stream(passed) if encoder else passed:
        if isinstance(example, Broken):
            report.broken.append(example)
        elif encoder:
            report.lengths.append(len(example))
            report.trained.append(int(example.trained.sum()))
            # The line break after an end-of-turn token may be trained too.
            report.endless += special_ids.isdisjoint(example.input_ids[example.trained][-2:].tolist())
            report.nothing_left += max_length is not None and not example.trained[:max_length].any()
            if len(report.samples) < samples:
                report.samples.append(example)
    return report


def _look(records: Iterable[Record | Broken], report: Report, special: re.Pattern | None) -> Iterator[Record | Broken]:
    """Count turns and the like while the records pass."""
    for record in records:
        if isinstance(record, Conversation):
            roles = [message["role"] for message in record.messages]
            report.turns.append(roles.count("assistant"))
            report.with_system += roles[0] == "system"
            report.with_tools += bool(record.tools) or "tool" in roles
            if special and any(special.search(message["content"]) for message in record.messages):
                report.with_special += 1
                report.first_special = report.first_special or record.place
        elif not isinstance(record, Broken):
            report.texts += 1
        yield record


def _special_tokens(encoder: Encoder | None) -> tuple[re.Pattern | None, set[int]]:
    """What finds a special token in a text, and the ids of all."""
    if encoder is None:
        return None, set()
    texts = special_tokens(encoder.tokenizer)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)"), set(encoder.tokenizer.convert_tokens_to_ids(texts))


def summary(numbers: Sequence[int]) -> dict[str, float]:
    """Least, median, 95 % quantile and greatest; empty for no numbers."""
    if not numbers:
        return {}
    least, median, high, greatest = np.quantile(numbers, [0, 0.5, 0.95, 1])
    return {"min": int(least), "median": float(median), "p95": float(high), "max": int(greatest)}


def _of_source(reader: Reader) -> dict[str, Any]:
    columns = [] if reader.format is None else get_format(reader.format).columns
    return {
        "path": reader.source.path,
        "weight": reader.source.weight,
        "format": reader.format,
        "columns": list(columns),
        "columns_not_read": sorted(reader.unused),
        "records": reader.records,
    }
