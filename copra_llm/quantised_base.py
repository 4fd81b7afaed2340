"""How is a base model held in 4 or 8 bits while its adapter is trained?

By bitsandbytes, through transformers, on GPUs and CPUs. Only the frozen base is quantised; the adapter keeps its own
type, and so does the output layer. Adapters trained so are merged into a base of full precision, never into the
quantised one, which would round them away.

Source: Dettmers et al., QLoRA (arXiv 2305.14314): nf4, double quantisation; LLM.int8() (arXiv 2208.07339): 8 bits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from copra_llm.errors import InputError
from copra_llm.settings import ModelSettings


def quantisation(settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told, `{}` for a base of full precision.

    Args:
        settings: of the base.
        dtype: of the numbers that 4-bit products are computed in.

    Raises:
        InputError: if bitsandbytes is not installed.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        flag = "--load_in_4bit" if settings.load_in_4bit else "--load_in_8bit"
        raise InputError(f"{flag} needs bitsandbytes: pip install copra_llm[quantization]")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    # A quantised model cannot be moved afterwards: each process loads it where it computes.
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference.

    On CPUs with AVX512-BF16 its first evaluation packs them for a faster product that has no gradient; training on
    would go on without one, silently (0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
