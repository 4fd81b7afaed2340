"""Mixture: average the weight changes, exactly.

    Delta W_m = sum_i w_i Delta W_i = [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n],      sum_i w_i = 1

by concatenation, so the rank is the sum of the ranks and the scaling 1. No cross terms.

Source: CopRA (arXiv 2410.22911), section 3.1, "Mixture".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copra_llm.adapters import LoraFactors


def mix(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Mix one module's factors; rank `sum_i r_i`, scaling 1, the first one's dtype."""
    dtype = factors[0].lora_B.dtype
    scaled = [(w * f.scaling * f.lora_B.double()).to(dtype) for f, w in zip(factors, weights, strict=True)]
    lora_A = torch.cat([f.lora_A.to(factors[0].lora_A.dtype) for f in factors])  # (sum r, in)
    return LoraFactors(lora_A, torch.cat(scaled, dim=1), 1.0)  # B: (out, sum r)
