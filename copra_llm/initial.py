"""Where do the factors start, and what is an adapter on its base if that start has changed the base?

PiSSA and OLoRA take the start out of the base, for the largest part of each weight to be trained:

    W' = W - s B0 A0,    W' + s B A = W + s [B, -B0] [A; A0]

So the trained model is also the untouched base with a plain LoRA adapter of twice the rank, and that is what is saved,
checkpoints included. While training, the adapter is on W': a layer that a mask leaves out is PEFT's disabled layer, the
residual W' and not W. W' is rounded to the base's type, once.

Sources: Meng et al., PiSSA (arXiv 2404.02948); Buyukakyuz, OLoRA (arXiv 2406.01775).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from copra_llm.adapters import LoraFactors, load_adapter_weights, save_adapter_weights
from copra_llm.errors import InputError
from copra_llm.settings import LoraSettings

_START = "_copra_start"
"""Attribute of a model whose base was changed: the tensors `{key: tensor}` of the adapter as it started."""


def refuse_start(
    model: nn.Module, targets: list[str] | str, settings: LoraSettings, excluded: str | None = None
) -> None:
    """Refuse a start that PEFT would get wrong on one of the modules to adapt.

    Args:
        model: the base, no adapter attached.
        targets: PEFT's `target_modules`.
        settings: of the adapter.
        excluded: PEFT's `exclude_modules`.

    Raises:
        InputError: for a module of another kind than linear or in another type than PEFT's decompositions know (a
            quantised one), one smaller than the rank, or one that shares its weight.
    """
    init = settings.init_lora_weights
    if init in ("default", "gaussian"):
        return
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in _adapted(model, targets).items():
        if excluded is not None and re.fullmatch(excluded, name):
            continue
        # OLoRA takes a weight as (out, in), which GPT-2's Conv1D is not.
        kinds = (nn.Linear,) if init == "olora" else (nn.Linear, Conv1D)
        if type(module) not in kinds or module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = f"{type(module).__name__}, {str(module.weight.dtype).removeprefix('torch.')}"
            raise InputError(f"--init_lora_weights {init} is not right for {name} ({kind}), only for linear layers "
                             "that are not quantised; give default or gaussian")  # fmt: skip
        if settings.changes_base and min(module.weight.shape) < settings.lora_r:
            raise InputError(f"--lora_r is {settings.lora_r}, but {name} has no more than {min(module.weight.shape)} "
                             f"directions for --init_lora_weights {init}; lower the rank")  # fmt: skip
        if settings.changes_base and owners[id(module.weight)] > 1:
            raise InputError(f"--init_lora_weights {init} would change {name}, whose weight is also another module's; "
                             "leave it out of --lora_target_modules")  # fmt: skip


def _adapted(model: nn.Module, targets: list[str] | str) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if targets == "all-linear":
        output = model.get_output_embeddings()
        return {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and m is not output}
    return {n: m for n, m in modules.items() if any(n == t or n.endswith(f".{t}") for t in targets)}


def keep_start(model: PeftModel) -> None:
    """Remember the tensors of an adapter whose start has just changed the base; `write_for_base` needs them."""
    # The Hub would only be asked whether the vocabulary was changed, and it was not.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, _START, {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()})


def write_for_base(model: PeftModel, folder: Path) -> None:
    """Rewrite the adapter that `model` has just saved for the base as it was; nothing to do where that is its own.

    Rank and alpha double, so that the scaling stays; rsLoRA's becomes an ordinary one. DoRA's magnitudes belong to the
    sum of base and adapter, which stays.
    """
    start = getattr(model, _START, None)
    if start is None:
        return
    adapter = load_adapter_weights(folder)
    factors = {}
    for name, f in adapter.factors.items():
        key = f"base_model.model.{name}"
        lora_A = torch.cat([f.lora_A, start[f"{key}.lora_A.weight"]])  # (2r, in)
        lora_B = torch.cat([f.lora_B, -start[f"{key}.lora_B.weight"]], dim=1)  # (out, 2r)
        factors[name] = LoraFactors(lora_A, lora_B, f.scaling)
    save_adapter_weights(adapter.with_factors(factors, adapter.source), folder)


def read_for_training(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a file that `write_for_base` has written, the tensors that `model` trains: the first half, bit for bit."""
    start = getattr(model, _START, None)
    if start is None:
        return tensors
    # The other half was made again with the model, from the base and the seed.
    halves = {key: tensor[tuple(map(slice, start[key].shape))].contiguous() for key, tensor in tensors.items()
              if key in start and tensor.ndim == start[key].ndim}  # fmt: skip
    return tensors | halves
