"""TIES: trim each adapter, elect a sign for every entry, average those that agree with it.

    trim     t_i = x_i where |x_i| is among the `density` largest of its matrix, else 0
    elect    g = sign(sum_i w_i t_i)
    merge    m = sum_{i: sign(t_i) = g} w_i t_i / sum_{i: sign(t_i) = g} w_i        (0 where nothing was kept)

entry by entry, on the factors (x is A, then B, as PEFT does it: fast, keeps the rank, has cross terms) or on
Delta W (as in the paper; then cut to a rank, since the result has no low one). With equal weights the mean is
the paper's; only ratios of weights count, and `--scale` is the paper's lambda. The paper trims over the whole
model, here as in PEFT each matrix keeps its own share.

Source: Yadav et al., TIES-Merging (arXiv 2306.01708), section 4 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError
from copra_llm.merge.delta import Deltas
from copra_llm.merge.lowrank import cut
from copra_llm.merge.pad import same_rank


def ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    on: str = "factors",
    rank: int | None = None,
    pad: str | None = None,
    note=None,
) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's; of equal ranks on factors without `pad`.
        weights: how much each adapter counts; at least 0.
        density: fraction of each matrix's entries that is kept, in (0, 1].
        on: "factors" or "delta".
        rank: cut the result to it; None: no cut on factors, the largest rank on delta.
        pad: "zero" to fill smaller ranks up with zeros, on factors.
        note: gets `lost` and `whole` where something is cut.

    Raises:
        InputError: if the ranks differ, or a weight is negative.
    """
    if on == "delta":
        deltas = Deltas(factors)
        limits = [deltas.kth_largest(i, kept(density, deltas.size)) for i in range(len(factors))]
        limits = torch.tensor(limits, dtype=torch.float64).view(-1, 1, 1)
        return deltas.merged(lambda _, x: elect(trim(x, limits), weights), rank or max(f.r for f in factors), note)
    sides = sides_of(same_rank(factors, pad, "ties on factors", "--on delta or --pad zero"))
    lora_A, lora_B = (elect(torch.stack([trim(x, threshold(x, density)) for x in side]), weights) for side in sides)
    return on_factors(lora_A, lora_B, rank, factors[0], note)


def elect(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Elect the signs and average what agrees: `(n, ...)` -> `(...)`.

    Raises:
        InputError: if a weight is negative: a share of a mean cannot be.
    """
    if min(weights) < 0:
        raise InputError(f"a weight is {min(weights):g}, but where signs are elected weights are shares of a mean; "
                         "give none below 0")  # fmt: skip
    shares = torch.tensor(weights, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))
    sign = (shares * values).sum(0).sign()
    agree = torch.where(values.sign() == sign, shares, 0.0)  # (n, ...)
    return (agree * values).sum(0) / agree.sum(0).clamp_min(torch.finfo(values.dtype).tiny)


def kept(density: float, size: int) -> int:
    """How many of `size` entries are kept: at least one."""
    return max(1, round(density * size))


def threshold(values: Tensor, density: float) -> float:
    """The magnitude of the smallest entry that is kept."""
    return float(values.abs().flatten().kthvalue(values.numel() - kept(density, values.numel()) + 1).values)


def trim(values: Tensor, limit: Tensor | float) -> Tensor:
    """Zeros for the entries below `limit` in magnitude."""
    return torch.where(values.abs() >= limit, values, 0.0)


def sides_of(factors: Sequence[LoraFactors]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All A `(r, in)` and all B `(out, r)` in float64, at scaling 1."""
    all_A, all_B = zip(*(f.at_scaling(1.0) for f in factors), strict=True)
    return all_A, all_B


def on_factors(lora_A: Tensor, lora_B: Tensor, rank: int | None, like: LoraFactors, note) -> LoraFactors:
    """The merged factors at scaling 1 in the dtype of `like`, cut to `rank` if that is smaller than theirs."""
    if rank is not None and rank < len(lora_A):
        return cut(lora_B, lora_A, rank, like, note)
    return LoraFactors(lora_A.to(like.lora_A.dtype), lora_B.to(like.lora_B.dtype), 1.0)
