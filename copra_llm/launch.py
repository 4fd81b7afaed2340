"""Which backend was a run launched with, and does its configuration fit the run's settings?

`accelerate launch --config_file` says it by environment variables, which Accelerate reads. What the loop needs of such
a configuration it sets itself; what contradicts the run's settings is refused before anything is loaded.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from torch.accelerator import current_accelerator

from copra_llm.backends import Backend
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.processes import on_main
from copra_llm.settings import TrainSettings
from copra_llm.sharded import ShardedBase, check_fsdp, fsdp_plugin, load_on_all
from copra_llm.zero import Zero, check_zero, choose_loading


def process_group(settings: TrainSettings) -> InitProcessGroupKwargs:
    """How the processes of a run talk to each other."""
    timeout = timedelta(seconds=settings.ddp_timeout)
    # Under DeepSpeed Accelerate looks for an accelerator alone, and finds no way to talk on a machine of CPUs.
    if _asked("ACCELERATE_USE_DEEPSPEED") and "LOCAL_RANK" in os.environ and current_accelerator() is None:
        return InitProcessGroupKwargs(backend="gloo", timeout=timeout)
    return InitProcessGroupKwargs(timeout=timeout)


def mixed_precision(settings: TrainSettings) -> str:
    """What Accelerate is told of it: under DeepSpeed nothing, which would cast the whole model and not autocast."""
    return "no" if _asked("ACCELERATE_USE_DEEPSPEED") else settings.mixed_precision


def accelerator_of(settings: TrainSettings, **options: Any) -> Accelerator:
    """An Accelerator of a run's mixed precision, whatever has run in the process before.

    Accelerate keeps the first precision for the whole process, of objects that are there already too; so none of them
    is to be used any more.

    Args:
        settings: of the run.
        options: of `Accelerator`, beside the precision.
    """
    return _accelerator(mixed_precision(settings), **options)


def evaluating(settings: TrainSettings) -> Accelerator:
    """An Accelerator to evaluate a run's adapter with, in its own precision: what its record says is said again.

    Where float16 cannot be computed in, on a CPU, in that of the weights.
    """
    precision = mixed_precision(settings)
    return _accelerator("no" if precision == "fp16" and not torch.cuda.is_available() else precision)


def _accelerator(precision: str, **options: Any) -> Accelerator:
    # DeepSpeed has a precision of its own, and is told the same by every run.
    own = is_initialized() and PartialState().distributed_type != DistributedType.DEEPSPEED
    if own and AcceleratorState().mixed_precision != precision:
        # As transformers does where a new run's arguments come.
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, **options)


def check_launch(accelerator: Accelerator, config: RunConfig) -> None:
    """Refuse a launch that cannot train as it says; to be asked before the base is loaded.

    Raises:
        InputError: naming the setting; ToldElsewhere on the other processes.
    """
    if config.train.torch_compile and (_wants_zero(accelerator) or _wants_fsdp(accelerator)):
        on_main(accelerator, _refuse_compilation)
    if _wants_zero(accelerator):
        on_main(accelerator, lambda: check_zero(accelerator, config))
        choose_loading(accelerator.deepspeed_plugin, config.model.dtype)
    elif _wants_fsdp(accelerator):
        on_main(accelerator, lambda: check_fsdp(fsdp_plugin(accelerator)))
        load_on_all()


def _refuse_compilation() -> None:
    raise InputError("--torch_compile is for whole models, on one process or several, but DeepSpeed and FSDP divide "
                     "them; leave one of the two out")  # fmt: skip


def check_same_base(accelerator: Accelerator, fingerprint: str) -> None:
    """Refuse processes whose bases differ: machines may have unequal files under one name.

    Raises:
        InputError: naming the process; ToldElsewhere on the others.
    """
    found = gather_object([fingerprint])
    odd = next((rank for rank, own in enumerate(found) if own != found[0]), None)

    def check() -> None:
        if odd is not None:
            raise InputError(f"process {odd} has read a base with the hash {found[odd]}, but process 0 one with "
                             f"{found[0]}; give all machines the same files")  # fmt: skip

    on_main(accelerator, check)


def backend_of(accelerator: Accelerator, settings: TrainSettings) -> Backend:
    """The one that this run was launched with."""
    kind = Zero if _wants_zero(accelerator) else ShardedBase if _wants_fsdp(accelerator) else Backend
    return kind(accelerator, settings)


def _wants_zero(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def _wants_fsdp(accelerator: Accelerator) -> bool:
    # On CPUs Accelerate keeps the type MULTI_CPU; one process has nothing to shard.
    return accelerator.num_processes > 1 and _asked("ACCELERATE_USE_FSDP")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
