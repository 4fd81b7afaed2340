"""What does few-shot training of a dual encoder cost here, and what in a plain loop as CLIP-LoRA's?

    python eval/speed/clip.py [--rounds 3] [--steps 3]                       (needs $COPRA_DATA/images/oxford_flowers)

The plain loop decodes every image each time, and encodes the prompts of all 102 classes in each step, at CLIP's 77
tokens. Model, adapter, optimizer, images, views and precision are the same; the losses of the first step, before which
nothing differs, are compared. The model has random weights (`random_clip`).

Rounds are interleaved in one process with one thread; costs are CPU seconds, since the machine may be shared, without
the first step. This loop's images are decoded before: a run of 8000 steps reads each of them 157 times. Evaluated are
three adapters, one after the other, as along a line.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from random_clip import ABOUT, WIDTH, class_scores, save_model, text_features

import copra_llm.train as train
from copra_llm.batches import BatchStream
from copra_llm.build import Workbench, build
from copra_llm.config import RunConfig
from copra_llm.errors import exit_on_input_error
from copra_llm.evaluate import evaluate
from copra_llm.images import read_run_images
from copra_llm.pictures import decode, eval_view, train_view, view_rng
from copra_llm.results import Result, environment, write_result

HERE = Path(__file__).parent
RECORD = HERE / "results" / "clip.json"
TASK, BATCH, TEST = "oxford_flowers", 32, 102
CONTENDERS = ("plain", "lora", "copra")


def settings(model: Path, method: str, steps: int) -> RunConfig:
    """CLIP-LoRA's, for some steps."""
    return RunConfig().replace(
        model_name_or_path=str(model), tasks=[TASK], shots=16, method=method, max_steps=steps, lora_r=2, lora_alpha=1.0,
        use_rslora=True, lora_dropout=0.25, learning_rate=5e-4, weight_decay=1e-2, max_grad_norm=0.0,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, max_eval_samples=TEST, logging_steps=1,
        checkpoint_at=[],
    )  # fmt: skip


class Clock:
    """CPU seconds at the end of each step."""

    def __init__(self):
        self.seconds: list[float] = []

    def step(self) -> None:
        self.seconds.append(time.process_time())

    def images_a_second(self) -> float:
        """Without the first step."""
        return BATCH * (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])


def train_plain(bench: Workbench, config: RunConfig) -> tuple[float, float]:
    """Images a CPU second and the first step's loss of the plain loop."""
    clock, split, encode = Clock(), bench.splits["train"][TASK], prompts_encoder(bench, config)
    model = bench.classifier.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
    steps, losses = config.train.max_steps, []
    for step, batch in enumerate(BatchStream([split], BATCH, config.train.seed, 0, steps)):
        train._seed_noise(config.train.seed, step, 0)
        places = enumerate(split.encoded[index] for _, index in batch)
        views = [train_view(decode(e.source), 224, view_rng(config.train.seed, step, at)) for at, e in places]
        labels = torch.tensor([split.labels[index] for _, index in batch])
        loss = F.cross_entropy(scores_of(bench, views, encode()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        clock.step()
    return clock.images_a_second(), losses[0]


def prompts_encoder(bench: Workbench, config: RunConfig) -> Callable[[], torch.Tensor]:
    """A function that encodes all prompts at the full width."""
    (run,) = read_run_images(config, [TASK], ("test",))
    tokens = bench.base.tokenizer(run.prompts, padding="max_length", max_length=WIDTH, return_tensors="pt")
    whole = bench.classifier.model.get_base_model()
    return lambda: text_features(whole, {"input_ids": tokens["input_ids"]})


def scores_of(bench: Workbench, views: list, text: torch.Tensor) -> torch.Tensor:
    """Class scores of some views."""
    stacked = torch.stack([torch.from_numpy(view.copy()) for view in views])
    return class_scores(bench.classifier.model.get_base_model(), stacked, text)


def train_here(bench: Workbench, config: RunConfig) -> tuple[float, float]:
    """The same of this package's loop."""
    clock, split = Clock(), bench.splits["train"][TASK]
    split.views.prepare(split.encoded)
    with tempfile.TemporaryDirectory() as folder:
        progress = train.fit(Accelerator(), bench, config, Path(folder), clock.step)
    return clock.images_a_second(), progress.log[0]["loss"]


def three_adapters(bench: Workbench):
    """The same adapter at three sizes, as along a line."""
    factors = [p for name, p in bench.classifier.named_parameters() if "lora_B" in name]
    for value in (0.01, 0.02, 0.03):
        for p in factors:
            p.data.fill_(value)
        yield value


def evaluate_plain(bench: Workbench, config: RunConfig) -> float:
    """Images a CPU second: prompts once an adapter, images decoded each time."""
    split, started = bench.splits["test"][TASK], time.process_time()
    encode = prompts_encoder(bench, config)
    bench.classifier.eval()
    for _ in three_adapters(bench):
        with torch.inference_mode():
            text = encode()
            for first in range(0, len(split), BATCH):
                views = [eval_view(decode(e.source), 224) for e in split.encoded[first : first + BATCH]]
                scores_of(bench, views, text).argmax(-1)
    return 3 * len(split) / (time.process_time() - started)


def evaluate_here(bench: Workbench, config: RunConfig) -> float:
    """The same here, decoding the images the first time."""
    split, started, accelerator = bench.splits["test"][TASK], time.process_time(), Accelerator()
    for _ in three_adapters(bench):
        evaluate(accelerator, bench.classifier, split, BATCH)
    return 3 * len(split) / (time.process_time() - started)


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started, speeds, evaluations, losses = time.time(), {}, {}, {}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place)
        (run,) = read_run_images(settings(model, "lora", 1), [TASK], ("test",))
        save_model(model, run.prompts)
        for _ in range(args.rounds):
            for contender in CONTENDERS:
                config = settings(model, "copra" if contender == "copra" else "lora", args.steps + 1)
                bench = build(config, [TASK], splits=("train",))
                speed, loss = (train_plain if contender == "plain" else train_here)(bench, config)
                speeds.setdefault(contender, []).append(speed)
                losses[contender] = loss
                print(f"{contender}: {speed:.1f} images a CPU second", flush=True)
            for contender, way in (("plain", evaluate_plain), ("here", evaluate_here)):
                evaluations.setdefault(contender, []).append(way(build(config, [TASK], splits=("test",)), config))
                print(f"evaluation, {contender}: {evaluations[contender][-1]:.1f} images a CPU second", flush=True)
    # In the first step B is 0, so that dropout is not seen; only the order of sums differs, by the padding.
    if not math.isclose(losses["plain"], losses["lora"], rel_tol=1e-4):
        raise AssertionError(f"the loops do not train the same: {losses}")
    metrics = against_plain(speeds, "") | against_plain(evaluations, "evaluation/")
    for name, value in metrics.items():
        print(f"{name}: {value:.2f}")
    own = {"task": TASK, "shots": 16, "batch_size": BATCH, "classes": len(run.prompts), "test_images": TEST,
           "rounds": args.rounds, "model": ABOUT}  # fmt: skip
    data = {"speeds": speeds, "evaluations": evaluations}
    write_result(RECORD, Result("speed_clip", own, metrics, time.time() - started, steps=args.steps, data=data,
                                environment=environment(threads=1)))  # fmt: skip


def against_plain(speeds: dict[str, list[float]], prefix: str) -> dict[str, float]:
    """Medians, and ratios to the plain loop's with their range over rounds."""
    metrics = {}
    for name, own in speeds.items():
        ratios = [a / b for a, b in zip(own, speeds["plain"], strict=True)]
        metrics |= {
            f"images_per_second/{prefix}{name}": statistics.median(own),
            f"ratio/{prefix}{name}": statistics.median(own) / statistics.median(speeds["plain"]),
            f"ratio_min/{prefix}{name}": min(ratios),
            f"ratio_max/{prefix}{name}": max(ratios),
        }
    return metrics


if __name__ == "__main__":
    sys.exit(main())
