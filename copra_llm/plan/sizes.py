"""How large are a base model and its adapter, exactly?

The model is made on torch's meta device, where tensors have a shape and a type but no numbers, and PEFT attaches the
adapter to it as to any other. So counts are those of the run, for whatever model and targets, and no weight is read.

A quantised linear layer of n weights takes, in bytes,

    4 bits:  n / 2 + 4 n / 64 + 64,  or with double quantisation  n / 2 + n / 64 + 4 n / (64 * 256) + 64 + 1024 + 4
    8 bits:  n + 4 out

blocks rounded up: packed numbers, a scale a block (float32, or 8 bits with a float32 a block of those), code books.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3: blocks of 64 and 256, 4.127 bits a weight; LLM.int8()
(arXiv 2208.07339): a float32 a row. Linear layers of blocks are quantised, the rest stays in the base's type.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig

from copra_llm.errors import InputError
from copra_llm.gates import base_name, group_players
from copra_llm.gguf import quiet_loading
from copra_llm.models import AUTO, Base, Source, add_adapter, base_config, dtype_of, extra_arguments, kind_of
from copra_llm.plan.cluster import ShapeSettings
from copra_llm.quantised_base import linear_layers
from copra_llm.settings import LoraSettings, ModelSettings, ScheduleSettings


@dataclass(frozen=True)
class Sizes:
    """Of a base model and its adapter; bytes, unless named otherwise."""

    base_params: int
    base_bytes: int
    whole_bytes: int
    """Of the base, quantised weights: they are not divided."""
    divided_blocks: tuple[int, ...]
    """Of the base, each transformer block's bytes beside them."""
    divided_rest: int
    """Of the base, what belongs to no block: embeddings, last norm, output layer."""
    largest_rows: int
    """Rows of the base's longest weight: FSDP2 divides by rows."""
    largest_matrix: int
    """Weights of the largest quantised layer, 0 where none is."""
    trained: tuple[int, ...]
    """Of each trained tensor, the number of its entries."""
    trained_bytes: int
    players_of_block: tuple[int, ...]
    """Of each block with players, from the lowest up, how many."""
    block_trained: int
    """Trained parameters that belong to players."""
    adapter_file: int
    """Of `adapter_model.safetensors`."""

    @property
    def trained_params(self) -> int:
        return sum(self.trained)

    @property
    def divided_bytes(self) -> int:
        return sum(self.divided_blocks) + self.divided_rest


def configuration(model: ModelSettings, shape: ShapeSettings, max_length: int) -> tuple[PreTrainedConfig, Source]:
    """The configuration of the named model, or of a Llama of the given sizes; no weights are needed.

    Raises:
        InputError: if the name means nothing, or the Hub cannot be reached.
    """
    if not shape.given:
        name = model.model_name_or_path
        return base_config(model), Source(name, name)
    sizes = {key: value for key, value in vars(shape).items() if value is not None}
    config = LlamaConfig(**sizes, max_position_embeddings=max_length)
    config.architectures = ["LlamaForCausalLM"]
    return config, Source("", f"a Llama of {shape.num_hidden_layers} blocks of {shape.hidden_size}")


def empty_model(
    config: PreTrainedConfig, source: Source, dtype: str, lora: LoraSettings, attention: str | None = None
) -> tuple[Base, PeftModel]:
    """The base without numbers, on the meta device, and the same with its adapter.

    Args:
        config: of the base.
        source: names it.
        dtype: of its weights.
        lora: of the adapter; where A and B start changes no size.
        attention: transformers' name of the attention; None: the model's default.

    Raises:
        InputError: for targets or blocks that the model lacks.
    """
    kind, options = kind_of(config), {"attn_implementation": attention} if attention else {}
    with torch.device("meta"), quiet_loading(), warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        # A configuration is changed by the model that is made of it.
        own = type(config).from_dict(config.to_dict())
        own.architectures = config.architectures
        model = AUTO[kind].from_config(own, dtype=dtype_of(dtype), **extra_arguments(kind, own), **options)
        model.requires_grad_(False)
        base = Base(model, None, source, kind, "")
        return base, add_adapter(base, dataclasses.replace(lora, init_lora_weights="default"), init_seed=0)


def measure(
    base: Base, model: PeftModel, settings: ModelSettings, lora: LoraSettings, gates: ScheduleSettings
) -> Sizes:
    """The sizes of a base and its adapter, made by `empty_model`.

    Raises:
        InputError: if no adapted module stands in a block, or a pattern finds none.
    """
    tensors, quantised = _base_tensors(base.model, settings)
    blocks = group_players(tensors, "layer", gates.layer_pattern)
    adapted = {base_name(n.rpartition(".lora_")[0]): 0 for n, p in model.named_parameters() if p.requires_grad}
    players = group_players(adapted, gates.granularity, gates.layer_pattern)
    if not players:
        raise InputError("no adapted module stands in a numbered transformer block; name others in "
                         "--lora_target_modules, or give --layer_pattern")  # fmt: skip
    in_players = {name for names in players.values() for name in names}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = [name for name in trained if base_name(name.rpartition(".lora_")[0]) in in_players]
    block_of = group_players(in_players, "layer", gates.layer_pattern)
    divided = {name: 0 if name in quantised else size for name, (_, size) in tensors.items()}
    of_blocks = tuple(sum(divided[name] for name in names) for names in blocks.values())
    total = sum(size for _, size in tensors.values())
    return Sizes(
        base_params=sum(n for n, _ in tensors.values()),
        base_bytes=total,
        whole_bytes=total - sum(divided.values()),
        divided_blocks=of_blocks,
        divided_rest=sum(divided.values()) - sum(of_blocks),
        largest_rows=max(p.shape[0] for n, p in base.model.named_parameters() if p.dim() and not p.requires_grad),
        largest_matrix=max((tensors[name][0] for name in quantised), default=0),
        trained=tuple(p.numel() for p in trained.values()),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained.values()),
        players_of_block=tuple(len(n) if gates.granularity == "module" else 1 for n in block_of.values()),
        block_trained=sum(trained[name].numel() for name in inside),
        adapter_file=safetensors_bytes(_saved(model, lora), {"format": "pt"}),
    )


def quantised_bytes(rows: int, columns: int, settings: ModelSettings) -> int:
    """Bytes of a linear layer's `(rows, columns)` weight under bitsandbytes (0.50)."""
    n = rows * columns
    if settings.load_in_8bit:
        return n + 4 * rows
    blocks, code_book = math.ceil(n / 64), 16 * 4
    if not settings.bnb_4bit_use_double_quant:
        return math.ceil(n / 2) + 4 * blocks + code_book
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + code_book + 256 * 4 + 4


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> int:
    """Length of a safetensors file: eight bytes, a JSON header padded to a multiple of eight, the numbers.

    Args:
        tensors: `{name: (type by safetensors' name, shape, bytes)}`.
        metadata: of the file.

    Source: the format's description, github.com/huggingface/safetensors. Within a file wider types come first, then
    names in order; here only the digits of the offsets depend on it.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape, size) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(length / 8) * 8 + start


def _base_tensors(model: nn.Module, settings: ModelSettings) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """`{base parameter's name: (entries, bytes)}`, and the names of those that are quantised."""
    frozen = {}
    quantised = _quantised(model) if settings.load_in_4bit or settings.load_in_8bit else set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            continue
        size = p.numel() * p.element_size()
        if name.replace(".base_layer", "") in quantised:
            size = quantised_bytes(*p.shape, settings)
        frozen[name.replace(".base_layer", "")] = (p.numel(), size)
    return frozen, quantised


def _quantised(model: nn.Module) -> set[str]:
    """Names of the weights that are quantised, in the base without an adapter."""
    inside, _ = linear_layers(model)
    frozen = (name for name in inside if not model.get_submodule(name).weight.requires_grad)
    return {f"{name.replace('.base_layer', '')}.weight" for name in frozen}


_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _saved(model: PeftModel, lora: LoraSettings) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """What PEFT writes; a start that changes the base is written at twice the rank (`initial.py`)."""
    saved = {}
    for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        shape = tuple(t.shape)
        if lora.changes_base and ".lora_A" in name:
            shape = (2 * shape[0], *shape[1:])
        if lora.changes_base and ".lora_B" in name:
            shape = (shape[0], 2 * shape[1])
        saved[name] = (_TYPES[t.dtype], shape, math.prod(shape) * t.element_size())
    return saved
