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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from copra_llm import hub
from copra_llm.adapter_files import CONFIG_FILE, HEAD_FILE, RUN_FOLDER, WEIGHTS_FILE
from copra_llm.errors import InputError
from copra_llm.results import atomic_folder, write_atomic

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
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / CONFIG_FILE}, line {error.lineno} is not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{folder / CONFIG_FILE} is not UTF-8 text (byte {error.start})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder} is a {kind} adapter, but must be LORA")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise InputError(f"{folder / CONFIG_FILE}: {key} is {config.get(key)!r}, but must be a number")
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} has no weights in {WEIGHTS_FILE} (pickled ones are not read); save them anew")
    tensors, _ = _read(folder / WEIGHTS_FILE)
    heads, metadata = _read(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else ({}, {})
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
        shapes = {k: tuple(v.shape) for k, v in pair.items()}
        if any(len(shape) != 2 for shape in shapes.values()):
            raise InputError(f"{folder}: the factors of {name} are no matrices: {shapes}; adapt linear layers")
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise InputError(f"{folder}: the factors of {name} do not fit each other: {shapes}")
        if pair["lora_A"].shape[0] != _rank(config, name):
            raise InputError(f"{folder}: the factors of {name} have rank {pair['lora_A'].shape[0]}, but "
                             f"{CONFIG_FILE} says {_rank(config, name)}")  # fmt: skip
        factors[name] = LoraFactors(pair["lora_A"], pair["lora_B"], _scaling(config, name))
    if not factors:
        raise InputError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B")
    return AdapterWeights(factors, config, extras, heads, metadata, str(path))


def save_adapter_weights(adapter: AdapterWeights, folder: Path | str) -> None:
    """Write an adapter that plain PEFT loads, atomically."""
    with atomic_folder(Path(folder)) as fresh:
        write_atomic(fresh / CONFIG_FILE, json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        save_file(adapter.state_dict(), fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        if adapter.heads:
            save_file(adapter.heads, fresh / HEAD_FILE, metadata=adapter.head_metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); save or fetch it again") from None


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
