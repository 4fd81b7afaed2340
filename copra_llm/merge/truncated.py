"""Truncated mixture: the best rank-r approximation of the average weight change.

    Delta W = argmin over rank r of || X - sum_i w_i Delta W_i ||_F = U_r S_r V_r^T,      sum_i w_i = 1

By the theorem of Eckart and Young, the first r triplets of the SVD, found on the stacked factors (lowrank.py).
It is the mixture at the size of one adapter: what a round of federated learning sends back.

Source: CopRA (arXiv 2410.22911), section 3.1, "Mixture"; Eckart and Young, Psychometrika 1 (1936).
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import cut, stacked


def mix_truncated(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, rank: int | None = None, note=None
) -> LoraFactors:
    """Mix one module's factors and cut the result.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter.
        rank: of the result, at most; None: the largest of the adapters' ranks.
        note: gets `lost` and `whole`, the norms of what was cut off and of what it was cut from.

    Returns:
        Factors of scaling 1 in the first one's dtype.
    """
    return cut(*stacked(factors, weights), rank or max(f.r for f in factors), factors[0], note)
