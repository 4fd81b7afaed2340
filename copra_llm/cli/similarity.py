"""`copra similarity`: how alike are adapters?"""

from __future__ import annotations

import argparse

from copra_llm.cli.common import fresh_output
from copra_llm.errors import InputError

HELP = "Cosine similarities, t-SNE and distances from the checkpoint at a quarter of the run; weights only."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="two or more; runs bring their settings along")
    parser.add_argument("--on", default="delta", help="delta (the weight changes) or factors (A and B themselves)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE's random start")
    parser.add_argument("--perplexity", type=float, help="of t-SNE; unset: a third of the others, 30 at most")
    parser.add_argument("--output", required=True, help="folder for similarity.json, similarity.png and similarity.svg")


def run(args: argparse.Namespace) -> int:
    from copra_llm.report import require_matplotlib
    from copra_llm.results import write_result
    from copra_llm.saved_runs import read_run
    from copra_llm.similarity import similarity_record
    from copra_llm.summaries.landscape_plots import plot_similarity

    if len(args.adapters) < 2:
        raise InputError("one adapter was given, but there is nothing to compare it with; give two or more")
    require_matplotlib()
    output = fresh_output(args.output)
    runs = [read_run(path) for path in args.adapters]
    record = similarity_record(
        runs, on=args.on, seed=args.seed, perplexity=args.perplexity, adapter_folders=args.adapters
    )
    write_result(output / "similarity.json", record)
    for name, value in record.metrics.items():
        print(f"{name}: {value:.3f}")
    for point, row in zip(record.data["points"], record.data["cosine"], strict=True):
        print(f"{point['label']}: cosines {' '.join(f'{value:.3f}' for value in row)}")
    plot_similarity([record], output / "similarity")
    return 0
