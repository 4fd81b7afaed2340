"""What does a YAML file of settings hold, and are its values of the wanted types?"""

from __future__ import annotations

import contextlib
import functools
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from copra_llm.errors import InputError, shown
from copra_llm.json_file import why_unread

LARGEST = 1 << 64
"""Of a whole number, either way."""
DEEPEST = 50
"""Levels of lists and tables within each other."""


@functools.cache
def packaged_yaml(package: str, name: str) -> dict[str, Any]:
    """A YAML file that ships with a package, read once; not to be written to."""
    import yaml

    return yaml.safe_load(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def load_yaml(text: str) -> Any:
    """`yaml.safe_load`, but for texts that are nested deeper than any file of settings.

    Its scanner takes a time that grows with the length times the depth: a hundred thousand brackets would take hours.

    Raises:
        yaml.YAMLError, ValueError: for what is no YAML, or has a value that is none.
    """
    import yaml

    class Shallow(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent, index):
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"nested deeper than {DEEPEST}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return yaml.load(text, Shallow)


def read_yaml(path: Path) -> dict[str, Any]:
    """The `name: value` entries of a YAML file.

    Raises:
        InputError: if the file is missing, is no YAML, or holds something else.
    """
    # Here, since what only parses flags should start without it.
    import yaml

    if not path.is_file():
        raise InputError(f"{path} does not exist; give a YAML file of settings")
    try:
        values = load_yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}{f', line {mark.line + 1}' if mark else ''} is not YAML; mend it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); give a YAML file of settings") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML that can be read ({why_unread(error)}); mend it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, but must hold `name: value` lines")
    other = next((name for name in values if not isinstance(name, str)), None)
    if other is not None:
        raise InputError(f"{path} has {shown(other)} for a name, but names must be texts")
    return values


def typed(path: Path, key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; YAML reads `1e-3` as text and `1` as an integer, and both may mean a float."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is list:
        entries = value if isinstance(value, list) else [value]
        return [typed(path, key, entry, get_args(kind)[0]) for entry in entries]
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    elif kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= LARGEST:
            return value
        raise InputError(f"{path}: {key} is {shown(value)}, but must lie within 2**64")
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{path}: {key} is {shown(value)}, but must be of type {kind.__name__}")
