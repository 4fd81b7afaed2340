"""Instruction tuning: train every method and seed of the plan on each data set, merge pairs of seeds, evaluate on test.

    python eval/instruct/run.py [--plans alpaca] [--workers 2]

Uses every GPU, or every core; stopped and started again, it goes on where it was.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.sweep import Sweep, run_sweep

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="plans")
    add_folder(parser, "--work", "runs/instruct", "adapters and checkpoints")
    args = parser.parse_args()
    for _, plan in chosen_plans(args, Sweep):
        run_sweep(plan, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
