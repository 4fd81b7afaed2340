"""Train the clients of every federation of the plan, merge them, evaluate the clients and the merged adapter.

    python eval/federated/run.py [--plans iid] [--tasks sst2] [--workers 2] [--engine flower]

Uses every GPU, or every core; stopped and started again, it goes on where it was. With --engine flower the clients are
nodes of Flower's simulation.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.federated import Federation, run_federation

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="plans")
    add_folder(parser, "--work", "runs/federated", "the clients' runs, merged adapters")
    parser.add_argument("--engine", choices=("plain", "flower"), default="plain")
    args = parser.parse_args()
    for name, plan in chosen_plans(args, Federation):
        if args.engine == "flower":
            from copra_llm.protocols.flower import simulate_plan

            simulate_plan(name, plan, args.results, args.work, args.data_root, say)
        else:
            run_federation(name, plan, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
