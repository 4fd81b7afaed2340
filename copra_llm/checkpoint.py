"""What does a run leave on disk, and how does it go on after a stop?

A checkpoint is a folder that appears whole or not at all: the adapter as anybody loads it, the optimizer's
state, and the progress with the settings it was made under. Data order, masks and dropout are functions of
(seed, step), so nothing else has to be saved.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from copra_llm.adapter_files import CONFIG, RESULT, WEIGHTS_FILE
from copra_llm.classifiers import read_heads
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError
from copra_llm.initial import read_for_training, write_for_base
from copra_llm.results import atomic_folder, write_atomic
from copra_llm.saved_runs import checkpoint_folder
from copra_llm.settings import WITHOUT_EFFECT

PREEMPTED = "PREEMPTED"
"""The file that says that a run was stopped."""
STATE, OPTIMIZER = "state.json", "optimizer.pt"
"""What a checkpoint holds beside the adapter."""

# May differ between a checkpoint's run and the one that resumes it: the folder itself is one task's.
_FREE_ON_RESUME = WITHOUT_EFFECT | {"tasks"}


@dataclass
class Progress:
    """Where a run is, and what it has logged."""

    step: int = 0
    """Optimizer steps done."""
    log: list[dict[str, float]] = field(default_factory=list)
    """One entry every `logging_steps`: step, loss, learning_rate, grad_norm
    (of the last step, before clipping), activation_prob, active_layers."""
    dev: list[dict[str, float]] = field(default_factory=list)
    """One entry every `eval_steps`: step and the dev metrics."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """One entry an answer to `sample_prompts`: step, prompt and text."""
    skipped: int = 0
    """Steps left out because their loss was not finite."""
    seconds: float = 0.0
    """Time in the loop so far, evaluation and saving included."""


def save_adapter(classifier, folder: Path) -> None:
    """Write a plain PEFT adapter (and an encoder's heads beside it), atomically."""
    with atomic_folder(folder) as fresh:
        _write_adapter(classifier, fresh)


def _write_adapter(classifier, folder: Path) -> None:
    config = classifier.model.peft_config["default"]
    # PEFT keeps the modules as a set, whose order changes from process to process; the file should not.
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    # The Hub would only be asked whether the vocabulary was changed, and it was not.
    classifier.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    write_for_base(classifier.model, folder)
    classifier.save_extras(folder)


def save_checkpoint(accelerator, classifier, optimizer, config: RunConfig, folder: Path, progress: Progress) -> None:
    """`checkpoint-<step>/`: the adapter as anybody loads it, the optimizer's state, and the progress."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with atomic_folder(checkpoint_folder(folder, progress.step)) as fresh:
            _write_adapter(accelerator.unwrap_model(classifier), fresh)
            torch.save(optimizer.state_dict(), fresh / OPTIMIZER)
            write_atomic(fresh / STATE, json.dumps({"config": config.flat(), **vars(progress)}))
    accelerator.wait_for_everyone()


def load_weights(classifier, folder: Path) -> None:
    """Give a model the adapter that it, or one made like it, has saved in a folder, and an encoder its heads."""
    tensors = read_for_training(classifier.model, load_file(folder / WEIGHTS_FILE))
    set_peft_model_state_dict(classifier.model, tensors)
    for task, head in read_heads(folder).items():
        classifier.heads[task].data.copy_(head)


def resume(config: RunConfig, folder: Path, classifier, optimizer, scheduler) -> Progress:
    """Load the checkpoint that the config names into the parts; a fresh `Progress` if there is none."""
    wanted = config.train.resume_from_checkpoint
    if wanted is None:
        return Progress()
    checkpoint = _latest_checkpoint(folder) if wanted == "latest" else Path(wanted)
    if checkpoint is None:
        return Progress()
    if not (checkpoint / STATE).is_file():
        raise InputError(f"--resume_from_checkpoint names {checkpoint}, which holds no {STATE}; give a checkpoint")
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    refuse_other_settings(checkpoint, state.pop("config"), config)
    load_weights(classifier, checkpoint)
    optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER, weights_only=True))
    progress = Progress(**state)
    advance(scheduler, progress.step)
    return progress


def advance(scheduler, steps: int) -> None:
    """Bring the learning rate to where it was after `steps` more; another run has taken them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def claim(accelerator: Accelerator, folder: Path, config: RunConfig) -> None:
    """Write the run's settings, once nothing is left to be refused.

    A record says that a run is finished: one of an earlier run must not outlive the start of this one.
    """
    if accelerator.is_main_process:
        (folder / RESULT).unlink(missing_ok=True)
        write_atomic(folder / CONFIG, dump_yaml(config))
    accelerator.wait_for_everyone()


def refuse_other_settings(place: Path, before: dict[str, Any], config: RunConfig) -> None:
    # A run from before a setting existed had its default.
    before = RunConfig().flat() | before
    for key, now in config.flat().items():
        if key not in _FREE_ON_RESUME and before[key] != now:
            raise InputError(f"{place} was trained with {key} = {before[key]}, but this run has {key} = {now}; "
                             "resume with the same settings, or start anew elsewhere")  # fmt: skip


def _latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; a checkpoint appears whole or not at all."""
    found = [c for c in folder.glob("checkpoint-*") if (c / STATE).is_file()]
    return max(found, key=lambda c: int(c.name.rsplit("-", 1)[1]), default=None)


def rotate(accelerator: Accelerator, folder: Path, settings, keep_at: set[int], newest: int) -> None:
    """Remove the oldest `save_steps` checkpoints beyond `save_total_limit`; those of `checkpoint_at` stay."""
    if settings.save_total_limit is None or not accelerator.is_main_process:
        return
    steps = sorted(int(c.name.rsplit("-", 1)[1]) for c in folder.glob("checkpoint-*"))
    # Later ones are of another run in this folder: counting them would remove what was just saved.
    for step in [s for s in steps if s not in keep_at and s <= newest][: -settings.save_total_limit]:
        # Renamed first: a kill in the middle leaves no torn checkpoint under its name.
        doomed = folder / f".removed-{step}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint_folder(folder, step), doomed)
        shutil.rmtree(doomed)
