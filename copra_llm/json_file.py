"""What does a JSON file, or a line of JSON, hold, and in which sentence is it refused where it holds none?"""

from __future__ import annotations

import json
from collections.abc import Callable
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


def is_integer(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a number of things, of a size that 64 bits hold."""
    return is_integer(value) and 0 <= value < 1 << 63


def list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a JSON value is a list of such values."""
    return lambda value: isinstance(value, list) and all(map(good, value))


def is_unicode(text: str) -> bool:
    """Whether a text has no half characters, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number: of Python's kinds, a bool is an integer too."""
    return isinstance(value, int | float) and not isinstance(value, bool)
