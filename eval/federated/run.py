"""Train the clients of every federation of the plan, merge them, evaluate the clients and the merged adapter.

    python eval/federated/run.py [--plans iid] [--tasks sst2] [--workers 2] [--engine flower]

Uses every GPU, or every core; stopped and started again, it goes on where it was. With --engine flower the clients are
nodes of Flower's simulation.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.federated import Federation, run_federation
from copra_llm.protocols.plans import read_plans

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/federated"), help="the clients' runs, merged adapters")
    parser.add_argument("--plans", nargs="+", help="entries of the plan; default: all")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--data_root")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    parser.add_argument("--engine", choices=("plain", "flower"), default="plain")
    args = parser.parse_args()
    say = functools.partial(print, flush=True)
    for name, plan in read_plans(args.plan, Federation).items():
        tasks = [task for task in plan.tasks if args.tasks is None or task in args.tasks]
        if tasks and (args.plans is None or name in args.plans):
            chosen = dataclasses.replace(plan, tasks=tasks)
            if args.engine == "flower":
                from copra_llm.protocols.flower import simulate_plan

                simulate_plan(name, chosen, args.results, args.work, args.data_root, say)
            else:
                run_federation(name, chosen, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
