"""Run the plan: tune on dev, train every seed, merge all pairs, evaluate along the lines.

    python eval/interpolation/run.py [--models minilm] [--tasks sst2 agnews] [--methods copra]

Stopped and started again, it goes on where it was. The table: `copra report eval/interpolation/results`.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.connectivity import Plan, run_plan

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE)
    add_folder(parser, "--work", "runs/interpolation", "adapters and checkpoints; other protocols' --runs")
    args = parser.parse_args()
    for model, plan in chosen_plans(args, Plan):
        run_plan(model, plan, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
