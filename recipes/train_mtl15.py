"""Train LoRA adapters on MTL15 with CopRA, CoTo or plain LoRA.

    accelerate launch recipes/train_mtl15.py --tasks sst2 --method copra --max_steps 300 --output_dir runs/copra

Writes OUTPUT/<task>/{adapter,result.json,config.yaml,checkpoint-*}. `--help` lists every setting.
"""

import sys

from copra_llm.config import parse_run_config
from copra_llm.errors import exit_on_input_error
from copra_llm.publish import push_each
from copra_llm.tasks.mtl15 import get_task
from copra_llm.train import print_metrics, train_each


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    config = parse_run_config(argv, description=__doc__)
    for task in config.data.tasks:
        get_task(task)
    for result in push_each(config, train_each(config)):
        print_metrics(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
