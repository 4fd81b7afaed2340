"""How is a base model held in 4 or 8 bits while its adapter is trained?

By bitsandbytes, through transformers, on GPUs and CPUs. What is quantised is the linear layers of the frozen base's
transformer blocks, alone: the adapter keeps its own type, and so does all that stands outside blocks, such as output
layers, heads and a dual encoder's projections. Adapters trained so are merged with each other as any, and folded into
a base of full precision, never into the quantised one, which would round them away.

On a CPU, 8-bit layers take one of two ways (bitsandbytes 0.50.2): in training the weight is dequantised for the
product, in evaluation inputs are rounded to 8 bits too, row by row but for outliers of the whole batch. So a loss
measured in evaluation is not bit for bit that of training, and depends a little on which examples share a batch.

Source: Dettmers et al., QLoRA (arXiv 2305.14314): nf4, double quantisation; LLM.int8() (arXiv 2208.07339): 8 bits.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from copra_llm.errors import InputError
from copra_llm.gates import FIRST_INTEGER
from copra_llm.settings import ModelSettings


def quantisation(settings: ModelSettings, dtype: torch.dtype, skeleton: Callable[[], nn.Module]) -> dict[str, Any]:
    """What `from_pretrained` is told, `{}` for a base of full precision.

    Args:
        settings: of the base.
        dtype: of all that is not quantised, and of 4-bit layers' products unless the settings say otherwise.
        skeleton: makes a model with the base's modules; it is called where tensors take no memory.

    Raises:
        InputError: if bitsandbytes is not installed, or the base has no blocks.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    flag = "--load_in_4bit" if settings.load_in_4bit else "--load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{flag} needs bitsandbytes: pip install copra_llm[quantization]")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        inside, outside = linear_layers(skeleton())
    if not inside:
        raise InputError(f"{flag} quantises the linear layers of numbered transformer blocks, but "
                         f"{settings.model_name_or_path} has none; leave the flag out")  # fmt: skip
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        # Of 4-bit layers too, whatever the name says. Patterns: a plain name would also match longer ones.
        llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in outside],
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=settings.bnb_4bit_compute_dtype or dtype,
        bnb_4bit_quant_storage=settings.bnb_4bit_quant_storage,
    )
    # A quantised model cannot be moved afterwards: each process loads it where it computes.
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def linear_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a base's linear layers: those in numbered blocks, which are what is quantised, and the others."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if re.search(FIRST_INTEGER, name)]
    return inside, [name for name in names if not re.search(FIRST_INTEGER, name)]


def quantised_as(model: nn.Module) -> dict[str, Any] | None:
    """How a loaded base's layers are held, for its record; None: none is quantised."""
    # PEFT's layers around bitsandbytes' bear the same names.
    own = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    eight, four = ([m for m in own if type(m).__name__ == kind] for kind in ("Linear8bitLt", "Linear4bit"))
    if eight:
        return {"bits": 8, "type": "int8", "modules": len(eight)}
    if not four:
        return None
    weight, computed = four[0].weight, four[0].compute_dtype
    return {
        "bits": 4,
        "type": weight.quant_type,
        "double_quant": weight.compress_statistics,
        "compute_dtype": str(computed).removeprefix("torch."),
        "storage": str(weight.quant_storage).removeprefix("torch."),
        "modules": len(four),
    }


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference.

    On CPUs with AVX512-BF16 its first evaluation packs them for a faster product that has no gradient; training on
    would go on without one, silently (0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
