"""`copra fold`: an adapter becomes part of its model."""

from __future__ import annotations

import argparse
import sys

from copra_llm.cli.common import fresh_output
from copra_llm.errors import InputError

HELP = "Write the base model with an adapter folded in, which plain transformers loads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--output", required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--model_name_or_path", "--model-name-or-path", help="unset: the base that the adapter names")
    parser.add_argument("--dtype", help="of what is written: float32, bfloat16 or float16; unset: the base's own")
    parser.add_argument("--max_shard_size", "--max-shard-size", help="of a weights file; unset: 5GB")
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")
    for bits in ("4bit", "8bit"):
        parser.add_argument(f"--load_in_{bits}", f"--load-in-{bits}", action="store_true", help="refused: it rounds")


def run(args: argparse.Namespace) -> int:
    from copra_llm.export import MAX_SHARD_SIZE, fold

    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(args, flag):
            raise InputError(f"--{flag} would fold into rounded weights and round the sum again; fold into the "
                             "full-precision base without it, then quantise")  # fmt: skip
    output = fresh_output(args.output)
    folded = fold(
        args.adapter,
        output,
        model_name_or_path=args.model_name_or_path,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size or MAX_SHARD_SIZE,
        trust_remote_code=args.trust_remote_code,
        progress=sys.stderr.isatty(),
    )
    files = f"{folded.shards} file" + ("s" if folded.shards > 1 else "")
    print(f"{output}: {folded.base_model} with {args.adapter} folded in, "
          f"{folded.parameters:,} parameters in {folded.dtype}, {files}")  # fmt: skip
    return 0
