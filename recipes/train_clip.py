"""Train LoRA adapters of a dual encoder (CLIP, SigLIP) on a few images of each class, with CopRA, CoTo or plain LoRA.

    accelerate launch recipes/train_clip.py --tasks dtd --shots 16 --output_dir runs/clip

The protocol is CLIP-LoRA's (arXiv 2405.18541), the learning rate CopRA's. Writes
OUTPUT/<task>/{adapter,result.json,config.yaml,checkpoint-*}. `--help` lists every setting.
"""

import sys

from copra_llm.config import COMMON, RunConfig, parse_run_config
from copra_llm.errors import exit_on_input_error
from copra_llm.images import own_name
from copra_llm.protocols.clip import SCALES, SETTINGS, STEPS_A_SHOT
from copra_llm.publish import push_each
from copra_llm.settings import ImageSettings
from copra_llm.train import print_metrics, train_each

DEFAULTS = SETTINGS | {"model_name_or_path": SCALES["paper"].model, "tasks": ["dtd"], "shots": 16}


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
