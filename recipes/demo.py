"""CopRA's claim in some minutes: two adapters trained with different seeds, merged.

    python recipes/demo.py [--output demo]

Trains LoRA and CopRA with two seeds each on all-MiniLM-L6-v2 and the packaged samples of SST-2 and AG News (no
network needed), merges each pair by fusion and mixture, and writes OUTPUT/report.html. It prints what it finds.
The sample is small: what it shows is how things work, not how well.
"""

import argparse
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.connectivity import Plan, run_plan
from copra_llm.report import write_report

PLAN = Plan(
    tasks=["sst2", "agnews"],
    methods=["lora", "copra"],
    seeds=[0, 1],
    learning_rate=[4e-3],
    max_steps=[150],
    points={"fusion": 11, "mixture": 3},
    settings={"lora_r": 4, "lora_alpha": 8, "max_length": 48, "per_device_train_batch_size": 16},
)


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--model_name_or_path", default="minilm")
    parser.add_argument("--data_root", default="sample")
    args = parser.parse_args()
    records, work = args.output / "results", args.output / "runs"
    run_plan(args.model_name_or_path, PLAN, records, work, args.data_root, lambda text: print(text, flush=True))
    page = write_report([records], args.output, title="The demo: LoRA and CopRA on two small samples")
    print(f"\n{(args.output / 'table.md').read_text(encoding='utf-8')}\nThe page with the curves: {page}")


if __name__ == "__main__":
    sys.exit(main())
