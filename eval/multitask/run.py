"""Merge the adapters of different tasks by every rule of the plan, evaluate the result on each task.

    python eval/multitask/run.py [--work runs/interpolation] [--methods lora copra] [--workers 2]

Takes adapters that are in --work, trains those that are not; stopped and started again, it goes on where it was.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.multitask import MultiTask, run_multitask
from copra_llm.protocols.plans import read_plans

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/interpolation"), help="the single runs' adapters")
    parser.add_argument("--plans", nargs="+", help="entries of the plan; default: all")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--data_root")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    args = parser.parse_args()
    say = functools.partial(print, flush=True)
    for name, plan in read_plans(args.plan, MultiTask).items():
        methods = [method for method in plan.methods if args.methods is None or method in args.methods]
        if methods and (args.plans is None or name in args.plans):
            chosen = dataclasses.replace(plan, methods=methods)
            run_multitask(chosen, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
