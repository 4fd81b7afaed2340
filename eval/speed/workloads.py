"""On what are steps timed? Model, adapter, batches and loss of each kind of model.

Rows are full and of one length, so every batch of every contender costs the same; `natural` are texts of their own
lengths, for whole runs. All texts are the packaged sample's (agnews); images are noise.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from random_clip import class_scores, save_model, text_features
from torch import Tensor, nn

from copra_llm.batches import EncodedSplit
from copra_llm.build import fixed_head
from copra_llm.classifiers import EncoderClassifier
from copra_llm.config import RunConfig
from copra_llm.conversations import InstructTask
from copra_llm.dual_encoder import DualEncoder
from copra_llm.image_inputs import image_inputs
from copra_llm.language_model import LanguageModel
from copra_llm.models import Base, add_adapter, load_base
from copra_llm.tasks.clip.catalogue import ImageTask
from copra_llm.tasks.instruct.encode import Encoded
from copra_llm.tasks.mtl15 import get_task, load_split

TASK = "agnews"
NATURAL_STEPS = 5
"""Steps of a whole run: each example is read once."""


@dataclass(frozen=True)
class Workload:
    """What all contenders share."""

    config: RunConfig
    """Of a run in this package's loop."""
    base: Base
    """Its model carries the adapter."""
    peft: nn.Module
    """The base with its adapter."""
    frozen: nn.Module
    """The base without an adapter; it shares the weights."""
    bare: nn.Module
    """Maps a batch to the loss of `frozen`."""
    bench_model: Callable[[nn.Module], nn.Module]
    """Makes of a PEFT model this package's module, which maps a batch to the same loss."""
    task: Any
    full: EncodedSplit
    natural: EncodedSplit | None = None

    @property
    def batch_size(self) -> int:
        return self.config.train.per_device_train_batch_size


@contextmanager
def without_dropout(w: Workload) -> Iterator[None]:
    """Within it neither base nor adapter drops anything out, so that losses can be compared."""
    layers = [m for model in (w.peft, w.bare) for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


class Bare(nn.Module):
    """A base model where a PEFT model is expected."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters: what one contender does to its modules, no other one sees."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def language(name: str, dtype: str, rows: int = 4, length: int = 128) -> Workload:
    """A causal language model; every token but a row's first is trained."""
    config = _config(name, dtype, rows)
    base = load_base(config.model)
    model, task = twin(base.model), InstructTask(TASK)
    bare = LanguageModel(base, Bare(model))
    peft = add_adapter(base, config.lora, init_seed=0)
    texts = _texts()
    ids = [base.tokenizer(text)["input_ids"] for text in texts]
    full = [_conversation(row) for row in _joined(ids, length)]
    few = rows * NATURAL_STEPS
    natural = [_conversation(row[:length]) for row in ids[:few]]
    return Workload(config, base, peft, model, bare, lambda model: LanguageModel(base, model), task,
                    _rows(task, full), _rows(task, natural))  # fmt: skip


def encoder(name: str, dtype: str, rows: int = 16, length: int = 64) -> Workload:
    """An encoder with a fixed head on the mean of its hidden states."""
    config, task = _config(name, dtype, rows), get_task(TASK)
    base = load_base(config.model)
    heads, model = {TASK: fixed_head(base, task, config.data)}, twin(base.model)

    def classifier(model: nn.Module) -> EncoderClassifier:
        return EncoderClassifier(base, model, [task], length, heads)

    bare = classifier(model)
    peft = add_adapter(base, config.lora, init_seed=0)
    texts, labels = _texts(), [example.label for example in load_split(task, "train", "sample")]
    joined = [" ".join(itertools.islice(itertools.cycle(texts), i, i + length)) for i in range(len(texts))]
    full, natural = ([dict(base.tokenizer(text, truncation=True, max_length=length)) for text in some]
                     for some in (joined, texts[: rows * NATURAL_STEPS]))  # fmt: skip
    return Workload(
        config, base, peft, model, bare, classifier, task, _rows(task, full, labels), _rows(task, natural, labels)
    )


def of_texts(name: str, dtype: str) -> Workload:
    """SmolLM2 as a language model, MiniLM as an encoder."""
    return {"smollm2": language, "minilm": encoder}[name](name, dtype)


def dual(folder: Path, dtype: str, rows: int = 32, classes: int = 102) -> Workload:
    """A dual encoder of random weights (`random_clip`), saved in `folder`, with CLIP-LoRA's adapter; random views."""
    prompts = [f"a photo of a {colour} {flower}, a type of flower."
               for flower, colour in itertools.product(FLOWERS, COLOURS)][:classes]  # fmt: skip
    save_model(folder, prompts)
    config = _config(str(folder), dtype, rows).replace(lora_r=2, lora_alpha=1.0, use_rslora=True, lora_dropout=0.25,
                                                       lora_target_modules=["qkv"])  # fmt: skip
    base = load_base(config.model)
    task, inputs, model = ImageTask("flowers", str(folder), "{}"), image_inputs(base), twin(base.model)
    peft = add_adapter(base, config.lora, init_seed=0)

    def classifier(model: nn.Module) -> DualEncoder:
        return DualEncoder(base, model, {task.name: prompts}, inputs)

    rng = np.random.default_rng(0)
    views = list(rng.integers(0, 256, (4 * rows, inputs.size, inputs.size, 3), dtype=np.uint8))
    labels = [int(label) for label in rng.integers(0, classes, len(views))]
    tokens = classifier(peft).prompts[task.name]
    split = EncodedSplit(task, views, labels, np.full(len(views), inputs.size))
    return Workload(config, base, peft, model, BareDual(model, tokens, inputs), classifier, task, split)


class BareDual(nn.Module):
    """A dual encoder's loss, in which both towers run in each step."""

    def __init__(self, model: nn.Module, tokens: dict[str, Tensor], inputs):
        super().__init__()
        self.model, self.tokens, self.inputs = model, tokens, inputs

    def collate(self, task, views: list[np.ndarray], labels: list[int]) -> dict:
        return {"pixels": torch.from_numpy(np.stack(views)), "labels": torch.tensor(labels)}

    def forward(self, batch: dict) -> Tensor:
        device = batch["pixels"].device
        text = text_features(self.model, {key: value.to(device) for key, value in self.tokens.items()})
        scores = class_scores(self.model, batch["pixels"], text, self.inputs.mean, self.inputs.std)
        return F.cross_entropy(scores.float(), batch["labels"])


FLOWERS = ("rose", "lily", "iris", "tulip", "daisy", "poppy", "orchid", "lotus", "violet", "peony", "aster", "dahlia",
           "primrose", "marigold", "foxglove", "snapdragon", "sunflower")  # fmt: skip
COLOURS = ("red", "blue", "white", "yellow", "orange", "purple")


def _config(model: str, dtype: str, rows: int) -> RunConfig:
    """Rank 8 on all linear layers; no weight decay, gradients clipped, as all contenders do."""
    return RunConfig().replace(
        model_name_or_path=model, dtype=dtype, bf16=dtype == "bfloat16", tasks=[TASK], lora_r=8, lora_alpha=16,
        lora_target_modules=["all-linear"], learning_rate=2e-4, per_device_train_batch_size=rows, checkpoint_at=[],
        output_dir="",
    )  # fmt: skip


def _texts() -> list[str]:
    return [" ".join(example.fields.values()) for example in load_split(get_task(TASK), "train", "sample")]


def _joined(ids: list[list[int]], length: int) -> list[list[int]]:
    """All tokens one after the other, cut into full rows."""
    tokens = list(itertools.chain.from_iterable(ids))
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def _conversation(ids: list[int]) -> list[Encoded]:
    trained = np.ones(len(ids), bool)
    trained[0] = False
    return [Encoded(np.array(ids, np.int32), trained, TASK)]


def _rows(task, encoded: list, labels: list[int] | None = None) -> EncodedSplit:
    if isinstance(encoded[0], dict):
        lengths = np.array([len(row["input_ids"]) for row in encoded])
        return EncodedSplit(task, encoded, labels[: len(encoded)], lengths)
    lengths = np.array([len(example) for (example,) in encoded])
    return EncodedSplit(task, encoded, [0] * len(encoded), lengths, lengths - 1)
