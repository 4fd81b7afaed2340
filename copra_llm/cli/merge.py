"""`copra merge`: adapters in, one adapter out."""

from __future__ import annotations

import argparse

from copra_llm.cli.common import fresh_output

HELP = "Merge adapters of one base model into one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER")
    parser.add_argument("--method", default="fusion", help="fusion (averages the factors) or mixture (exact average)")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each adapter, summing to 1; default: equal")
    parser.add_argument("--output", required=True, help="folder for the merged adapter")


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights, save_adapter_weights
    from copra_llm.merge import merge

    output = fresh_output(args.output)
    merged = merge([load_adapter_weights(a) for a in args.adapters], args.method, args.weights)
    save_adapter_weights(merged, output)
    print(f"{output}: {args.method} of {len(args.adapters)} adapters, rank {merged.config['r']}")
    return 0
