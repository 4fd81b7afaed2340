"""What stands ready before a run starts: the base model, an adapter, the classifier and its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from copra_llm.batches import EncodedSplit, encode_split
from copra_llm.classifiers import Classifier, build_classifier, make_head, read_heads
from copra_llm.config import DataSettings, RunConfig
from copra_llm.models import Base, add_adapter, load_adapter, load_base
from copra_llm.paths import data_root
from copra_llm.tasks.mtl15 import SPLITS, Task, get_task, load_split

AUTO_HEAD = "label_words"
"""What `--head auto` means; the README's limits say what was measured."""


@dataclass
class Workbench:
    """Everything a run works with; training replaces the classifier by its prepared form."""

    base: Base
    classifier: Classifier
    tasks: list[Task]
    splits: dict[str, dict[str, EncodedSplit]]
    """`{split: {task: examples}}`."""


def build(
    config: RunConfig, tasks: list[str], *, adapter: Path | None = None, splits: tuple[str, ...] = SPLITS
) -> Workbench:
    """Load data first (the cheapest to be wrong), then the model; attach a fresh or a saved adapter.

    Raises:
        InputError: for whatever is wrong with the names, data, model or adapter.
    """
    chosen = [get_task(name) for name in tasks]
    root = data_root(config.data.data_root, "mtl15")
    limits = {"train": config.data.max_train_samples}
    examples = {
        split: {t.name: load_split(t, split, root, limits.get(split, config.data.max_eval_samples)) for t in chosen}
        for split in splits
    }
    base = load_base(config.model)
    heads = {}
    if base.kind == "encoder":
        heads = read_heads(adapter) if adapter is not None else {}
        heads |= {t.name: fixed_head(base, t, config.data) for t in chosen if t.name not in heads}
    if adapter is None:
        model = add_adapter(base, config.lora, config.train.seed_of("init"))
    else:
        model = load_adapter(base, adapter)
    classifier = build_classifier(
        base, model, chosen, max_length=config.data.max_length, heads=heads, train_head=config.data.train_head
    )
    encoded = {
        split: {t.name: encode_split(classifier, t, per_task[t.name]) for t in chosen}
        for split, per_task in examples.items()
    }
    return Workbench(base, classifier, chosen, encoded)


def fixed_head(base: Base, task: Task, settings: DataSettings) -> Tensor:
    """An encoder's head for a task `(num_labels, hidden)`, as the settings want it; no adapter may be active."""
    kind = AUTO_HEAD if settings.head == "auto" else settings.head
    return make_head(base, task, kind, settings.head_seed)
