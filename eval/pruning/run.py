"""Run the plan: prune every adapter in every way, evaluate on test; the checkpoint at T/4 too.

    python eval/pruning/run.py --runs runs/interpolation [--models minilm] [--tasks sst2] [--methods copra]

The adapters are those that eval/interpolation/run.py has trained in its --work. Stopped and started again, it
goes on where it was. The table and the plot: `make tables`.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.pruning import Plan, run_plan

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE)
    add_folder(parser, "--runs", "runs/interpolation", "the trained adapters, <model>/<task>/<method>/<run>/")
    add_folder(parser, "--work", "runs/pruning", "runs repeated for their T/4 checkpoint")
    args = parser.parse_args()
    for model, plan in chosen_plans(args, Plan):
        run_plan(model, plan, args.runs, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
