"""Which shape has a record, and what does it say?

| format | columns | becomes |
|---|---|---|
| `messages` | messages: [{role, content}]; tools | the conversation (OpenAI) |
| `sharegpt` | conversations: [{from, value}]; system, tools | the conversation |
| `prompt_completion` | prompt, completion; tools | two texts: text; two lists of messages: a conversation |
| `alpaca` | instruction, output; input, system | user: instruction, an empty line, input; assistant: output |
| `dolly` | instruction, response; context | the same |
| `question_answer` | question, answer; system | user: question; assistant: answer |
| `text` | text | plain text |

The prompt of `prompt_completion` is never trained. A record's shape is the first of the table whose columns (before
the semicolon) it has; the first record decides for its file.

Source: the README of tatsu-lab/stanford_alpaca; OpenAI's and TRL's documentation of dataset formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from copra_llm.errors import InputError, named, nearest
from copra_llm.tasks.instruct.messages import conversation, text
from copra_llm.tasks.instruct.records import Conversation, Record, Text

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One shape of records."""

    columns: tuple[str, ...]
    """What a record must have, and by which it is recognised."""
    optional: tuple[str, ...]
    """What else is read."""
    read: Callable[[Row, str], Record]
    """(row, place) -> record."""


def _messages(row: Row, place: str) -> Conversation:
    return conversation(row["messages"], place, tools=row.get("tools"))


def _sharegpt(row: Row, place: str) -> Conversation:
    return conversation(row["conversations"], place, tools=row.get("tools"), system=row.get("system"))


def _prompt_completion(row: Row, place: str) -> Record:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], place, tools=row.get("tools"), prompt=len(prompt))
    return Text(_column(row, "prompt", place), _filled(row, "completion", place), place)


def _pair(question: str, further: str | None, answer: str) -> Callable[[Row, str], Conversation]:
    """One user turn, of one column or two, and one answer."""

    def read(row: Row, place: str) -> Conversation:
        asked = [_column(row, question, place)]
        if further is not None and row.get(further) is not None:
            asked.append(_column(row, further, place))
        user = "\n\n".join(part for part in asked if part.strip())
        if not user:
            raise InputError(f'{place}: the column "{question}" is empty; fill it, or remove the record')
        said = _filled(row, answer, place)
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
        return conversation(turns, place, system=row.get("system"))

    return read


def _text(row: Row, place: str) -> Text:
    return Text("", _filled(row, "text", place), place)


FORMATS = {
    "messages": Format(("messages",), ("tools",), _messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _sharegpt),
    "prompt_completion": Format(("prompt", "completion"), ("tools",), _prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input", "system"), _pair("instruction", "input", "output")),
    "dolly": Format(("instruction", "response"), ("context",), _pair("instruction", "context", "response")),
    "question_answer": Format(("question", "answer"), ("system",), _pair("question", None, "answer")),
    "text": Format(("text",), (), _text),
}
"""In the order in which a record is held against them."""


def get_format(name: str) -> Format:
    """Look a format up.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in FORMATS:
        raise InputError(f'there is no format "{name}"{nearest(name, FORMATS)}; the formats are {", ".join(FORMATS)}')
    return FORMATS[name]


def recognise(row: Row) -> str | None:
    """The name of the first format whose columns the record has; None: of none. A null is a column that is absent."""
    present = {column for column, value in row.items() if value is not None}
    return next((name for name, shape in FORMATS.items() if present.issuperset(shape.columns)), None)


def read_record(row: Any, name: str, place: str, *, only: bool = True) -> Record:
    """Read one record of a given format.

    Args:
        row: the record as it was found.
        name: of the format.
        place: file and line.
        only: refuse a record that would be recognised as another format; False where the user has named this one.

    Raises:
        InputError: if a column is missing or malformed, or the record is of another format.
    """
    check_row(row, place)
    shape = get_format(name)
    found = recognise(row)
    missing = next((column for column in shape.columns if row.get(column) is None), None)
    if found not in (name, None) and (only or missing):
        raise InputError(f'{place}: the record is of the format "{found}", but "{name}" is expected here; '
                         "put each format into a file of its own")  # fmt: skip
    if missing:
        raise InputError(f'{place}: the column "{missing}" is missing; {name} needs {" and ".join(shape.columns)}')
    return shape.read(row, place)


def check_row(row: Any, place: str) -> None:
    """Raise an `InputError` unless the record is an object."""
    if not isinstance(row, dict):
        raise InputError(f"{place} holds a {type(row).__name__}, but must be an object with named columns; mend it")


def unknown_shape(row: Row, place: str) -> InputError:
    """What to say of a record that fits no format, where none is named."""
    shapes = "; ".join(f"{name}: {', '.join(shape.columns)}" for name, shape in FORMATS.items())
    columns = named(", ".join(row), "") if row else "none"
    return InputError(f"{place}: its columns ({columns}) fit no format; rename them to those of one ({shapes})")


def _column(row: Row, column: str, place: str) -> str:
    return text(row[column], f'{place}: the column "{column}"')


def _filled(row: Row, column: str, place: str) -> str:
    value = _column(row, column, place)
    if not value.strip():
        raise InputError(f'{place}: the column "{column}" is empty; fill it, or remove the record')
    return value
