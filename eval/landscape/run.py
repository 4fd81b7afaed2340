"""Run the plan: layer-wise barriers, planes through three seeds, similarities of all runs.

    python eval/landscape/run.py --runs FOLDER [--models minilm] [--tasks dbpedia sst2] [--methods lora copra]

FOLDER holds runs as `eval/interpolation/run.py --work FOLDER` leaves them. Stopped and started again, it goes on
where it was. Records go to `results/`, pictures beside it.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.landscape import Plan, run_plan
from copra_llm.report import find_results
from copra_llm.summaries.landscape_plots import draw

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE)
    add_folder(parser, "--runs", "runs/interpolation", "the trained adapters, <model>/<task>/<method>/<run>/")
    args = parser.parse_args()
    for model, plan in chosen_plans(args, Plan):
        run_plan(model, plan, args.results, args.runs, args.data_root, say, args.workers)
    draw(find_results([args.results]), args.results.parent)


if __name__ == "__main__":
    sys.exit(main())
