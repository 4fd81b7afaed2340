"""Merging in dense float64 NumPy, straight from the papers: what `copra_llm.merge` is held against.

Adapters are random with singular values that fall by a third, so that cuts, bases and signs are well defined.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from copra_llm.adapters import LoraFactors
from copra_llm.merge.dare import keep_mask

SHAPES = st.sampled_from([(14, 9), (9, 14), (12, 12), (5, 3)])
SCALINGS = st.sampled_from([2.0, 0.25, 1 / 3, 16 / 6**0.5])
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-7}
"""Promised is 1e-5; stored in float64 only the Gram matrix of `--on delta` (1e-8) is above rounding."""


def factors(seed: int, r: int, shape: tuple[int, int], scaling: float, dtype=torch.float64) -> LoraFactors:
    """Random factors whose singular values fall: 1, 1/3, 1/9, ... times numbers of size 1."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs = shape
    lora_A = torch.randn((r, inputs), generator=generator, dtype=torch.float64)
    fall = 3.0 ** -torch.arange(r, dtype=torch.float64)
    lora_B = torch.randn((out, r), generator=generator, dtype=torch.float64) * fall
    return LoraFactors(lora_A.to(dtype), lora_B.to(dtype), scaling)


@st.composite
def parts(draw, least_weight: float = -2.0):
    """Two to four adapters of one module, of any ranks, scalings and dtype, with weights of any sum."""
    n, shape, seed = draw(st.integers(2, 4)), draw(SHAPES), draw(st.integers(0, 999))
    dtype = draw(st.sampled_from(sorted(RELATIVE, key=str)))
    made = [factors(seed + i, draw(st.integers(1, 4)), shape, draw(SCALINGS), dtype) for i in range(n)]
    weights = draw(st.lists(st.floats(least_weight, 2.0).filter(lambda w: abs(w) > 0.05), min_size=n, max_size=n))
    return made, weights


def dense(f: LoraFactors) -> np.ndarray:
    return f.scaling * f.lora_B.double().numpy() @ f.lora_A.double().numpy()


def near(merged: LoraFactors, expected: np.ndarray) -> bool:
    error = np.linalg.norm(dense(merged) - expected)
    return error <= RELATIVE[merged.lora_A.dtype] * np.linalg.norm(expected)


def supported(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD without zero singular values; what has no gap is put aside."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    k = int((S / S[0] > 1e-10).sum())
    assume(k < 2 or min(-np.diff(S[:k])) > 1e-4 * S[0])
    return U[:, :k], S[:k], Vh[:k]


def best(matrix: np.ndarray, rank: int | None) -> np.ndarray:
    """The best approximation of a rank."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    if rank is None or rank >= len(S) or S[rank] < 1e-10 * S[0]:
        return matrix
    assume(S[rank - 1] - S[rank] > 1e-3 * S[0])
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def trimmed(matrix: np.ndarray, density: float) -> np.ndarray:
    """The largest entries in magnitude, the others 0."""
    order = np.argsort(-abs(matrix).ravel())
    result = np.zeros(matrix.size)
    chosen = order[: max(1, round(density * matrix.size))]
    result[chosen] = matrix.ravel()[chosen]
    return result.reshape(matrix.shape)


def elected(matrices: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """TIES' election and disjoint mean, entry by entry."""
    result = np.zeros_like(matrices[0])
    for place in np.ndindex(result.shape):
        values = [m[place] for m in matrices]
        sign = np.sign(sum(w * v for w, v in zip(weights, values, strict=True)))
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if np.sign(v) == sign != 0]
        if agree:
            result[place] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return result


def dropped(f: LoraFactors, i: int, density: float, seed: int) -> np.ndarray:
    """DARE on delta: lines are those of the longer side."""
    delta = dense(f)
    turned = delta.shape[1] > delta.shape[0]
    lines = delta.T if turned else delta
    mask = keep_mask(range(len(lines)), lines.shape[1], density=density, seed=seed, name="m.delta", adapter=i)
    kept = np.where(mask.numpy(), lines / density, 0.0)
    return kept.T if turned else kept


def polar_factor(matrix: np.ndarray) -> np.ndarray:
    P, D, Wh = np.linalg.svd(matrix, full_matrices=False)
    assume(min(D) > 1e-3)
    return P @ Wh
