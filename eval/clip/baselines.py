"""What does a dual encoder do without an adapter? Zero-shot, and a linear probe on its frozen image features.

    python eval/clip/baselines.py --model_name_or_path openai/clip-vit-base-patch16 --tasks dtd --shots 16 [--seed 0]

Takes the settings of recipes/train_clip.py and sees the same shots, dev and test images. Each task gives a record for
each way, `OUTPUT_DIR/<task>/{zero-shot,linear-probe}-<shots>-seed<s>.json`; zero-shot sees no training image, but is
repeated for each seed all the same. What has a record is not done again.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from copra_llm.batches import EncodedSplit, eval_loader
from copra_llm.build import Workbench, build
from copra_llm.config import COMMON, RunConfig, parse_run_config
from copra_llm.errors import exit_on_input_error
from copra_llm.evaluate import evaluate, scoring
from copra_llm.linear_probe import best_probe
from copra_llm.protocols.clip import SCALES, SETTINGS
from copra_llm.protocols.runs import portable
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_result
from copra_llm.settings import ImageSettings
from copra_llm.train import run_environment

WAYS = ("zero-shot", "linear-probe")
DEFAULTS = SETTINGS | {"model_name_or_path": SCALES["paper"].model, "tasks": ["dtd"], "shots": 16,
                       "output_dir": str(Path(__file__).parent / "results")}  # fmt: skip


def zero_shot(accelerator: Accelerator, bench: Workbench, task: str, batch_size: int) -> tuple[dict, dict]:
    """Metrics and data of the class prompts' own scores."""
    outcome = evaluate(accelerator, bench.classifier, bench.splits["test"][task], batch_size)
    return outcome.metrics(f"test/{task}"), {f"correct/test/{task}": pack_bits(outcome.correct)}


def linear_probe(accelerator: Accelerator, bench: Workbench, task: str, batch_size: int) -> tuple[dict, dict]:
    """Metrics and data of the best probe; each image is seen once, as in evaluation."""
    found = {
        split: features_of(accelerator, bench, bench.splits[split][task], batch_size)
        for split in ("train", "dev", "test")
    }
    probe = best_probe(found["train"], found["dev"], num_classes=len(bench.classifier.prompts[task]["input_ids"]))
    features, labels = found["test"]
    correct = (probe.scores(features).argmax(-1) == labels).numpy()
    metrics = {
        f"test/{task}/accuracy": probe.accuracy(features, labels),
        f"test/{task}/loss": probe.loss(*found["test"]),
    }
    return metrics, {f"correct/test/{task}": pack_bits(correct), "l2": probe.l2}


def features_of(
    accelerator: Accelerator, bench: Workbench, split: EncodedSplit, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features of length 1 `(n, dim)` and labels `(n,)`."""
    features, labels = [], []
    with scoring(accelerator, bench.classifier):
        for batch in eval_loader(bench.classifier, split, batch_size):
            features.append(bench.classifier.image_features(batch["pixels"].to(accelerator.device)).cpu())
            labels.append(batch["labels"])
    # Copied: what inference mode has made can take part in no fit.
    return torch.cat(features).clone(), torch.cat(labels)


def run(config: RunConfig, task: str, output: Path) -> None:
    """The records of one task that are not there yet."""
    seed, shots = config.train.seed, config.image.shots or "all"
    files = {way: output / task / f"{way}-{shots}-seed{seed}.json" for way in WAYS}
    missing = [way for way in WAYS if not files[way].is_file()]
    if not missing:
        return
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    bench = build(config, [task])
    bench.classifier.to(accelerator.device)
    for way in missing:
        started = time.time()
        measure = zero_shot if way == "zero-shot" else linear_probe
        with bench.classifier.model.disable_adapter():
            metrics, data = measure(accelerator, bench, task, config.train.per_device_eval_batch_size)
        settings = config.replace(tasks=[task]).flat() | {"label": way, "method": way}
        environment = run_environment(accelerator, bench)
        record = Result("clip_baseline", settings, metrics, time.time() - started, peak_memory_bytes(), data=data,
                        environment=environment)  # fmt: skip
        write_result(files[way], portable(record))
        print(f"{files[way]}: {metrics[f'test/{task}/accuracy']:.2f} %", flush=True)


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    config = parse_run_config(argv, __doc__, (*COMMON, ImageSettings), DEFAULTS)
    for task in config.data.tasks:
        run(config, task, Path(config.train.output_dir))


if __name__ == "__main__":
    sys.exit(main())
