"""`copra evaluate`: accuracy and loss of an adapter."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from copra_llm.cli.common import add_data_arguments, config_of
from copra_llm.errors import InputError

HELP = "Accuracy and loss of an adapter on a task."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--output", help="file for the result record")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import adapter_folder, load_adapter_weights
    from copra_llm.build import build
    from copra_llm.evaluate import evaluate
    from copra_llm.launch import evaluating
    from copra_llm.results import Result, pack_bits, write_result
    from copra_llm.train import run_environment

    started = time.time()
    if args.output and Path(args.output).is_dir():
        raise InputError(f"--output names {args.output}, which is a folder; give a file for the record")
    weights = load_adapter_weights(args.adapter)
    config = config_of(args.adapter, weights, args)
    bench = build(config, [args.task], adapter=adapter_folder(args.adapter), splits=(args.split,))
    counts = bench.counts.get(args.split)
    if counts is not None and counts.cut:
        print(f"note: {counts.cut} of {counts.kept} examples are longer than --max_length {config.data.max_length} and "
              "were cut", file=sys.stderr)  # fmt: skip
    accelerator = evaluating(config.train)
    bench.classifier.to(accelerator.device)
    examples = bench.splits[args.split][args.task]
    outcome = evaluate(accelerator, bench.classifier, examples, args.per_device_eval_batch_size)
    metrics = outcome.metrics(f"{args.split}/{args.task}")
    for name, value in metrics.items():
        print(f"{name}: {value:.3f}")
    if args.output:
        record = Result(
            protocol="evaluate",
            config={"adapter": args.adapter, "split": args.split, "task": args.task, **config.flat()},
            metrics=metrics,
            seconds=time.time() - started,
            data={f"correct/{args.split}/{args.task}": pack_bits(outcome.correct)},
            environment=run_environment(accelerator, bench),
        )
        write_result(Path(args.output), record)
    return 0
