"""Run the sweeps: learning rate x steps x seeds, along a run, and over schedules.

    python eval/sweep/run.py [--sweeps grid along] [--workers 2]

Uses every GPU, or every core; stopped and started again, it goes on where it was.
"""

import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.sweep import Sweep, run_sweep

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="sweeps")
    add_folder(parser, "--work", "runs/interpolation", "adapters and checkpoints")
    args = parser.parse_args()
    for _, sweep in chosen_plans(args, Sweep):
        run_sweep(sweep, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
