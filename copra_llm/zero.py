"""How does the loop train under DeepSpeed's ZeRO, so that inactive layers do not move?

ZeRO flattens the states of each parameter group and shards the flat vector (stage 1), its gradient too (2), and the
parameters (3). A gradient that is missing reads as zero there, and AdamW moves what has momentum or weight decay. So
each layer is a group of its own, and a group that no gradient has reached in a step, on any process, is left out of
it: parameters, moments and step count stay as they are.

What is written is what one process would write: the float32 adapter, and the optimizer's state by parameter.

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from copra_llm.backends import Backend
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.exchange import share
from copra_llm.gates import LayerGates
from copra_llm.optimizer import FiniteWatch
from copra_llm.settings import TrainSettings

T = TypeVar("T")

_MOMENTS = ("exp_avg", "exp_avg_sq")


class GroupedAdamW(AdamW):
    """AdamW that steps only the groups whose `reached` is true."""

    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["reached"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def layer_groups(optimizer: Optimizer, gates: LayerGates) -> list[dict]:
    """An optimizer's groups, cut so that no group holds parameters that a step may leave out apart.

    Args:
        optimizer: with one group a learning rate.
        gates: a layer's parameters stay together; each that is always on stands alone.

    Returns:
        Groups with the options of those they were cut from, and `origin`, the number of that group.
    """
    player_of = gates.player_of()
    cut: dict[tuple, list[nn.Parameter]] = {}
    for origin, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            cut.setdefault((origin, player_of.get(id(p), id(p))), []).append(p)
    return [
        {**optimizer.param_groups[origin], "params": params, "origin": origin, "reached": False}
        for (origin, _), params in cut.items()
    ]


class Zero(Backend):
    """DeepSpeed's engine with ZeRO stage 1, 2 or 3."""

    def prepare(self, classifier: nn.Module, optimizer: Optimizer, gates: LayerGates) -> nn.Module:
        self.trained = [p for p in classifier.parameters() if p.requires_grad]
        start = [p.detach().to(self.accelerator.device, copy=True) for p in self.trained]
        share(start)
        self.plain, self.optimizer = optimizer, GroupedAdamW(layer_groups(optimizer, gates), fused=True)
        self.group_of = {id(p): i for i, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        self._reached = torch.zeros(len(self.optimizer.param_groups), device=self.accelerator.device)
        for p in self.trained:
            p.register_hook(self._note(self.group_of[id(p)]))
        classifier.forward = self._autocast()(classifier.forward)
        with engine_told(self.accelerator, self.settings):
            self.engine, wrapped = self.accelerator.prepare(classifier, self.optimizer)
        self.zero = wrapped.optimizer
        self._load_state(start)
        return self.engine

    def _autocast(self) -> torch.autocast:
        """Mixed precision as Accelerate has it elsewhere: float32 where it matters, the adapter too."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def decode(self, classifier: nn.Module, action: Callable[[nn.Module], T]) -> T:
        with self._autocast():
            return super().decode(classifier, action)

    def _note(self, group: int):
        def note(gradient: Tensor) -> None:
            self._reached[group] = 1.0

        return note

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def step(self, mask: Sequence[bool], watch: FiniteWatch) -> Tensor:
        told = self.accelerator.reduce(torch.cat([self._reached, watch.bad_losses.reshape(1)]), reduction="sum")
        bad_losses = told[-1]
        for group, processes in zip(self.optimizer.param_groups, told[:-1].tolist(), strict=True):
            group["reached"] = bool(processes)
            group["lr"] = self.plain.param_groups[group["origin"]]["lr"]
        self.optimizer.found_inf = (bad_losses > 0).float()
        self.engine.step()
        self._reached.zero_()
        if self.stage3:
            # It keeps the gradients of a layer that is inactive next, and would count them in the norm.
            self.zero.grad_partitions_flat_buffer.zero_()
        # A gradient that is not finite makes the engine skip the step, on all processes; its norm is an older one then.
        norm = math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())
        norm = torch.tensor(norm, device=self.accelerator.device)
        watch.verdict(bad_losses, norm)
        return norm

    def count(self, sent: tuple[int, int]) -> tuple[int, int]:
        return sent

    def communication(self, sent: tuple[int, int]) -> dict[str, Any]:
        # The engine's own buckets and gathers are not counted.
        return {"communication": {"backend": f"zero{self.engine.zero_optimization_stage()}"}}

    # --- what is whole elsewhere ----------------------------------------------------------------------------

    def _flat(self) -> list[list[Tensor]]:
        """This process's flat pieces of each group."""
        if not self.stage3:
            return [group["params"] for group in self.optimizer.param_groups]
        pieces: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        for number, piece in enumerate(self.zero.fp32_partitioned_groups_flat):
            pieces[self.zero.sub_group_to_group_id[number]].append(piece)
        return pieces

    @property
    def stage3(self) -> bool:
        return self.engine.zero_optimization_stage() == 3

    def _load_state(self, start: list[Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for pieces in self._flat():
            for piece in pieces:
                self.optimizer.state[piece] = {"step": torch.zeros((), device=piece.device)} | {
                    key: torch.zeros_like(piece) for key in _MOMENTS
                }
        if not self.stage3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self._write(start)
        for p in self.trained:
            before = self.plain.state.pop(p, None)
            if before is None:
                continue
            for key in _MOMENTS:
                safe_set_full_optimizer_state(p, before[key].to(self.accelerator.device), key)
            for piece in self._flat()[self.group_of[id(p)]]:
                self.optimizer.state[piece]["step"].copy_(before["step"])

    def optimizer_state(self) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        flat, state = self._flat(), {}
        for number, p in enumerate(p for group in self.plain.param_groups for p in group["params"]):
            step = self.optimizer.state[flat[self.group_of[id(p)]][0]]["step"]
            moments = {key: safe_get_full_optimizer_state(p, key).cpu() for key in _MOMENTS}
            if step > 0:
                state[number] = {"step": step.detach().cpu().clone(), **moments}
        return {"state": state, "param_groups": self.plain.state_dict()["param_groups"]}

    @contextmanager
    def whole(self, classifier: nn.Module, changed: bool = False) -> Iterator[nn.Module]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        model = self.accelerator.unwrap_model(classifier)
        kept = [p.data for p in self.trained]
        heads = [p for name, p in model.named_parameters() if not name.startswith("model.") and not p.requires_grad]
        masters = [safe_get_full_fp32_param(p).view(_shape(p)) for p in self.trained]
        with ExitStack() as stack:
            if self.stage3:
                stack.enter_context(deepspeed.zero.GatheredParameters(heads))
            for p, master in zip(self.trained, masters, strict=True):
                p.data = master
            try:
                yield model
            finally:
                written = [p.data for p in self.trained]
                for p, before in zip(self.trained, kept, strict=True):
                    p.data = before
            if changed:
                self._write(written)

    def _write(self, values: list[Tensor]) -> None:
        """Give every trained parameter, and its master copy, a value."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        gathered = self.trained if self.stage3 else []
        with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0), torch.no_grad():
            for p, value in zip(self.trained, values, strict=True):
                p.data.copy_(value)
        for p, value in zip(self.trained, values, strict=True):
            safe_set_full_fp32_param(p, value.to(self.accelerator.device, torch.float32))


def _shape(p: nn.Parameter) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)


# --- what the engine is told ------------------------------------------------------------------------------


def engine_settings(accelerator: Accelerator, settings: TrainSettings) -> dict:
    """What DeepSpeed's configuration has to say for this run."""
    size, parts = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": parts,
        "train_batch_size": size * parts * accelerator.num_processes,
        "gradient_clipping": settings.max_grad_norm,
    }


@contextmanager
def engine_told(accelerator: Accelerator, settings: TrainSettings) -> Iterator[None]:
    """The launch's configuration, completed for this run within the block: the next one in the process has its own."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    told = engine_settings(accelerator, settings)
    before = {key: config.get(key, "auto") for key in told}
    config.update(told)
    try:
        yield
    finally:
        config.update(before)


def check_zero(accelerator: Accelerator, run: RunConfig) -> None:
    """Refuse what a launch asks of DeepSpeed and this loop cannot do, or what contradicts the run's own settings.

    Raises:
        InputError: naming the setting of DeepSpeed's configuration and the run's own.
    """
    settings, config = run.train, accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero.get("stage", 0) == 0:
        raise InputError("zero_stage is 0, with which DeepSpeed shards nothing; launch without DeepSpeed, or set "
                         "zero_stage to 1, 2 or 3")  # fmt: skip
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise InputError(f"DeepSpeed's configuration has its own {name}, but this loop brings it (--learning_rate, "
                             "--lr_scheduler_type); take it out of the file")  # fmt: skip
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise InputError("DeepSpeed's offload_optimizer would put its own Adam in place of the one that leaves "
                         "inactive layers alone; set offload_optimizer_device to none")  # fmt: skip
    check_run(run, zero["stage"])
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True:
            raise InputError(f"DeepSpeed's configuration enables {name}, which casts the whole model; set it to auto, "
                             "and give --bf16 for mixed precision")  # fmt: skip
    if zero["stage"] == 3 and accelerator.deepspeed_plugin.zero3_init_flag:
        _check_load_in_parts(run)
    wanted = engine_settings(accelerator, settings)
    flags = {"gradient_accumulation_steps": "--gradient_accumulation_steps", "gradient_clipping": "--max_grad_norm",
             "train_micro_batch_size_per_gpu": "--per_device_train_batch_size"}  # fmt: skip
    for key, flag in flags.items():
        # 1 is also what Accelerate writes where the file says nothing.
        if (said := config.get(key, "auto")) not in ("auto", 1, wanted[key]):
            raise InputError(f"DeepSpeed's configuration has {key} = {said}, but {flag} is {wanted[key]}; set it to "
                             "auto, or make them equal")  # fmt: skip


def check_run(run: RunConfig, stage: int) -> None:
    """Refuse settings of a run that cannot be had under ZeRO, whatever the launch says.

    Args:
        run: the run's settings.
        stage: of ZeRO, 1 to 3.

    Raises:
        InputError: naming the run's setting.
    """
    if run.train.fp16:
        raise InputError("--fp16 under DeepSpeed scales losses by its own rules, which are not held to those here; "
                         "give --bf16 or neither")  # fmt: skip
    if run.data.train_head and run.data.joint and len(run.data.tasks) > 1:
        raise InputError("--train_head with --joint trains a head a task, and processes whose batches are of unequal "
                         "tasks cannot meet under DeepSpeed; leave one of them out, or launch without it")  # fmt: skip
    if stage < 3:
        return
    if run.model.load_in_8bit:
        raise InputError("--load_in_8bit and ZeRO-3 both take the base's weights apart; give --load_in_4bit, or set "
                         "zero_stage to 2")  # fmt: skip
    storage = run.model.bnb_4bit_quant_storage or "uint8"
    if run.model.load_in_4bit and storage != run.model.dtype:
        raise InputError(f"ZeRO-3 divides 4-bit weights together with the others, so all are stored in one type, but "
                         f"--bnb_4bit_quant_storage is {storage} and --dtype {run.model.dtype}; "
                         f"give --bnb_4bit_quant_storage {run.model.dtype}")  # fmt: skip
    if run.lora.use_dora:
        raise InputError("--use_dora reads its factors past the passes for which ZeRO-3 gathers them; leave it out, or "
                         "set zero_stage to 2")  # fmt: skip


def _check_load_in_parts(run: RunConfig) -> None:
    asked = {
        "--load_in_4bit": run.model.load_in_4bit,
        "--packing": run.instruct is not None and run.instruct.packing,
        f"--init_lora_weights {run.lora.init_lora_weights}": run.lora.changes_base,
    }
    flag = next((flag for flag, wanted in asked.items() if wanted), None)
    if flag is not None:
        raise InputError(f"{flag} has to see the whole base, but zero3_init_flag is true, so each process reads a "
                         "part of it; set zero3_init_flag: false")  # fmt: skip


def choose_loading(plugin: DeepSpeedPlugin, dtype: str) -> None:
    """Have transformers read the base in parts if `zero3_init_flag` is true, in its own type, and whole if it is not.

    Accelerate has told it of ZeRO-3 whatever the flag says, and DeepSpeed creates what is sharded in the type of its
    mixed precision, which is not used here.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if not plugin.zero3_init_flag:
        unset_hf_deepspeed_config()
        return
    config, short = plugin.deepspeed_config, {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    before = {key: config.get(key) for key in ("bf16", "fp16")}
    config.update({key: {"enabled": key == short} for key in before})
    plugin.set_deepspeed_weakref()
    config.update(before)
