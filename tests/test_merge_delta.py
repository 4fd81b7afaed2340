"""How merge rules compute: Delta W in blocks, what cutting lost, DARE's masks, and that nothing large is formed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_reference import SHAPES, dense, elected, factors, trimmed
from torch.utils._python_dispatch import TorchDispatchMode

from copra_llm.merge import METHODS, merge
from copra_llm.merge.dare import keep_mask, on_blocks
from copra_llm.merge.delta import Deltas
from copra_llm.merge.figures import Figures
from copra_llm.merge.lowrank import norm_of_product, polar

# --- delta in blocks ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), r=st.integers(1, 3), shape=SHAPES, block=st.integers(1, 200), data=st.data())
def test_kth_largest_is_exact(seed, r, shape, block, data):
    """The bits' order is the numbers', whatever the blocks; also among equal magnitudes and zeros."""
    f = factors(seed, r, shape, -0.7)
    f.lora_B[::2] = f.lora_B[0]
    f.lora_B[1::3] = 0.0
    deltas = Deltas([f], block)
    k = data.draw(st.integers(1, deltas.size))
    # Products of block rows may round in another order than the whole product: they are compared as computed.
    values = torch.cat([x[0].abs().flatten() for _, x in deltas.blocks()])
    assert deltas.kth_largest(0, k) == float(values.sort(descending=True).values[k - 1])


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
def test_blocks_do_not_change_the_result(shape):
    """One line at a time or all at once."""
    fs = [factors(seed, 3, shape, 2.0) for seed in range(3)]
    notes = {}

    def merged(block: int) -> np.ndarray:
        rule = lambda first, x: (x * x.sign().roll(1, 0)).sum(0)  # noqa: E731
        return dense(Deltas(fs, block).merged(rule, 2, lambda **n: notes.setdefault(block, n)))

    assert np.allclose(merged(1), merged(10**6), rtol=0, atol=1e-12)
    for name in ("lost", "whole"):
        assert notes[1][name] == pytest.approx(notes[10**6][name], rel=1e-7)


def test_what_cutting_lost_is_the_distance_to_the_uncut():
    """On delta and on the stacked factors, against the dense matrices; over modules as one norm."""
    adapters = [random_adapter(i, dtype=torch.float64) for i in range(3)]
    for method, options in (("truncated", {}), ("ties", {"on": "delta", "density": 0.5}), ("tsv-m", {})):
        figures = Figures()
        merged = merge(adapters, method, figures=figures, rank=2, **options)
        lost = whole = 0.0
        for name, f in merged.factors.items():
            own = [a.factors[name] for a in adapters]
            if method == "ties":
                uncut = elected([trimmed(dense(x), 0.5) for x in own], [1.0] * 3)
            else:
                same = "mixture" if method == "truncated" else method
                uncut = dense(METHODS[same](own, [1 / 3 if method == "truncated" else 1.0] * 3))
            lost, whole = lost + np.linalg.norm(dense(f) - uncut) ** 2, whole + np.linalg.norm(uncut) ** 2
        assert figures.norm("lost") == pytest.approx(lost**0.5, rel=1e-6)
        assert figures.norm("whole") == pytest.approx(whole**0.5, rel=1e-9)
        assert figures.sentences() == [
            f"cut to the rank: lost {100 * (lost / whole) ** 0.5:.3g} % of the merged update's Frobenius norm"
        ]


# --- DARE's masks ---------------------------------------------------------------------------------------------------

KEY = {"density": 0.5, "seed": 3, "name": "model.layers.0.q_proj.delta", "adapter": 1}


def test_golden_masks():
    """The same on every machine and in every version: a changed mask is a changed method."""
    rows = ["".join("01"[int(x)] for x in row) for row in keep_mask(range(2, 5), 12, **KEY)]
    assert rows == ["010100100000", "011110001001", "001001000011"]


def test_a_mask_depends_on_its_key_alone():
    """Any block of lines is a part of the whole; another seed, name or adapter is another mask."""
    whole = keep_mask(range(40), 30, **KEY)
    assert torch.equal(keep_mask(range(7, 19), 30, **KEY), whole[7:19])
    assert 0.45 < whole.double().mean() < 0.55  # 1200 draws: +- 3 standard errors
    for change in ({"seed": 4}, {"name": "other"}, {"adapter": 0}):
        other = keep_mask(range(40), 30, **KEY | change)
        assert 0.4 < (whole == other).double().mean() < 0.6


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
def test_blocks_do_not_change_the_masks(shape):
    """A block knows its first line."""
    fs = [factors(seed, 3, shape, 2.0) for seed in range(2)]
    rule = on_blocks(lambda x: x.sum(0), 0.5, 7, "m")
    assert np.allclose(dense(Deltas(fs, 20).merged(rule, 9)), dense(Deltas(fs).merged(rule, 9)), rtol=0, atol=1e-10)


def test_no_global_generator_moves():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = merge([random_adapter(0), random_adapter(1)], "dare", seed=1)
    again = merge([random_adapter(0), random_adapter(1)], "dare", seed=1)
    other = merge([random_adapter(0), random_adapter(1)], "dare", seed=2)
    assert torch.equal(before, torch.get_rng_state()) and (numpy_before == np.random.get_state()[1]).all()
    for name, f in first.factors.items():
        assert torch.equal(f.lora_A, again.factors[name].lora_A)
        assert not torch.equal(f.lora_A, other.factors[name].lora_A)
    modules = list(first.factors.values())
    assert not torch.equal(modules[0].lora_A == 0, modules[3].lora_A == 0)  # of equal shape, in other layers


@pytest.mark.parametrize("on", ["factors", "delta"])
def test_dare_is_unbiased(on):
    """The mean over 400 seeds is the sum, within 4.5 standard errors in every entry (of 126: p < 0.001)."""
    fs = [factors(seed, 2, (14, 9), 2.0) for seed in range(2)]
    options = {"density": 0.5, "on": on, "rank": 9}
    draws = np.stack([dense(METHODS["dare"](fs, [1.0, -0.5], seed=s, **options)) for s in range(400)])
    expected = dense(fs[0]) - 0.5 * dense(fs[1])
    error = draws.std(0) / 400**0.5
    assert (abs(draws.mean(0) - expected) <= 4.5 * error).all()
    assert np.linalg.norm(error) > 0.01 * np.linalg.norm(expected)


# --- sizes ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_delta_weight_is_never_formed(method):
    """3000 x 2000 would be 6 million entries; KnOTS' stack of V parts, n * sum r * in, is the most there is."""
    fs = [factors(seed, 4, (3000, 2000), 2.0) for seed in range(3)]
    with Largest() as largest:
        METHODS[method](fs, [0.5, 0.3, 0.2])
    assert largest.entries <= 3 * 12 * 3000


def test_delta_is_read_in_blocks():
    """Of every adapter a block, and the shorter side squared."""
    fs = [factors(seed, 4, (60, 3000), 2.0) for seed in range(3)]
    deltas = Deltas(fs, block=6000)
    with Largest() as largest:
        deltas.kth_largest(0, 10)
        deltas.merged(lambda first, x: x.sum(0), 4)
    assert largest.entries <= max(3 * 6000, 60 * 60, 1 << 16)


# --- small mathematics ----------------------------------------------------------------------------------------------


def test_norm_of_a_product_that_cancels():
    """B A - B A (1 + 1e-9): a thousand times smaller than what the squared norm could tell."""
    f = factors(0, 3, (14, 9), 1.0)
    lora_B, lora_A = torch.cat([f.lora_B, -(1 + 1e-9) * f.lora_B], 1), torch.cat([f.lora_A, f.lora_A])
    assert norm_of_product(lora_B, lora_A) == pytest.approx(1e-9 * np.linalg.norm(dense(f)), rel=1e-5)


def test_polar_factor_of_dependent_columns():
    """Two equal columns are each other's half; no direction is made up."""
    column = torch.tensor([[3.0], [4.0], [0.0]], dtype=torch.float64)
    half = torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64) / 2**0.5
    assert torch.allclose(polar(torch.cat([column, column], 1)), torch.cat([half, half], 1))
