"""How does a trainer that is not ours train CopRA?

    SFTTrainer(model, ..., callbacks=[CopRACallback(method="copra", seed=0)])

    p    = schedule(global_step / max_steps)
    mask = sample_mask(p, num_layers, seed, global_step)          the mask of `train` for this seed and step

One mask an optimizer step, across gradient accumulation. Layers left out have no gradient in it, so the optimizer
passes them by: no momentum, no weight decay. Evaluation, generation and saving meet the whole adapter.

Source: CopRA (arXiv 2410.22911), section 2.1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from types import FrameType

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copra_llm.errors import InputError, nearest
from copra_llm.gates import LayerGates, foreign_adapters
from copra_llm.masks import sample_mask
from copra_llm.schedule import METHODS, Schedule, too_short

logger = logging.getLogger(__name__)


class CopRACallback(TrainerCallback):
    """CopRA for `transformers.Trainer` and TRL's `SFTTrainer`, whose model carries a PEFT LoRA adapter.

    Args:
        method: "copra", "coto", "lora", or a schedule of your own.
        seed: of the masks, in [0, 2**64): what `--mask_seed` (or else `--seed`) is to a recipe.
        granularity: "layer" switches a transformer block's adapters together, "module" each alone.
        layer_pattern: regular expression; a layer's key is the module name up to the end of its match.
        fused: whether adapted linear layers are computed in one pass, equal to PEFT's up to rounding.

    The entries `activation_prob` (in [0, 1]) and `active_layers` (a count) join the training logs: in
    `state.log_history`, and for the callbacks after this one. Trackers of `report_to` come before it; pass
    `report_to="none"` and the tracker's callback after this one.

    Raises:
        InputError: for an unknown method or seed, and when training starts: if there is no LoRA to switch, an adapter
            of another kind, no known number of steps, or a backend under which inactive layers would move.
    """

    def __init__(
        self,
        method: str | Schedule = "copra",
        seed: int = 0,
        granularity: str = "layer",
        layer_pattern: str | None = None,
        fused: bool = True,
    ):
        if isinstance(method, str) and method not in METHODS:
            raise InputError(f'method is "{method}"{nearest(method, METHODS)}, but must be one of {", ".join(METHODS)}')
        if not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed}, but must be at least 0 and below 2**64")
        self.schedule = METHODS[method] if isinstance(method, str) else method
        self.seed, self.granularity, self.layer_pattern, self.fused = seed, granularity, layer_pattern, fused
        self._masked: _MaskedModel | None = None
        self._of_last_step: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._release()
        model = kwargs["model"]
        _refuse_backend(args)
        if state.max_steps < 1:
            raise InputError("the trainer does not know its number of steps, but p(t) needs it; give max_steps")
        foreign = foreign_adapters(model)
        if foreign:
            raise InputError(f"{foreign[0]} has an adapter that is not LoRA and cannot be left out of a step; "
                             "give the model LoRA adapters alone")  # fmt: skip
        gates = LayerGates(model, self.granularity, self.layer_pattern, self.fused)
        if state.global_step == 0 and (why := too_short(self.schedule, state.max_steps, gates.num_layers)):
            logger.warning("%s", why)
        self._masked = _MaskedModel(model, gates, _training_frame())

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        layers = self._masked.gates.num_layers
        p = self.schedule.of_layers(state.global_step / state.max_steps, layers)
        mask = sample_mask(p, layers, seed=self.seed, step=state.global_step)
        self._of_last_step = {"activation_prob": sum(p) / layers, "active_layers": int(mask.sum())}
        self._masked.begin(mask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._masked.end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        logs = kwargs["logs"]
        if "loss" in logs:  # of training; those of evaluation have prefixes
            logs.update(self._of_last_step)
            state.log_history[-1].update(self._of_last_step)  # a copy, made before the callbacks were asked

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._release()

    def _release(self) -> None:
        if self._masked is not None:
            self._masked.release()
            self._masked = None


class _MaskedModel:
    """A model under the masks of one call of `train()`, and under none outside of it.

    No callback hears of an error or an interrupt that ends `train()`. So every forward pass of the base model asks
    the stack whether `train()` is still running, and opens all gates for good if it is not.

    Args:
        model: with its adapter.
        gates: its players.
        frame: of the function that trains.
    """

    def __init__(self, model: nn.Module, gates: LayerGates, frame: FrameType):
        self.gates = gates
        self._frame: FrameType | None = frame
        self._mask: Sequence[bool] | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The base, since `generate` goes round PEFT's wrapper.
        self._hooks = [
            base.register_forward_pre_hook(self._before_forward),
            base.register_forward_hook(self._after_forward),
        ]

    def __getstate__(self) -> dict:
        # A copy of the model is not the one that is trained: it opens its gates with its first forward pass.
        return vars(self) | {"_frame": None}

    def begin(self, mask: Sequence[bool]) -> None:
        """Close the gates where `mask (num_layers,)` is False, for the forward and backward passes of a step."""
        self._mask = mask
        self.gates.apply(mask)

    def end(self) -> None:
        self._mask = None
        self.gates.lift()

    def release(self) -> None:
        """Leave the model as it was found."""
        self.end()
        for hook in self._hooks:
            hook.remove()
        self._frame = None

    def _before_forward(self, module: nn.Module, inputs: tuple) -> None:
        if not _is_running(self._frame):
            self.release()
        elif not (module.training and torch.is_grad_enabled()):
            # In the middle of a step, what runs without a graph is not its loss: an evaluation, a sample, a reference.
            self.gates.lift()

    def _after_forward(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if self._mask is not None:
            self.gates.apply(self._mask)


def _training_frame() -> FrameType:
    """The function that called the trainer's callbacks."""
    frame = sys._getframe()
    while frame.f_globals["__name__"] in (__name__, TrainerCallback.__module__):
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType | None) -> bool:
    """Whether a function's frame is among the callers of this one."""
    caller = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _refuse_backend(args: TrainingArguments) -> None:
    """Refuse what would move inactive layers, or would not see their masks."""
    if args.deepspeed_plugin is not None:
        raise InputError("DeepSpeed flattens the optimizer's state, so that inactive layers would move; "
                         "train without it, or with FSDP version 2")  # fmt: skip
    if _fsdp_version(args) == 1:
        raise InputError("FSDP version 1 flattens the parameters, so that inactive layers would move; "
                         "set fsdp_version to 2")  # fmt: skip
    if args.n_gpu > 1:
        raise InputError(f"the trainer would spread each batch over {args.n_gpu} GPUs of one process, which moves "
                         "inactive layers; start a process a GPU with accelerate launch")  # fmt: skip
    if args.ddp_find_unused_parameters is False and args.world_size > 1:
        raise InputError("ddp_find_unused_parameters is False, but inactive layers are unused; leave it unset")
    if args.torch_compile:
        raise InputError("torch_compile would compile the model anew for every mask; leave it off")


def _fsdp_version(args: TrainingArguments) -> int | None:
    """By the trainer's arguments, or by those of `accelerate launch`."""
    if args.fsdp_plugin_args is not None:
        return args.fsdp_plugin_args["fsdp_version"]
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return int(os.environ.get("FSDP_VERSION", "1")) if launched else None
