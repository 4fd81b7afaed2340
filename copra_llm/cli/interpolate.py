"""`copra interpolate`: accuracy and loss along the line between two adapters."""

from __future__ import annotations

import argparse

from copra_llm.cli.common import add_data_arguments, bar, config_of, fresh_output
from copra_llm.cli.merge import LINES, add_method_arguments, method_options
from copra_llm.errors import InputError

HELP = "Accuracy and loss along the line between two adapters."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="the two ends; --pair gives more lines")
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar="ADAPTER", help="one more curve")
    parser.add_argument("--labels", nargs="+", help="names of the curves in the plot; default: each run's method")
    parser.add_argument("--points", type=int, default=21, help="weights from 0 to 1: both ends and the middle, so odd")
    parser.add_argument("--layerwise", action="store_true", help="one layer at a time, all others the first adapter's")
    parser.add_argument(
        "--output", required=True, help="folder for curve-<n>.json, curves.png and curves.svg (--layerwise: layers)"
    )
    add_data_arguments(parser)
    add_method_arguments(parser, LINES)


def run(args: argparse.Namespace) -> int:
    from copra_llm.interpolate import line
    from copra_llm.merge import check_line, check_options
    from copra_llm.report import plot_curves, require_matplotlib
    from copra_llm.results import write_result
    from copra_llm.summaries.landscape_plots import plot_layers

    if len(args.adapters) != 2:
        given = len(args.adapters)
        raise InputError(f"{given} adapters were given, but a line has two ends; add lines with --pair A B")
    line(args.points)
    check_line(args.method)
    check_options(args.method, method_options(args))
    pairs = [args.adapters, *args.pair]
    if args.labels and len(args.labels) != len(pairs):
        raise InputError(f"{len(args.labels)} labels were given for {len(pairs)} curves; give one each")
    require_matplotlib()
    output = fresh_output(args.output)
    records = [_record(pair, args, args.labels[i] if args.labels else None) for i, pair in enumerate(pairs)]
    name, plot = ("layers", plot_layers) if args.layerwise else ("curves", plot_curves)
    for i, record in enumerate(records):
        write_result(output / f"{name.removesuffix('s')}-{i}.json", record)
        for metric, value in record.metrics.items():
            print(f"{record.config['label']} {metric}: {value:.3f}")
    plot(records, output / name)
    return 0


def _record(pair: list[str], args: argparse.Namespace, label: str | None):
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.interpolate import line_record
    from copra_llm.layerwise import layerwise_record

    ends = [load_adapter_weights(path) for path in pair]
    config = config_of(pair[0], ends[0], args)
    settings = {"adapters": pair, "label": label or config.schedule.method}
    record = layerwise_record if args.layerwise else line_record
    return record(
        ends,
        config,
        args.task,
        method=args.method,
        merge_options=method_options(args),
        points=args.points,
        split=args.split,
        settings=settings,
        progress=bar("point"),
    )
