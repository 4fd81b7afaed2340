"""`copra push`: an adapter to the Hub, with its record and a model card.

copra push runs/copra-0/sst2 me/copra-sst2 --private
copra push runs/merged me/merged --results runs/line runs/pruned.json
copra push runs/copra-0/sst2 me/copra-sst2 --dry_run look     # writes what would be pushed, and pushes nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copra_llm.cli.common import fresh_output

HELP = "Push an adapter to the Hub, with its record and a model card made from it; nothing of this machine goes along."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER")
    add("repo_id", metavar="OWNER/NAME", help="the repository, made if it is not there; without OWNER/: yours")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", help="the branch, made if it is not there; unset: main")
    add("--base_model", "--base-model", help="hub id of the base, where the adapter names a folder")
    add("--results", nargs="+", default=[], help="records of merging or pruning it, for the card; files or folders")
    add("--dry_run", "--dry-run", metavar="FOLDER", help="write all that would be pushed there; no network")


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.hub import check_name, switched_off
    from copra_llm.publish import hub_base, known_licence, prepare, push
    from copra_llm.results import atomic_folder

    check_name(args.repo_id)
    results = [Path(path) for path in args.results]
    if args.dry_run is None:
        pushed, notes = push(args.adapter, args.repo_id, private=args.private, revision=args.revision,
                             base_model=args.base_model, results=results)  # fmt: skip
        last = f"{args.adapter}: pushed to {pushed.url}"
    else:
        folder = fresh_output(args.dry_run)
        with switched_off(), atomic_folder(folder) as fresh:
            base = hub_base(args.base_model or load_adapter_weights(args.adapter).named_base(), args.adapter)
            notes = prepare(args.adapter, fresh, args.repo_id, base_model=base, results=results,
                            licence=known_licence(base))  # fmt: skip
        last = f"{folder}: what would be pushed to {args.repo_id}"
    for sentence in notes:
        print(sentence, file=sys.stderr)
    print(last)
    return 0
