"""`copra shapley`: what each layer of an adapter contributes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copra_llm.cli.common import add_data_arguments, config_of, counter
from copra_llm.errors import InputError

HELP = "Shapley values of an adapter's layers: what each contributes to loss or accuracy."
BAR = 24
"""Characters of the longest bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--metric", default="loss", help="loss (values in nats) or accuracy (percentage points)")
    parser.add_argument("--estimator", default="quadrature",
                        help="exact, permutation, owen, stratified, adjusted, regression or quadrature")  # fmt: skip
    parser.add_argument("--budget", type=int, default=256,
                        help="most coalitions to evaluate; exact where that is all of them")  # fmt: skip
    parser.add_argument("--standard_error", "--standard-error", type=float,
                        help="stop as soon as no player's standard error is larger")  # fmt: skip
    parser.add_argument("--granularity", default="layer", help="players: layer (transformer block) or module")
    parser.add_argument("--groups", type=int, help="join consecutive players into so many groups")
    parser.add_argument("--layer_pattern", "--layer-pattern", help="as in training: what names a layer")
    parser.add_argument("--pack", type=int, default=1, help="coalitions side by side in one pass, for large GPUs")
    parser.add_argument("--seed", type=int, default=0, help="of the coalitions")
    parser.add_argument("--output", required=True, help="file for the result record; evaluations are kept beside it")
    add_data_arguments(parser)
    parser.set_defaults(split="dev", per_device_eval_batch_size=16)


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.coalitions import CoalitionGame
    from copra_llm.evaluator import AdapterEvaluator
    from copra_llm.ledger import Ledger, identity
    from copra_llm.protocols.layer_values import LEDGER_SUFFIX, check_estimator, shapley_records
    from copra_llm.results import write_result

    output = Path(args.output)
    if output.is_dir():
        raise InputError(f"--output names {output}, which is a folder; give a file for the record")
    if output.exists():
        raise InputError(f"--output names {output}, which exists; give a new file")
    if args.pack < 1:
        raise InputError(f"--pack is {args.pack}, but must be at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, but must be at least 0")
    check_estimator(args.estimator)
    weights = load_adapter_weights(args.adapter)
    evaluator = AdapterEvaluator(config_of(args.adapter, weights, args), [args.task], args.split)
    game = CoalitionGame(evaluator, weights, args.task, metric=args.metric, granularity=args.granularity,
                         layer_pattern=args.layer_pattern, n_groups=args.groups, pack=args.pack)  # fmt: skip
    if game.note:
        print(f"note: {game.note}", file=sys.stderr)
    ledger = Ledger(output.with_suffix(LEDGER_SUFFIX), identity(game))
    with counter("coalition", min(args.budget, 2**game.n_players)) as done:
        (record,) = shapley_records(
            game, ledger, metrics=[args.metric], estimator=args.estimator, budget=args.budget, seed=args.seed,
            standard_error=args.standard_error, settings={"adapter": args.adapter}, done=done,
        )  # fmt: skip
    write_result(output, record)
    print(table(record.data, args.metric))
    for name, value in record.metrics.items():
        print(f"{name}: {value:.3f}")
    return 0


def table(data: dict, metric: str) -> str:
    """A line a player: its value, standard error and a bar to scale; negative values in another character."""
    unit = "nats" if metric == "loss" else "points"
    digits = 4 if metric == "loss" else 2
    width = max(len("player"), *map(len, data["players"]))
    largest = max(map(abs, data["values"])) or 1.0
    lines = [f"{'player':{width}}  {f'value [{unit}]':>14}  {'std. error':>10}"]
    for player, value, error in zip(data["players"], data["values"], data["standard_errors"], strict=True):
        shown = "exact" if error is None else f"{error:.{digits}f}"
        bar = ("█" if value >= 0 else "░") * round(BAR * abs(value) / largest)
        lines.append(f"{player:{width}}  {value:14.{digits}f}  {shown:>10}  {bar}".rstrip())
    change = data["v_full"] - data["v_empty"]
    lines.append(f"{'whole adapter':{width}}  {change:14.{digits}f}  from {data['evaluations']} coalitions")
    return "\n".join(lines)
