"""Fusion: average the factors.

    Delta W_f = s * (sum_i w_i B_i) (sum_i w_i A_i),      sum_i w_i = 1

For two adapters (w B1 + (1 - w) B2)(w A1 + (1 - w) A2). It keeps the rank, and has cross terms B_i A_j: it
is good exactly where adapters are linearly mode-connected. It is not PEFT's "linear", which weighs the
factors by sqrt(w). Unequal scalings are first brought to the first adapter's,
A_i <- sqrt(s_i / s_1) A_i and B_i <- sqrt(s_i / s_1) B_i.

Source: CopRA (arXiv 2410.22911), section 3.1, "Fusion".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError


def fuse(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Fuse one module's factors; the result has the first one's rank, scaling and dtype.

    Raises:
        InputError: if the ranks differ, or the first scaling is 0.
    """
    first = factors[0]
    if first.scaling == 0.0:
        raise InputError("the first adapter's scaling is 0, and fusion brings the others to it; put it last")
    if any(f.r != first.r for f in factors):
        ranks = " and ".join(str(r) for r in dict.fromkeys(f.r for f in factors))
        raise InputError(f"fusion needs equal ranks, but they are {ranks}; use --method mixture")
    lora_A, lora_B = 0, 0
    for f, weight in zip(factors, weights, strict=True):
        ratio = f.scaling / first.scaling
        root = math.sqrt(abs(ratio))
        lora_A = lora_A + (weight * root) * f.lora_A.double()
        lora_B = lora_B + math.copysign(weight * root, ratio * weight) * f.lora_B.double()
    return LoraFactors(lora_A.to(first.lora_A.dtype), lora_B.to(first.lora_B.dtype), first.scaling)
