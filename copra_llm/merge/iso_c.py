"""Iso-C: add the weight changes, then make every direction as strong as the others.

    sum_i w_i Delta W_i = U S V^T,      Delta W = mean(S) U V^T

The mean is over the singular values that are not zero: a LoRA sum has at most sum r_i of them, and a mean over
all min(out, in) would only shrink with the size of the layer.

Source: Marczak et al., No Task Left Behind (arXiv 2502.04959), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import balanced, stacked, support, svd_of_product


def isotropic(factors: Sequence[LoraFactors], weights: Sequence[float], *, rank: int | None = None) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter, of any sum.
        rank: keep the strongest directions only, and average over them; None: all that are there.
    """
    lora_B, lora_A = stacked(factors, weights)
    U, S, Vh = svd_of_product(lora_B, lora_A)
    k = min(max(1, support(S, len(lora_B), lora_A.shape[1])), rank or len(S))
    return balanced(U[:, :k], S[:k].mean().expand(k), Vh[:k], factors[0])
