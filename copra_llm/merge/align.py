"""LoRA-align: turn each adapter's factors, which leaves its Delta W as it is, until fusion comes near the mixture.

    Delta W_2 = (B_2 P)(P^-1 A_2) for every invertible P, and exactly (scaling s, weights w and 1 - w)
    Delta W_f - Delta W_m = -w (1 - w) s (B_1 - B_2 P)(A_1 - P^-1 A_2)

Here P is orthogonal, and minimises the sum of squares in closed form:

    min over P^T P = 1 of ||B_1 - B_2 P||_F^2 + ||A_1 - P^T A_2||_F^2:
    P = U V^T,    U S V^T = SVD(B_2^T B_1 + A_2 A_1^T)

More than two adapters are all aligned to the first. The paper's objective is the sum of the two norms (its
equation 5 calls it a bound on the gap, which a sum need not be): align_learned.py. Both objectives and the true
gap are noted, before and after.

Source: CopRA (arXiv 2410.22911), section 3.1, equation 5; Schönemann, Psychometrika 31 (1966) for P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.merge.fusion import at_first_scaling, fuse
from copra_llm.merge.lowrank import norm_of_product, stacked
from copra_llm.merge.pad import same_rank

Pair = tuple[Tensor, Tensor]
"""`A (r, in)` and `B (out, r)` in float64, brought to one scaling."""


def align(factors: Sequence[LoraFactors], weights: Sequence[float], *, pad: str | None = None, note=None):
    """Align one module's factors by orthogonal matrices, then fuse them.

    Args:
        factors: one module's, of equal ranks without `pad`.
        weights: one for each adapter, summing to 1.
        pad: "zero" to fill smaller ranks up with zeros.
        note: gets `objective_*`, `squares_*` and `gap_*`, each before and after, and the `mixture`'s norm.

    Raises:
        InputError: if the ranks differ and `pad` is None, or the first scaling is 0.
    """
    return fuse_aligned(factors, weights, procrustes, "align", pad, note)


def procrustes(first: Pair, other: Pair) -> Tensor:
    """The orthogonal `P (r, r)` that minimises `||B_1 - B_2 P||^2 + ||A_1 - P^T A_2||^2`."""
    (a1, b1), (a2, b2) = first, other
    U, _, Vh = torch.linalg.svd(b2.T @ b1 + a2 @ a1.T)
    return U @ Vh


def fuse_aligned(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    solve: Callable[[Pair, Pair], Tensor],
    what: str,
    pad: str | None,
    note: Callable[..., None] | None,
) -> LoraFactors:
    """Fusion after every adapter but the first has been turned by `P = solve(first, other)`."""
    factors = same_rank(factors, pad, what, "--method mixture or --pad zero")
    before = at_first_scaling(factors)
    after = [before[0], *(turned(pair, solve(before[0], pair)) for pair in before[1:])]
    scaling = factors[0].scaling
    # The first stays in its own dtype: the result has it.
    aligned = [factors[0], *(LoraFactors(a, b, scaling) for a, b in after[1:])]
    if note is not None:
        mixture = stacked(factors, weights)
        fused = {"before": factors, "after": aligned}
        for when, pairs in (("before", before), ("after", after)):
            values = [objectives(pairs[0], pair) for pair in pairs[1:]]
            own = fuse([LoraFactors(f.lora_A.double(), f.lora_B.double(), f.scaling) for f in fused[when]], weights)
            numbers = {"objective": sum(v[0] for v in values), "squares": sum(v[1] for v in values)}
            note(**{f"{name}_{when}": value for name, value in (numbers | {"gap": gap(own, *mixture)}).items()})
        note(mixture=norm_of_product(*mixture))
    return fuse(aligned, weights)


def turned(pair: Pair, P: Tensor) -> Pair:
    """`(P^-1 A, B P)`: the same product."""
    lora_A, lora_B = pair
    return torch.linalg.solve(P, lora_A), lora_B @ P


def objectives(first: Pair, other: Pair) -> tuple[float, float]:
    """`||B_1 - B_2|| + ||A_1 - A_2||`, the paper's for P = 1, and the sum of their squares."""
    norms = [float(torch.linalg.matrix_norm(x - y)) for x, y in zip(first, other, strict=True)]
    return sum(norms), sum(n * n for n in norms)


def gap(fused: LoraFactors, mixture_B: Tensor, mixture_A: Tensor) -> float:
    """`||Delta W_f - Delta W_m||_F`, from the factors."""
    lora_B = torch.cat([fused.scaling * fused.lora_B.double(), -mixture_B], 1)
    return norm_of_product(lora_B, torch.cat([fused.lora_A.double(), mixture_A]))
