"""Which base model does a name mean, and how does an adapter get onto it?

A name is a hub id, a folder, a `.gguf` file, or the short name of a model that an installed Python package
carries. A GGUF is dequantised once into an ordinary folder in the cache. Saved adapters name the hub id;
when the hub is out of reach, that id resolves to the packaged copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from copra_llm.adapters import check_places, load_adapter_weights
from copra_llm.errors import InputError, nearest, shown
from copra_llm.gguf import UNREADABLE, converted_gguf, gguf_arguments, gguf_folder, quiet_loading
from copra_llm.initial import keep_start, refuse_start
from copra_llm.packaged import PACKAGED, packaged_path
from copra_llm.quantised_base import keep_trainable, quantisation, quantised_as
from copra_llm.settings import LoraSettings, ModelSettings
from copra_llm.towers import not_adapted


@dataclass(frozen=True)
class Source:
    """Where a base model is loaded from, and the name that saved adapters give it."""

    load_from: str
    """A folder or a hub id."""
    name: str
    """`base_model_name_or_path` of saved adapters."""
    dequantised: str | None = None
    """The GGUF file that the weights come from, in fewer bits than they have now; None: they are as published."""


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer."""

    model: nn.Module
    tokenizer: object
    source: Source
    kind: str
    """"causal", "seq2seq", "encoder" or "dual" (an image and a text tower that meet in one space)."""
    fingerprint: str
    """SHA-256 of the weights, first 16 hex digits."""

    def about(self) -> dict[str, Any]:
        """What a record says of it; how the weights are held, where they are not as published."""
        held = {"base_quantised": quantised_as(self.model), "base_dequantised_from": self.source.dequantised}
        named = {"base_model": self.source.name, "base_fingerprint": self.fingerprint}
        return named | {key: value for key, value in held.items() if value is not None}


def resolve(name: str, weights: bool = True) -> Source:
    """Find out what a model name means; `weights`: whether a folder must hold any.

    Raises:
        InputError: for a folder without a config or weights, a missing file, or a package not installed.
    """
    source = _locate(name)
    if source.load_from.endswith(".gguf"):
        file = Path(source.load_from)
        return Source(str(converted_gguf(file)), source.name, file.name)
    folder = Path(source.load_from)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json; give a folder that save_pretrained has written")
    if weights and folder.is_dir() and not _weight_files(folder):
        pickled = " (pickled ones can run code, and are not read)" if any(folder.glob("*.bin")) else ""
        raise InputError(f"{name} holds no weights in *.safetensors{pickled}; give a folder with them")
    return source


def _locate(name: str) -> Source:
    """What a model name means, a GGUF not converted yet."""
    path = Path(name).expanduser()
    if name in PACKAGED:
        return Source(str(packaged_path(name)), PACKAGED[name].hub_id)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"{name} does not exist; give the path of a GGUF file")
        return Source(str(path), str(path.resolve()))
    if path.is_dir():
        return Source(str(path), str(path.resolve()))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = nearest(name, PACKAGED)
        raise InputError(
            f'"{name}" is no folder, no .gguf file, no hub id (owner/name) and no packaged model{known}; '
            f"packaged ones are {', '.join(PACKAGED)}"
        )
    packaged = next((short for short, model in PACKAGED.items() if model.hub_id == name), None)
    if packaged is not None and importlib.util.find_spec(PACKAGED[packaged].package) and not _hub_has(name):
        return Source(str(packaged_path(packaged)), name)
    return Source(name, name)


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a base model alone; no weights are read, those of a GGUF not dequantised.

    Args:
        name: as for `resolve`; a folder needs no weights here.
        trust_remote_code: run code that comes with a Hub model.

    Raises:
        InputError: if the name means nothing, or the Hub cannot be reached.
    """
    source = _locate(name)
    path = Path(source.load_from)
    where = {"pretrained_model_name_or_path": source.load_from}
    if path.suffix == ".gguf":
        folder = gguf_folder(path)
        converted = (folder / "config.json").is_file()
        where = {"pretrained_model_name_or_path": str(folder)} if converted else gguf_arguments(path)
    with _readable(name, "tokenizer of"), quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dtype_of(name: str) -> torch.dtype:
    """A floating-point type by its name.

    Raises:
        InputError: if it is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f'--dtype is "{name}", but must be float32, bfloat16 or float16')
    return dtype


def base_config(settings: ModelSettings) -> PreTrainedConfig:
    """The configuration of a base model, without its weights.

    Raises:
        InputError: if the name means nothing, or the Hub cannot be reached.
    """
    return _read_config(resolve(settings.model_name_or_path, weights=False), settings)


def _read_config(source: Source, settings: ModelSettings) -> PreTrainedConfig:
    with _readable(settings.model_name_or_path):
        config = AutoConfig.from_pretrained(source.load_from, trust_remote_code=settings.trust_remote_code)
    named = getattr(config, "architectures", None) or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise InputError(f"{settings.model_name_or_path}: config.json has architectures {shown(named)}, but must name "
                         "them in a list; fetch the model again")  # fmt: skip
    return config


def load_base(settings: ModelSettings) -> Base:
    """Load the base model, frozen, and its tokenizer.

    Raises:
        InputError: if the name or dtype means nothing, or the Hub cannot be reached.
    """
    source = resolve(settings.model_name_or_path)
    dtype = dtype_of(settings.dtype)
    options = {"trust_remote_code": settings.trust_remote_code, "use_safetensors": True}
    config = _read_config(source, settings)
    kind = kind_of(config)
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    with _readable(settings.model_name_or_path), quiet_loading():
        extra = extra_arguments(kind, config)
        options |= quantisation(settings, dtype, lambda: AUTO[kind].from_config(config, **extra))
        model = AUTO[kind].from_pretrained(source.load_from, dtype=dtype, **extra, **options)
        tokenizer = AutoTokenizer.from_pretrained(source.load_from, trust_remote_code=settings.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    keep_trainable(model)
    return Base(model, tokenizer, source, kind, fingerprint(source.load_from))


@contextmanager
def _readable(name: str, what: str = "model"):
    """What transformers raises within the block becomes one sentence; only its readers stand in there.

    A file that is not what it should be makes them raise anything: a KeyError, a RecursionError, a bare Exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        code = "trust_remote_code" in str(error)
        remedy = ("it comes with code of its own; give --trust_remote_code if you trust that" if code
                  else "mend that, or give another")  # fmt: skip
        first = "" if code else f" ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise InputError(f'the {what} "{name}" could not be loaded{first}; {remedy}') from None


AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel, "dual": AutoModel}
"""What transformers makes of each kind."""


def kind_of(config) -> str:
    """By the configuration's architecture: "causal", "seq2seq", "encoder" or "dual"."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    architecture = (getattr(config, "architectures", None) or [""])[0]
    # Models that write about pictures have both configurations too, but are "ForConditionalGeneration".
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and "For" not in architecture:
        return "dual"
    return "causal" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def extra_arguments(kind: str, config) -> dict:
    """What `AUTO` is told besides."""
    # Encoders are read through their mean-pooled tokens: a pooler would be dead weight.
    return {"add_pooling_layer": False} if kind == "encoder" and config.model_type in ("bert", "roberta") else {}


QKV = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin",
       "query_proj", "key_proj", "value_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "qkv_proj")  # fmt: skip
"""Names of attention input projections over the architectures of transformers, for `--lora_target_modules qkv`."""


def target_modules(model: nn.Module, wanted: list[str]) -> list[str] | str:
    """`--lora_target_modules` as PEFT's `target_modules`.

    Raises:
        InputError: if a name matches no module of the model.
    """
    if wanted == ["all-linear"]:
        return "all-linear"
    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _adaptable(module)}
    if wanted == ["qkv"]:
        found = sorted(present.intersection(QKV))
        if not found:
            raise InputError(
                "the model has no query, key or value projection under a known name, so --lora_target_modules qkv "
                f"fits nothing; name some of {', '.join(sorted(present))}"
            )
        return found
    names = [name for name, module in model.named_modules() if _adaptable(module)]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                f'no module of the model matches --lora_target_modules "{target}"{nearest(target, present)}; '
                f"it has {', '.join(sorted(present))}"
            )
    return wanted


def _check_layers(model: nn.Module, layers: list[int] | None) -> None:
    found = (re.search(r"\.(\d+)\.", name) for name, module in model.named_modules() if _adaptable(module))
    present = {int(match[1]) for match in found if match}
    missing = next((layer for layer in layers or () if layer not in present), None)
    if missing is not None:
        raise InputError(
            f"--lora_layers_to_transform names block {missing}, but the model's go from 0 to {max(present, default=0)}"
        )


def _adaptable(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or type(module).__name__ in ("Conv1D", "Embedding")


def add_adapter(base: Base, settings: LoraSettings, init_seed: int, encoder: str = "both") -> PeftModel:
    """Attach a fresh LoRA adapter, initialised from a seed of its own; no global generator moves.

    Args:
        base: keeps its weights, unless the adapter starts from a part of them (`initial`).
        settings: rank, targets and the like.
        init_seed: of the factors A.
        encoder: which towers of a dual encoder are adapted: "both", "vision" or "text".

    Raises:
        InputError: for modules or blocks that the model lacks, or a start that is not right for one of them.
    """
    _check_layers(base.model, settings.lora_layers_to_transform)
    targets = target_modules(base.model, settings.lora_target_modules)
    linear = [name for name, module in base.model.named_modules() if _adaptable(module)]
    excluded = not_adapted(encoder, linear, targets) if base.kind == "dual" else None
    refuse_start(base.model, targets, settings, excluded)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=settings.lora_layers_to_transform,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(base.kind, "FEATURE_EXTRACTION"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(init_seed)
        model = get_peft_model(base.model, config)
    # A start is over once it is made: whoever loads the adapter must not make it again.
    model.peft_config["default"].init_lora_weights = True
    if settings.changes_base:
        keep_start(model)
    _name_base(model, base.source)
    return model


def load_adapter(base: Base, folder: Path | str) -> PeftModel:
    """Attach a saved PEFT adapter, frozen.

    Raises:
        InputError: if it cannot be read (`load_adapter_weights`), or does not fit the base model.
    """
    # Before PEFT sees the folder: it would take what is missing or misnamed for something else, or read a pickle.
    weights = load_adapter_weights(folder)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder))
    except (*UNREADABLE, SafetensorError, TypeError, KeyError, IndexError, AttributeError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} does not fit the base model {base.source.name}: {first}; give the base that it "
                         "was trained on with --model_name_or_path") from None  # fmt: skip
    # PEFT leaves out in silence what it finds no place for.
    check_places(weights, get_peft_model_state_dict(model, save_embedding_layers=False).keys(), base.source.name)
    _name_base(model, base.source)
    return model


def _name_base(model: PeftModel, source: Source) -> None:
    for config in model.peft_config.values():
        config.base_model_name_or_path = source.name


def sharded_at_load(model: nn.Module) -> bool:
    """Whether a base's weights were spread over the processes as they were read (ZeRO-3)."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def whole_base(model: nn.Module):
    """A base that was sharded as it was loaded has all its weights within the block, on every process."""
    if not sharded_at_load(model):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def fingerprint(load_from: str) -> str:
    """SHA-256 over the weight files of a local folder, or of the cached snapshot of a hub id; 16 hex digits."""
    folder = Path(load_from)
    if not folder.is_dir():
        from transformers.utils import cached_file

        offline = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        config = cached_file(load_from, "config.json", **offline)
        folder = Path(config).parent if config else folder
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(folder.glob("*.safetensors"))


def _hub_has(hub_id: str) -> bool:
    """Whether the Hub, or its local cache, can give this model now."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return True
    if constants.is_offline_mode():
        return False
    # The hub client retries for half a minute before it gives up; one request (through the proxy, if there is
    # one) answers at once.
    request = urllib.request.Request(f"{constants.ENDPOINT}/{hub_id}/resolve/main/config.json", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=3).close()
        return True
    except (OSError, HTTPException, ValueError):
        return False
