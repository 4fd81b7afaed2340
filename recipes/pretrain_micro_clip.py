"""A CLIP small enough for two cores, trained in some minutes on half of the classes of three image sets.

    pip install --no-deps open_clip_torch        # whose wheel has CLIP's byte-pair merges; nothing else of it is used
    python recipes/pretrain_micro_clip.py --data_root DATA/images --output_dir micro-clip

Flowers, DTD's first ten classes and CIFAR-10, every other class: those of `flowers51`, `dtd5` and `cifar5` are kept
apart, so that few-shot training on them meets classes that the model has never seen. The loss is cross-entropy over
the captions of all training classes, one random caption a class and step:

    logits = exp(logit_scale) * image @ caption^T        (batch, classes), unit vectors

Token embeddings stay random: a word that only the classes kept apart have is then no stranger than any other.
Writes a folder as transformers' `save_pretrained` does, and a record: accuracy on the classes kept apart, without
training (names alone, near chance) and by the nearest mean of 16 shots (whether the features are of use).
"""

import argparse
import gzip
import importlib.util
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.paths import data_root
from copra_llm.pictures import PictureCache, eval_view, needed_side, normalise, reduced, train_view, view_rng
from copra_llm.results import Result, atomic_folder, environment, peak_memory_bytes, write_result
from copra_llm.tasks.clip.catalogue import IMAGES, PLAIN_TEMPLATE, get_image_task
from copra_llm.tasks.clip.examples import ImageExample
from copra_llm.tasks.clip.few_shot import few_shot
from copra_llm.tasks.clip.folders import read_images

KEPT_APART = {"flowers51": "oxford_flowers", "dtd5": "dtd10", "cifar5": "cifar10"}
"""Sets of classes that are not trained on -> the sets that they are of."""
CAPTIONS = (PLAIN_TEMPLATE, "{}.", "a picture of a {}.", "a close-up photo of a {}.", "a small photo of the {}.")
"""Beside each set's own template."""
CLIP_MERGES = 49408 - 2 * 256 - 2
"""CLIP's tokens less the bytes (alone and at a word's end) and two special ones."""
HEAD = 32
"""Width of an attention head."""
CACHE_BYTES = 2**30
SHOTS = 16


@dataclass(frozen=True)
class Plan:
    """The model's sizes and its training."""

    data_root: str | None = None
    output_dir: str = "micro-clip"
    record: str | None = None
    """File of the result record; None: OUTPUT/result.json."""
    clip_merges: str | None = None
    """CLIP's bpe_simple_vocab_16e6.txt.gz; None: the one of open_clip_torch."""
    image_size: int = 48
    """Pixels of a side."""
    patch_size: int = 8
    width: int = 128
    """Of both towers and of the space that they share."""
    vision_layers: int = 6
    text_layers: int = 4
    steps: int = 700
    batch_size: int = 64
    least_area: float = 0.4
    """Share of an image that a training view shows at least; CLIP-LoRA's 0.08 wants longer training."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    seed: int = 0


def read_classes(root: Path | str) -> tuple[list[str], list[ImageExample], np.ndarray]:
    """Names of the classes that are not kept apart, all their images of whichever split, and how often each is drawn.

    The shares `(n,)` sum to 1 and give each of the three sets the same.
    """
    classnames, examples, shares = [], [], []
    for apart, whole in KEPT_APART.items():
        data = read_images(get_image_task(whole), root)
        data = data.select_classes([name for name in data.classnames if name not in get_image_task(apart).classes])
        own = [ImageExample(e.source, e.label + len(classnames)) for split in data.splits.values() for e in split]
        shares += [1 / (len(KEPT_APART) * len(own))] * len(own)
        examples += own
        classnames += data.classnames
    return classnames, examples, np.array(shares)


def merges_file(name: str | None) -> Path:
    """CLIP's merges.

    Raises:
        InputError: if no file is named and the package that has one is not installed, or the named file is missing.
    """
    if name is None:
        spec = importlib.util.find_spec("open_clip")
        if spec is None:
            raise InputError("open_clip_torch is not installed, whose wheel has CLIP's merges; install it with "
                             "`pip install --no-deps open_clip_torch`, or give --clip_merges FILE")  # fmt: skip
        return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not Path(name).is_file():
        raise InputError(f"--clip_merges names {name}, which is no file; give bpe_simple_vocab_16e6.txt.gz")
    return Path(name)


def tokenizer_of(path: Path) -> CLIPTokenizer:
    """CLIP's tokenizer: bytes, bytes that end a word, merges and two special ones are the tokens, in this order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().splitlines()[1 : CLIP_MERGES + 1]]
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def new_model(plan: Plan, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights, a pure function of the seed."""
    shape = {"hidden_size": plan.width, "intermediate_size": 4 * plan.width, "projection_dim": plan.width}
    shape["num_attention_heads"] = max(1, plan.width // HEAD)
    text = {"num_hidden_layers": plan.text_layers, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    vision = {"num_hidden_layers": plan.vision_layers, "image_size": plan.image_size, "patch_size": plan.patch_size}
    config = CLIPConfig(text_config=shape | text | ids, vision_config=shape | vision, projection_dim=plan.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = CLIPModel(config)
    model.text_model.embeddings.token_embedding.weight.requires_grad_(False)
    return model


class Captions:
    """Tokens of every class under every template, and the unit vectors of what a model makes of them."""

    def __init__(self, tokenizer: CLIPTokenizer, classnames: list[str], templates: list[str]):
        texts = [template.format(name) for name in classnames for template in templates]
        self.shape = len(classnames), len(templates)
        self.tokens = tokenizer(texts, padding=True, return_tensors="pt")

    def vectors(self, model: CLIPModel, choice: torch.Tensor) -> torch.Tensor:
        """`(classes, width)`, class c under its template `choice[c]`."""
        rows = torch.arange(self.shape[0]) * self.shape[1] + choice
        chosen = {key: value[rows] for key, value in self.tokens.items()}
        return functional.normalize(model.get_text_features(**chosen).pooler_output, dim=-1)


class Eyes:
    """Images as unit vectors."""

    def __init__(self, processor: CLIPImageProcessorPil, size: int):
        self.processor, self.size = processor, size
        self.cache = PictureCache(CACHE_BYTES, partial(reduced, side=needed_side(size)))

    def vectors(self, model: CLIPModel, views: list[np.ndarray]) -> torch.Tensor:
        """`(n, width)`."""
        stacked = torch.from_numpy(np.stack(views))
        pixels = normalise(stacked, self.processor.image_mean, self.processor.image_std)
        return functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def see(self, model: CLIPModel, examples: list[ImageExample]) -> torch.Tensor:
        """`(n, width)`, the middle of every image."""
        views = [eval_view(self.cache[example.source], self.size) for example in examples]
        return torch.cat([self.vectors(model, views[i : i + 256]) for i in range(0, len(views), 256)])


def train(
    model: CLIPModel, captions: Captions, eyes: Eyes, examples: list[ImageExample], shares: np.ndarray, plan: Plan
) -> list[float]:
    """The loss of every step; a step draws its images by their shares, none twice."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan))
    losses = []
    for step in (bar := tqdm(range(plan.steps), unit="step", disable=not sys.stderr.isatty())):
        rng = np.random.Generator(np.random.Philox(key=plan.seed, counter=[0, step, 4, 0]))
        batch = [examples[i] for i in rng.choice(len(examples), plan.batch_size, replace=False, p=shares)]
        choice = torch.from_numpy(rng.integers(captions.shape[1], size=captions.shape[0]))
        views = [
            train_view(eyes.cache[example.source], eyes.size, view_rng(plan.seed, step, i), (plan.least_area, 1.0))
            for i, example in enumerate(batch)
        ]
        similarity = eyes.vectors(model, views) @ captions.vectors(model, choice).T  # (batch, classes)
        labels = torch.tensor([example.label for example in batch])
        loss = functional.cross_entropy(model.logit_scale.exp() * similarity, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


def rate(step: int, plan: Plan) -> float:
    """Share of the learning rate: a linear rise, then half a cosine to nothing."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))


def apart(model: CLIPModel, tokenizer: CLIPTokenizer, eyes: Eyes, root: Path | str, seed: int) -> dict[str, float]:
    """Accuracies in percent on the classes that were kept apart."""
    metrics = {}
    for name in KEPT_APART:
        task = get_image_task(name)
        data = read_images(task, root)
        labels = torch.tensor([example.label for example in data.splits["test"]])
        images = eyes.see(model, data.splits["test"])
        captions = Captions(tokenizer, data.classnames, [task.template])
        with torch.no_grad():
            named = captions.vectors(model, torch.zeros(len(data.classnames), dtype=torch.long))
        shots = eyes.see(model, few_shot(data.splits["train"], SHOTS, seed, data.classnames))
        means = functional.normalize(shots.unflatten(0, (-1, SHOTS)).mean(dim=1), dim=-1)
        metrics[f"test/{name}/chance"] = 100 / len(data.classnames)
        metrics[f"test/{name}/accuracy"] = 100 * (images @ named.T).argmax(1).eq(labels).float().mean().item()
        nearest = (images @ means.T).argmax(1).eq(labels).float().mean().item()
        metrics[f"test/{name}/nearest_mean_accuracy"] = 100 * nearest
    return metrics


def pretrain(plan: Plan) -> Result:
    """Train, write the folder, and say what the model is good for."""
    start, cpu = time.perf_counter(), time.process_time()
    root = data_root(plan.data_root, IMAGES)
    tokenizer = tokenizer_of(merges_file(plan.clip_merges))
    classnames, examples, shares = read_classes(root)
    side = {"height": plan.image_size, "width": plan.image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": plan.image_size}, crop_size=side)
    model, eyes = new_model(plan, tokenizer), Eyes(processor, plan.image_size)
    captions = Captions(tokenizer, classnames, list(CAPTIONS))
    losses = train(model, captions, eyes, examples, shares, plan)
    model.eval()
    metrics = apart(model, tokenizer, eyes, root, plan.seed) | {"train/loss": float(np.mean(losses[-50:]))}
    with atomic_folder(Path(plan.output_dir)) as folder:
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder)
    return Result(
        protocol="pretrain",
        config=asdict(plan) | {"data_root": None, "output_dir": None, "record": None, "clip_merges": None},
        metrics=metrics,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
        steps=plan.steps,
        examples=plan.steps * plan.batch_size,
        data={
            "cpu_seconds": time.process_time() - cpu,
            "images": len(examples),
            "classes": classnames,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        environment=environment(device="cpu", threads=torch.get_num_threads()),
    )


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Plan):
        kind = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    plan = Plan(**vars(parser.parse_args(argv)))
    torch.set_num_threads(1)
    result = pretrain(plan)
    write_result(Path(plan.record or Path(plan.output_dir) / "result.json"), result)
    for name, value in result.metrics.items():
        print(f"{name}: {value:.1f}")


if __name__ == "__main__":
    sys.exit(main())
