"""What is the command line of a protocol's `run.py`?

    python eval/<protocol>/run.py [--plan FILE] [--results DIR] [--data_root DIR] [--workers N]
                                  [--models NAME ...] [--tasks TASK ...] [--methods METHOD ...]

Each `run.py` names its folder and adds what is its own; the rest is here, so that the protocols are used alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from copra_llm.protocols.plans import read_plans

P = TypeVar("P")

say = functools.partial(print, flush=True)
"""Reports progress also where the output is a file; picklable, so that workers report too."""


def protocol_parser(
    description: str, here: Path, entries: str = "models", methods: str = "methods"
) -> argparse.ArgumentParser:
    """The flags that all protocols have.

    Args:
        description: the script's docstring.
        here: the protocol's folder, with `plan.yaml` and `results/`.
        entries: what the entries of its plan are; `--<entries>` chooses among them.
        methods: what is compared in them; `--<methods>` chooses among those.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=here / "plan.yaml")
    parser.add_argument("--results", type=Path, default=here / "results", help="where the records go")
    parser.add_argument(f"--{entries}", dest="entries", nargs="+", help="entries of the plan; default: all")
    parser.add_argument("--tasks", nargs="+", help="of the plan's; default: all")
    parser.add_argument(f"--{methods}", dest="methods", nargs="+", help="of the plan's; default: all")
    parser.add_argument("--data_root", help="of MTL15; unset: $COPRA_DATA")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    return parser


def add_folder(parser: argparse.ArgumentParser, flag: str, default: str, help: str) -> None:
    """A flag for a folder of adapters or of work in progress."""
    parser.add_argument(flag, type=Path, default=Path(default), help=help)


def chosen_plans(args: argparse.Namespace, kind: type[P]) -> Iterator[tuple[str, P]]:
    """The entries of the plan that were asked for, with the tasks and methods that were asked for.

    Raises:
        InputError: if the plan is wrong.
    """
    for name, plan in read_plans(args.plan, kind).items():
        if args.entries is None or name in args.entries:
            chosen = narrowed(plan, args.tasks, args.methods)
            if chosen is not None:
                yield name, chosen


def narrowed(plan: P, tasks: Sequence[str] | None, methods: Sequence[str] | None) -> P | None:
    """What was asked for of a plan; None if nothing of it is left to do.

    Args:
        plan: of any protocol.
        tasks: that may be used; groups of tasks that need another one are left out. None: all.
        methods: names of methods, and of variants where the plan has those. None: all.
    """
    for wanted, fields in ((tasks, ("tasks", "groups")), (methods, ("methods", "variants"))):
        if wanted is None:
            continue
        kept = {field: _kept(getattr(plan, field), wanted) for field in fields if hasattr(plan, field)}
        if not any(kept.values()):
            return None
        plan = dataclasses.replace(plan, **kept)
    return plan


def _kept(names: Any, wanted: Sequence[str]) -> Any:
    """Of names, groups of names, or what has names as its keys: those that are wanted, a group as a whole."""
    if isinstance(names, dict):
        return {name: own for name, own in names.items() if name in wanted}
    return [name for name in names if set(name if isinstance(name, list) else [name]) <= set(wanted)]
