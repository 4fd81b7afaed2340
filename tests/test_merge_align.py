"""LoRA-align: closed form and learned, its objectives and the gap it is meant to close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_reference import dense, near

from copra_llm.adapters import LoraFactors
from copra_llm.merge import METHODS, merge
from copra_llm.merge.align import procrustes
from copra_llm.merge.align_learned import learn
from copra_llm.merge.figures import Figures

SCALINGS = st.sampled_from([2.0, 0.25, -1.5, 16 / 6**0.5])


def factors(seed: int, r: int = 3, scaling: float = 2.0, dtype=torch.float64) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, 9), (14, r)))
    return LoraFactors(lora_A.to(dtype), lora_B.to(dtype), scaling)


def turned(f: LoraFactors, P: torch.Tensor) -> LoraFactors:
    """The same Delta W in other factors."""
    return LoraFactors(torch.linalg.solve(P, f.lora_A), f.lora_B @ P, f.scaling)


def rotation(seed: int, r: int) -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).normal(size=(r, r)))[0])


def objectives(first, other, P: np.ndarray) -> tuple[float, float]:
    """The paper's sum of norms, and the sum of squares, for `(A, B)` in NumPy."""
    (a1, b1), (a2, b2) = first, other
    norms = np.linalg.norm(b1 - b2 @ P), np.linalg.norm(a1 - np.linalg.inv(P) @ a2)
    return sum(norms), sum(n**2 for n in norms)


def numpy_pair(f: LoraFactors, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """`A` and `B` at another scaling: roots of the ratio on both sides, its sign in B."""
    ratio = f.scaling / scaling
    lora_A, lora_B = f.lora_A.double().numpy(), f.lora_B.double().numpy()
    return abs(ratio) ** 0.5 * lora_A, np.sign(ratio) * abs(ratio) ** 0.5 * lora_B


def pair(f: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
    return f.lora_A.double(), f.lora_B.double()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 4), r=st.integers(1, 5), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scalings=st.lists(SCALINGS, min_size=4, max_size=4), weights=st.lists(st.floats(-1.0, 1.0), min_size=3, max_size=3),
)  # fmt: skip
def test_closed_form_against_a_dense_reference(n, r, seed, dtype, scalings, weights):
    """P from NumPy's SVD; every adapter turned to the first; then averaged. In float32 as promised, to 1e-5."""
    fs = [factors(seed + i, r, s, dtype) for i, s in enumerate(scalings[:n])]
    weights = [*weights[: n - 1], 1.0 - sum(weights[: n - 1])]
    pairs = [numpy_pair(f, scalings[0]) for f in fs]
    a1, b1 = pairs[0]
    lora_A, lora_B = weights[0] * a1, weights[0] * b1
    for (a, b), w in zip(pairs[1:], weights[1:], strict=True):
        U, _, Vh = np.linalg.svd(b.T @ b1 + a @ a1.T)
        lora_A, lora_B = lora_A + w * Vh.T @ U.T @ a, lora_B + w * b @ U @ Vh
    merged = METHODS["align"](fs, weights)
    # Averages can nearly cancel: the error is measured by the factors' size, not by the product's.
    size = scalings[0] * np.linalg.norm(lora_A) * np.linalg.norm(lora_B)
    assert np.linalg.norm(dense(merged) - scalings[0] * lora_B @ lora_A) <= 1e-5 * abs(size) + 1e-6
    assert merged.scaling == scalings[0] and merged.r == r and merged.lora_A.dtype == dtype


@settings(max_examples=25, deadline=None)
@given(r=st.integers(1, 5), seed=st.integers(0, 99))
def test_closed_form_is_the_best_rotation(r, seed):
    """No other orthogonal matrix has a smaller sum of squares: not a random one, not one nearby."""
    first, other = factors(seed, r), factors(seed + 1, r)
    P = procrustes(pair(first), pair(other)).numpy()
    assert np.allclose(P.T @ P, np.eye(r), atol=1e-12)
    first, other = numpy_pair(first, 2.0), numpy_pair(other, 2.0)
    least = objectives(first, other, P)[1]
    rng = np.random.default_rng(seed)
    for size in (1e-3, 0.1, 1.0, 10.0):
        skew = size * rng.normal(size=(r, r))
        Q = P @ np.linalg.solve(np.eye(r) + (skew - skew.T), np.eye(r) - (skew - skew.T))
        assert objectives(first, other, Q)[1] >= least - 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), weight=st.floats(-1.0, 2.0), scalings=st.lists(SCALINGS, min_size=2, max_size=2))
def test_the_gap_is_the_product_of_the_differences(seed, weight, scalings):
    """Delta W_f - Delta W_m = -w (1 - w) s (B_1 - B_2 P)(A_1 - P^-1 A_2), for both ways of finding P."""
    fs = [factors(seed + i, 3, s) for i, s in enumerate(scalings)]
    (a1, b1), (a2, b2) = (numpy_pair(f, scalings[0]) for f in fs)
    mixture = weight * dense(fs[0]) + (1 - weight) * dense(fs[1])
    torch_pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((a1, b1), (a2, b2))]
    for method, P in (("align", procrustes(*torch_pairs)), ("align-learned", learn(*torch_pairs, steps=10))):
        options = {"steps": 10} if method == "align-learned" else {}
        fused = METHODS[method](fs, [weight, 1 - weight], **options)
        P = P.numpy()
        gap = -weight * (1 - weight) * scalings[0] * (b1 - b2 @ P) @ (a1 - np.linalg.inv(P) @ a2)
        assert np.allclose(dense(fused) - mixture, gap, rtol=0, atol=1e-8 * (1 + abs(gap).max()))


@pytest.mark.parametrize("method", ["align", "align-learned"])
def test_a_rotated_copy_is_turned_back(method):
    """Other factors, the same Delta W: fusion after aligning gives it, fusion alone does not."""
    first = factors(0)
    copies = [first, turned(first, rotation(1, 3)), turned(first, rotation(2, 3))]
    weights = [0.2, 0.3, 0.5]
    assert near(METHODS[method](copies, weights), dense(first))
    assert np.linalg.norm(dense(METHODS["fusion"](copies, weights)) - dense(first)) > 0.1 * np.linalg.norm(dense(first))


def test_a_learned_matrix_undoes_more_than_rotations():
    """B_2 = B_1 T, A_2 = T^-1 A_1 with a stretching T: the learned P closes the gap, a rotation cannot."""
    first = factors(0)
    stretch = torch.diag(torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)) @ rotation(3, 3)
    copies = [first, turned(first, stretch)]
    learned, rotated = (METHODS[m](copies, [0.5, 0.5]) for m in ("align-learned", "align"))
    error = {n: np.linalg.norm(dense(f) - dense(first)) for n, f in (("learned", learned), ("rotated", rotated))}
    assert error["learned"] < 1e-6 * np.linalg.norm(dense(first)) < 0.1 * error["rotated"]


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_learned_is_a_minimum_below_the_closed_form(r):
    """No direction goes down: measured slopes are below 1e-6 of the objective."""
    first, other = factors(5, r), factors(6, r)
    P = learn(pair(first), pair(other), steps=2000).numpy()
    start = procrustes(pair(first), pair(other)).numpy()
    first, other = numpy_pair(first, 2.0), numpy_pair(other, 2.0)
    value = objectives(first, other, P)[0]
    assert value < objectives(first, other, start)[0]
    rng = np.random.default_rng(r)
    for _ in range(20):
        step = 1e-5 * rng.normal(size=(r, r)) * np.linalg.norm(P) / r
        slope = objectives(first, other, P + step)[0] - objectives(first, other, P - step)[0]
        assert abs(slope) / (2 * np.linalg.norm(step)) < 1e-4 * value / np.linalg.norm(P)


def test_learning_is_deterministic_and_leaves_generators_alone():
    """Also without gradients around it, as in an evaluation."""
    adapters = [random_adapter(i) for i in range(2)]
    before = torch.get_rng_state()
    once = merge(adapters, "align-learned", steps=5)
    with torch.no_grad():
        again = merge(adapters, "align-learned", steps=5)
    assert torch.equal(before, torch.get_rng_state())
    for name, f in once.factors.items():
        assert torch.equal(f.lora_A, again.factors[name].lora_A) and torch.equal(f.lora_B, again.factors[name].lora_B)
        assert not f.lora_A.requires_grad


def test_equal_and_untrained_adapters():
    """Where a norm is 0 there is no gradient, and nothing to learn."""
    first = factors(0)
    untrained = LoraFactors(first.lora_A, torch.zeros_like(first.lora_B), first.scaling)
    for method in ("align", "align-learned"):
        assert near(METHODS[method]([first, first], [0.5, 0.5]), dense(first))
        assert not dense(METHODS[method]([untrained, untrained], [0.5, 0.5])).any()
        assert np.isfinite(dense(METHODS[method]([first, untrained], [0.5, 0.5]))).all()


@pytest.mark.parametrize("method", ["align", "align-learned"])
def test_figures_against_dense_matrices(method):
    """Both objectives and the gap, before and after, summed over modules and adapters; and what is printed."""
    adapters = [random_adapter(i, 3, s, torch.float64) for i, s in enumerate((2.0, 0.5, -1.0))]
    weights, figures = [0.5, 0.2, 0.3], Figures()
    options = {"steps": 10} if method == "align-learned" else {}
    merged = merge(adapters, method, weights, figures=figures, **options)
    expected = {"objective_before": 0.0, "objective_after": 0.0, "squares_before": 0.0, "squares_after": 0.0}
    squared = {"gap_before": 0.0, "gap_after": 0.0, "mixture": 0.0}
    fused = merge(adapters, "fusion", weights)
    for name, f in merged.factors.items():
        first, *others = (numpy_pair(a.factors[name], 2.0) for a in adapters)
        mixture = sum(w * dense(a.factors[name]) for a, w in zip(adapters, weights, strict=True))
        for other in others:
            tensors = [tuple(map(torch.from_numpy, p)) for p in (first, other)]
            P = procrustes(*tensors) if method == "align" else learn(*tensors, steps=10)
            for when, Q in (("before", np.eye(3)), ("after", P.numpy())):
                both = objectives(first, other, Q)
                expected[f"objective_{when}"] += both[0]
                expected[f"squares_{when}"] += both[1]
        squared["gap_before"] += np.linalg.norm(dense(fused.factors[name]) - mixture) ** 2
        squared["gap_after"] += np.linalg.norm(dense(f) - mixture) ** 2
        squared["mixture"] += np.linalg.norm(mixture) ** 2
    for name, value in expected.items():
        assert figures.total(name) == pytest.approx(value, rel=1e-8), name
    for name, value in squared.items():
        assert figures.norm(name) == pytest.approx(value**0.5, rel=1e-8), name
    assert figures.total("squares_after") < figures.total("squares_before")
    assert figures.total("objective_after") < figures.total("objective_before")
    assert figures.sentences() == [
        f"alignment, sum of norms: {expected['objective_before']:.6g} before, {expected['objective_after']:.6g} after",
        f"alignment, sum of squares: {expected['squares_before']:.6g} before, {expected['squares_after']:.6g} after",
        f"gap to the mixture: {squared['gap_before'] ** 0.5:.6g} before, {squared['gap_after'] ** 0.5:.6g} after "
        f"(the mixture's norm is {squared['mixture'] ** 0.5:.6g})",
    ]


def test_unequal_ranks_are_padded():
    """Zeros are turned with the rest; at weights (0, 1) nothing is lost."""
    adapters = [random_adapter(0, 2, dtype=torch.float64), random_adapter(1, 4, dtype=torch.float64)]
    merged = merge(adapters, "align", [0.0, 1.0], pad="zero")
    for name, f in merged.factors.items():
        assert f.r == 4 and near(f, dense(adapters[1].factors[name]))
