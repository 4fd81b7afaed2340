"""What does a forward and backward pass keep in memory, and how many operations is it?

Both are counted, not estimated: the model's own forward and backward run on fake tensors, which have a shape, a type
and a lifetime but no numbers (`torch._subclasses.fake_tensor`), while every storage is watched from its birth to its
death. So what PEFT's casts keep counts too, and whatever else a formula for plain transformers (Korthikanti et al.,
arXiv 2205.05198, section 4: s b h (34 + 5 a s / h) bytes a block, all weights trained) would miss under LoRA, where
frozen layers keep no inputs.

Attention is taken to be fused (FlashAttention, arXiv 2205.14135): it keeps queries, keys, values, outputs and one
number a row, and not the (tokens x tokens) matrix; `eager` does. Where rows are packed it has a mask, and keeps that as
float numbers in each block, and keys and values once for each query head (transformers' `sdpa_attention`; not with
FlashAttention). Its operations are 4 s^2 d a head, half of them if causal, and 2.5 times as many backward
(FlashAttention-2, arXiv 2307.08691, section 4.1).

Blocks are alike, so two and three of them are enough to know any number: what is kept and computed grows linearly, and
what is held for a moment beyond it does not grow.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from copra_llm.classifiers import mean_pool
from copra_llm.errors import InputError
from copra_llm.fused_linear import products_made_again
from copra_llm.gates import LayerGates
from copra_llm.gguf import quiet_loading
from copra_llm.linear_loss import token_losses
from copra_llm.models import Base, Source
from copra_llm.plan.sizes import empty_model
from copra_llm.settings import LoraSettings

FUSED = "copra_plan_fused"
"""Name under which transformers finds the attention of this module."""
_FEW, _MORE = 2, 3
"""Blocks that are run in the place of all."""


@dataclass(frozen=True)
class Work:
    """Of one micro-batch on one process, all adapters active."""

    kept: int
    """Bytes that the backward pass needs, when the forward pass of the blocks has ended."""
    beyond: int
    """Bytes held beyond these at the worst moment: logits, gradients on their way, temporary results."""
    forward: float
    """Floating-point operations of the frozen forward pass."""
    forward_lora: float
    """Of the adapters, forward."""
    backward_blocks: float
    """Of the backward pass through the frozen blocks, recomputed activations included."""
    backward_head: float
    """Of the backward pass through what stands behind the blocks."""
    backward_lora: float
    """Of the adapters, backward."""

    def flops(self, active: float, reached: float) -> float:
        """Operations of a step with these shares of active players and of blocks that the backward pass reaches."""
        lora = active * (self.forward_lora + self.backward_lora)
        return self.forward + self.backward_head + reached * self.backward_blocks + lora


@dataclass(frozen=True)
class Batch:
    """A micro-batch and how it is run."""

    rows: int
    length: int
    """Tokens a row, all of them trained on."""
    checkpointing: bool
    """Activations recomputed in the backward pass."""
    autocast: bool
    """Products in bfloat16, weights in their own type."""
    dropout: bool
    """Attention's dropout keeps its matrix (on CPUs)."""
    fused: bool
    """Adapted linear layers in one pass (`fused_linear.py`), as the loop does where it can."""
    masked: bool
    """Attention has a mask of tokens by tokens: packed rows, without FlashAttention."""


def trace(config: PreTrainedConfig, dtype: str, lora: LoraSettings, attention: str | None, batch: Batch) -> Work:
    """Count one micro-batch of a model.

    Args:
        config: of the base, a causal language model or an encoder.
        dtype: of its weights.
        lora: of the adapter.
        attention: `--attn_implementation`; all but "eager" count as fused.
        batch: its size.

    Raises:
        InputError: for a model of another kind, or one whose computation depends on numbers.
    """
    blocks = config.get_text_config().num_hidden_layers
    # Where some blocks have adapters and others have none, they are not alike.
    alike = blocks > _MORE and lora.lora_layers_to_transform is None
    counts = (_FEW, _MORE) if alike else (blocks,)
    try:
        runs = [_run(_cut(config, n, alike), dtype, lora, attention, batch, first_only=False) for n in counts]
        firsts = [_run(_cut(config, n, alike), dtype, lora, attention, batch, first_only=True) for n in counts]
    except (DataDependentOutputException, UnsupportedFakeTensorException) as error:
        raise InputError(f"a {config.model_type} model's computation depends on its numbers, so it cannot be planned "
                         "without weights; plan one of another architecture") from error  # fmt: skip
    return _extrapolated(runs, firsts, counts, blocks)


@dataclass(frozen=True)
class _Run:
    kept: int
    peak: int
    forward: float
    backward: float
    players: int


def _extrapolated(runs: list[_Run], firsts: list[_Run], counts: tuple[int, ...], blocks: int) -> Work:
    """From runs with all adapters active, and with the first block's alone, to `blocks` blocks."""
    last, first = runs[-1], firsts[-1]

    def line(values: list[float]) -> float:
        slope = values[-1] - values[0] if len(values) > 1 else 0.0
        return values[-1] + slope * (blocks - counts[-1])

    # Of one player's adapter: with all active there are so many of them more than with the first alone.
    more = max(last.players - 1, 1)
    lora_forward = (last.forward - first.forward) / more
    lora_backward = (last.backward - first.backward) / more
    scale = last.players * blocks / counts[-1]
    frozen = [f.forward - lora_forward for f in firsts]
    through = [f.backward - lora_backward for f in firsts]
    block = (through[-1] - through[0]) if len(counts) > 1 else None
    head = max(0.0, through[-1] - block * counts[-1]) if block is not None else 0.0
    kept = int(line([r.kept for r in runs]))
    return Work(kept, last.peak - last.kept, line(frozen), lora_forward * scale,
                line(through) - head, head, lora_backward * scale)  # fmt: skip


def _cut(config: PreTrainedConfig, blocks: int, alike: bool) -> PreTrainedConfig:
    """The configuration with so many blocks."""
    if not alike:
        return config
    values = config.to_dict()
    lists = {k: v[:blocks] for k, v in values.items() if isinstance(v, list) and len(v) == config.num_hidden_layers}
    own = type(config).from_dict(values | lists | {"num_hidden_layers": blocks})
    own.architectures = config.architectures
    return own


def _run(config, dtype: str, lora: LoraSettings, attention: str | None, batch: Batch, first_only: bool) -> _Run:
    base, model = empty_model(config, Source("", ""), dtype, lora, attention if attention == "eager" else _fused())
    if base.kind not in ("causal", "encoder"):
        raise InputError(f"a {config.model_type} model is a {base.kind} model, but only causal language models and "
                         "encoders are planned; give one of them")  # fmt: skip
    if batch.checkpointing:
        # There is no dropout's noise to repeat.
        base.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        base.model.disable_input_require_grads()
    model.train()
    gates = LayerGates(model, fused=batch.fused)
    mode = FakeTensorMode()
    _make_fake(model, mode)
    mask = [not first_only or i == 0 for i in range(gates.num_layers)]
    with mode, gates.applied(mask), quiet_loading():
        for p in model.parameters():
            # Gradients count apart (`memory.py`).
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        known = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        return _count(base, model, batch, [*known, *model.buffers()], sum(mask), config)


def _count(base: Base, model: PeftModel, batch: Batch, known: list[Tensor], players: int, config) -> _Run:
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    with _Meter([*known, ids]) as meter, _attention(batch), products_made_again(not batch.checkpointing):
        with torch.autocast("cpu", torch.bfloat16, enabled=batch.autocast):
            hidden, loss_of = _forward(base, model, ids, config)
            kept = meter.now
            loss = loss_of(hidden)
        forward = meter.flops
        del hidden, loss_of
        loss.backward()
    return _Run(kept, meter.most, forward, meter.flops - forward, players)


def _forward(base: Base, model: PeftModel, ids: Tensor, config):
    """Last hidden states, and the function that makes the loss of them."""
    if base.kind == "causal":
        hidden = base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        head, n = base.model.get_output_embeddings(), ids.numel()

        def loss_of(hidden):
            return token_losses(hidden.flatten(0, 1)[torch.zeros(n, dtype=torch.long)], head, ids.flatten())[0].sum()

        return hidden, loss_of
    pooled = mean_pool(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return pooled, lambda pooled: F.cross_entropy(
        (pooled @ torch.zeros(2, config.hidden_size, dtype=pooled.dtype).T).float(), ids[:, 0]
    )


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in the place of those on the meta device; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is None:
                        continue
                    if id(t) not in made:
                        fake = torch.empty(t.shape, dtype=t.dtype)
                        is_parameter = isinstance(t, nn.Parameter)
                        made[id(t)] = nn.Parameter(fake, t.requires_grad) if is_parameter else fake
                    tensors[name] = made[id(t)]


class _Meter(TorchDispatchMode):
    """Counts within its block what is alive of the storages made there, and operations.

    Not torch's FlopCounterMode, whose hooks keep recomputed activations alive.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        """Bytes alive, and at most."""
        self.flops = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        self.flops += operations(operation, args, kwargs or {}, out)
        if operation in _INSIDE:
            self.most = max(self.most, self.now + _INSIDE[operation](*args))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = t.untyped_storage().nbytes()
                self.now += self._sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(t.untyped_storage(), self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def operations(operation, args: tuple, kwargs: dict, out) -> int:
    """Floating-point operations of one call, those of products alone.

    Args:
        operation: an overload packet, `torch.ops.aten.mm`, say.
        args: of the call.
        kwargs: likewise.
        out: what it gave.
    """
    if operation in _ATTENTION:
        return _ATTENTION[operation](*args)
    operation = _IN_PLACE.get(operation, operation)
    return flop_registry[operation](*args, **kwargs, out_val=out) if operation in flop_registry else 0


_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products that torch's registry lacks, since they add to their first argument (`fused_linear.py`)."""
_INSIDE = {torch.ops.aten.logsumexp: lambda values, *_: values.nbytes}
"""Bytes that an operation holds while it runs: here exp(x - max) of all of x."""


# --- attention --------------------------------------------------------------------------------------------


def _fused() -> str:
    """Tell transformers of `_attend`; doing it again changes nothing."""
    AttentionInterface.register(FUSED, _attend)
    AttentionMaskInterface.register(FUSED, lambda *args, **kwargs: None)
    return FUSED


_now: dict = {"matrix": False, "mask": None}


@contextmanager
def _attention(batch: Batch):
    """Within the block, attention with dropout keeps its matrix, and has a mask, if the batch says so."""
    before = dict(_now)
    mask = torch.ones(batch.rows, 1, batch.length, batch.length, dtype=torch.bool) if batch.masked else None
    _now.update(matrix=batch.dropout, mask=mask)
    try:
        yield
    finally:
        _now.update(before)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **more):
    """transformers' interface: `(batch, heads, tokens, size)` -> `(batch, tokens, heads, size)`, no weights."""
    causal, mask = getattr(module, "is_causal", True) if is_causal is None else is_causal, _now["mask"]
    heads = query.shape[1] // key.shape[1]
    if mask is not None and heads > 1:
        # transformers does so: with a mask, fused kernels do not take fewer heads of keys than of queries.
        key, value = (t.repeat_interleave(heads, dim=1) for t in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout if _now["matrix"] else 0.0,
        is_causal=causal and mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _fused_flops(query, key, value, dropout_p=0.0, is_causal=False) -> int:
    batch, heads, tokens, size = query.shape
    return 4 * batch * heads * tokens * key.shape[2] * size // (2 if is_causal else 1)


def _fused_backward_flops(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal) -> int:
    return _fused_flops(query, key, value, dropout_p, is_causal) * 5 // 2


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward_flops,
}
"""Operations of fused attention, which torch's registry lacks on CPUs."""
