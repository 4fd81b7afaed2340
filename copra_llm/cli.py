"""`copra`: merge adapters, look along the line between them, evaluate, report.

    copra merge A B --method fusion --weights 0.5 0.5 --output DIR
    copra interpolate A B --task sst2 --points 21 --output DIR
    copra evaluate A --task sst2
    copra report RESULTS... --output DIR

An adapter is a folder that PEFT's `save_pretrained` has written, or a run's folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from copra_llm import __version__
from copra_llm.errors import InputError, exit_on_input_error, nearest


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise InputError(f'there is no command "{words[0]}"{nearest(words[0], COMMANDS)}; see copra --help')
    args = parser.parse_args(words)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="copra", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"copra_llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (run, add_arguments, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        flags = [o for action in self._actions for o in action.option_strings]
        unknown = next((w for w in message.split() if w.startswith("--")), "")
        hint = nearest(unknown, flags) if "unrecognized" in message else ""
        raise InputError(f"{message}{hint}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        # Refused by the command's own parser, which knows the flags that come near.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


# --- merge ------------------------------------------------------------------------------------------------


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER")
    parser.add_argument("--method", default="fusion", help="fusion (averages the factors) or mixture (exact average)")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each adapter, summing to 1; default: equal")
    parser.add_argument("--output", required=True, help="folder for the merged adapter")


def _merge(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights, save_adapter_weights
    from copra_llm.merge import merge

    output = _fresh_output(args.output)
    merged = merge([load_adapter_weights(a) for a in args.adapters], args.method, args.weights)
    save_adapter_weights(merged, output)
    print(f"{output}: {args.method} of {len(args.adapters)} adapters, rank {merged.config['r']}")
    return 0


def _fresh_output(name: str) -> Path:
    output = Path(name)
    if output.is_file():
        raise InputError(f"--output names {output}, which is a file; give a new folder")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output names {output}, which is not empty; give a new folder")
    return output


# --- interpolate and evaluate -----------------------------------------------------------------------------


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="task of MTL15, e.g. sst2")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--data_root", "--data-root", help='the folder of MTL15, "sample" or "hub"; unset: $COPRA_DATA')
    parser.add_argument("--max_length", "--max-length", type=int, help="tokens; unset: as in training")
    parser.add_argument("--max_eval_samples", "--max-eval-samples", type=int)
    parser.add_argument("--per_device_eval_batch_size", "--per-device-eval-batch-size", type=int, default=64)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", help="unset: the base that the adapter names")


def _interpolate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="the two ends; --pair gives more lines")
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar="ADAPTER", help="one more curve")
    parser.add_argument("--labels", nargs="+", help="names of the curves in the plot; default: each run's method")
    parser.add_argument("--method", default="fusion", help="fusion or mixture")
    parser.add_argument("--points", type=int, default=21, help="weights from 0 to 1: both ends and the middle, so odd")
    parser.add_argument("--output", required=True, help="folder for curve-<n>.json, curves.png and curves.svg")
    _data_arguments(parser)


def _interpolate(args: argparse.Namespace) -> int:
    from copra_llm.interpolate import line
    from copra_llm.report import plot_curves, require_matplotlib
    from copra_llm.results import write_result

    if len(args.adapters) != 2:
        given = len(args.adapters)
        raise InputError(f"{given} adapters were given, but a line has two ends; add lines with --pair A B")
    alphas = line(args.points)
    pairs = [args.adapters, *args.pair]
    if args.labels and len(args.labels) != len(pairs):
        raise InputError(f"{len(args.labels)} labels were given for {len(pairs)} curves; give one each")
    require_matplotlib()
    output = _fresh_output(args.output)
    records = [_curve(pair, alphas, args, args.labels[i] if args.labels else None) for i, pair in enumerate(pairs)]
    for i, record in enumerate(records):
        write_result(output / f"curve-{i}.json", record)
        for name, value in record.metrics.items():
            print(f"{record.config['label']} {name}: {value:.3f}")
    plot_curves(records, output / "curves")
    return 0


def _curve(pair: list[str], alphas, args: argparse.Namespace, label: str | None):
    from tqdm import tqdm

    from copra_llm.adapters import load_adapter_weights
    from copra_llm.build import build
    from copra_llm.interpolate import curve_record, interpolate

    started = time.time()
    ends = [load_adapter_weights(path) for path in pair]
    config = _config_of(pair[0], ends[0], args)
    benches = []

    def bench_of(folder: Path):
        benches.append(build(config, [args.task], adapter=folder, splits=(args.split,)))
        return benches[0]

    curve = interpolate(
        *ends,
        method=args.method,
        alphas=alphas,
        bench_of=bench_of,
        split=args.split,
        task=args.task,
        batch_size=args.per_device_eval_batch_size,
        progress=lambda points: tqdm(points, unit="point", disable=not sys.stderr.isatty()),
    )
    settings = {"adapters": pair, "label": label or config.schedule.method, "merge_method": args.method}
    settings |= {"split": args.split, "task": args.task, "points": args.points, **config.flat()}
    return curve_record(curve, settings, benches[0], time.time() - started)


def _config_of(path: str, weights, args: argparse.Namespace):
    """The run's own settings where a config.yaml lies beside the adapter, changed by the flags."""
    from copra_llm.config import RunConfig, read_settings

    run = next((f for f in (Path(path) / "config.yaml", Path(path).parent / "config.yaml") if f.is_file()), None)
    config = RunConfig.from_flat(read_settings(run)) if run else RunConfig()
    base_model = args.model_name_or_path or weights.base_model
    if not base_model:
        raise InputError(f"{weights.source} does not say which base model it is for; give --model_name_or_path")
    changes = {"model_name_or_path": base_model}
    for name in ("data_root", "max_length", "max_eval_samples", "per_device_eval_batch_size"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return config.replace(**changes)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--output", help="file for the result record")
    _data_arguments(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from accelerate import Accelerator

    from copra_llm.adapters import adapter_folder, load_adapter_weights
    from copra_llm.build import build
    from copra_llm.evaluate import evaluate
    from copra_llm.results import Result, pack_bits, write_result
    from copra_llm.train import run_environment

    started = time.time()
    if args.output and Path(args.output).is_dir():
        raise InputError(f"--output names {args.output}, which is a folder; give a file for the record")
    weights = load_adapter_weights(args.adapter)
    config = _config_of(args.adapter, weights, args)
    bench = build(config, [args.task], adapter=adapter_folder(args.adapter), splits=(args.split,))
    accelerator = Accelerator()
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


# --- report -----------------------------------------------------------------------------------------------


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="RESULT", help="result records, or folders that hold them")
    parser.add_argument("--output", required=True, help="folder for report.html, table.md and the plots")


def _report(args: argparse.Namespace) -> int:
    from copra_llm.report import write_report

    page = write_report([Path(r) for r in args.results], Path(args.output))
    print(page)
    return 0


COMMANDS = {
    "merge": (_merge, _merge_arguments, "Merge adapters of one base model into one."),
    "interpolate": (_interpolate, _interpolate_arguments, "Accuracy and loss along the line between two adapters."),
    "evaluate": (_evaluate, _evaluate_arguments, "Accuracy and loss of an adapter on a task."),
    "report": (_report, _report_arguments, "Tables, plots and one HTML page from result records."),
}
"""Command-line names -> (function, its arguments, help)."""


if __name__ == "__main__":
    sys.exit(main())
