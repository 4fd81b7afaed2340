"""What does a JSON file, or a line of JSON, hold, and in which sentence is it refused where it holds none?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError


def read_json(path: Path, remedy: str) -> Any:
    """The value that a JSON file holds.

    Args:
        path: the file.
        remedy: ends the sentence, such as "give a result record".

    Raises:
        InputError: if there is no such file, or it is not UTF-8, not JSON, or nested too deep to be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is no file; {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); {remedy}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno} is not JSON ({error.msg}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read ({why_unread(error)}); {remedy}") from None


def why_unread(error: ValueError | RecursionError) -> str:
    """Why JSON or YAML of the right grammar cannot be read: Python bounds numerals' digits, and nesting."""
    deep = isinstance(error, RecursionError) or "nested" in str(error)
    return "it is nested too deep" if deep else "a value is out of range"


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number: of Python's kinds, a bool is an integer too."""
    return isinstance(value, int | float) and not isinstance(value, bool)
