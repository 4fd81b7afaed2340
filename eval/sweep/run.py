"""Run the sweeps: learning rate x steps x seeds, along a run, and over schedules.

    python eval/sweep/run.py [--sweeps grid along] [--workers 2]

Uses every GPU, or every core; stopped and started again, it goes on where it was.
"""

import argparse
import functools
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.plans import read_plans
from copra_llm.protocols.sweep import Sweep, run_sweep

HERE = Path(__file__).parent


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/interpolation"), help="adapters and checkpoints")
    parser.add_argument("--sweeps", nargs="+", help="entries of the plan; default: all")
    parser.add_argument("--data_root")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    args = parser.parse_args()
    say = functools.partial(print, flush=True)
    for name, sweep in read_plans(args.plan, Sweep).items():
        if args.sweeps is None or name in args.sweeps:
            run_sweep(sweep, args.results, args.work, args.data_root, say, args.workers)


if __name__ == "__main__":
    sys.exit(main())
