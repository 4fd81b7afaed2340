"""Every merge rule against a dense float64 reference, on random adapters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from merge_reference import best, dense, dropped, elected, factors, near, parts, polar_factor, supported, trimmed

from copra_llm.merge import METHODS
from copra_llm.merge.core_space import INNER
from copra_llm.merge.dare import keep_mask

DENSITIES = st.floats(0.1, 1.0)
RANKS = st.sampled_from([None, 1, 2, 3, 5])


@settings(max_examples=40, deadline=None)
@given(made=parts(), rank=RANKS)
def test_truncated_and_task_arithmetic(made, rank):
    """The sum itself, or its best approximation."""
    fs, weights = made
    total = sum(w * dense(f) for f, w in zip(fs, weights, strict=True))
    assert near(METHODS["task-arithmetic"](fs, weights, rank=rank), best(total, rank))
    own = rank or max(f.r for f in fs)
    cut = METHODS["truncated"](fs, weights, rank=rank)
    assert near(cut, best(total, own)) and cut.r == min(own, *total.shape, sum(f.r for f in fs))


@settings(max_examples=40, deadline=None)
@given(made=parts(), rank=RANKS)
def test_iso_c(made, rank):
    fs, weights = made
    U, S, Vh = supported(sum(w * dense(f) for f, w in zip(fs, weights, strict=True)))
    k = min(len(S), rank or len(S))
    assert near(METHODS["iso-c"](fs, weights, rank=rank), S[:k].mean() * U[:, :k] @ Vh[:k])


@settings(max_examples=40, deadline=None)
@given(made=parts(), density=st.none() | DENSITIES)
def test_tsv_m(made, density):
    fs, weights = made
    left, middle, right = [], [], []
    for f, w in zip(fs, weights, strict=True):
        U, S, Vh = supported(dense(f))
        k = min(len(S), max(1, min(dense(f).shape) // len(fs) if density is None else round(density * f.r)))
        left, middle, right = [*left, U[:, :k]], [*middle, w * S[:k]], [*right, Vh[:k].T]
    U, S, V = polar_factor(np.hstack(left)), np.concatenate(middle), polar_factor(np.hstack(right))
    assert near(METHODS["tsv-m"](fs, weights, density=density), (U * S) @ V.T)
    assert near(METHODS["tsv-m"](fs, weights, density=density, rank=2), best((U * S) @ V.T, 2))


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES)
def test_ties_on_factors(made, density):
    """On A and on B apart, each with the scaling's root; the product has the cross terms."""
    fs, weights = made
    same = [factors(7 * i, 3, dense(f).shape, f.scaling, f.lora_A.dtype) for i, f in enumerate(fs)]
    lora_A, lora_B = (
        elected([trimmed(f.scaling**0.5 * getattr(f, side).double().numpy(), density) for f in same], weights)
        for side in ("lora_A", "lora_B")
    )
    merged = METHODS["ties"](same, weights, density=density)
    assert near(merged, lora_B @ lora_A) and merged.r == 3


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES, rank=RANKS)
def test_ties_on_delta(made, density, rank):
    fs, weights = made
    expected = elected([trimmed(dense(f), density) for f in fs], weights)
    merged = METHODS["ties"](fs, weights, density=density, on="delta", rank=rank)
    assert near(merged, best(expected, rank or max(f.r for f in fs)))


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES, rank=RANKS, seed=st.integers(0, 2**64 - 1))
def test_dare_on_delta(made, density, rank, seed):
    fs, weights = made
    own = rank or max(f.r for f in fs)
    kept = [dropped(f, i, density, seed) for i, f in enumerate(fs)]
    total, voted = sum(w * x for w, x in zip(weights, kept, strict=True)), elected(kept, weights)
    options = {"density": density, "rank": rank, "seed": seed, "module": "m", "on": "delta"}
    for method, expected in (("dare", total), ("dare-ties", voted)):
        assume(np.linalg.norm(expected) > 0)
        assert near(METHODS[method](fs, weights, **options), best(expected, own))


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES, seed=st.integers(0, 99))
def test_dare_on_factors(made, density, seed):
    """B~ A~ of each adapter, added without cross terms; DARE-TIES elects on A~ and B~."""
    fs, weights = made
    fs = [factors(7 * i, 3, dense(f).shape, f.scaling, f.lora_A.dtype) for i, f in enumerate(fs)]

    def side(i: int, which: str, lines: np.ndarray) -> np.ndarray:
        key = {"density": density, "seed": seed, "name": f"m.{which}", "adapter": i}
        return np.where(keep_mask(range(3), lines.shape[1], **key).numpy(), lines / density, 0.0)

    all_A = [side(i, "lora_A", f.scaling**0.5 * f.lora_A.double().numpy()) for i, f in enumerate(fs)]
    all_B = [side(i, "lora_B", f.scaling**0.5 * f.lora_B.T.double().numpy()).T for i, f in enumerate(fs)]
    total = sum(w * b @ a for w, a, b in zip(weights, all_A, all_B, strict=True))
    voted = elected(all_B, weights) @ elected(all_A, weights)
    options = {"density": density, "seed": seed, "module": "m"}
    assert near(METHODS["dare"](fs, weights, **options), total)
    assert near(METHODS["dare-ties"](fs, weights, **options), voted)


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES)
def test_knots(made, density):
    fs, weights = made
    U, S, Vh = supported(np.hstack([dense(f) for f in fs]))
    V = elected([trimmed(part, density) for part in np.hsplit(Vh, len(fs))], weights)
    assert near(METHODS["knots"](fs, weights, density=density), (U * S) @ V)
    assert near(METHODS["knots"](fs, weights, density=density, rank=2), best((U * S) @ V, 2))


@settings(max_examples=40, deadline=None)
@given(made=parts(least_weight=0.1), density=DENSITIES)
def test_core_space(made, density):
    """Linear rules give what they give outside; TIES works on the cores, isotropy commutes with the bases."""
    fs, weights = made
    U, _, _ = supported(np.hstack([f.scaling * f.lora_B.double().numpy() for f in fs]))
    _, _, Vh = supported(np.vstack([f.lora_A.double().numpy() for f in fs]))
    cores = [U.T @ dense(f) @ Vh.T for f in fs]
    core_space = METHODS["core-space"]
    total = sum(w * dense(f) for f, w in zip(fs, weights, strict=True))
    voted = U @ elected([trimmed(core, density) for core in cores], weights) @ Vh
    assert near(core_space(fs, weights, inner="task-arithmetic"), total)
    assert near(core_space(fs, weights, inner="ties", density=density), voted)
    assert near(core_space(fs, weights, inner="ties", density=density, rank=2), best(voted, 2))
    U, S, Vh = supported(total)
    assert near(core_space(fs, weights, inner="iso-c"), S.mean() * U @ Vh)


@pytest.mark.parametrize("inner", INNER)
def test_every_rule_works_inside_core_space(inner):
    """At density 1 and one-hot weights TIES, DARE and the sum give the adapter back; so does each for n copies."""
    first, second = (factors(seed, 3, (14, 9), 2.0) for seed in range(2))
    takes_density = inner not in ("task-arithmetic", "iso-c")
    options = {"inner": inner, "density": 1.0 if takes_density else None}
    if inner not in ("iso-c", "tsv-m"):
        assert near(METHODS["core-space"]([first, second], [1.0, 0.0], **options), dense(first))
    if inner != "iso-c":
        assert near(
            METHODS["core-space"]([first, first], [0.5, 0.5], **options), dense(first) / (1 + (inner == "tsv-m"))
        )
