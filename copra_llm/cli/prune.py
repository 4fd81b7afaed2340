"""`copra prune`: a smaller adapter, or the accuracy of many smaller ones.

copra prune A --keep every-other --density 0.5 --by magnitude --quantise int8 --output DIR    # writes one
copra prune A --task sst2 --output FILE                                                       # evaluates all
copra prune A --task sst2 --keep all low --density 0.3 0.1 --output FILE    # evaluates every combination
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from copra_llm.cli.common import add_data_arguments, bar, config_of, fresh_output
from copra_llm.errors import InputError

HELP = (
    "Keep some layers, modules or entries of an adapter: write the smaller one; or, with --task, evaluate every "
    "combination of what is listed (nothing listed: all structured variants, curves over densities, quantised ones)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument(
        "--keep",
        nargs="+",
        help="what stays: all, every-other, low, middle, high (a third), a target module, a tower, layers (0,2,5)",
    )
    parser.add_argument("--density", nargs="+", type=float, help="fraction of the entries of A and B kept, in (0, 1]")
    parser.add_argument(
        "--by",
        nargs="+",
        help="which entries: magnitude (largest of the whole adapter; the default), matrix (of each A and B), random",
    )
    parser.add_argument("--quantise", "--quantize", nargs="+", help="int8, nf4, or none; written dequantised")
    parser.add_argument("--seed", type=int, default=0, help="of --by random")
    parser.add_argument("--layer_pattern", "--layer-pattern", help="match ends a layer's name; unset: as in training")
    parser.add_argument("--output", help="folder for the adapter; with --task, file for the result record")
    add_data_arguments(parser, task_required=False)


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.saved_runs import read_run

    variants = _variants(args)
    if args.task:
        return _evaluate(args, variants)
    if args.output is None:
        raise InputError("neither --output nor --task was given; name a folder for the smaller adapter, or a task")
    if len(variants) != 1:
        raise InputError(f"{len(variants)} variants were asked for, but one folder is written; give one value of each "
                         "flag, or evaluate them all with --task")  # fmt: skip
    output = fresh_output(args.output)
    weights = load_adapter_weights(args.adapter)
    _write(weights, variants[0], output, args.layer_pattern or read_run(args.adapter).config.schedule.layer_pattern)
    return 0


def _variants(args: argparse.Namespace) -> list:
    """Every combination of the flags, none twice; nothing if no flag was given."""
    from copra_llm.prune import Variant

    if args.by and not args.density:
        raise InputError(f"--by {' '.join(args.by)} chooses entries, but no --density says how many; give one below 1")
    if not (args.keep or args.density or args.quantise):
        return []
    kinds = [None if kind == "none" else kind for kind in args.quantise or ["none"]]
    combined = itertools.product(args.keep or ["all"], kinds, args.by or ["magnitude"], args.density or [1.0])
    found = [
        Variant(keep, density, by if args.density else None, kind, args.seed) for keep, kind, by, density in combined
    ]
    return list(dict.fromkeys(found))


def _write(weights, variant, output: Path, layer_pattern: str | None) -> None:
    from copra_llm.adapters import save_adapter_weights
    from copra_llm.prune import size

    pruned = variant.of(weights, layer_pattern)
    if not any(bool(f.lora_A.any()) for f in pruned.factors.values()):
        raise InputError(f"nothing is left of {weights.source} at density {variant.density:g}: no rank has entries in "
                         "both A and B; keep more")  # fmt: skip
    before, after = size(weights, layer_pattern), size(pruned, layer_pattern)
    save_adapter_weights(pruned, output)
    print(f"layers: {len(after.layers)} of {len(before.layers)}: {', '.join(after.layers)}")
    print(f"modules: {after.modules} of {before.modules}: {', '.join(_last_parts(pruned.factors))}")
    print(f"parameters: {after.parameters} of {before.parameters}")
    print(f"bytes: {after.bytes} of {before.bytes}")
    if variant.quantise:
        print(f"bytes as {variant.quantise}: {variant.bytes_of(pruned)} (in theory; written dequantised)")
    print(output)


def _last_parts(names) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _evaluate(args: argparse.Namespace, variants: list) -> int:
    from copra_llm.adapters import adapter_folder, load_adapter_weights
    from copra_llm.evaluator import AdapterEvaluator
    from copra_llm.progress import STATE
    from copra_llm.prune import structured, structured_names
    from copra_llm.variants import figure_variants, finish, unfinished_file, variants_record

    output = Path(args.output) if args.output else None
    if output is not None and output.is_dir():
        raise InputError(f"--output names {output}, which is a folder; give a file for the record")
    weights = load_adapter_weights(args.adapter)
    config = config_of(args.adapter, weights, args)
    if args.layer_pattern:
        config = config.replace(layer_pattern=args.layer_pattern)
    pattern = config.schedule.layer_pattern
    variants = variants or figure_variants(structured_names(weights, pattern), args.seed)
    for keep in dict.fromkeys(variant.keep for variant in variants):
        structured(weights, keep, pattern)  # what does not fit is refused before anything is loaded
    record = variants_record(
        weights,
        config,
        args.task,
        variants,
        AdapterEvaluator(config, [args.task], args.split),
        checkpoint="early" if (adapter_folder(args.adapter) / STATE).is_file() else "final",
        settings={"adapter": args.adapter},
        unfinished=unfinished_file(output) if output else None,
        progress=bar("variant"),
    )
    print(f"{'variant':32} {'density':>7} {'accuracy':>8} {'loss':>7} {'parameters':>11} {'bytes':>11}")
    for row in record.data["rows"]:
        print(f"{row['name']:32} {row['density']:7.2f} {row['accuracy']:8.2f} {row['loss']:7.3f} "
              f"{row['parameters']:11} {row['bytes']:11}")  # fmt: skip
    if output is not None:
        finish(output, record)
    return 0
