"""When does CopRA pay, and what should its defaults be? Run the study, or a part of it.

    python eval/study/run.py [--entries screening headline] [--workers 2] [--dry-run]

Uses every GPU, or every core; stopped and started again, it goes on where it was. Seeds are done one after the other
for all tasks and variants, so that what there is can be compared at any time.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, protocol_parser, say
from copra_llm.protocols.comparisons import Selection, read_study
from copra_llm.protocols.study import run_study
from copra_llm.protocols.study_cost import cost_lines

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="entries", methods="variants")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the plan's; default: all")
    add_folder(parser, "--work", "runs/study", "adapters and checkpoints")
    parser.add_argument(
        "--records", type=Path, nargs="*", default=[], metavar="DIR",
        help="records of other protocols, only read: the same runs are not done again, unless their adapter is wanted",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and how long it may take")
    args = parser.parse_args()
    comparisons = read_study(args.plan, args.entries)
    selection = Selection(args.tasks, args.methods, args.seeds)
    if args.dry_run:
        for text in cost_lines(comparisons, args.results, args.data_root, selection, tuple(args.records)):
            print(text)
        return
    run_study(
        comparisons, args.results, args.work, args.data_root,
        selection=selection, others=tuple(args.records), say=say, workers=args.workers,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
