"""All fifteen tasks of MTL15, single and merged, at one setting.

    python eval/mtl15/run.py [--tasks yahoo imdb] [--methods copra] [--workers 2]

Uses every GPU, or every core; stopped and started again, it goes on where it was. Records are shared with
`eval/interpolation`, whose four tasks are part of these.
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
    parser.set_defaults(results=HERE.parent / "interpolation" / "results")
    args = parser.parse_args()
    for model, plan in chosen_plans(args, Plan):
        run_plan(model, plan, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
