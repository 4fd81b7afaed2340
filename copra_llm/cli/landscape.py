"""`copra landscape`: accuracy and loss on the plane through three adapters."""

from __future__ import annotations

import argparse

from copra_llm.cli.common import add_data_arguments, bar, config_of, fresh_output
from copra_llm.errors import InputError

HELP = "Accuracy and loss on the plane through three adapters (fusions of the three)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="the three corners")
    parser.add_argument("--labels", nargs=3, metavar="NAME", help="names of the corners; default: A B C")
    parser.add_argument(
        "--grid", type=int, default=11, help="points along each side; costs grid x grid + 4 evaluations"
    )
    parser.add_argument("--margin", type=float, default=0.2, help="of the grid beyond the corners, relative")
    parser.add_argument("--output", required=True, help="folder for plane.json, plane.png and plane.svg")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.plane import plane_record
    from copra_llm.report import require_matplotlib
    from copra_llm.results import write_result
    from copra_llm.summaries.landscape_plots import plot_planes

    if len(args.adapters) != 3:
        raise InputError(f"{len(args.adapters)} adapters were given, but a plane goes through three")
    require_matplotlib()
    output = fresh_output(args.output)
    adapters = [load_adapter_weights(path) for path in args.adapters]
    record = plane_record(
        adapters,
        config_of(args.adapters[0], adapters[0], args),
        args.task,
        points=args.grid,
        margin=args.margin,
        labels=args.labels,
        split=args.split,
        settings={"adapters": args.adapters},
        progress=bar("point"),
    )
    write_result(output / "plane.json", record)
    for name, value in record.metrics.items():
        print(f"{name}: {value:.3f}")
    plot_planes([record], output / "plane")
    return 0
