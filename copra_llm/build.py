"""What stands ready before a run starts: the base model, an adapter, the classifier and its data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from copra_llm.adapters import AdapterWeights, LoraFactors, load_adapter_weights
from copra_llm.batches import EncodedSplit, encode_split
from copra_llm.choice_model import ChoiceModel
from copra_llm.classifiers import Classifier, build_classifier, make_head, read_heads
from copra_llm.config import RunConfig
from copra_llm.conversations import InstructTask, asks_conversations, encode_conversations, read_conversations
from copra_llm.dual_encoder import DualEncoder
from copra_llm.errors import InputError, nearest
from copra_llm.image_inputs import image_inputs
from copra_llm.images import ImageRun, asks_images, encode_images, read_run_images
from copra_llm.language_model import LanguageModel, refuse_leaking_packs
from copra_llm.models import Base, add_adapter, load_adapter, load_base
from copra_llm.paths import data_root
from copra_llm.settings import DataSettings, ImageSettings, PartSettings
from copra_llm.shards import shards
from copra_llm.tasks.choices import COMMONSENSE, ChoiceTask, choice_task_names, get_choice_task, load_choices
from copra_llm.tasks.clip.catalogue import ImageTask, image_task_names
from copra_llm.tasks.instruct.lengths import Counts
from copra_llm.tasks.mtl15 import SPLITS, Example, Task, get_task, load_split, task_names

AUTO_HEAD = "label_words"
"""What `--head auto` means; the README's limits say what was measured."""


@dataclass
class Workbench:
    """Everything a run works with; training replaces the classifier by its prepared form."""

    base: Base
    classifier: Classifier | LanguageModel | ChoiceModel | DualEncoder
    tasks: list[Task] | list[InstructTask] | list[ChoiceTask] | list[ImageTask]
    splits: dict[str, dict[str, EncodedSplit]]
    """`{split: {task: examples}}`."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """What became of the records of each split, where some may be cut or dropped."""
    backend: Any = None
    """What training has prepared the classifier with (`backends`)."""


def build(
    config: RunConfig, tasks: list[str], *, adapter: Path | None = None, splits: tuple[str, ...] = SPLITS
) -> Workbench:
    """Load data first (the cheapest to be wrong), then the model; attach a fresh or a saved adapter.

    Raises:
        InputError: for whatever is wrong with the names, data, model or adapter.
    """
    if asks_conversations(config, tasks):
        if tasks[0] in choice_task_names():
            raise InputError(f"these conversations are called {tasks[0]}, which is an evaluation's name; give --tasks "
                             "another one")  # fmt: skip
        return _build_conversations(config.replace(tasks=tasks), adapter, splits)
    if set(tasks) & set(choice_task_names()):
        return _build_choices(config, tasks, adapter, splits)
    if asks_images(config, tasks):
        return _build_images(config, tasks, adapter, splits)
    _check_names(tasks)
    chosen = [get_task(name) for name in tasks]
    examples = {split: {task.name: load_examples(config, task, split) for task in chosen} for split in splits}
    start = _start(config, adapter)
    base = load_base(config.model)
    heads = {}
    if base.kind == "encoder":
        heads = read_heads(adapter) if adapter is not None else {}
        if start is not None:
            heads = {key.removesuffix(".weight"): head for key, head in start.heads.items()}
        heads |= {t.name: fixed_head(base, t, config.data) for t in chosen if t.name not in heads}
    model = _attached(base, config, adapter, start)
    classifier = build_classifier(
        base, model, chosen, max_length=config.data.max_length, heads=heads, train_head=config.data.train_head
    )
    encoded = {
        split: {t.name: encode_split(classifier, t, per_task[t.name]) for t in chosen}
        for split, per_task in examples.items()
    }
    return Workbench(base, classifier, chosen, encoded)


def _check_names(tasks: list[str]) -> None:
    known = [*task_names(), InstructTask.name, *choice_task_names(), *image_task_names()]
    for name in tasks:
        if name not in known:
            raise InputError(f'there is no task "{name}"{nearest(name, known)}; the tasks are {", ".join(known)}')


def _build_conversations(config: RunConfig, adapter: Path | None, splits: tuple[str, ...]) -> Workbench:
    records, start = read_conversations(config, splits), _start(config, adapter)
    base = load_base(config.model)
    encoded, counts = encode_conversations(records, base.tokenizer, config)
    if config.instruct.packing and "train" in splits:
        refuse_leaking_packs(base)
    model = _attached(base, config, adapter, start)
    return Workbench(base, LanguageModel(base, model), [InstructTask(*config.data.tasks)], encoded, counts)


def _build_choices(config: RunConfig, tasks: list[str], adapter: Path | None, splits: tuple[str, ...]) -> Workbench:
    if adapter is None:
        raise InputError(f"{tasks[0]} is for evaluation; train on its records as conversations: "
                         "recipes/train_instruct.py --dataset_name FILE")  # fmt: skip
    chosen = [get_choice_task(name) for name in tasks]
    root = data_root(config.data.data_root, COMMONSENSE)
    examples = {s: {t.name: load_choices(t, s, root, config.data.max_eval_samples) for t in chosen} for s in splits}
    base = load_base(config.model)
    model = ChoiceModel(base, load_adapter(base, adapter), config.data.max_length)
    encoded, counts = {}, {}
    for split, per_task in examples.items():
        encoded[split] = {t.name: encode_split(model, t, per_task[t.name]) for t in chosen}
        n, cut = map(sum, zip(*((len(e), sum(c.cut for c in e.encoded)) for e in encoded[split].values()), strict=True))
        counts[split] = Counts(read=n, kept=n, cut=cut)
    return Workbench(base, model, chosen, encoded, counts)


def _build_images(config: RunConfig, tasks: list[str], adapter: Path | None, splits: tuple[str, ...]) -> Workbench:
    settings = config.image or ImageSettings()
    runs = [_own_images(run, config.part) for run in read_run_images(config, tasks, splits)]
    start = _start(config, adapter)
    if config.train.neftune_noise_alpha is not None:
        raise InputError("--neftune_noise_alpha is noise on a language model's embeddings, but images are classified "
                         "by a dual encoder; leave it out")  # fmt: skip
    base = load_base(config.model)
    inputs = image_inputs(base)
    model = _attached(base, config, adapter, start)
    classifier = DualEncoder(base, model, {run.task.name: run.prompts for run in runs}, inputs)
    encoded = encode_images(runs, inputs, settings, config.train.dataloader_num_workers)
    return Workbench(base, classifier, [run.task for run in runs], encoded)


def _own_images(run: ImageRun, part: PartSettings) -> ImageRun:
    """With this client's share of the training images."""
    return replace(run, splits={s: _own_share(e, part) if s == "train" else e for s, e in run.splits.items()})


def _start(config: RunConfig, adapter: Path | None) -> AdapterWeights | None:
    """What a fresh adapter starts from, if the settings name something."""
    if adapter is not None or config.part.init_adapter is None:
        return None
    if config.lora.changes_base:
        raise InputError(f"--init_adapter and --init_lora_weights {config.lora.init_lora_weights} both say where the "
                         "adapter starts, from unequal bases; give one of them")  # fmt: skip
    return load_adapter_weights(config.part.init_adapter)


def _attached(base: Base, config: RunConfig, adapter: Path | None, start: AdapterWeights | None) -> PeftModel:
    """The base with the saved adapter, or with a fresh one."""
    if adapter is not None:
        return load_adapter(base, adapter)
    encoder = "both" if config.image is None else config.image.encoder
    model = add_adapter(base, config.lora, config.train.seed_of("init"), encoder)
    if start is not None:
        start_from(model, start, config.lora.scaling)
    return model


def fixed_head(base: Base, task: Task, settings: DataSettings) -> Tensor:
    """An encoder's head for a task `(num_labels, hidden)`, as the settings want it; no adapter may be active."""
    kind = AUTO_HEAD if settings.head == "auto" else settings.head
    return make_head(base, task, kind, settings.head_seed)


def load_examples(config: RunConfig, task: Task, split: str) -> list[Example]:
    """The examples of a split that the settings leave: of the training split, this client's share."""
    root = data_root(config.data.data_root, "mtl15")
    if split != "train":
        return load_split(task, split, root, config.data.max_eval_samples)
    return _own_share(load_split(task, split, root, config.data.max_train_samples), config.part)


def training_labels(config: RunConfig, name: str) -> tuple[list[int], int]:
    """The labels of the examples that a run trains on, and how many labels the task has; no model is loaded.

    Raises:
        InputError: as `build`.
    """
    if asks_images(config, [name]):
        (run,) = read_run_images(config, [name], ("train",))
        return [e.label for e in _own_images(run, config.part).splits["train"]], len(run.prompts)
    task = get_task(name)
    return [example.label for example in load_examples(config, task, "train")], len(task.labels)


def _own_share(examples: list[Any], part: PartSettings) -> list[Any]:
    """This client's share of examples with labels."""
    if part.num_clients == 1:
        return examples
    labels = [example.label for example in examples]
    options = {"split": part.client_split, "beta": part.dirichlet_beta, "seed": part.split_seed}
    return [examples[i] for i in shards(labels, part.num_clients, **options)[part.client]]


def start_from(model: PeftModel, weights: AdapterWeights, scaling: float) -> None:
    """Give a fresh adapter the weights of a saved one.

    Args:
        model: keeps its own scaling; where the saved one differs, A and B make up for it.
        weights: of the same ranks and targets.
        scaling: the model's own.

    Raises:
        InputError: if ranks or targets differ.
    """
    factors = {}
    for name, f in weights.factors.items():
        lora_A, lora_B = f.at_scaling(scaling)
        factors[name] = LoraFactors(lora_A.to(f.lora_A.dtype), lora_B.to(f.lora_B.dtype), scaling)
    tensors = replace(weights, factors=factors).state_dict()
    own, saved = ({key: tuple(t.shape) for key, t in d.items()} for d in (get_peft_model_state_dict(model), tensors))
    for key in sorted(own.keys() | saved.keys()):
        if own.get(key) != saved.get(key):
            raise InputError(
                f"--init_adapter {weights.source} has {saved.get(key, 'nothing')} for {key}, but this run has "
                f"{own.get(key, 'nothing')}; give both the same ranks, targets and layers"
            )
    set_peft_model_state_dict(model, tensors)
