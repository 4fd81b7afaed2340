"""The paper's figures 2 to 6 and table 1 on image sets, and what they are compared with.

    python eval/clip/run.py --scale small [--figures 3 4] [--tasks dtd5] [--methods lora copra] [--workers 2]

"small" takes the micro CLIP (recipes/pretrain_micro_clip.py --output_dir runs/micro-clip) and two cores, "paper" the
paper's model, data sets and steps. What a figure needs of another's adapters is trained by figure 3. Stopped and
started again, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import baselines

from copra_llm.config import RunConfig
from copra_llm.errors import exit_on_input_error
from copra_llm.portable import portable_name
from copra_llm.protocols.clip import FIGURES, SCALES, entries, run_figures
from copra_llm.protocols.command import narrowed, say

HERE = Path(__file__).parent
BASELINES = "baselines"


def run_baselines(args: argparse.Namespace) -> None:
    """Zero-shot and the linear probe, on the images of figure 3's runs."""
    for shots, plan in entries(args.plans, FIGURES["3"][0], args.scale):
        chosen = narrowed(plan, args.tasks, None)
        for task in chosen.tasks if chosen else ():
            for seed in plan.seeds:
                model = args.model_name_or_path or SCALES[args.scale].model
                own = {"model_name_or_path": model, "tasks": [task], "seed": seed, "data_root": args.data_root}
                config = RunConfig().replace(**plan.settings | own)
                baselines.run(config, task, args.results / f"{shots}-shots" / portable_name(model))


@exit_on_input_error
def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--figures", nargs="+", choices=[*FIGURES, BASELINES], default=[BASELINES, *FIGURES])
    parser.add_argument("--tasks", nargs="+", help="of the plans'; default: all")
    parser.add_argument("--methods", nargs="+", help="of the plans'; default: all")
    parser.add_argument("--model_name_or_path", help="another model than the scale's")
    parser.add_argument("--data_root", help="of the image sets; unset: $COPRA_DATA")
    parser.add_argument("--plans", type=Path, default=HERE / "plans")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the records go")
    parser.add_argument("--work", type=Path, default=Path("runs/clip"), help="adapters and checkpoints")
    parser.add_argument("--workers", type=int, help="processes side by side; default: one a GPU, or one a core")
    args = parser.parse_args()
    figures = [figure for figure in args.figures if figure != BASELINES]
    run_figures(
        figures, args.scale, args.plans, args.results, args.work, model=args.model_name_or_path, tasks=args.tasks,
        methods=args.methods, data_root=args.data_root, say=say, workers=args.workers,
    )  # fmt: skip
    if BASELINES in args.figures:
        run_baselines(args)


if __name__ == "__main__":
    sys.exit(main())
