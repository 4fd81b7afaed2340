"""How are several adapters made one? Weights in, weights out; no model is needed.

Each rule is a function of one module's factors in a file of its own; here is what they share: which
adapters fit together, and what the merged adapter carries along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from copra_llm.adapters import AdapterWeights, LoraFactors
from copra_llm.errors import InputError, nearest
from copra_llm.merge.fusion import fuse
from copra_llm.merge.mixture import mix

METHODS: dict[str, Callable[[Sequence[LoraFactors], Sequence[float]], LoraFactors]] = {
    "fusion": fuse,
    "mixture": mix,
}
"""Names of `copra merge --method`."""


def check_method(method: str) -> None:
    """Refuse a name that is no key of `METHODS`."""
    if method not in METHODS:
        raise InputError(f'there is no merge method "{method}"{nearest(method, METHODS)}; choose {", ".join(METHODS)}')


def merge(adapters: Sequence[AdapterWeights], method: str, weights: Sequence[float] | None = None) -> AdapterWeights:
    """Merge adapters of one base model.

    Args:
        adapters: one or more; the first one gives dtype, scaling (fusion) and config.
        method: key of `METHODS`.
        weights: one for each adapter, summing to 1; None: equal ones.

    Raises:
        InputError: if the method is unknown, the weights do not fit, or the adapters do not: other base,
            other shapes, targets (fusion), heads or extra tensors.
    """
    check_method(method)
    weights = [1.0 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters were given with {len(weights)} weights; give one weight each")
    if not abs(sum(weights) - 1.0) <= 1e-6:
        raise InputError(f"the weights sum to {sum(weights):g}, but {method} needs them to sum to 1")
    for other in adapters[1:]:
        _check_pair(adapters[0], other, same_targets=method == "fusion")
    if len(adapters) == 1:
        return adapters[0]
    factors = {}
    for name in dict.fromkeys(name for a in adapters for name in a.factors):
        # An adapter without this module adds nothing to it.
        pairs = [(a.factors[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.factors]
        factors[name] = METHODS[method]([f for f, _ in pairs], [w for _, w in pairs])
    merged = adapters[0].with_factors(factors, source="+".join(a.source for a in adapters))
    heads = {task: head for a in reversed(adapters) for task, head in a.heads.items()}
    return AdapterWeights(merged.factors, merged.config, merged.extras, heads, _head_labels(adapters), merged.source)


def _check_pair(first: AdapterWeights, other: AdapterWeights, same_targets: bool) -> None:
    both = f"{first.source} and {other.source}"
    if first.base_model != other.base_model:
        raise InputError(
            f"{both} have different base models, {first.base_model} and {other.base_model}; merge adapters of one base"
        )
    for adapter in (first, other):
        if adapter.config.get("use_dora"):
            raise InputError(f"{adapter.source} is a DoRA adapter: its magnitudes are relative to its own direction, "
                             "so they cannot be averaged; fold it into the base instead")  # fmt: skip
        unread = next((key for key in adapter.extras if ".lora_" in key), None)
        if unread is not None:
            raise InputError(f"{adapter.source} holds {unread}, and only the factors A and B of linear layers can be "
                             "merged; train without it")  # fmt: skip
    for name in sorted(first.factors.keys() & other.factors.keys()):
        a, b = (tuple(f.lora_B.shape[:1] + f.lora_A.shape[1:]) for f in (first.factors[name], other.factors[name]))
        if a != b:
            raise InputError(f"{both} differ in the shape of {name}: {a} and {b}; merge adapters of one base")
        if same_targets and first.factors[name].r != other.factors[name].r:
            r, s = first.factors[name].r, other.factors[name].r
            raise InputError(f"{both} differ in rank: {r} and {s}; fusion needs equal ranks, use --method mixture")
    if same_targets and first.factors.keys() != other.factors.keys():
        only = sorted(first.factors.keys() ^ other.factors.keys())[0]
        raise InputError(f"only one of {both} adapts {only}; fusion needs equal targets, use --method mixture")
    for key in sorted(first.extras.keys() | other.extras.keys()):
        if key in first.extras and key in other.extras and torch.equal(first.extras[key], other.extras[key]):
            continue
        raise InputError(f"{both} differ in {key}, which is no LoRA factor and cannot be merged; "
                         "train with the same frozen one")  # fmt: skip
    for task in sorted(first.heads.keys() & other.heads.keys()):
        if not torch.equal(first.heads[task], other.heads[task]):
            raise InputError(f"{both} have different heads for {task.removesuffix('.weight')}, and heads cannot be "
                             "merged; train without --train_head and with one --head_seed")  # fmt: skip


def _head_labels(adapters: Sequence[AdapterWeights]) -> dict[str, str]:
    import json

    labels = {}
    for adapter in adapters:
        labels |= json.loads(adapter.head_metadata.get("labels", "{}"))
    return {"labels": json.dumps(labels)} if labels else {}
