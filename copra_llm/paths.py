"""Where do data, converted models and results live?

A flag wins, then an environment variable, then the user's cache; never the package's own folder or the
working directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from copra_llm.errors import InputError
from copra_llm.json_file import is_unicode

SAMPLE = "sample"
"""`--data_root sample`: the small hand-written data that ships with the package."""
HUB = "hub"
"""`--data_root hub`: the published data sets, through `datasets`."""


LONGEST_NAME = 1000
"""Of a path in a file, in characters: of UTF-8 no more bytes than a system takes."""


def is_below(name: str) -> bool:
    """Whether a path that stands in a file is one of a file in a folder: relative, and never upwards."""
    path = Path(name)
    if "\0" in name or not is_unicode(name) or len(name) > LONGEST_NAME:
        return False
    return not path.is_absolute() and ".." not in path.parts


def cache_dir() -> Path:
    """`$COPRA_CACHE`, else `$XDG_CACHE_HOME/copra_llm`, else `~/.cache/copra_llm`."""
    if "COPRA_CACHE" in os.environ:
        return Path(os.environ["COPRA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "copra_llm"


def data_root(flag: str | None, benchmark: str) -> Path | str:
    """The folder of one benchmark's data, or `SAMPLE` or `HUB`.

    `flag` (`--data_root`) wins; then `$COPRA_DATA/<benchmark>`; then the packaged sample.

    Raises:
        InputError: if the folder does not exist.
    """
    if flag in (SAMPLE, HUB):
        return flag
    if flag is None and "COPRA_DATA" not in os.environ:
        return SAMPLE
    root = Path(flag) if flag is not None else Path(os.environ["COPRA_DATA"]) / benchmark
    if not root.is_dir():
        source = "--data_root" if flag is not None else "$COPRA_DATA"
        raise InputError(
            f"{source} names {root}, which is not a folder; give the folder that holds one folder a task, "
            f'or "{SAMPLE}", or "{HUB}"'
        )
    return root
