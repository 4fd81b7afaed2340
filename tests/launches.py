"""The launch configurations' headers: which commands do they show?"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

CONFIGS = ROOT / "accelerate_configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.suffix in (".yaml", ".slurm"))


@dataclass(frozen=True)
class Shown:
    """A command of a header."""

    file: str
    variables: dict[str, str]
    """Set for it alone, before its first word."""
    words: list[str]


def header(path: Path) -> list[str]:
    """The comment lines at the top, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    comments = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return [line[1:] for line in comments]


def shown(path: Path) -> list[Shown]:
    """What is indented in the header, with its continued lines in one."""
    text = "\n".join(header(path)).replace("\\\n", " ")
    commands = []
    for line in (line for line in text.splitlines() if line.startswith("   ")):
        words = shlex.split(line)
        first = next(i for i, word in enumerate(words) if "=" not in word)
        variables = dict(word.split("=", 1) for word in words[:first])
        commands.append(Shown(path.name, variables, words[first:]))
    return commands


COMMANDS = [command for path in FILES for command in shown(path)]
