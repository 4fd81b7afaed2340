"""Which adapters can be merged with each other?

Refused with one sentence is what no rule could get right: other base models or shapes, magnitudes and
variants that are relative to something else than the base weights, heads that differ.
"""

from __future__ import annotations

import torch

from copra_llm.adapters import AdapterWeights
from copra_llm.errors import InputError

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that move part of the base weights into the adapter: its Delta W is relative to another base."""


def check_alone(adapter: AdapterWeights) -> None:
    """Refuse an adapter whose factors are not all there is to it.

    Raises:
        InputError: for DoRA, for initialisations that change the base, for factors of other kinds of layers, and
            for numbers that are not finite.
    """
    if adapter.config.get("use_dora"):
        raise InputError(f"{adapter.source} is a DoRA adapter: its magnitudes are relative to its own direction, "
                         "so they cannot be averaged; fold it into the base instead")  # fmt: skip
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise InputError(f"{adapter.source} was initialised by {start}, which changes the base weights; convert it to "
                         "plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)")  # fmt: skip
    unread = next((key for key in adapter.extras if ".lora_" in key), None)
    if unread is not None:
        raise InputError(f"{adapter.source} holds {unread}, and only the factors A and B of linear layers can be "
                         "merged; train without it")  # fmt: skip
    for name, f in adapter.factors.items():
        if not (torch.isfinite(f.lora_A).all() and torch.isfinite(f.lora_B).all()):
            raise InputError(f"{adapter.source} has numbers in {name} that are not finite; train it anew")


def check_pair(first: AdapterWeights, other: AdapterWeights, alike: str | None) -> None:
    """Refuse two adapters that do not fit each other.

    Args:
        first, other: each has passed `check_alone`.
        alike: the method, if it needs equal ranks and targets; else None.

    Raises:
        InputError: naming both adapters and what differs.
    """
    both = f"{first.source} and {other.source}"
    if first.base_model != other.base_model:
        raise InputError(
            f"{both} have different base models, {first.base_model} and {other.base_model}; merge adapters of one base"
        )
    for name in sorted(first.factors.keys() & other.factors.keys()):
        a, b = (tuple(f.lora_B.shape[:1] + f.lora_A.shape[1:]) for f in (first.factors[name], other.factors[name]))
        if a != b:
            raise InputError(f"{both} differ in the shape of {name}: {a} and {b}; merge adapters of one base")
        if alike and first.factors[name].r != other.factors[name].r:
            r, s = first.factors[name].r, other.factors[name].r
            raise InputError(f"{both} differ in rank: {r} and {s}; {alike} needs equal ranks, use --method mixture "
                             "or --pad zero")  # fmt: skip
    if alike and first.factors.keys() != other.factors.keys():
        only = sorted(first.factors.keys() ^ other.factors.keys())[0]
        raise InputError(f"only one of {both} adapts {only}; {alike} needs equal targets, use --method mixture "
                         "or --pad zero")  # fmt: skip
    for key in sorted(first.extras.keys() | other.extras.keys()):
        if key in first.extras and key in other.extras and torch.equal(first.extras[key], other.extras[key]):
            continue
        raise InputError(f"{both} differ in {key}, which is no LoRA factor and cannot be merged; "
                         "train with the same frozen one")  # fmt: skip
    for task in sorted(first.heads.keys() & other.heads.keys()):
        if not torch.equal(first.heads[task], other.heads[task]):
            raise InputError(f"{both} have different heads for {task.removesuffix('.weight')}, and heads cannot be "
                             "merged; train without --train_head and with one --head_seed")  # fmt: skip
