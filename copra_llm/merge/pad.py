"""How are factors of unequal rank put side by side?

    B A = [B, 0] [A; 0]

Rows and columns of zeros leave Delta W as it is, and give every adapter the largest rank. What a rule then
makes of the zeros is its own: fusion averages a row of zeros with whichever row stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.functional import pad as zeros

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError


def same_rank(factors: Sequence[LoraFactors], pad: str | None, what: str, instead: str) -> list[LoraFactors]:
    """The factors, all of one rank.

    Args:
        factors: of one module.
        pad: "zero", or None: unequal ranks are refused.
        what, instead: the rule and what else could be used, for the refusal.

    Raises:
        InputError: if the ranks differ and `pad` is None.
    """
    ranks = list(dict.fromkeys(f.r for f in factors))
    if pad is None and len(ranks) > 1:
        raise InputError(f"{what} needs equal ranks, but they are {' and '.join(map(str, ranks))}; use {instead}")
    more = [max(ranks) - f.r for f in factors]
    return [
        LoraFactors(zeros(f.lora_A, (0, 0, 0, m)), zeros(f.lora_B, (0, m)), f.scaling) if m else f
        for f, m in zip(factors, more, strict=True)
    ]
