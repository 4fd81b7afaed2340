"""What is the command line of a protocol's `run.py`?

    python eval/<protocol>/run.py [--plan FILE] [--results DIR] [--data_root DIR] [--workers N]
                                  [--models NAME ...] [--tasks TASK ...] [--methods METHOD ...]

Each `run.py` names its folder and adds what is its own; the rest is here, so that the protocols are used alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from copra_llm.errors import InputError
from copra_llm.protocols.plans import read_plans

P = TypeVar("P")

say = functools.partial(print, flush=True)
"""Reports progress also where the output is a file; picklable, so that workers report too."""


def protocol_parser(description: str, here: Path, entries: str = "models") -> argparse.ArgumentParser:
    """The flags that all protocols have.

    Args:
        description: the script's docstring.
        here: the protocol's folder, with `plan.yaml` and `results/`.
        entries: what the entries of its plan are; `--<entries>` chooses among them.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=here / "plan.yaml")
    parser.add_argument("--results", type=Path, default=here / "results", help="where the records go")
    parser.add_argument(f"--{entries}", dest="entries", nargs="+", help="entries of the plan; default: all")
    parser.add_argument("--tasks", nargs="+", help="of the plan's; default: all")
    parser.add_argument("--methods", nargs="+", help="of the plan's; default: all")
    parser.add_argument("--data_root", help="of MTL15; unset: $COPRA_DATA")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    return parser


def add_folder(parser: argparse.ArgumentParser, flag: str, default: str, help: str) -> None:
    """A flag for a folder of adapters or of work in progress."""
    parser.add_argument(flag, type=Path, default=Path(default), help=help)


def chosen_plans(args: argparse.Namespace, kind: type[P]) -> Iterator[tuple[str, P]]:
    """The entries of the plan that were asked for, with the tasks and methods that were asked for.

    Raises:
        InputError: if the plan is wrong, or an entry has no tasks or methods to choose among.
    """
    for name, plan in read_plans(args.plan, kind).items():
        if args.entries is None or name in args.entries:
            chosen = _narrowed(plan, tasks=args.tasks, methods=args.methods)
            if chosen is not None:
                yield name, chosen


def _narrowed(plan: Any, **wanted: list[str] | None) -> Any:
    """The plan with what was asked for of it; None if nothing is left to do."""
    chosen = {}
    for field, values in wanted.items():
        if values is None:
            continue
        if not hasattr(plan, field):
            raise InputError(f"--{field} was given, but this protocol's plan has no {field}; leave it out")
        chosen[field] = [value for value in getattr(plan, field) if value in values]
    return dataclasses.replace(plan, **chosen) if all(chosen.values()) else None
