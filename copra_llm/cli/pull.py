"""`copra pull`: an adapter from the Hub."""

from __future__ import annotations

import argparse

from copra_llm.cli.common import fresh_output
from copra_llm.errors import InputError

HELP = "Fetch an adapter from the Hub; prints its folder, which every command takes (as it takes the hub id itself)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="with @REVISION behind it, or --revision")
    parser.add_argument("--revision", help="branch, tag or commit; unset: main")
    parser.add_argument("--output", help="new folder for a copy; unset: the Hub's cache")


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.hub import parse_id, pull

    hub_id = parse_id(args.repo_id)
    if hub_id is None:
        raise InputError(f'"{args.repo_id}" is no hub id; give owner/name, or owner/name@revision')
    if args.revision and hub_id.revision:
        raise InputError(f"{hub_id} and --revision {args.revision} both name a revision; give one of them")
    output = fresh_output(args.output) if args.output else None
    if args.revision:
        hub_id = parse_id(f"{hub_id.repo}@{args.revision}")
        if hub_id is None:
            raise InputError(f'--revision is "{args.revision}", but must be a branch, a tag or a commit')
    # What does not load is refused before it is written anywhere else.
    load_adapter_weights(pull(hub_id))
    print(pull(hub_id, output))
    return 0
