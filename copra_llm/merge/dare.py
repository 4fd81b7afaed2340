"""DARE: drop entries at random, rescale those that stay, then add (DARE) or elect signs (DARE-TIES).

    x_i~ = m_i x_i / density,      m_i ~ Bernoulli(density) for every entry, so E[x_i~] = x_i
    dare         sum_i w_i Delta W_i~
    dare-ties    elect and merge of TIES on the x_i~

On delta, x is Delta W, and the result is cut to a rank. On factors, x is A and B, dropped independently, and
Delta W_i~ = B_i~ A_i~ is added without cross terms (PEFT's dare_linear has them): the rank is sum r_i.

A mask is a pure function of seed, module, adapter and place: Philox with the seed and a digest of the module's
name as key, adapter and line in the counter. So it is the same whatever the blocks, the order of the modules and
the machine, and no global generator moves.

Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099), section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.merge.delta import Deltas
from copra_llm.merge.pad import same_rank
from copra_llm.merge.ties import elect, on_factors, sides_of


def dare(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    on: str = "factors",
    rank: int | None = None,
    seed: int = 0,
    module: str = "",
    note=None,
) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter, of any sum.
        density: probability of keeping an entry, in (0, 1].
        on: "factors" or "delta".
        rank: cut the result to it; None: no cut on factors, the largest rank on delta.
        seed: of the masks.
        module: the module's name, part of the masks' key.
        note: gets `lost` and `whole` where something is cut.
    """
    if on == "delta":
        share = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
        rule = on_blocks(lambda x: (share * x).sum(0), density, seed, module)
        return Deltas(factors).merged(rule, rank or max(f.r for f in factors), note)
    all_A, all_B = _dropped_factors(factors, density, seed, module)
    lora_A, lora_B = torch.cat(all_A), torch.cat([w * b for w, b in zip(weights, all_B, strict=True)], 1)
    return on_factors(lora_A, lora_B, rank, factors[0], note)


def dare_ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    on: str = "factors",
    rank: int | None = None,
    pad: str | None = None,
    seed: int = 0,
    module: str = "",
    note=None,
) -> LoraFactors:
    """The same with TIES' election; `weights` at least 0, on factors of equal ranks without `pad`.

    Raises:
        InputError: if the ranks differ, or a weight is negative.
    """
    if on == "delta":
        rule = on_blocks(lambda x: elect(x, weights), density, seed, module)
        return Deltas(factors).merged(rule, rank or max(f.r for f in factors), note)
    same = same_rank(factors, pad, "dare-ties on factors", "--on delta or --pad zero")
    lora_A, lora_B = (elect(torch.stack(side), weights) for side in _dropped_factors(same, density, seed, module))
    return on_factors(lora_A, lora_B, rank, factors[0], note)


def keep_mask(lines: range, length: int, *, density: float, seed: int, name: str, adapter: int) -> Tensor:
    """Which entries stay: bool `(len(lines), length)`.

    Args:
        lines: numbers of the lines, at most 2**64.
        length: entries of a line.
        density: probability of staying.
        seed: in [0, 2**64).
        name: of the matrix.
        adapter: its place in the merge.
    """
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    key = seed + (digest << 64)
    # As in masks.py: raw words, and nothing of ours in the counter's first word, in which the generator counts.
    raw = [np.random.Philox(key=key, counter=(line << 64) + (adapter << 128)).random_raw(length) for line in lines]
    return torch.from_numpy((np.stack(raw) >> np.uint64(11)) * 2.0**-53 < density)


def dropped(values: Tensor, adapter: int, first: int = 0, *, density: float, seed: int, name: str) -> Tensor:
    """`values (lines, length)` of one adapter, from line `first` on, with entries dropped and the others rescaled."""
    lines = range(first, first + len(values))
    mask = keep_mask(lines, values.shape[1], density=density, seed=seed, name=name, adapter=adapter)
    return torch.where(mask, values / density, 0.0)


def on_blocks(combine: Callable[[Tensor], Tensor], density: float, seed: int, module: str):
    """`combine` of the dropped blocks `(n, lines, length)`, as `Deltas.merged` wants it."""
    key = {"density": density, "seed": seed, "name": f"{module}.delta"}
    return lambda first, block: combine(torch.stack([dropped(x, i, first, **key) for i, x in enumerate(block)]))


def _dropped_factors(factors: Sequence[LoraFactors], density: float, seed: int, module: str):
    """All A~ `(r, in)` and all B~ `(out, r)` in float64, the scaling's root in both; a line is one of the r."""
    all_A, all_B = sides_of(factors)
    in_A, in_B = ({"density": density, "seed": seed, "name": f"{module}.lora_{side}"} for side in "AB")
    return (
        [dropped(a, i, **in_A) for i, a in enumerate(all_A)],
        [dropped(b.T, i, **in_B).T for i, b in enumerate(all_B)],
    )
