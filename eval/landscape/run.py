"""Run the plan: layer-wise barriers, planes through three seeds, similarities of all runs.

    python eval/landscape/run.py --runs FOLDER [--models minilm] [--tasks dbpedia sst2] [--methods lora copra]

FOLDER holds runs as `eval/interpolation/run.py --work FOLDER` leaves them. Stopped and started again, it goes on
where it was. Records go to `results/`, pictures beside it.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.landscape import Plan, run_plan
from copra_llm.protocols.plans import read_plans
from copra_llm.report import find_results
from copra_llm.summaries.landscape_plots import draw

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/interpolation"), help="adapters and checkpoints")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--data_root")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    args = parser.parse_args()
    for model, plan in read_plans(args.plan, Plan).items():
        if args.models is None or model in args.models:
            tasks = [task for task in plan.tasks if args.tasks is None or task in args.tasks]
            methods = [method for method in plan.methods if args.methods is None or method in args.methods]
            chosen = dataclasses.replace(plan, tasks=tasks, methods=methods)
            say = functools.partial(print, flush=True)
            run_plan(model, chosen, args.results, args.runs, args.data_root, say, args.workers)
    draw(find_results([args.results]), args.results.parent)


if __name__ == "__main__":
    sys.exit(main())
