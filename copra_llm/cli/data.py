"""`copra data check`: what is in instruction data, and which records are broken?"""

from __future__ import annotations

import argparse
import json
import sys

from copra_llm.cli.common import bar
from copra_llm.errors import InputError

HELP = "Instruction data: formats, counts, lengths, broken records."
CHECK_HELP = "Say what the data are, and list every broken record by file and line; exit code 2 if there is one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    check = actions.add_parser("check", help=CHECK_HELP, description=CHECK_HELP, allow_abbrev=False)
    check.add_argument(
        "files", nargs="+", metavar="FILE",
        help="JSONL, JSON or Parquet; a folder or a Hub id; each as FILE or FILE:WEIGHT; or a YAML list of them",
    )  # fmt: skip
    check.add_argument("--format", help="messages, sharegpt, alpaca, ...; unset: recognised by the columns")
    check.add_argument("--model_name_or_path", "--model-name-or-path", help="whose tokens are counted; unset: none are")
    check.add_argument("--chat_template", "--chat-template", help="chatml, plain, alpaca or a file; unset: the model's")
    check.add_argument("--turns", default="all", help="which assistant turns are trained: all, or the last alone")
    check.add_argument("--max_length", "--max-length", type=int, help="tokens; say how many records are longer")
    check.add_argument("--preview", type=int, metavar="N", help="show N examples, what is trained in colour")
    check.add_argument("--json", action="store_true", help="the same as JSON, with every broken record")


def run(args: argparse.Namespace) -> int:
    from copra_llm.tasks.instruct.check import check
    from copra_llm.tasks.instruct.preview import has_colours, preview
    from copra_llm.tasks.instruct.sources import parse_sources

    _check_flags(args)
    sources = parse_sources(args.files, args.format)
    encoder = _encoder(args)
    report = check(
        sources, encoder, max_length=args.max_length, samples=args.preview or 0, progress=bar("record")
    )  # fmt: skip
    if args.json:
        print(json.dumps(report.figures(), indent=1, ensure_ascii=False))
    else:
        print(report)
        if encoder is None:
            print("tokens   not counted; give --model_name_or_path")
        if report.samples:
            shown = preview(report.samples, encoder.tokenizer, args.preview, colours=has_colours(sys.stdout))
            print(f"\n{shown}", end="")
    return 2 if report.broken else 0


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("chat_template", "max_length", "preview"):
        if getattr(args, name) is not None and args.model_name_or_path is None:
            raise InputError(f"--{name} is about tokens; give --model_name_or_path too")
    for name in ("max_length", "preview"):
        if (getattr(args, name) or 1) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if args.preview is not None and args.json:
        raise InputError("--preview is for reading and --json for programs; give one of them")


def _encoder(args: argparse.Namespace):
    if args.model_name_or_path is None:
        return None
    from copra_llm.models import load_tokenizer
    from copra_llm.tasks.instruct.encode import Encoder

    return Encoder(load_tokenizer(args.model_name_or_path), args.chat_template, args.turns)
