"""What is left of an adapter when parts of it are taken away? Weights in, weights out; no model is needed.

Structured, by layers (transformer blocks, as `LayerGates` groups and orders them; n in a tower, each tower alone):

    all            every layer
    every-other    the first, the third, ... (layers 0, 2, ...)
    low, middle, high    positions [k n // 3, (k + 1) n // 3) with k = 0, 1, 2: the third that is KEPT
    0,2,5          the layers with these numbers; or by their full names, encoder.layer.0,encoder.layer.2
    query          a target module by the last part of its name, or a tower: that alone

Unstructured, by entries: of the n entries of the raw A and B, floor(density n + 1/2) are kept, the others set to 0:

    magnitude      the largest of the whole adapter
    matrix         the largest of each A and each B, counted in each
    random         of the whole adapter, a function of the seed alone

Among equal magnitudes the earlier entry stays: modules by name, A before B, row by row. `density` is the
fraction KEPT; with a rising density nothing that was kept is lost again. Adapters outside blocks are no
players and stay in every structured variant; entries of theirs count like any others.

Source: CopRA (arXiv 2410.22911), section 3.2 and figure 4 (whose sparsity is 1 - density).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copra_llm.adapters import AdapterWeights, LoraFactors
from copra_llm.errors import InputError, nearest
from copra_llm.gates import group_players
from copra_llm.quantise import KINDS, quantise, quantised_bytes

THIRDS = ("low", "middle", "high")
BY_LAYERS = ("all", "every-other", *THIRDS)
BY_ENTRIES = ("magnitude", "matrix", "random")


@dataclass(frozen=True)
class Variant:
    """One way to make an adapter smaller: layers first, then entries of what is left, then bits."""

    keep: str = "all"
    """What `structured` keeps."""
    density: float = 1.0
    """Fraction of the entries kept, in (0, 1]."""
    by: str | None = None
    """One of `BY_ENTRIES`; None: every entry is kept."""
    quantise: str | None = None
    """"int8" or "nf4"; None: as they are."""
    seed: int = 0
    """Of `random`."""

    def __post_init__(self):
        if not 0.0 < self.density <= 1.0:
            raise InputError(f"the density is {self.density:g}, but is the fraction kept and must lie in (0, 1]")
        if self.by is None and self.density < 1.0:
            raise InputError(f"density {self.density:g} needs a way to choose entries; give {', '.join(BY_ENTRIES)}")
        if self.by is not None and self.by not in BY_ENTRIES:
            hint = nearest(self.by, BY_ENTRIES)
            raise InputError(f'entries are not chosen by "{self.by}"{hint}; give {", ".join(BY_ENTRIES)}')
        if self.quantise is not None and self.quantise not in KINDS:
            hint = nearest(self.quantise, KINDS)
            raise InputError(f'adapters are not quantised to "{self.quantise}"{hint}; choose {" or ".join(KINDS)}')

    @property
    def kind(self) -> str:
        """In a record: "quantised", else "unstructured", else "structured"."""
        return "quantised" if self.quantise else "unstructured" if self.by else "structured"

    @property
    def name(self) -> str:
        """What is done besides the density: "low", "magnitude", "every-other+magnitude+nf4"."""
        parts = [None if self.keep == "all" else self.keep, self.by, self.quantise]
        return "+".join(part for part in parts if part) or "all"

    def of(self, weights: AdapterWeights, layer_pattern: str | None = None) -> AdapterWeights:
        """The variant of an adapter, as it would be written.

        Raises:
            InputError: if the adapter has not what is to be kept.
        """
        weights = structured(weights, self.keep, layer_pattern)
        if self.by is not None and self.density < 1.0:
            weights = shrunk(unstructured(weights, self.density, self.by, self.seed))
        return quantise(weights, self.quantise) if self.quantise else weights

    def bytes_of(self, weights: AdapterWeights) -> int:
        """What the tensors of this variant, made by `of`, take; of a quantised one in theory."""
        return quantised_bytes(weights, self.quantise) if self.quantise else size(weights).bytes


@dataclass(frozen=True)
class Size:
    """What an adapter holds."""

    layers: tuple[str, ...]
    modules: int
    parameters: int
    """Entries of A and B that are not 0, and all of what else is stored."""
    bytes: int
    """Of the tensors in its file."""


def size(weights: AdapterWeights, layer_pattern: str | None = None) -> Size:
    """Count what an adapter holds; heads, which are files of their own, are left out."""
    factors = weights.factors.values()
    nonzero = sum(int(f.lora_A.count_nonzero()) + int(f.lora_B.count_nonzero()) for f in factors)
    return Size(
        tuple(group_players(weights.factors, layer_pattern=layer_pattern)),
        len(weights.factors),
        nonzero + sum(tensor.numel() for tensor in weights.extras.values()),
        sum(tensor.nbytes for tensor in weights.state_dict().values()),
    )


# --- by layers --------------------------------------------------------------------------------------------


def structured(weights: AdapterWeights, keep: str, layer_pattern: str | None = None) -> AdapterWeights:
    """The adapter without the modules that `keep` does not name: they are absent from its files.

    Raises:
        InputError: if the adapter has no such layer, module or tower, or none is left.
    """
    _check(weights)
    if keep == "all":
        return weights
    players = group_players(weights.factors, layer_pattern=layer_pattern)
    chosen = {name for name in _chosen(weights.source, players, keep)}
    inside = {name for names in players.values() for name in names}
    if not chosen:
        raise InputError(f'"{keep}" keeps no layer of {weights.source}, whose adapter has {len(players)}; '
                         "keep others, or evaluate the base model")  # fmt: skip
    factors = {name: f for name, f in weights.factors.items() if name in chosen or name not in inside}
    return weights.with_factors(factors, f"{weights.source}, {keep}")


def structured_names(weights: AdapterWeights, layer_pattern: str | None = None) -> list[str]:
    """Every `keep` that fits the adapter: by layers, each target module, each tower where there are several."""
    players = group_players(weights.factors, layer_pattern=layer_pattern)
    by_layers = [keep for keep in BY_LAYERS if _chosen(weights.source, players, keep)]
    modules, towers = _target_modules(players), _towers(players)
    return by_layers + (modules if len(modules) > 1 else []) + (list(towers) if len(towers) > 1 else [])


def _chosen(source: str, players: dict[str, list[str]], keep: str) -> list[str]:
    """Names of the modules that `keep` keeps."""
    towers = _towers(players)
    if keep in BY_LAYERS:
        layers = [layer for tower in towers.values() for layer in _by_position(tower, keep)]
    elif keep in _target_modules(players):
        return [name for names in players.values() for name in names if name.rpartition(".")[2] == keep]
    elif keep in towers:
        layers = towers[keep]
    else:
        wanted = [part.strip() for part in keep.split(",")]
        known = {form for layer in players for form in (layer, _place(layer)[1])}
        missing = next((part for part in wanted if part not in known), None)
        if missing is not None:
            names = [*BY_LAYERS, *_target_modules(players), *(towers if len(towers) > 1 else [])]
            raise InputError(f'{source} has nothing called "{missing}" to keep{nearest(missing, names)}; give '
                             f"{', '.join(names)}, or layers: {', '.join(players)}")  # fmt: skip
        layers = [layer for layer in players if layer in wanted or _place(layer)[1] in wanted]
    return [name for layer in layers for name in players[layer]]


def _by_position(layers: Sequence[str], keep: str) -> Sequence[str]:
    if keep == "every-other":
        return layers[::2]
    if keep in THIRDS:
        k, n = THIRDS.index(keep), len(layers)
        return layers[k * n // 3 : (k + 1) * n // 3]
    return layers


def _target_modules(players: dict[str, list[str]]) -> list[str]:
    return sorted({name.rpartition(".")[2] for names in players.values() for name in names})


def _towers(players: dict[str, list[str]]) -> dict[str, list[str]]:
    """Layers in their order, by the stack that they are numbered in."""
    towers: dict[str, list[str]] = {}
    for layer in players:
        towers.setdefault(_place(layer)[0], []).append(layer)
    return towers


def _place(layer: str) -> tuple[str, str]:
    """A layer's tower and number: `("encoder.layer", "3")`; the number is the last one in its name."""
    parts = layer.split(".")
    at = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), len(parts))
    return ".".join(parts[:at] + parts[at + 1 :]), "".join(parts[at : at + 1])


# --- by entries -------------------------------------------------------------------------------------------


def unstructured(weights: AdapterWeights, density: float, by: str = "magnitude", seed: int = 0) -> AdapterWeights:
    """The adapter with all but `floor(density n + 1/2)` entries of A and B set to 0; shapes stay.

    Args:
        weights: the adapter.
        density: fraction kept, in (0, 1].
        by: one of `BY_ENTRIES`.
        seed: of `random`.

    Raises:
        InputError: for a density or `by` out of range, or an entry that is not finite.
    """
    Variant(density=density, by=by)
    _check(weights)
    names = sorted(weights.factors)
    matrices = [m for name in names for m in (weights.factors[name].lora_A, weights.factors[name].lora_B)]
    if not all(matrix.isfinite().all() for matrix in matrices):
        raise InputError(f"{weights.source} has entries that are not finite, which have no magnitude; train it again "
                         "at a lower rate")  # fmt: skip
    entries = [matrix.abs().flatten().double() for matrix in matrices]
    if by == "matrix":
        kept = [largest(e, kept_count(density, e.numel())) for e in entries]
    else:
        scores = torch.cat(entries)  # (n,)
        if by == "random":
            scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sizes = [e.numel() for e in entries]
        kept = largest(scores, kept_count(density, len(scores))).split(sizes)
    pruned = [m.where(mask.view(m.shape), 0) for m, mask in zip(matrices, kept, strict=True)]
    factors = {
        name: dataclasses.replace(weights.factors[name], lora_A=lora_A, lora_B=lora_B)
        for name, lora_A, lora_B in zip(names, pruned[::2], pruned[1::2], strict=True)
    }
    ordered = {name: factors[name] for name in weights.factors}
    return weights.with_factors(ordered, f"{weights.source}, {by} at density {density:g}")


def kept_count(density: float, n: int) -> int:
    """How many of `n` entries stay: `density n`, rounded, halves up."""
    # 0.35 * 10 and the like come out a hair off the half that was meant.
    return math.floor(round(density * n, 6) + 0.5)


def largest(scores: Tensor, k: int) -> Tensor:
    """Mask `(n,)` of the `k` largest of `scores (n,)`; among equals the earlier ones."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - k + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero()[: k - int(mask.sum()), 0]
    mask[ties] = True
    return mask


def shrunk(weights: AdapterWeights) -> AdapterWeights:
    """The adapter without the ranks that add nothing: a row of A, or the column of B that meets it, is all 0.

    Delta W is the same. A module of which no rank is left is dropped, unless something else is stored for it
    (DoRA's magnitude acts without factors too): then one rank of zeros stays. So it does in one module of an adapter
    that adds nothing at all, since PEFT loads no empty one.
    """
    stored_for = {key.partition(".lora_")[0] for key in weights.extras if ".lora_" in key}
    factors = {}
    for name, f in weights.factors.items():
        live = f.lora_A.any(1) & f.lora_B.any(0)  # (r,)
        if live.any():
            factors[name] = dataclasses.replace(f, lora_A=f.lora_A[live], lora_B=f.lora_B[:, live])
        elif any(key.endswith(f".{name}") for key in stored_for):
            factors[name] = _zero_rank(f)
    if not factors:
        first = min(weights.factors)
        factors = {first: _zero_rank(weights.factors[first])}
    return weights.with_factors(factors, weights.source)


def _zero_rank(f: LoraFactors) -> LoraFactors:
    return dataclasses.replace(f, lora_A=torch.zeros_like(f.lora_A[:1]), lora_B=torch.zeros_like(f.lora_B[:, :1]))


def _check(weights: AdapterWeights) -> None:
    """Refuse adapters of which A and B of linear layers are not all."""
    adapted = [f".{name}.lora_" for name in weights.factors]
    unread = next((k for k in weights.extras if ".lora_" in k and not any(name in k for name in adapted)), None)
    if unread is not None:
        raise InputError(f"{weights.source} holds {unread}, and only the factors A and B of linear layers can be "
                         "pruned; train without it")  # fmt: skip
    if weights.config.get("target_parameters"):
        raise InputError(f"{weights.source} adapts parameters by name (target_parameters), and only the factors A and "
                         "B of linear layers can be pruned; train without it")  # fmt: skip
