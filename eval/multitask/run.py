"""Merge the adapters of different tasks by every rule of the plan, evaluate the result on each task.

    python eval/multitask/run.py [--work runs/interpolation] [--methods lora copra] [--workers 2]

Takes adapters that are in --work, trains those that are not; stopped and started again, it goes on where it was.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.multitask import MultiTask, run_multitask

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="plans")
    add_folder(parser, "--work", "runs/interpolation", "the single runs' adapters")
    args = parser.parse_args()
    for _, plan in chosen_plans(args, MultiTask):
        run_multitask(plan, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
