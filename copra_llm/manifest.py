"""Is a folder still what was written into it?

    manifest.json: {"files": {name: {"bytes": n, "sha256": "..."}}}

Written last, so that a folder with a manifest has had all its files. A disk that was full or lost power, a copy that
was cut short, and a flipped bit all show as a size or a sum that differs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from copra_llm.errors import named
from copra_llm.json_file import read_json
from copra_llm.paths import is_below
from copra_llm.results import write_atomic

MANIFEST = "manifest.json"
_LONGEST_NAME = 200
"""Of a file, folders included, in characters: of UTF-8 no more bytes than a file system takes."""


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of every file below a folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_atomic(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, naming the file; None where nothing is.

    Files that the manifest does not name are no damage.
    """
    try:
        files = read_json(folder / MANIFEST, "save it anew")["files"]
        noted = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no manifest"
    if not all(map(is_below, files)) or max(map(len, files), default=0) > _LONGEST_NAME:
        return f"{MANIFEST} names files that are not in the folder"
    for name, size, _ in noted:
        if not (folder / name).is_file():
            return f"{named(name, '')} is missing"
        if (now := (folder / name).stat().st_size) != size:
            return f"{named(name, '')} has {now} bytes instead of {size}"
    # Sums last: sizes are free.
    return next(
        (f"{named(n, '')} is not what was written (SHA-256)" for n, _, s in noted if _sha256(folder / n) != s), None
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
