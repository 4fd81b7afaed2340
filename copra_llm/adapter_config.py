"""Can the `adapter_config.json` of a LoRA adapter be relied upon?

An adapter's folder may be anybody's. Every field on which numbers, names or PEFT's own construction of the adapter
depend is of the type that PEFT writes, and of a size that a model can have, before anything is built from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from copra_llm.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from copra_llm.errors import InputError, shown
from copra_llm.json_file import is_integer, is_number, list_of, read_json
from copra_llm.patterns import pattern_fault

MOST_RANK = 1 << 16
"""Of a factor; a model has no wider layers."""
MOST_LAYERS = 1 << 12
"""That `layer_replication` may ask for."""
_REMEDY = "save the adapter anew with PEFT, or fetch it again"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of a saved LoRA adapter whose weights are safetensors.

    Args:
        folder: with PEFT's two files.

    Raises:
        InputError: if it is no LoRA adapter, a field is of another type or size than any that PEFT can have written, or
            the weights are there as a pickle alone.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, _REMEDY)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        kind = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 40 else shown(kind)
        raise InputError(f"{folder} is a {kind} adapter, but must be LORA; give a LoRA adapter")
    for key, (good, must) in _FIELDS.items():
        value = config.get(key)
        if (value is not None or key in _NEEDED) and not good(value):
            raise InputError(f"{path}: {key} is {shown(value)}, but must be {must}; {_REMEDY}")
    for key, most in _PATTERNS.items():
        for pattern in _patterns(config.get(key)):
            if (fault := pattern_fault(pattern, most)) is not None:
                raise InputError(f"{path}: {key} holds {shown(pattern)}, which {fault}; name the modules instead")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} has no weights in {WEIGHTS_FILE} (pickled ones are not read); save them anew")
    return config


def _is_rank(value: Any) -> bool:
    return is_integer(value) and 1 <= value <= MOST_RANK


def _is_alpha(value: Any) -> bool:
    # As a float: an integer may be beyond any.
    return is_number(value) and abs(value) <= 1e30 and not math.isnan(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    """A module's name or the end of one."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return is_integer(value) and 0 <= value < 1 << 31


def _either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(good(value) for good in kinds)


def _names_to(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(good, value.values()))


def _is_span_list(value: Any) -> bool:
    spans = isinstance(value, list) and all(list_of(_is_index)(span) and len(span) == 2 for span in value)
    return spans and all(a < b for a, b in value) and sum(b - a for a, b in value) <= MOST_LAYERS


_NAMES = (_either(_is_text, list_of(_is_text)), "a text or a list of texts")
_FLAG = (_is_flag, "true or false")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a whole number from 1 to {MOST_RANK}"),
    "lora_alpha": (_is_alpha, "a finite number"),
    "lora_dropout": (lambda v: is_number(v) and 0.0 <= v <= 1.0, "a number in [0, 1]"),
    "rank_pattern": (_names_to(_is_rank), f"a table of whole numbers from 1 to {MOST_RANK}"),
    "alpha_pattern": (_names_to(_is_alpha), "a table of finite numbers"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "use_qalora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "inference_mode": _FLAG,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    # PEFT puts them into regular expressions.
    "modules_to_save": (list_of(_is_name), "a list of modules' names"),
    "target_parameters": (list_of(_is_text), "a list of texts"),
    "layers_to_transform": (_either(_is_index, list_of(_is_index)), "an index or a list of indices"),
    "trainable_token_indices": (_either(list_of(_is_index), _names_to(list_of(_is_index))), "lists of indices"),
    "layer_replication": (_is_span_list, f"a list of [start, end] with at most {MOST_LAYERS} layers in all"),
    "init_lora_weights": (_either(_is_flag, _is_text), "true, false or a text"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a text"),
    "task_type": (_is_text, "a text"),
    # PEFT would import the package that the file names.
    "megatron_config": (lambda v: not v, "null, since Megatron's layers are not read"),
}
"""Field -> (is it a possible value, what it must be); null is what PEFT writes for one that is not set."""
_NEEDED = ("r", "lora_alpha")
# Keys of the first two are matched with every adapted module's name, for its rank and its scaling.
_PATTERNS = {"rank_pattern": 4, "alpha_pattern": 4, "target_modules": 16, "exclude_modules": 16, "layers_pattern": 4}


def _patterns(value: Any) -> list[str]:
    """The regular expressions in a field: a table's keys, a text; names in a list are compared as they are."""
    if isinstance(value, dict):
        return list(value)
    return [value] if isinstance(value, str) else []
