"""TSV-M: keep each adapter's strongest singular vectors, and make those of different adapters orthogonal.

    Delta W_i = U_i S_i V_i^T, cut to k_i triplets
    U = [U_1, ..., U_n] = P_U D_U Q_U^T,  U_perp = P_U Q_U^T      (the nearest orthonormal columns: Procrustes)
    V likewise
    Delta W = U_perp diag(w_1 S_1, ..., w_n S_n) V_perp^T

The paper keeps 1 / n of the layer's min(out, in) triplets, which of an adapter is nearly always all r_i. Directions
that adapters share exactly are halved on both sides by orthogonalising, so n copies of one adapter give it back.

Source: Gargiulo et al., Task Singular Vectors (arXiv 2412.00081), section 4, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import balanced, cut, polar, stacked, support, svd_of_product


def task_singular_vectors(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float | None = None,
    rank: int | None = None,
    note=None,
) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter, of any sum.
        density: share of each adapter's r_i triplets that is kept, at least one; None: the paper's
            `min(out, in) / n` triplets, as far as there are so many.
        rank: cut the result to it; None: nothing more is lost.
        note: gets what cutting to `rank` lost.
    """
    left, middle, right = [], [], []
    for f, weight in zip(factors, weights, strict=True):
        U, S, Vh = svd_of_product(*stacked([f], [1.0]))
        smaller = min(len(f.lora_B), f.lora_A.shape[1])
        kept = max(1, smaller // len(factors) if density is None else round(density * f.r))
        # None of an adapter whose B is still zero: its singular vectors would be arbitrary.
        k = min(kept, support(S, len(f.lora_B), f.lora_A.shape[1]))
        left, middle, right = [*left, U[:, :k]], [*middle, weight * S[:k]], [*right, Vh[:k]]
    if not any(map(len, middle)):
        return cut(*stacked(factors, weights), 1, factors[0])
    U, S, V = polar(torch.cat(left, 1)), torch.cat(middle), polar(torch.cat(right).T)  # (out, K), (K,), (in, K)
    if rank is not None and rank < len(S):
        return cut(U * S, V.T, rank, factors[0], note)
    # A negative weight's sign goes to the left.
    return balanced(U * S.sign(), S.abs(), V.T, factors[0])
