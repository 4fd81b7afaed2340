"""What of a record belongs to the machine it was made on, and what is said in its place?

A path becomes the name of its file or folder; what is to be made public is looked through once more, for paths and
secrets that have come in some other way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ROOTED = re.compile(r"/|~|\.{1,2}(?:/|$)|[A-Za-z]:[\\/]|\\\\|file:")
_SECRET = re.compile(
    r"\b(?:hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|://[^/\s:@\"',]+:[^/\s:@\"',]+@|BEGIN [A-Z ]*PRIVATE KEY"
)
"""How tokens of the Hub, of OpenAI, GitHub, GitLab, AWS and Slack begin, a signed JWT, a URL with a password, a key."""
_NAMES_SECRET = re.compile(r"(?:TOKEN|API_KEY|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 8
"""Characters of the value of an environment variable that may be a secret; shorter ones are found in any text."""


def is_local(name: str) -> bool:
    """Whether a text is a path: rooted, or with a slash and on this machine's disk."""
    return bool(_ROOTED.match(name)) or ("/" in name and os.path.exists(name))


def portable_name(name: str) -> str:
    """A model's or file's name as it is, but of a path its last part."""
    path = Path(name).expanduser()
    return path.resolve().name.rpartition("\\")[2] if is_local(name) or path.exists() else name


def portable_values(value: Any) -> Any:
    """The same value, of JSON's kinds, with `portable_name` of every text that is a path."""
    if isinstance(value, str):
        return portable_name(value) if is_local(value) else value
    if isinstance(value, Mapping):
        return {key: portable_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable_values(entry) for entry in value]
    return value


def texts(value: Any) -> Iterable[str]:
    """Every text in a value of JSON's kinds, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts(key)
            yield from texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts(entry)


def has_secret(text: str, known: Iterable[str] = ()) -> bool:
    """Whether something in a text looks like a secret.

    Args:
        text: of any length.
        known: secrets beyond those that environment variables hold.
    """
    own = (value for name, value in os.environ.items() if _NAMES_SECRET.search(name))
    held = any(len(secret) >= _SHORTEST_SECRET and secret in text for secret in (*own, *known))
    return held or _SECRET.search(text) is not None


def place_in(text: str, more: Iterable[Path] = ()) -> str | None:
    """A folder of this machine that a text names: the home, the working directory, or one of `more`; None: none."""
    for folder in {Path.home(), Path.cwd(), *(Path(p).resolve() for p in more)}:
        name = str(folder)
        # The root and its folders, as in a container without users, are in many texts about computers.
        if len(folder.parts) > 2 and re.search(rf"{re.escape(name)}(?![\w-])", text):
            return name
    return None
