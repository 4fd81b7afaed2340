"""Who takes the steps that are timed? Each trains the same adapter on the same batches, from the same start.

    base         the frozen base's loss, forward and backward, with a gradient of what enters the first block; it keeps
                 no keys and values for tokens to come, as transformers would by default
    truncated    the same, with a gradient of what enters the lowest block that CopRA trains in that step
    peft         PEFT LoRA in the loop anybody would write: fused AdamW, clipping, the loss of this package
    trainer      transformers.Trainer around PEFT LoRA, its defaults
    sft          TRL's SFTTrainer, its defaults but activation checkpointing, which costs time to save memory
    lora, copra  copra_llm.train.fit with all it does in a step

A watch is told when the first batch is made, and when a step is done: loading and start-up do not count.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from sampling import sampled_schedule, step_masks
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workloads import Workload, twin

from copra_llm.activations import no_cache_by_default
from copra_llm.batches import BatchStream, EncodedSplit, train_loader
from copra_llm.build import Workbench
from copra_llm.gates import LayerGates
from copra_llm.language_model import LanguageModel
from copra_llm.train import fit


class Watch(Protocol):
    """Looks at a contender's steps."""

    def begin(self) -> None:
        """The first batch is about to be made; said again for each further batch."""

    def step(self) -> None:
        """A step is done."""


class Contender(Protocol):
    def __call__(self, w: Workload, device: str, split: EncodedSplit, steps: int, seed: int, watch: Watch) -> float:
        """Take steps.

        Args:
            w: what is trained; a copy of its adapter, so that the next contender starts from the same.
            device: "cpu" or "cuda".
            split: the examples.
            steps: optimizer steps; of CopRA, its whole schedule.
            seed: of the masks.
            watch: is told of the steps.

        Returns:
            Mean loss over the steps, in nats.
        """


# --- the frozen base --------------------------------------------------------------------------------------


def base(w, device, split, steps, seed, watch) -> float:
    players = LayerGates(w.peft).num_layers
    return _frozen(w, device, split, [np.ones(players, bool)] * steps, watch)


def truncated(w, device, split, steps, seed, watch) -> float:
    return _frozen(w, device, split, step_masks(w, steps, seed), watch)


def _frozen(w: Workload, device: str, split: EncodedSplit, masks: Sequence[np.ndarray], watch: Watch) -> float:
    model, cuts, losses = w.bare.train(), [lowest_blocks(w, mask) for mask in masks], []
    for blocks, batch in zip(cuts, _batches(w, model, split, len(masks), watch), strict=True):
        with entering(blocks), no_cache_by_default(w.frozen), _autocast(w, device):
            loss = model(send_to_device(batch, device))
        loss.backward()
        losses.append(loss.detach())
        watch.step()
    return float(torch.stack(losses).mean())


def lowest_blocks(w: Workload, mask: np.ndarray) -> list[nn.Module]:
    """Of each tower with an active layer the lowest such block, of the base without an adapter."""
    lowest: dict[str, str] = {}
    for key, active in zip(LayerGates(w.peft).keys, mask, strict=True):
        if active:
            lowest.setdefault(key.rsplit(".", 1)[0], key)
    return [w.frozen.get_submodule(key) for key in lowest.values()]


@contextmanager
def entering(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the hidden states that enter these blocks begin a graph of their own."""

    def begin(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield


# --- PEFT LoRA in other loops -----------------------------------------------------------------------------


def peft(w, device, split, steps, seed, watch) -> float:
    settings, model = w.config.train, w.bench_model(twin(w.peft)).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for batch in _batches(w, model, split, steps, watch):
        with _autocast(w, device):
            loss = model(send_to_device(batch, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        watch.step()
    return float(torch.stack(losses).mean())


def trainer(w, device, split, steps, seed, watch) -> float:
    model = twin(w.peft)
    if isinstance(w.bench_model(model), LanguageModel):
        rows = [{"input_ids": example.input_ids.tolist()} for (example,), _ in _in_order(w, split, steps)]
        collate = DataCollatorForLanguageModeling(w.base.tokenizer, mlm=False)
    else:
        model, rows = WithLoss(w.bench_model(model)), _in_order(w, split, steps)

        def collate(some: list[tuple]) -> dict:
            encoded, labels = zip(*some, strict=True)
            return model.classifier.collate(w.task, list(encoded), list(labels))

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**_arguments(w, device, split, steps, folder), remove_unused_columns=False)
        own = Trainer(model, args, _said(collate, watch), rows, callbacks=[_Told(watch)])
        return _trained(own)


def sft(w, device, split, steps, seed, watch) -> float:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [example.input_ids.tolist() for (example,), _ in _in_order(w, split, steps)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**_arguments(w, device, split, steps, folder), gradient_checkpointing=False)
        own = SFTTrainer(twin(w.peft), args, train_dataset=Dataset.from_dict({"input_ids": rows}),
                         processing_class=w.base.tokenizer, callbacks=[_Told(watch)])  # fmt: skip
        own.data_collator = _said(own.data_collator, watch)
        return _trained(own)


def _trained(own: Trainer) -> float:
    # It would print the loss as a line of its own.
    own.remove_callback(PrinterCallback)
    return own.train().training_loss


class WithLoss(nn.Module):
    """A classifier as `Trainer` wants a model."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, num_items_in_batch=None, **batch) -> dict:
        return {"loss": self.classifier(batch)}


class _Told(TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, *args, **kwargs):
        self.watch.step()


def _arguments(w: Workload, device: str, split: EncodedSplit, steps: int, folder: str) -> dict:
    """What is the same for all; full rows come in everybody's order, texts in the trainer's own."""
    settings = w.config.train
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": w.batch_size,
        "learning_rate": settings.learning_rate, "optim": "adamw_torch_fused", "bf16": settings.bf16,
        "logging_steps": steps, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "use_cpu": device == "cpu", "dataloader_pin_memory": device != "cpu",
        "train_sampling_strategy": "sequential" if split is w.full else "random",
    }  # fmt: skip


# --- this package -----------------------------------------------------------------------------------------


def lora(w, device, split, steps, seed, watch) -> float:
    return _fitted(w, device, split, steps, watch, method="lora")


def copra(w, device, split, steps, seed, watch) -> float:
    return _fitted(w, device, split, steps, watch, method="copra", mask_seed=seed, **sampled_schedule(steps))


def _fitted(w: Workload, device: str, split: EncodedSplit, steps: int, watch: Watch, **changes) -> float:
    return fitted(w, twin(w.peft), device, split, steps, watch, **changes)


def fitted(
    w: Workload, model: nn.Module, device: str, split: EncodedSplit, steps: int, watch: Watch, **changes
) -> float:
    """Train this PEFT model, with some settings changed."""
    config = w.config.replace(max_steps=steps, logging_steps=steps, **changes)
    classifier = w.bench_model(model)
    # A pass over one example is start-up: it shows which layers take one input.
    classifier.collate = _said(classifier.collate, watch, rows=w.batch_size)
    base = replace(w.base, model=model.get_base_model())
    bench = Workbench(base, classifier, [w.task], {"train": {w.task.name: split}})
    own = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if config.train.bf16 else "no")
    with tempfile.TemporaryDirectory() as folder:
        return fit(own, bench, config, Path(folder), watch.step).log[-1]["loss"]


CONTENDERS: dict[str, Contender] = {
    "base": base, "truncated": truncated, "peft": peft, "trainer": trainer, "sft": sft, "lora": lora, "copra": copra,
}  # fmt: skip
SCHEDULED = ("truncated", "copra")
"""Those whose steps are not all alike."""


def contenders_of(w: Workload) -> list[str]:
    """Who can train it: TRL's trainer takes language models alone."""
    causal = w.base.kind == "causal"
    return [name for name in CONTENDERS if causal or name != "sft"]


# --- batches ----------------------------------------------------------------------------------------------


def _stream(w: Workload, split: EncodedSplit, steps: int) -> BatchStream:
    return BatchStream([split], w.batch_size, w.config.train.seed_of("data"), 0, steps)


def _batches(w: Workload, model: nn.Module, split: EncodedSplit, steps: int, watch: Watch) -> DataLoader:
    told = SimpleNamespace(collate=_said(model.collate, watch))
    return train_loader(told, [split], _stream(w, split, steps))


def _in_order(w: Workload, split: EncodedSplit, steps: int) -> list[tuple]:
    """The examples of the stream with their labels, one after the other."""
    places = [index for batch in _stream(w, split, steps) for _, index in batch]
    return [(split.encoded[index], split.labels[index]) for index in places]


def _said(collate: Callable, watch: Watch, rows: int | None = None) -> Callable:
    """`collate`, of which the watch is told; of batches of so many rows, if that is given."""

    def told(*args):
        if rows is None or len(args[1]) == rows:
            watch.begin()
        return collate(*args)

    return told


def _autocast(w: Workload, device: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=w.config.train.bf16)
