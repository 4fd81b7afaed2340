"""`copra merge`: adapters in, one adapter out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from copra_llm.cli.common import bar, fresh_output

HELP = "Merge adapters of one base model into one."
RULES = {
    "fusion": "average the factors: s (sum w B)(sum w A); keeps the rank, has cross terms [pad]",
    "mixture": "average the weight changes dW, exactly; the rank is sum r",
    "truncated": "the mixture's best approximation of a rank, by default the adapters' largest [rank]",
    "align": "turn the factors towards the first's by the best orthogonal P, then fusion [pad]",
    "align-learned": "the same with a learned invertible P, the paper's objective [steps, pad]",
    "task-arithmetic": "add the weight changes: scale * sum w dW [rank]",
    "ties": "trim to the largest entries, elect signs, average what agrees [density 0.2, on, rank, pad]",
    "dare": "drop entries at random, rescale, add [density 0.5, on, rank, seed]",
    "dare-ties": "drop as in dare, then elect and average as in ties [density 0.5, on, rank, pad, seed]",
    "knots": "SVD of [dW_1, ..., dW_n], ties on the adapters' right parts [density 0.2, rank]",
    "core-space": "any inner rule, in the smallest space that holds all adapters [inner, density, rank, seed]",
    "iso-c": "the sum, all its singular values set to their mean [rank]",
    "tsv-m": "each adapter's singular vectors, made orthogonal to the others' [density, rank]",
}
"""`--method` -> what it does [its options besides `--scale`]; the equations stand in `copra_llm/merge/`."""
LINES = ("fusion", "mixture", "truncated", "align", "align-learned", "task-arithmetic")
"""Those whose line between two adapters ends in the adapters themselves."""
OPTIONS = ("rank", "density", "on", "inner", "scale", "steps", "pad", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each adapter; default: equal, 1 / n where "
                        "they must sum to 1 (fusion, mixture, truncated, align, align-learned), else 1")  # fmt: skip
    parser.add_argument("--output", required=True, help="folder for the merged adapter")
    add_method_arguments(parser)


def add_method_arguments(parser: argparse.ArgumentParser, methods: Iterable[str] = RULES) -> None:
    """`--method` and the options of the rules, with a line about every method below the help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods and their options:\n" + "\n".join(f"  {name:16} {RULES[name]}" for name in methods)
    add = parser.add_argument
    add("--method", default="fusion", help="one of those below; default: fusion")
    add("--rank", type=int, help="cut the result to this rank; what that loses is printed")
    add("--density", type=float, help="fraction kept: of entries (ties, dare, dare-ties, knots, core-space) or of "
        "singular vectors (tsv-m)")  # fmt: skip
    add("--on", help="factors (A and B, as PEFT does; the default) or delta (dW itself, in blocks, then cut to "
        "--rank): ties, dare, dare-ties")  # fmt: skip
    add("--inner", help="rule inside core-space: task-arithmetic, ties (default), dare, dare-ties, iso-c, tsv-m")
    add("--scale", type=float, help="factor on the result, for methods whose weights need not sum to 1")
    add("--steps", type=int, help="most steps of align-learned's descent; default: 100")
    add("--pad", help="zero: fill smaller ranks and missing modules up with zeros, where equal ones are needed")
    add("--seed", type=int, help="of the masks of dare and dare-ties; default: 0")


def method_options(args: argparse.Namespace) -> dict:
    """The options that were given."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import load_adapter_weights, save_adapter_weights
    from copra_llm.merge import check_options, check_weights, merge
    from copra_llm.merge.figures import Figures

    output = fresh_output(args.output)
    options = check_options(args.method, method_options(args))
    check_weights(args.method, len(args.adapters), args.weights)
    adapters, figures = [load_adapter_weights(a) for a in args.adapters], Figures()
    merged = merge(adapters, args.method, args.weights, figures=figures, progress=bar("module"), **options)
    save_adapter_weights(merged, output)
    print(f"{output}: {args.method} of {len(args.adapters)} adapters, rank {merged.config['r']}")
    for sentence in figures.sentences():
        print(sentence)
    return 0
