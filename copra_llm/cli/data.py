"""`copra data check`: what is in instruction data or images, and which records or files are broken?

`copra data lm-eval` writes evaluations as tasks of lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from copra_llm.cli.common import bar, broken_lines, fresh_output
from copra_llm.errors import InputError

HELP = "Instruction data and images: formats, counts, sizes, what is broken; evaluations for lm-evaluation-harness."
CHECK_HELP = "Say what the data are, and list every broken record or image by its place; exit code 2 if there is one."
LM_EVAL_HELP = "Write evaluations as tasks of lm-evaluation-harness, for its --include_path."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    check = actions.add_parser("check", help=CHECK_HELP, description=CHECK_HELP, allow_abbrev=False)
    check.add_argument(
        "files", nargs="+", metavar="FILE",
        help="JSONL, JSON or Parquet; a folder or a Hub id; each as FILE or FILE:WEIGHT; or a YAML list of them. For "
             "images: oxford_pets, dtd, ..., or a folder of them",
    )  # fmt: skip
    check.add_argument("--images", action="store_true", help="a Hub id names images, not instruction data")
    check.add_argument("--data_root", "--data-root", help="folder of the image sets; unset: in $COPRA_DATA")
    check.add_argument("--format", help="messages, sharegpt, alpaca, ...; unset: recognised by the columns")
    check.add_argument("--model_name_or_path", "--model-name-or-path", help="whose tokens are counted; unset: none are")
    check.add_argument("--chat_template", "--chat-template", help="chatml, plain, alpaca or a file; unset: the model's")
    check.add_argument("--turns", default="all", help="which assistant turns are trained: all, or the last alone")
    check.add_argument("--max_length", "--max-length", type=int, help="tokens; say how many records are longer")
    check.add_argument("--preview", type=int, metavar="N", help="show N examples, what is trained in colour")
    check.add_argument("--json", action="store_true", help="the same as JSON, with every broken record")

    tasks = actions.add_parser("lm-eval", help=LM_EVAL_HELP, description=LM_EVAL_HELP, allow_abbrev=False)
    tasks.add_argument("tasks", nargs="+", metavar="TASK", help="arc_easy, winogrande, ...")
    tasks.add_argument("--split", default="test", choices=("train", "dev", "test"))
    tasks.add_argument("--data_root", "--data-root", help="folder of the evaluations; unset: in $COPRA_DATA")
    tasks.add_argument("--max_eval_samples", "--max-eval-samples", type=int, help="of each, from the start; unset: all")
    tasks.add_argument("--output", required=True, help="folder for the tasks and their data")


def run(args: argparse.Namespace) -> int:
    return _lm_eval(args) if args.action == "lm-eval" else _check(args)


def _lm_eval(args: argparse.Namespace) -> int:
    from copra_llm.paths import data_root
    from copra_llm.tasks.choices import COMMONSENSE, get_choice_task, load_choices
    from copra_llm.tasks.lm_eval import write_lm_eval_tasks

    if args.max_eval_samples is not None and args.max_eval_samples < 1:
        raise InputError(f"--max_eval_samples is {args.max_eval_samples}, but must be at least 1")
    output = fresh_output(args.output)
    root = data_root(args.data_root, COMMONSENSE)
    tasks = [get_choice_task(name) for name in args.tasks]
    examples = {task: load_choices(task, args.split, root, args.max_eval_samples) for task in tasks}
    names = write_lm_eval_tasks(examples, output)
    print(f"lm_eval --include_path {output} --tasks {','.join(names)} ...")
    return 0


def _check(args: argparse.Namespace) -> int:
    from copra_llm.cli import data_images

    if args.images or data_images.image_words(args.files):
        return data_images.check(args)
    if args.data_root is not None:
        raise InputError("--data_root is where image sets lie; name one of them, or leave it out")
    from copra_llm.tasks.instruct.check import check
    from copra_llm.tasks.instruct.preview import has_colours, preview
    from copra_llm.tasks.instruct.sources import parse_sources

    _check_flags(args)
    sources = parse_sources(args.files, args.format)
    encoder = _encoder(args)
    report = check(sources, encoder, max_length=args.max_length, samples=args.preview or 0, progress=bar("record"))
    if args.json:
        print(json.dumps(report.figures(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(_text(report.figures(), tokens_wanted=encoder is not None)))
        if report.samples:
            shown = preview(report.samples, encoder.tokenizer, args.preview, colours=has_colours(sys.stdout))
            print(f"\n{shown}", end="")
    return 2 if report.broken else 0


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("chat_template", "max_length", "preview"):
        if getattr(args, name) is not None and args.model_name_or_path is None:
            raise InputError(f"--{name} is about tokens; give --model_name_or_path too")
    for name in ("max_length", "preview"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if args.preview is not None and args.json:
        raise InputError("--preview is for reading and --json for programs; give one of them")


def _encoder(args: argparse.Namespace):
    if args.model_name_or_path is None:
        return None
    from copra_llm.models import load_tokenizer
    from copra_llm.tasks.instruct.encode import Encoder

    return Encoder(load_tokenizer(args.model_name_or_path), args.chat_template, args.turns)


def _text(figures: dict, tokens_wanted: bool) -> Iterator[str]:
    """The figures of `check.Report` as lines to read."""
    for source in figures["sources"]:
        shape = f"{source['format']} ({', '.join(source['columns'])})" if source["format"] else "no format recognised"
        weight = f", weight {source['weight']:g}" if len(figures["sources"]) > 1 else ""
        yield f"{source['path']}: {shape}, {source['records']:,} records{weight}"
        if source["columns_not_read"]:
            yield f"  columns that are not read: {', '.join(source['columns_not_read'])}"
    records, turns = figures["records"], figures["turns"]
    yield (
        f"records  {records['read']:,} read: {records['good']:,} good, {records['broken']:,} broken; "
        f"{records['duplicates']:,} equal to an earlier one"
    )
    if turns["conversations"]:
        yield (
            f"turns    of the assistant: {_spread(turns)}; {turns['with_system']:,} records with a system message, "
            f"{turns['with_tools']:,} with tools"
        )
    if turns["texts"]:
        yield f"texts    {turns['texts']:,} records without turns, for no chat template"
    yield from _token_lines(figures, tokens_wanted)
    yield from broken_lines(figures["broken"])


def _token_lines(figures: dict, tokens_wanted: bool) -> Iterator[str]:
    if "tokens" not in figures:
        yield "tokens   none" if tokens_wanted else "tokens   not counted; give --model_name_or_path"
        return
    tokens, special = figures["tokens"], figures["special"]
    line = f"tokens   a record: {_spread(tokens)}"
    if "max_length" in tokens:
        line += f"; {tokens['longer_percent']:.1f} % ({tokens['longer']:,}) longer than {tokens['max_length']:,}"
        if tokens["nothing_trained_when_cut"]:
            line += f", {tokens['nothing_trained_when_cut']:,} with nothing to train when cut there"
    yield line
    yield f"trained  {figures['trained']['percent']:.1f} % of {tokens['total']:,} tokens"
    if figures["trained"]["without_end"]:
        yield (
            f"careful  {figures['trained']['without_end']:,} records end with no special token, so that they do not "
            "teach the model where to stop"
        )
    if special["records"]:
        yield (
            f"careful  {special['records']:,} records hold special tokens of the tokenizer in their text, which will "
            f"act as such (first: {special['first']})"
        )


def _spread(of: dict) -> str:
    return f"min {of['min']:,}, median {of['median']:,.0f}, 95 % {of['p95']:,.0f}, max {of['max']:,}"
