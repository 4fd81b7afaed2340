"""What does a run leave on disk, and how does it go on after a stop?

A checkpoint is a folder that appears whole or not at all: the adapter as anybody loads it, the optimizer's
state, the progress with the settings it was made under, and a manifest by which later damage shows; JSON and
safetensors, so that reading another's runs no code. Data order, masks and dropout are functions of (seed, step), so
nothing else has to be saved; and the number of processes may change, as long as a step has as many examples.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from copra_llm.adapter_files import CONFIG, HEAD_FILE, RESULT, WEIGHTS_FILE
from copra_llm.classifiers import read_heads
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError, shown
from copra_llm.initial import read_for_training, write_for_base
from copra_llm.locks import FolderLock
from copra_llm.manifest import MANIFEST, damage, write_manifest
from copra_llm.optimizer_file import OPTIMIZER, read_optimizer, write_optimizer
from copra_llm.processes import on_main
from copra_llm.progress import STATE, Progress, read_state, write_state
from copra_llm.results import atomic_folder, temporary_of, write_atomic
from copra_llm.saved_runs import ADAPTER, checkpoint_folder
from copra_llm.settings import WITHOUT_EFFECT
from copra_llm.tensor_file import read_tensors

PREEMPTED = "PREEMPTED"
"""The file that says that a run was stopped."""
BEST = "best"
"""The folder of the best adapter so far, while a run that wants it goes on."""
# May differ between a checkpoint's run and the one that resumes it: the folder itself is one task's.
_FREE_ON_RESUME = WITHOUT_EFFECT | {"tasks"}
# May differ where their product with the number of processes does not.
_MAKE_A_STEP = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


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
            write_optimizer(optimizer_state, fresh)
            write_state(fresh, config.flat(), progress)
            write_manifest(fresh)

    with backend.whole(classifier) as whole:
        on_main(accelerator, write)


def load_weights(classifier, folder: Path) -> None:
    """Give a model the adapter that it, or one made like it, has saved in a folder, and an encoder its heads.

    Raises:
        InputError: if the files are torn, of an adapter of other modules or shapes, or not all numbers are finite.
    """
    saved, _ = read_tensors(folder / WEIGHTS_FILE)
    own = get_peft_model_state_dict(classifier.model, save_embedding_layers=False)
    tensors = read_for_training(classifier.model, saved)
    _check_same(folder / WEIGHTS_FILE, tensors, own)
    heads = read_heads(folder)
    _check_same(folder / HEAD_FILE, heads, classifier.heads if heads else {})
    set_peft_model_state_dict(classifier.model, tensors)
    for task, head in heads.items():
        classifier.heads[task].data.copy_(head)


def _check_same(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not for these."""
    for key in sorted({*saved.keys(), *own.keys()}):
        a, b = (tuple(tensors[key].shape) if key in tensors else "nothing" for tensors in (saved, own))
        if a != b:
            raise InputError(f"{path} has {a} for {shown(key)}, but this run has {b}; give another checkpoint, or "
                             "start anew elsewhere")  # fmt: skip
        if not bool(torch.isfinite(saved[key]).all()):
            raise InputError(f"{path}: {key} has numbers that are not finite; give an earlier checkpoint")


def resume(
    accelerator: Accelerator,
    config: RunConfig,
    folder: Path,
    classifier,
    optimizer,
    scheduler,
    examples_a_step: int,
    total_steps: int,
) -> Progress:
    """Load the checkpoint that the config names into the parts; a fresh `Progress` if there is none.

    Raises:
        InputError: for a checkpoint that is not whole, or of other settings; ToldElsewhere on the other processes.
    """
    batch_size = config.train.per_device_train_batch_size
    checkpoint = on_main(accelerator, lambda: _chosen_checkpoint(config.train.resume_from_checkpoint, folder))
    if checkpoint is None:
        return Progress(examples_a_step=examples_a_step, stream_batch_size=batch_size)
    before, progress = read_state(checkpoint)
    examples = None if progress.examples_a_step is None else (progress.examples_a_step, examples_a_step)
    refuse_other_settings(checkpoint, before, config, examples)
    if progress.step > total_steps or examples_a_step % (progress.stream_batch_size or 1):
        raise InputError(f"{checkpoint / STATE} is of step {progress.step} with batches of "
                         f"{progress.stream_batch_size}, but this run has {total_steps} steps of {examples_a_step} "
                         "examples; give a checkpoint of a run like this one")  # fmt: skip
    load_weights(classifier, checkpoint)
    read_optimizer(optimizer, checkpoint)
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
    if (checkpoint / MANIFEST).is_file() and (reason := damage(checkpoint)) is not None:
        return reason
    # Sums say that nothing was changed since; that it can be read, only its readers do.
    readers = {STATE: lambda path: read_state(path.parent), WEIGHTS_FILE: read_tensors, OPTIMIZER: read_tensors}
    for name, read in readers.items():
        if not (checkpoint / name).is_file():
            pickled = " (pickled ones are not read)" if name == OPTIMIZER and (checkpoint / _PICKLED).is_file() else ""
            return f"{name} is missing{pickled}"
        try:
            read(checkpoint / name)
        except InputError as error:
            return f"{name} cannot be read ({error})"
    return None


_PICKLED = "optimizer.pt"
"""Where earlier versions kept the optimizer's state."""


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
