"""What is in instruction data, before anything is trained on it?

Formats, records and duplicates, turns; with a tokenizer, lengths and the share that is trained; every broken record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from copra_llm.tasks.instruct.encode import Encoded, Encoder
from copra_llm.tasks.instruct.formats import get_format
from copra_llm.tasks.instruct.lengths import Counts, counted
from copra_llm.tasks.instruct.records import Broken, Conversation, Record
from copra_llm.tasks.instruct.sources import Reader, Source

SHOWN = 20
"""Broken records that the text lists."""


@dataclass
class Report:
    """What `check` found."""

    readers: list[Reader]
    """One a source, read to the end."""
    counts: Counts = field(default_factory=Counts)
    turns: list[int] = field(default_factory=list)
    """Assistant turns of each conversation."""
    texts: int = 0
    """Records of plain text, or of prompt and completion as text."""
    with_system: int = 0
    with_tools: int = 0
    with_control: int = 0
    """Records whose messages hold a special token of the tokenizer: it will act as one."""
    first_control: str | None = None
    lengths: list[int] = field(default_factory=list)
    """Tokens of each example; empty without a tokenizer."""
    trained: list[int] = field(default_factory=list)
    """Trained tokens of each example."""
    nothing_left: int = 0
    """Examples of which no trained token is within `max_length`."""
    max_length: int | None = None
    """Tokens."""
    broken: list[Broken] = field(default_factory=list)
    samples: list[Encoded] = field(default_factory=list)
    """The first examples, as many as asked for."""

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers and text, for JSON. Lengths in tokens, shares in percent."""
        record: dict[str, Any] = {
            "sources": [
                {"path": r.source.path, "weight": r.source.weight, "format": r.format, "records": r.records,
                 "columns_not_read": sorted(r.unused)}
                for r in self.readers
            ],
            "records": {"read": self.counts.read, "good": self.counts.read - len(self.broken),
                        "broken": len(self.broken), "duplicates": self.counts.duplicates},
            "turns": {**summary(self.turns), "conversations": len(self.turns), "texts": self.texts,
                      "with_system": self.with_system, "with_tools": self.with_tools},
            "broken": [{"place": b.place, "sentence": b.sentence} for b in self.broken],
        }  # fmt: skip
        if self.lengths:
            total = sum(self.lengths)
            record["tokens"] = {**summary(self.lengths), "total": total, "with_special_tokens": self.with_control}
            record["trained"] = {"tokens": sum(self.trained), "percent": 100 * sum(self.trained) / total}
            if self.max_length is not None:
                over = sum(length > self.max_length for length in self.lengths)
                record["tokens"] |= {"max_length": self.max_length, "longer": over,
                                     "longer_percent": 100 * over / len(self.lengths),
                                     "nothing_trained_when_cut": self.nothing_left}  # fmt: skip
        return record

    def __str__(self) -> str:
        lines = [line for reader in self.readers for line in _of_source(reader, len(self.readers) > 1)]
        good = self.counts.read - len(self.broken)
        lines.append(f"records  {self.counts.read:,} read: {good:,} good, {len(self.broken):,} broken; "
                     f"{self.counts.duplicates:,} equal to an earlier one")  # fmt: skip
        if self.turns:
            lines.append(f"turns    of the assistant: {_spread(self.turns)}; {self.with_system:,} records with a "
                         f"system message, {self.with_tools:,} with tools")  # fmt: skip
        if self.texts:
            lines.append(f"texts    {self.texts:,} records without turns, for no chat template")
        lines += self._token_lines()
        if self.broken:
            lines.append("broken")
            lines += [f"  {broken.sentence}" for broken in self.broken[:SHOWN]]
            if len(self.broken) > SHOWN:
                lines.append(f"  and {len(self.broken) - SHOWN:,} more; --json lists all")
        return "\n".join(lines)

    def _token_lines(self) -> Iterator[str]:
        if not self.lengths:
            return
        line = f"tokens   a record: {_spread(self.lengths)}"
        if self.max_length is not None:
            over = sum(length > self.max_length for length in self.lengths)
            line += f"; {100 * over / len(self.lengths):.1f} % ({over:,}) longer than {self.max_length:,}"
            if self.nothing_left:
                line += f", {self.nothing_left:,} with nothing to train when cut there"
        yield line
        total = sum(self.lengths)
        yield f"trained  {100 * sum(self.trained) / total:.1f} % of {total:,} tokens"
        if self.with_control:
            yield (f"careful  {self.with_control:,} records hold special tokens of the tokenizer in their text, which "
                   f"will act as such (first: {self.first_control})")  # fmt: skip


def check(
    sources: list[Source], encoder: Encoder | None = None, *, max_length: int | None = None, samples: int = 0,
    progress=iter,
) -> Report:  # fmt: skip
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
    control = _special_tokens(encoder)
    records = counted(chain.from_iterable(report.readers), report.counts)
    passed = _look(progress(records), report, control)
    for example in encoder.stream(passed) if encoder else passed:
        if isinstance(example, Broken):
            report.broken.append(example)
        elif encoder:
            report.lengths.append(len(example))
            report.trained.append(int(example.trained.sum()))
            report.nothing_left += max_length is not None and not example.trained[:max_length].any()
            if len(report.samples) < samples:
                report.samples.append(example)
    return report


def _look(records: Iterable[Record | Broken], report: Report, control: re.Pattern | None) -> Iterator[Record | Broken]:
    """Count turns and the like while the records pass."""
    for record in records:
        if isinstance(record, Conversation):
            roles = [message["role"] for message in record.messages]
            report.turns.append(roles.count("assistant"))
            report.with_system += roles[0] == "system"
            report.with_tools += bool(record.tools) or "tool" in roles
            if control and any(control.search(message["content"]) for message in record.messages):
                report.with_control += 1
                report.first_control = report.first_control or record.place
        elif not isinstance(record, Broken):
            report.texts += 1
        yield record


def _special_tokens(encoder: Encoder | None) -> re.Pattern | None:
    if encoder is None:
        return None
    tokens = (t.content for t in encoder.tokenizer.added_tokens_decoder.values() if t.special)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def summary(numbers: list[int]) -> dict[str, float]:
    """Least, median, 95 % quantile and greatest; empty for no numbers."""
    if not numbers:
        return {}
    least, median, high, greatest = np.quantile(numbers, [0, 0.5, 0.95, 1])
    return {"min": int(least), "median": float(median), "p95": float(high), "max": int(greatest)}


def _spread(numbers: list[int]) -> str:
    s = summary(numbers)
    return f"min {s['min']:,}, median {s['median']:,.0f}, 95 % {s['p95']:,.0f}, max {s['max']:,}"


def _of_source(reader: Reader, several: bool) -> Iterator[str]:
    if reader.format is None:
        shape = "no format recognised"
    else:
        known = get_format(reader.format)
        shape = f"{reader.format} ({', '.join((*known.columns, *known.optional))})"
    weight = f", weight {reader.source.weight:g}" if several else ""
    yield f"{reader.source.path}: {shape}, {reader.records:,} records{weight}"
    if reader.unused:
        yield f"  columns that are not read: {', '.join(sorted(reader.unused))}"
