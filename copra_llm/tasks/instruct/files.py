"""What are the records of a file, each with its place?

JSONL is read line by line, so that a file larger than the memory can be checked; a line that is no JSON, or no UTF-8,
costs that line alone. A JSON list is read whole, and record by record, so that each has its line. Parquet comes in
batches of rows; folders and Hub ids through `datasets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.records import Broken

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
ENDINGS = (*JSON_ENDINGS, ".parquet")
BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""
Rows = Iterator[tuple[str, Any] | Broken]


def file_rows(path: Path) -> Rows:
    """The records of a file as (place, record), in order; what cannot be read as `Broken`.

    Raises:
        InputError: if the file is missing, of an unknown kind, or no Parquet file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a file ({', '.join(ENDINGS)}), a folder or a Hub id")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix not in JSON_ENDINGS:
        raise InputError(f'{path} ends in "{path.suffix}", but is read as {", ".join(ENDINGS)}; convert or rename it')
    with path.open("rb") as stream:
        start = stream.read(1024).removeprefix(BOM).lstrip()
    # By content: many a file called .json holds one object a line, and some .jsonl one list.
    return _json_list(path) if start.startswith(b"[") else _lines(path)


def _lines(path: Path) -> Rows:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Broken(place, f"{place} is not UTF-8 text (byte {error.start + 1}); mend or remove it")
            except json.JSONDecodeError as error:
                yield Broken(place, f"{place} is not JSON ({error.msg}, column {error.colno}); mend or remove it")
            except (ValueError, RecursionError):
                yield Broken(place, f"{place} is JSON too deep, or with a number too long, to be read; remove it")


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_list(path: Path) -> Rows:
    try:
        document = path.read_bytes().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"{path}, line {line}"
        yield Broken(place, f"{place} is not UTF-8 text, and so no record of the list could be read; mend it")
        return
    decoder = json.JSONDecoder()
    position, counted, line = document.index("[") + 1, 0, 1

    def skip(position: int) -> int:
        return _SPACE.match(document, position).end()

    position = skip(position)
    while document[position : position + 1] != "]":
        line += document.count("\n", counted, position)
        counted = position
        place = f"{path}, line {line}"
        try:
            row, position = decoder.raw_decode(document, position)
        except (ValueError, RecursionError) as error:
            # Where a record ends cannot be told any more.
            what = f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            yield Broken(place, f"{place} is not JSON ({what}), and nothing from here on could be read; mend it")
            return
        yield place, row
        position = skip(position)
        if document[position : position + 1] == ",":
            position = skip(position + 1)
        elif document[position : position + 1] != "]":
            line += document.count("\n", counted, position)
            place = f"{path}, line {line}"
            yield Broken(place, f"{place} has no comma or ] after a record, and the rest could not be read; mend it")
            return


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path} is Parquet, and reading it needs the pyarrow package: pip install pyarrow") from None
    try:
        table = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} could not be read as Parquet ({_first(error)}); write it again") from None
    number = 0
    try:
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", without_nulls(row)
    except (ArrowException, OSError) as error:
        place = f"{path}, row {number + 1}"
        yield Broken(place, f"{place}: nothing from here on could be read ({_first(error)}); write the file again")


def dataset_rows(path: str, name: str | None, split: str) -> Rows:
    """The records of a Hub id, or of a folder that `datasets` loads.

    Args:
        path: Hub id (owner/name) or folder.
        name: of the configuration; None: the only one.
        split: "train", "test", ...

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path} needs the datasets package: pip install datasets") from None
    saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(path, name, split=split)
    # The hub client and each builder have errors of their own.
    except Exception as error:
        raise InputError(
            f"{path} (split {split}) could not be loaded as a data set ({type(error).__name__}: {_first(error)}); "
            "give a file, a folder of data files or a Hub id that can be reached"
        ) from None
    return ((f"{path}, {split} row {i}", without_nulls(row)) for i, row in enumerate(table, 1))


def without_nulls(value: Any) -> Any:
    """Without the keys whose value is None: Arrow gives every record the keys of all, also within messages."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _first(error: Exception) -> str:
    """The beginning of an error's own words."""
    return " ".join(str(error).split())[:200]
