"""Run the plan: Shapley values of every layer of every adapter, for loss and accuracy on dev.

    python eval/shapley/run.py --runs FOLDER [--models minilm] [--tasks sst2 agnews] [--methods lora copra]

FOLDER holds runs as `eval/interpolation/run.py --work FOLDER` leaves them. Stopped and started again, it goes on
after the last coalition. The table: `make tables`.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.layer_values import Plan, run_plan

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE)
    add_folder(parser, "--runs", "runs/interpolation", "the trained adapters, <model>/<task>/<method>/<run>/")
    add_folder(parser, "--work", "runs/shapley", "evaluations, kept as they come in")
    args = parser.parse_args()
    for model, plan in chosen_plans(args, Plan):
        run_plan(model, plan, args.results, args.runs, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
