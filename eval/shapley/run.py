"""Run the plan: Shapley values of every layer of every adapter, for loss and accuracy on dev.

    python eval/shapley/run.py --runs FOLDER [--models minilm] [--tasks sst2 agnews] [--methods lora copra]

FOLDER holds runs as `eval/interpolation/run.py --work FOLDER` leaves them. Stopped and started again, it goes on
after the last coalition. The table: `make tables`.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.layer_values import Plan, run_plan
from copra_llm.protocols.plans import read_plans

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/interpolation"), help="the trained adapters")
    parser.add_argument("--work", type=Path, default=Path("runs/shapley"), help="evaluations, kept as they come in")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--data_root")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    args = parser.parse_args()
    say = functools.partial(print, flush=True)
    for model, plan in read_plans(args.plan, Plan).items():
        if args.models is None or model in args.models:
            tasks = [task for task in plan.tasks if args.tasks is None or task in args.tasks]
            methods = [method for method in plan.methods if args.methods is None or method in args.methods]
            chosen = dataclasses.replace(plan, tasks=tasks, methods=methods)
            run_plan(model, chosen, args.results, args.runs, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
