"""From where do records come, and how often is each read?

A source is a file, a folder or a Hub id, alone or with a weight (`path:0.5`); a YAML file lists several:

    - path: alpaca.jsonl
    - {path: gsm8k.jsonl, weight: 2, format: question_answer}
    - {path: owner/name, name: default, split: train}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.json_file import is_number
from copra_llm.tasks.instruct.files import ENDINGS, dataset_rows, file_rows
from copra_llm.tasks.instruct.formats import check_row, get_format, read_record, recognise, unknown_shape
from copra_llm.tasks.instruct.records import Broken, Record
from copra_llm.yaml_file import load_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where records come from."""

    path: str
    """A file, a folder or a Hub id; `$VARIABLES` and `~` stand for what they mean."""
    weight: float = 1.0
    """How often an epoch reads each record, see `mixture`."""
    format: str | None = None
    """A name of `FORMATS`; None: recognised by the first record's columns."""
    split: str = "train"
    """Of a folder or a Hub id."""
    name: str | None = None
    """Configuration of a Hub id."""

    def __post_init__(self):
        if self.format is not None:
            get_format(self.format)
        # As a float: an integer may be beyond any.
        if not is_number(self.weight) or not 0 < self.weight <= sys.float_info.max:
            raise InputError(
                f"{self.path} has the weight {named(self.weight, '')}, but a weight must be a positive number"
            )


def parse_sources(words: Iterable[str], format: str | None = None) -> list[Source]:
    """Sources as the command line names them: `path`, `path:weight`, or a YAML file that lists them.

    Args:
        words: one or more of them.
        format: of all that name none themselves.

    Raises:
        InputError: for a weight that is not positive, an unknown format, or a YAML file that is no such list.
    """
    sources = []
    for word in words:
        if word.endswith((".yaml", ".yml")):
            sources += _from_yaml(Path(word), format)
        else:
            path, weight = _split_weight(word)
            sources.append(Source(path, weight, format))
    return sources


def _split_weight(word: str) -> tuple[str, float]:
    path, colon, tail = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        return path, float(tail)
    except ValueError:
        return word, 1.0


def _from_yaml(path: Path, format: str | None) -> list[Source]:
    import yaml

    known = [field.name for field in fields(Source)]
    try:
        entries = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a YAML file that lists sources") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())[:200]}); mend it") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'{path} must hold a list of sources, each "- path: FILE" with {", ".join(known[1:])} beside it'
        )
    sources = []
    for number, entry in enumerate(entries, 1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise InputError(f"{path}, source {number} has no path; give one")
        other = next(
            (key for key in ("format", "split", "name") if not isinstance(entry.get(key, ""), str | None)), None
        )
        if other is not None:
            raise InputError(f"{path}, source {number}: {other} is {shown(entry[other])}, but must be a text")
        for key in entry:
            if key not in known:
                hint = nearest(str(key)[:100], known)
                raise InputError(f"{path}, source {number}: there is no setting {named(key)}{hint}; "
                                 f"there are {', '.join(known)}")  # fmt: skip
        sources.append(Source(**{"format": format, **entry}))
    return sources


class Reader:
    """The records of one source, in order, each read or `Broken`; what was seen is known when it is through."""

    def __init__(self, source: Source):
        self.source = source
        self.format = source.format
        """Name of the format; None until a record is recognised."""
        self.records = 0
        """How many were there, broken ones too."""
        self.unused: set[str] = set()
        """Columns that were there and are not read."""

    def __iter__(self) -> Iterator[Record | Broken]:
        """Read the source.

        Raises:
            InputError: if the source itself cannot be read, or is empty.
        """
        for item in _rows(self.source):
            self.records += 1
            if isinstance(item, Broken):
                yield item
                continue
            place, row = item
            try:
                yield self._record(row, place)
            except InputError as error:
                yield Broken(place, str(error))
        if not self.records:
            raise InputError(f"{self.source.path} holds no record; give a source that does")

    def _record(self, row, place: str) -> Record:
        check_row(row, place)
        if self.format is None:
            self.format = recognise(row)
            if self.format is None:
                raise unknown_shape(row, place)
        shape = get_format(self.format)
        self.unused.update(row.keys() - {*shape.columns, *shape.optional})
        return read_record(row, self.format, place, only=self.source.format is None)


def _rows(source: Source):
    # Variables and ~, so that a plan or a record names no machine's folders.
    path = Path(os.path.expandvars(source.path)).expanduser()
    if path.is_dir():
        return dataset_rows(str(path), source.name, source.split)
    if not path.exists() and _is_hub_id(source.path):
        return dataset_rows(source.path, source.name, source.split)
    return file_rows(path)


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(ENDINGS)


def strict(items: Iterable[T | Broken]) -> Iterator[T]:
    """What is not broken.

    Raises:
        InputError: at the first broken item, with its sentence and the number of further ones.
    """
    items = iter(items)
    for item in items:
        if isinstance(item, Broken):
            further = sum(isinstance(later, Broken) for later in items)
            more = f" (and {further:,} more broken after it: `copra data check` lists them)" if further else ""
            raise InputError(f"{item.sentence}{more}")
        yield item
