"""Task arithmetic: add the weight changes.

    Delta W = lambda sum_i w_i Delta W_i

by concatenation, so exactly and without cross terms; `--scale` is lambda. Unlike in a mixture the weights need
not sum to 1: they are 1 each by default, and a negative one takes away what an adapter has learnt.

Source: Ilharco et al., Editing Models with Task Arithmetic (arXiv 2212.04089), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import cut, stacked
from copra_llm.merge.mixture import mix


def add(factors: Sequence[LoraFactors], weights: Sequence[float], *, rank: int | None = None, note=None) -> LoraFactors:
    """Add one module's weight changes.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter, of any sum.
        rank: cut the result to it; None: rank `sum_i r_i`, nothing is lost.
        note: gets what cutting lost.
    """
    if rank is None or rank >= sum(f.r for f in factors):
        return mix(factors, weights)
    return cut(*stacked(factors, weights), rank, factors[0], note)
