"""KnOTS: bring the adapters into one basis, then merge what each has in it by TIES.

    [Delta W_1, ..., Delta W_n] = U S [V_1, ..., V_n]^T        (the SVD of the concatenation, out x n in)
    Delta W = U S V^T,      V = TIES(V_1, ..., V_n)

Done on the factors: Delta W_i = B_i A_i, B = [B_1, ..., B_n] = Q_B [R_1, ..., R_n] and A_i^T = Q_i L_i give
Q_B^T [Delta W_1, ...] = [R_1 L_1^T, ..., R_n L_n^T] diag(Q_1, ..., Q_n)^T, whose core has sum r_i rows and columns.
Directions without a singular value are left out: their V_i would be arbitrary, and take part in the trimming.

Source: Stoica et al., Model Merging with SVD to Tie the Knots (arXiv 2410.19735), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import cut, support
from copra_llm.merge.ties import elect, threshold, trim


def tie(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    rank: int | None = None,
    note=None,
) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's, of any ranks.
        weights: how much each adapter counts in TIES; at least 0.
        density: fraction of each V_i's entries that is kept.
        rank: cut the result to it; None: at most `sum_i r_i`, nothing is lost.
        note: gets what cutting lost.
    """
    U, S, parts = shared_basis(factors)
    V = elect(torch.stack([trim(part, threshold(part, density)) for part in parts]), weights)  # (in, k)
    return cut(U * S, V.T, rank or len(S), factors[0], note if rank else None)


def shared_basis(factors: Sequence[LoraFactors]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """`U (out, k)`, `S (k,)` and `V_i (in, k)`, one for each adapter, with `Delta W_i = U @ diag(S) @ V_i.T`."""
    q_B, r_B = torch.linalg.qr(torch.cat([f.scaling * f.lora_B.double() for f in factors], 1))
    rows = [torch.linalg.qr(f.lora_A.double().T) for f in factors]  # (in, min(in, r)), (min(in, r), r)
    inner = r_B.split([f.r for f in factors], 1)
    core = torch.cat([own @ upper.T for own, (_, upper) in zip(inner, rows, strict=True)], 1)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    k = max(1, support(S, len(q_B), sum(f.lora_A.shape[1] for f in factors)))
    split = Vh[:k].split([len(upper) for _, upper in rows], 1)
    return q_B @ U[:, :k], S[:k], [q @ part.T for (q, _), part in zip(rows, split, strict=True)]
