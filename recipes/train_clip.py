"""Train LoRA adapters of a dual encoder (CLIP, SigLIP) on a few images of each class, with CopRA, CoTo or plain LoRA.

    accelerate launch recipes/train_clip.py --tasks dtd --shots 16 --output_dir runs/clip

The protocol is CLIP-LoRA's (arXiv 2405.18541), the learning rate CopRA's. Writes
OUTPUT/<task>/{adapter,result.json,config.yaml,checkpoint-*}. `--help` lists every setting.
"""

import sys

from copra_llm.config import COMMON, RunConfig, parse_run_config
from copra_llm.errors import exit_on_input_error
from copra_llm.images import own_name
from copra_llm.publish import push_each
from copra_llm.settings import ImageSettings
from copra_llm.train import print_metrics, train_each

DEFAULTS = {
    "model_name_or_path": "openai/clip-vit-base-patch16", "tasks": ["dtd"], "shots": 16, "lora_r": 2, "lora_alpha": 1.0,
    # CLIP-LoRA's code divides by the root of the rank.
    "use_rslora": True, "lora_dropout": 0.25, "lora_target_modules": ["qkv"], "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-6, "weight_decay": 1e-2, "max_grad_norm": 0.0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128,
}  # fmt: skip
STEPS_A_SHOT = 500
"""Optimizer steps are so many times the shots, unless --max_steps says how many."""


def resolved(config: RunConfig) -> RunConfig:
    """The settings with the protocol's number of steps, and a name for images of one's own."""
    if config.train.max_steps == -1 and config.image.shots is not None:
        config = config.replace(max_steps=STEPS_A_SHOT * config.image.shots)
    return own_name(config)


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    config = resolved(parse_run_config(argv, __doc__, (*COMMON, ImageSettings), DEFAULTS))
    for result in push_each(config, train_each(config)):
        print_metrics(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
