"""What is one record of instruction data, once the shape of its file no longer matters?

A conversation in the roles of chat templates, or text that no template touches. What cannot be read is a record too,
a `Broken` one: it travels along with the others until somebody raises or lists it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template."""

    messages: tuple[dict[str, Any], ...]
    """In order, each with `role` (one of `ROLES`) and `content` (text); other keys (`tool_calls`) as given."""
    tools: tuple[dict[str, Any], ...]
    """JSON schemas of the tools that the assistant may call."""
    place: str
    """File and line, for messages."""
    untrained: frozenset[int] = frozenset()
    """Indices of assistant messages that are context only: of a prompt, or with OpenAI's `"weight": 0`."""


@dataclass(frozen=True)
class Text:
    """Text for a base model: `completion` is trained, and follows `prompt` as it stands. No template is applied."""

    prompt: str
    """Empty for plain text."""
    completion: str
    place: str


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used."""

    place: str
    sentence: str
    """What is wrong with it, place and remedy included."""


Record = Conversation | Text


def digest(record: Record) -> bytes:
    """16 bytes that are equal for records of equal content, wherever they stand."""
    if isinstance(record, Text):
        content = ["text", record.prompt, record.completion]
    else:
        content = ["chat", record.messages, record.tools, sorted(record.untrained)]
    # Numbers and dates that came out of a Parquet file have no JSON of their own.
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).digest()
