"""`copra report`: records in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Tables, plots and one HTML page from result records."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="RESULT", help="result records, or folders that hold them")
    parser.add_argument("--output", required=True, help="folder for report.html, table.md and the plots")


def run(args: argparse.Namespace) -> int:
    from copra_llm.report import write_report

    page = write_report([Path(r) for r in args.results], Path(args.output))
    print(page)
    return 0
