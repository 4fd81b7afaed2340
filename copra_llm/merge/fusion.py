"""Fusion: average the factors.

    Delta W_f = s * (sum_i w_i B_i) (sum_i w_i A_i),      sum_i w_i = 1

For two adapters (w B1 + (1 - w) B2)(w A1 + (1 - w) A2). It keeps the rank, and has cross terms B_i A_j: it
is good exactly where adapters are linearly mode-connected. It is not PEFT's "linear", which weighs the
factors by sqrt(w). Unequal scalings are first brought to the first adapter's,
A_i <- sqrt(s_i / s_1) A_i and B_i <- sqrt(s_i / s_1) B_i.

Source: CopRA (arXiv 2410.22911), section 3.1, "Fusion".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError
from copra_llm.merge.pad import same_rank


def fuse(factors: Sequence[LoraFactors], weights: Sequence[float], *, pad: str | None = None) -> LoraFactors:
    """Fuse one module's factors; the result has the first one's scaling and dtype, and the largest rank.

    Args:
        factors: one module's.
        weights: one for each adapter.
        pad: "zero" to fill smaller ranks up with zeros.

    Raises:
        InputError: if the ranks differ and `pad` is None, or the first scaling is 0.
    """
    factors = same_rank(factors, pad, "fusion", "--method mixture or --pad zero")
    first = factors[0]
    lora_A, lora_B = 0, 0
    for (own_A, own_B), weight in zip(at_first_scaling(factors), weights, strict=True):
        lora_A = lora_A + weight * own_A
        lora_B = lora_B + weight * own_B
    return LoraFactors(lora_A.to(first.lora_A.dtype), lora_B.to(first.lora_B.dtype), first.scaling)


def at_first_scaling(factors: Sequence[LoraFactors]) -> list[tuple[Tensor, Tensor]]:
    """`A (r, in)` and `B (out, r)` of each in float64, such that `s_1 B A` is its Delta W.

    Raises:
        InputError: if the first scaling is 0.
    """
    first = factors[0].scaling
    if first == 0.0:
        raise InputError("the first adapter's scaling is 0, and fusion brings the others to it; put it last")
    return [f.at_scaling(first) for f in factors]
