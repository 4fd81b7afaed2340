"""What does a run leave on disk, and how does it go on after a stop?

A checkpoint is a folder that appears whole or not at all: the adapter as anybody loads it, the optimizer's
state, the progress with the settings it was made under, and a manifest by which later damage shows. Data order, masks
and dropout are functions of (seed, step), so nothing else has to be saved; and the number of processes may change, as
long as a step has as many examples.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
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
from copra_llm.locks import FolderLock
from copra_llm.manifest import MANIFEST, damage, write_manifest
from copra_llm.processes import on_main
from copra_llm.results import atomic_folder, temporary_of, write_atomic
from copra_llm.saved_runs import ADAPTER, checkpoint_folder
from copra_llm.settings import WITHOUT_EFFECT

PREEMPTED = "PREEMPTED"
"""The file that says that a run was stopped."""
BEST = "best"
"""The folder of the best adapter so far, while a run that wants it goes on."""
STATE, OPTIMIZER = "state.json", "optimizer.pt"
"""What a checkpoint holds beside the adapter."""

# May differ between a checkpoint's run and the one that resumes it: the folder itself is one task's.
_FREE_ON_RESUME = WITHOUT_EFFECT | {"tasks"}
# May differ where their product with the number of processes does not.
_MAKE_A_STEP = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


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
    unlogged: tuple[float, int] = (0.0, 0)
    """Sum and number of the losses since the last entry of the log."""
    seconds: float = 0.0
    """Time in the loop so far, evaluation and saving included."""
    examples_a_step: int | None = None
    """Examples of an optimizer step on all processes; None: of a checkpoint from before this was noted."""
    sent: tuple[int, int] = (0, 0)
    """Bytes that this process has put into the exchange of gradients, and the number of steps that were counted."""
    stream_batch_size: int | None = None
    """Examples of a micro-batch of the stream; that of the run's first start, whatever its batches are later."""


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


def save_checkpoint(accelerator, classifier, backend, config: RunConfig, folder: Path, progress: Progress) -> None:
    """`checkpoint-<step>/`: the adapter as anybody loads it, the optimizer's state, the progress, and the manifest.

    All processes call it: where parts of the model or of the state are spread over them, they are brought together.
    """
    optimizer_state = backend.optimizer_state()

    def write() -> None:
        with atomic_folder(checkpoint_folder(folder, progress.step)) as fresh:
            _write_adapter(whole, fresh)
            # By way of memory: where the disk is full, torch's own writer says that a position is unexpected.
            buffer = io.BytesIO()
            torch.save(optimizer_state, buffer)
            (fresh / OPTIMIZER).write_bytes(buffer.getbuffer())
            write_atomic(fresh / STATE, json.dumps({"config": config.flat(), **vars(progress)}))
            write_manifest(fresh)

    with backend.whole(classifier) as whole:
        on_main(accelerator, write)


def load_weights(classifier, folder: Path) -> None:
    """Give a model the adapter that it, or one made like it, has saved in a folder, and an encoder its heads."""
    tensors = read_for_training(classifier.model, load_file(folder / WEIGHTS_FILE))
    set_peft_model_state_dict(classifier.model, tensors)
    for task, head in read_heads(folder).items():
        classifier.heads[task].data.copy_(head)


def resume(
    accelerator: Accelerator, config: RunConfig, folder: Path, classifier, optimizer, scheduler, examples_a_step: int
) -> Progress:
    """Load the checkpoint that the config names into the parts; a fresh `Progress` if there is none.

    Raises:
        InputError: for a checkpoint that is not whole, or of other settings; ToldElsewhere on the other processes.
    """
    batch_size = config.train.per_device_train_batch_size
    checkpoint = on_main(accelerator, lambda: _chosen_checkpoint(config.train.resume_from_checkpoint, folder))
    if checkpoint is None:
        return Progress(examples_a_step=examples_a_step, stream_batch_size=batch_size)
    before, progress = _read_state(checkpoint)
    examples = None if progress.examples_a_step is None else (progress.examples_a_step, examples_a_step)
    refuse_other_settings(checkpoint, before, config, examples)
    load_weights(classifier, checkpoint)
    optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER, weights_only=True))
    progress.examples_a_step = examples_a_step
    progress.stream_batch_size = progress.stream_batch_size or batch_size
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

    def write() -> None:
        (folder / RESULT).unlink(missing_ok=True)
        write_atomic(folder / CONFIG, dump_yaml(config))

    on_main(accelerator, write)


@contextlib.contextmanager
def sole_writer(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """The run's folder is locked, and rid of what killed runs have left half-written.

    Raises:
        InputError: if another run is at work there; ToldElsewhere on the other processes.
    """
    lock = FolderLock(folder)

    def begin() -> None:
        if lock.take():
            _remove_leftovers(folder)

    try:
        on_main(accelerator, begin)
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    if (folder / RESULT).is_file():
        shutil.rmtree(folder / BEST, ignore_errors=True)
    for path in folder.iterdir():
        if path.name.startswith(_DOOMED) or _LEFT_HALF_WRITTEN.fullmatch(temporary_of(path) or ""):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


_DOOMED = ".removed-"
_WRITTEN = (ADAPTER, BEST, CONFIG, RESULT, PREEMPTED)
_LEFT_HALF_WRITTEN = re.compile("|".join([*map(re.escape, _WRITTEN), r"checkpoint-\d+"]))


def refuse_other_settings(
    place: Path, before: dict[str, Any], config: RunConfig, examples: tuple[int, int] | None = None
) -> None:
    """Refuse to go on with settings that lead elsewhere.

    Args:
        place: what was made with the settings before.
        before: flat.
        config: of this run.
        examples: of an optimizer step, before and now; None: not known, so what makes them up must be the same.

    Raises:
        InputError: naming both values of the first that differs.
    """
    if examples is not None and examples[0] != examples[1]:
        raise InputError(f"{place} was trained with {examples[0]} examples an optimizer step, but this run has "
                         f"{examples[1]} (--per_device_train_batch_size times --gradient_accumulation_steps times "
                         "processes); make it as many, or start anew elsewhere")  # fmt: skip
    free = _FREE_ON_RESUME if examples is None else _FREE_ON_RESUME | _MAKE_A_STEP
    # A run from before a setting existed had its default.
    before = RunConfig().flat() | before
    for key, now in config.flat().items():
        if key not in free and before[key] != now:
            raise InputError(f"{place} was trained with {key} = {before[key]}, but this run has {key} = {now}; "
                             "resume with the same settings, or start anew elsewhere")  # fmt: skip


def _chosen_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    if wanted is None:
        return None
    if wanted == "latest":
        return _newest_whole(folder)
    checkpoint = Path(wanted)
    if not (checkpoint / STATE).is_file():
        raise InputError(f"--resume_from_checkpoint names {checkpoint}, which holds no {STATE}; give a checkpoint")
    if (reason := broken(checkpoint)) is not None:
        raise InputError(f"--resume_from_checkpoint names {checkpoint}, where {reason}; give a whole checkpoint, or "
                         "latest for the newest of those")  # fmt: skip
    return checkpoint


def _newest_whole(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step; says of each above it what is broken."""
    for checkpoint in reversed(checkpoints(folder)):
        if (reason := broken(checkpoint)) is None:
            print(f"note: going on from {checkpoint}", file=sys.stderr)
            return checkpoint
        print(f"warning: {checkpoint} is passed over: {reason}", file=sys.stderr)
    if checkpoints(folder):
        print(f"warning: no checkpoint in {folder} is whole: beginning anew", file=sys.stderr)
    return None


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None: it is whole."""
    if (checkpoint / MANIFEST).is_file():
        return damage(checkpoint)
    # From before there were manifests: what can be read counts as whole.
    readers = {STATE: lambda path: _read_state(path.parent), WEIGHTS_FILE: load_file,
               OPTIMIZER: lambda path: torch.load(path, weights_only=True, map_location="cpu")}  # fmt: skip
    for name, read in readers.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            read(checkpoint / name)
        except Exception as error:  # a torn file makes its reader raise anything
            return f"{name} cannot be read ({type(error).__name__}: {error})"
    return None


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], Progress]:
    """The settings that a checkpoint was made under, and its progress."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state.pop("config"), Progress(**state)


def checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder, of increasing step."""
    return [checkpoint_folder(folder, step) for step in _steps_saved(folder)]


def _steps_saved(folder: Path) -> list[int]:
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match)


def rotate(accelerator: Accelerator, folder: Path, settings, keep_at: set[int], newest: int) -> None:
    """Remove the oldest `save_steps` checkpoints beyond `save_total_limit`; those of `checkpoint_at` stay."""

    def remove() -> None:
        # Later ones are of another run in this folder: counting them would remove what was just saved.
        own = [step for step in _steps_saved(folder) if step not in keep_at and step <= newest]
        for step in own[: -settings.save_total_limit]:
            # Renamed first: a kill in the middle leaves no torn checkpoint under its name.
            doomed = folder / f"{_DOOMED}{step}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(checkpoint_folder(folder, step), doomed)
            shutil.rmtree(doomed)

    if settings.save_total_limit is not None:
        on_main(accelerator, remove)
