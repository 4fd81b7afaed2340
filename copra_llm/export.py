"""How does an adapter become part of its model?

    W' = W + Delta W,      Delta W = scaling * B A  (DoRA: rescaled by its magnitudes)

for every adapted module, in float32, rounded once to the type that is written. PEFT folds; what is written is an
ordinary model, which plain transformers loads with neither PEFT nor this package.

Source: LoRA (arXiv 2106.09685), section 4.1: no latency is added at inference.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.serialization import split_torch_state_dict_into_shards
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from copra_llm.adapters import AdapterWeights, adapter_folder, load_adapter_weights
from copra_llm.errors import InputError
from copra_llm.gguf import UNREADABLE, quiet_loading
from copra_llm.image_inputs import processor_file
from copra_llm.models import base_config, dtype_of, kind_of, load_adapter, load_base
from copra_llm.results import atomic_folder
from copra_llm.settings import ModelSettings

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Folded:
    """What was written."""

    base_model: str
    """Hub id or folder of the base."""
    dtype: str
    """Of the weights."""
    parameters: int
    """Tied ones counted once."""
    shards: int
    """Number of safetensors files."""


def fold(
    adapter: Path | str,
    output: Path | str,
    *,
    model_name_or_path: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Folded:
    """Write the base model with the adapter folded in: weights, config, generation config and tokenizer, and a dual
    encoder's image processor.

    Args:
        adapter: folder that PEFT's `save_pretrained`, or a run, has written; a tokenizer in it goes before the base's.
        output: folder, replaced as a whole once everything is there.
        model_name_or_path: the base, in full precision; None: the one that the adapter names.
        dtype: "float32", "bfloat16" or "float16"; None: the base's own.
        max_shard_size: of a safetensors file, such as "500MB" or "5GB"; a larger tensor has a file of its own.
        trust_remote_code: run code that comes with a Hub model.
        progress: show PEFT's bar.

    Raises:
        InputError: if the base is quantised or no language model, the adapter does not fit it, or a folded weight is
            not finite.
    """
    folder, weights = adapter_folder(adapter), load_adapter_weights(adapter)
    _check_shard_size(max_shard_size)
    name = model_name_or_path or weights.named_base()
    settings = ModelSettings(model_name_or_path=name, trust_remote_code=trust_remote_code)
    wanted = _check_base(settings, weights, dtype)
    # In float32 whatever is written: one rounding, of the sum.
    base = load_base(settings)
    model = load_adapter(base, folder)
    if base.kind != "dual":  # it has no output embedding
        _untie(model)
    folded = _merge(model, weights.source, progress).to(wanted)
    _check_finite(folded, weights.source, wanted)
    tokenizer = _tokenizer(folder, base.source.load_from, trust_remote_code)
    with atomic_folder(Path(output)) as fresh, quiet_loading():
        folded.save_pretrained(fresh, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(fresh)
        processor = processor_file(base.source.load_from) if base.kind == "dual" else None
        if processor is not None:
            shutil.copyfile(processor, fresh / processor.name)
        shards = len(list(fresh.glob("*.safetensors")))
    parameters = sum(p.numel() for p in folded.parameters())
    return Folded(base.source.name, str(wanted).removeprefix("torch."), parameters, shards)


def _tokenizer(folder: Path, load_from: str, trust_remote_code: bool):
    """The adapter's, or else the base's, read anew: the loaded base's has been given a padding token."""
    own = (folder / "tokenizer_config.json").is_file()
    try:
        # Who trusts the base's code has said nothing of the adapter's.
        return AutoTokenizer.from_pretrained(
            folder if own else load_from, trust_remote_code=trust_remote_code and not own
        )
    except (*UNREADABLE, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer in {folder if own else load_from} could not be loaded ({first}); mend or "
                         "remove its files") from None  # fmt: skip


def _check_shard_size(size: str) -> None:
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError:
        raise InputError(f'--max_shard_size is "{size}", but must be a size such as 500MB or 5GB') from None


def _check_base(settings: ModelSettings, weights: AdapterWeights, dtype: str | None) -> torch.dtype:
    """The type to write; refuses a base into which nothing can be folded, before its weights are read."""
    name = settings.model_name_or_path
    config = base_config(settings)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"the base model {name} is quantised, and folding into it would round the sum; fold into the "
                         "full-precision base with --model_name_or_path, then quantise")  # fmt: skip
    if weights.heads:
        raise InputError(f"{weights.source} has an encoder's head on pooled states, for which transformers has no "
                         "class; load it with PEFT and its head.safetensors, as the README shows")  # fmt: skip
    if kind_of(config) == "encoder":
        raise InputError(f"the base model {name} is no causal or seq2seq language model, and its head or pooling would "
                         "be lost; load the adapter with PEFT")  # fmt: skip
    return dtype_of(dtype) if dtype is not None else config.dtype or torch.float32


def _untie(model: PeftModel) -> None:
    """If the adapter of one of two tied embeddings is folded, the other must not change with it.

    PEFT then sees that they differ and says so in the model's config; otherwise they stay tied.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends]
    if layers != ends and layers[0].weight is layers[1].weight:
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)


def _merge(model: PeftModel, source: str, progress: bool) -> PreTrainedModel:
    try:
        return model.merge_and_unload(progressbar=progress, safe_merge=True)
    except (ValueError, RuntimeError) as error:  # a NotImplementedError is a RuntimeError
        first = " ".join(str(error).split())[:200]
        raise InputError(f"{source} cannot be folded ({first}); use an adapter that PEFT can merge and whose values "
                         "are finite, such as an earlier checkpoint") from None  # fmt: skip


def _check_finite(model: nn.Module, source: str, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"folding {source} gives values of {name} that are not finite in {dtype}; write another "
                             "--dtype, or use an earlier checkpoint")  # fmt: skip
