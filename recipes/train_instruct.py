"""Train a LoRA adapter of a causal language model on conversations, with CopRA, CoTo or plain LoRA.

    accelerate launch recipes/train_instruct.py --model_name_or_path smollm2 --dataset_name alpaca.jsonl \\
        --max_length 512 --packing --max_steps 500 --output_dir runs/alpaca

Writes OUTPUT/{adapter,result.json,config.yaml,checkpoint-*}. `copra data check FILE` says what is in the data, and
`--help` lists every setting.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from copra_llm.config import COMMON, parse_run_config
from copra_llm.errors import exit_on_input_error
from copra_llm.publish import Publisher
from copra_llm.settings import InstructSettings
from copra_llm.train import print_metrics, train_adapter

DEFAULTS = {
    "model_name_or_path": "smollm2", "tasks": ["instruct"], "lora_r": 16, "lora_alpha": 32.0,
    "lora_target_modules": ["all-linear"], "learning_rate": 2e-4, "max_length": 1024, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
}  # fmt: skip
"""What TRL's users are used to."""


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    config = parse_run_config(argv, description=__doc__, groups=(*COMMON, InstructSettings), defaults=DEFAULTS)
    publisher, folder = Publisher(config), Path(config.train.output_dir)
    result = train_adapter(config, config.data.tasks, folder)
    if PartialState().is_main_process:
        for split, counts in result.data["records"].items():
            print(f"{split}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    print_metrics(result)
    publisher.push(folder, result)
    publisher.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
