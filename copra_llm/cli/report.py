"""`copra report`: records in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "One self-contained page from result records: tables, plots, every number as CSV."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="RESULT", help="result records, or folders that hold them")
    parser.add_argument(
        "--output", required=True, help="the page, NAME.html; or a folder for report.html, table.md and the curves"
    )
    parser.add_argument("--title", help="of the page; default: the methods in it")


def run(args: argparse.Namespace) -> int:
    from copra_llm.report import write_report

    page = write_report([Path(r) for r in args.results], Path(args.output), args.title)
    print(page)
    return 0
