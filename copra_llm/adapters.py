"""What is a saved LoRA adapter, as numbers?

    Delta W = scaling * B A,      A (r, in), B (out, r)

for every adapted module; read from and written to PEFT's own files, so that any PEFT adapter can be taken
apart, changed, and loaded by plain PEFT again. Nothing here touches a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from copra_llm import hub
from copra_llm.adapter_config import read_adapter_config
from copra_llm.adapter_files import CONFIG_FILE, HEAD_FILE, RUN_FOLDER, WEIGHTS_FILE
from copra_llm.errors import InputError, shown
from copra_llm.results import atomic_folder, write_atomic
from copra_llm.tensor_file import read_tensors

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """The adapter of one module."""

    lora_A: Tensor
    """`(r, in)`."""
    lora_B: Tensor
    """`(out, r)`."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def delta_weight(self) -> Tensor:
        """`scaling * B @ A (out, in)`, in float64."""
        return self.scaling * (self.lora_B.double() @ self.lora_A.double())

    def at_scaling(self, scaling: float) -> tuple[Tensor, Tensor]:
        """`A (r, in)` and `B (out, r)` in float64 whose Delta W at another scaling, not 0, is this one's.

        Each gets the root of the ratio of the scalings, which keeps them in balance; its sign goes into B.
        """
        ratio = self.scaling / scaling
        root = math.sqrt(abs(ratio))
        return root * self.lora_A.double(), math.copysign(root, ratio) * self.lora_B.double()


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter: factors by module name, and what was stored with them."""

    factors: dict[str, LoraFactors]
    """By the module's name in the base model."""
    config: dict[str, Any]
    """`adapter_config.json`."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are no LoRA factor (`modules_to_save`, DoRA magnitudes, ...), by their key in the file."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """An encoder's heads, `head.safetensors`."""
    head_metadata: dict[str, str] = field(default_factory=dict)
    source: str = "adapter"
    """The folder it came from, for messages."""

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell this adapter's tensors and scalings from those of others."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()) + sorted(self.heads.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        for name, f in sorted(self.factors.items()):
            digest.update(f"{name} {f.scaling!r} ".encode())
        return digest.hexdigest()[:16]

    def named_base(self) -> str:
        """The base model's name.

        Raises:
            InputError: if the adapter does not say.
        """
        if not self.base_model:
            raise InputError(f"{self.source} does not say which base model it is for; give --model_name_or_path")
        return self.base_model

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under PEFT's keys."""
        tensors = dict(self.extras)
        for name, f in self.factors.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = f.lora_A.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = f.lora_B.contiguous()
        return tensors

    def with_factors(self, factors: dict[str, LoraFactors], source: str) -> AdapterWeights:
        """The same adapter with other factors, its config rewritten so that PEFT loads them with their scaling.

        What else is stored for a module that is no longer adapted goes with it (a DoRA magnitude), or is kept under
        the name that it has in the plain module (a trained bias).
        """
        config = _fitting_config(self.config, factors)
        if factors.keys() != self.factors.keys():
            # By their full names: what chose the old modules may leave out a new one.
            restrictions = ("layers_to_transform", "layers_pattern", "exclude_modules")
            config |= {"target_modules": sorted(factors), **{key: None for key in restrictions if key in config}}
            for key in ("rank_pattern", "alpha_pattern"):
                patterns = config.get(key) or {}
                used = {p for p in patterns if any(get_pattern_key([p], name) == p for name in factors)}
                config[key] = {p: value for p, value in patterns.items() if p in used}
        dropped = sorted(self.factors.keys() - factors.keys())
        # PEFT would also take a longer name that ends like a target's.
        longer = [name for name in dropped if any(name.endswith(f".{target}") for target in factors)]
        if longer:
            config["exclude_modules"] = longer
        return replace(
            self, factors=factors, config=config, extras=_fitting_extras(self.extras, dropped), source=source
        )


def adapter_folder(path: Path | str) -> Path:
    """The folder with `adapter_config.json`: the path itself, `adapter/` in a run's folder, or, for what is no path
    here but a hub id (`owner/name`, `owner/name@revision`), where it was fetched to.

    Raises:
        InputError: if none of them is an adapter.
    """
    folder = Path(path)
    for place in (folder, folder / RUN_FOLDER):
        if (place / CONFIG_FILE).is_file():
            return place
    hub_id = hub.parse_id(str(path))
    if hub_id is not None and not folder.exists():
        return hub.download(hub_id)
    what = f"holds no {CONFIG_FILE}" if folder.is_dir() else "is not a folder"
    raise InputError(f"{path} {what}; give a folder that PEFT's save_pretrained, or a run, has written")


def load_adapter_weights(path: Path | str) -> AdapterWeights:
    """Read an adapter's files.

    Args:
        path: as for `adapter_folder`.

    Raises:
        InputError: if it is no LoRA adapter in safetensors, or its files do not fit each other.
    """
    folder = adapter_folder(path)
    config = read_adapter_config(folder)
    tensors, _ = read_tensors(folder / WEIGHTS_FILE)
    heads, metadata = read_head_file(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    extras = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B)\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            extras[key] = tensor
    factors = {}
    for name, pair in pairs.items():
        _check_factors(folder, name, pair, config)
        factors[name] = LoraFactors(pair["lora_A"], pair["lora_B"], _scaling(config, name))
    if not factors:
        raise InputError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B; give a LoRA adapter of linear layers")
    return AdapterWeights(factors, config, extras, heads, metadata, str(path))


def save_adapter_weights(adapter: AdapterWeights, folder: Path | str) -> None:
    """Write an adapter that plain PEFT loads, atomically."""
    with atomic_folder(Path(folder)) as fresh:
        write_atomic(fresh / CONFIG_FILE, json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        save_file(adapter.state_dict(), fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        if adapter.heads:
            save_file(adapter.heads, fresh / HEAD_FILE, metadata=adapter.head_metadata)


def check_places(adapter: AdapterWeights, keys: Collection[str], base_model: str) -> None:
    """Refuse an adapter of which a model has taken only a part.

    Args:
        adapter: that was to be attached.
        keys: of the tensors that the model has for it.
        base_model: the model's name.

    Raises:
        InputError: naming the first module that the model lacks.
    """
    for name in adapter.factors:
        if f"{_PREFIX}{name}.lora_A.weight" not in keys:
            raise InputError(f"{adapter.source} adapts {name}, which {base_model} does not have; give the base that "
                             "it was trained on with --model_name_or_path")  # fmt: skip


def read_head_file(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An encoder's heads `{"<task>.weight": (num_labels, hidden)}` beside an adapter, and their metadata.

    Raises:
        InputError: if a head is no matrix of finite numbers, or the labels are not lists of texts by task.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return {}, {}
    heads, metadata = read_tensors(path)
    for key, head in heads.items():
        if head.ndim != 2 or not head.is_floating_point() or not bool(torch.isfinite(head).all()):
            raise InputError(f"{path}: {shown(key)} is no matrix of finite numbers; save or fetch the adapter again")
    try:
        labels = json.loads(metadata.get("labels", "{}"))
        good = isinstance(labels, dict) and all(isinstance(words, list) for words in labels.values())
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise InputError(f"{path}: its labels are no lists by task; save or fetch the adapter again")
    return heads, metadata


def _check_factors(folder: Path, name: str, pair: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Refuse what is no pair of factors of the rank that the config gives the module."""
    where = f"{folder}: the factors of {shown(name)}"
    shapes = {k: tuple(v.shape) for k, v in pair.items()}
    kinds = {str(v.dtype).removeprefix("torch.") for v in pair.values()}
    if not re.fullmatch(r"[\w.-]{1,512}", name):
        raise InputError(f"{where} bear no name that a module can have; save or fetch the adapter again")
    if any(len(shape) != 2 for shape in shapes.values()):
        raise InputError(f"{where} are no matrices: {shapes}; adapt linear layers")
    if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
        raise InputError(f"{where} do not fit each other: {shapes}; save or fetch the adapter again")
    if 0 in (pair["lora_A"].shape[1], pair["lora_B"].shape[0]):
        raise InputError(f"{where} have no entries: {shapes}; save or fetch the adapter again")
    if not kinds.issubset(_TYPES):
        raise InputError(f"{where} are of type {', '.join(sorted(kinds))}; save them as one of {', '.join(_TYPES)}")
    if pair["lora_A"].shape[0] != _rank(config, name):
        raise InputError(f"{where} have rank {pair['lora_A'].shape[0]}, but {CONFIG_FILE} says {_rank(config, name)}; "
                         "save or fetch the adapter again")  # fmt: skip


_TYPES = ("float32", "bfloat16", "float16", "float64")
"""Of factors."""


def _rank(config: dict[str, Any], name: str) -> int:
    """PEFT's rank of a module."""
    ranks = config.get("rank_pattern") or {}
    return ranks.get(get_pattern_key(ranks, name), config["r"])


def _scaling(config: dict[str, Any], name: str) -> float:
    """PEFT's scaling of a module, patterns and rsLoRA included."""
    alphas = config.get("alpha_pattern") or {}
    r, alpha = _rank(config, name), alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _fitting_config(config: dict[str, Any], factors: dict[str, LoraFactors]) -> dict[str, Any]:
    """`config`, changed where it would give a factor another rank or scaling."""
    if all(f.r == _rank(config, name) and f.scaling == _scaling(config, name) for name, f in factors.items()):
        return dict(config)
    wanted = {name: (f.r, f.scaling * f.r) for name, f in factors.items()}
    (r, alpha), _ = Counter(wanted.values()).most_common(1)[0]
    # Keys are regular expressions that PEFT also matches at a name's end: "^" makes them one module's.
    return config | {
        "r": r,
        "lora_alpha": _whole(alpha),
        "use_rslora": False,
        "rank_pattern": {f"^{name}": own for name, (own, _) in wanted.items() if own != r},
        "alpha_pattern": {f"^{name}": _whole(own) for name, (_, own) in wanted.items() if own != alpha},
    }


def _fitting_extras(extras: dict[str, Tensor], dropped: Sequence[str]) -> dict[str, Tensor]:
    """`extras` for a file in which the modules `dropped` are not adapted."""
    fitting = {}
    for key, tensor in extras.items():
        name = key.removeprefix(_PREFIX)
        if name.partition(".lora_")[0] in dropped:
            continue
        if name.partition(".base_layer.")[0] in dropped:
            key = key.replace(".base_layer.", ".", 1)
        fitting[key] = tensor
    return fitting


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
