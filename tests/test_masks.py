"""The masks of `copra_llm.masks`: contracts C1 (pure in seed and step) and C2 (never empty, exact law).

`philox` and `reference_mask` are a second implementation from the definitions: Philox4x64-10 in plain
integers (Salmon et al. 2011), and the conditioned law in exact fractions.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT

from copra_llm.masks import _uniforms, marginal_prob, sample_mask

GOLDEN = [
    # (p, num_layers, seed, step, mask)
    (0.0, 12, 0, 0, "100000000000"),
    (0.3, 12, 0, 0, "111001001101"),
    (0.3, 12, 0, 1, "110000000100"),
    (0.05, 12, 42, 7, "000100100000"),
    (0.5, 30, 1234, 299, "001110100001010100101011000101"),
    (0.3, 12, 2**63 + 5, 2**40, "100100010100"),
    (1e-300, 24, 7, 123456, "000000000000000000100000"),
]

# Upper 0.1 % points of chi-square. Seeds are fixed, so a test passes always or never: the level says how
# unlikely a right sampler was to fail when the test was written.
CHI2_999 = {6: 22.458, 8: 26.124, 11: 31.264}


# --- C1: a pure function of (seed, step) ------------------------------------------------------------------


@pytest.mark.parametrize(("p", "num_layers", "seed", "step", "mask"), GOLDEN)
def test_golden_masks(p: float, num_layers: int, seed: int, step: int, mask: str):
    """These masks are the same on every machine and version; a change would break every resumed run."""
    assert _digits(sample_mask(p, num_layers, seed=seed, step=step)) == mask


@pytest.mark.parametrize("p", [0.0, 1e-300, 0.001, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("num_layers", [1, 2, 13])
def test_masks_follow_a_second_implementation(p: float, num_layers: int):
    """Philox with key = seed and the step in its second counter word, then the exact law, give the same masks."""
    for seed, step in itertools.product((0, 1, 2**64 - 1), (0, 1, 999, 2**64 - 1)):
        expected = reference_mask(p, num_layers, seed, step)
        assert _digits(sample_mask(p, num_layers, seed=seed, step=step)) == expected


def test_a_mask_depends_on_nothing_but_its_arguments():
    """Drawn in another order, after other draws and seeds, each step's mask is the same."""
    forward = [_digits(sample_mask(0.4, 12, seed=3, step=s)) for s in range(50)]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    backward = [_digits(sample_mask(0.4, 12, seed=3, step=s)) for s in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 40
    assert forward != [_digits(sample_mask(0.4, 12, seed=4, step=s)) for s in range(50)]


def test_no_global_generator_moves():
    """Python's, NumPy's and torch's generators are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for p in (0.0, 0.5, 1.0):
        sample_mask(p, 30, seed=0, step=7)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_another_process_draws_the_same_masks():
    """A process with another hash seed and without torch sees the same masks."""
    code = (
        "import sys; from copra_llm.masks import sample_mask; "
        "print(*[''.join(map(str, sample_mask(0.35, 24, seed=11, step=s).astype(int))) for s in range(20)]); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [_digits(sample_mask(0.35, 24, seed=11, step=s)) for s in range(20)]


def test_steps_share_no_random_numbers():
    """Philox counts blocks of four: no two steps (or seeds) may overlap in them."""
    drawn = Counter()
    for seed, step in itertools.product((0, 1), range(200)):
        drawn.update(_uniforms(64, seed, step).tolist())
    assert len(drawn) == 2 * 200 * 64


def test_successive_masks_are_independent():
    """The masks of steps 2i and 2i + 1 are jointly distributed as two independent ones (chi-square, 0.1 %)."""
    pairs = Counter()
    for i in range(9000):
        one, two = (_digits(sample_mask(0.5, 2, seed=5, step=step)) for step in (2 * i, 2 * i + 1))
        pairs[one + two] += 1
    outcomes = ["".join(pair) for pair in itertools.product(("01", "10", "11"), repeat=2)]
    assert _chi2([pairs[o] for o in outcomes], [1 / 9] * 9) < CHI2_999[8]


# --- C2: Bernoulli, given that at least one layer is active -----------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1e-300, 1e-12, 1e-3, 0.1])
def test_never_empty(p: float):
    """No mask is empty, however small p."""
    assert all(sample_mask(p, n, seed=n, step=s).any() for n in (1, 2, 6, 24) for s in range(200))


@pytest.mark.parametrize("p", [0.0, 1e-300, 1e-17])
def test_one_layer_uniformly_as_p_vanishes(p: float):
    """At p = 0 and in its limit exactly one layer is active, each as often (chi-square, 0.1 %)."""
    counts = np.zeros(12)
    for step in range(6000):
        mask = sample_mask(p, 12, seed=1, step=step)
        assert mask.sum() == 1
        counts += mask
    assert _chi2(counts, [1 / 12] * 12) < CHI2_999[11]


def test_p_one_is_every_layer():
    """At p = 1 every layer is active."""
    assert all(sample_mask(1.0, n, seed=2, step=s).all() for n in (1, 5, 40) for s in range(100))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_joint_law_of_three_layers(p: float):
    """Each of the 7 non-empty masks has probability p^k (1-p)^(3-k) / (1 - (1-p)^3) (chi-square, 0.1 %)."""
    counts = Counter(_digits(sample_mask(p, 3, seed=9, step=step)) for step in range(20_000))
    outcomes = ["".join(bits) for bits in itertools.product("01", repeat=3) if "1" in bits]
    law = [p ** o.count("1") * (1 - p) ** o.count("0") / (1 - (1 - p) ** 3) for o in outcomes]
    assert set(counts) <= set(outcomes)
    assert _chi2([counts[o] for o in outcomes], law) < CHI2_999[6]


@pytest.mark.parametrize("p", [0.02, 0.25, 0.7])
@pytest.mark.parametrize("num_layers", [2, 6, 12])
def test_marginal(p: float, num_layers: int):
    """Every layer, first or last, is active with probability p / (1 - (1-p)^L): within four standard errors."""
    steps = 6000
    expected = p / (1 - (1 - p) ** num_layers)
    assert marginal_prob(p, num_layers) == pytest.approx(expected, rel=1e-12)
    share = np.mean([sample_mask(p, num_layers, seed=3, step=s) for s in range(steps)], axis=0)
    assert np.all(np.abs(share - expected) < 4 * (expected * (1 - expected) / steps) ** 0.5)


def test_marginal_at_the_ends():
    """The marginal is 1 / L at p = 0 and in its limit, 1 at p = 1."""
    assert [marginal_prob(p, 8) for p in (0.0, 1e-300, 1.0)] == [0.125, 0.125, 1.0]


@pytest.mark.parametrize(("p", "num_layers"), [(-0.1, 3), (1.0000001, 3), (float("nan"), 3), (0.5, 0)])
def test_impossible_arguments_are_refused(p: float, num_layers: int):
    """A probability outside [0, 1], or no layer at all."""
    with pytest.raises(ValueError, match="p must lie in"):
        sample_mask(p, num_layers, seed=0, step=0)


# --- the second implementation ----------------------------------------------------------------------------


def reference_mask(p: float, num_layers: int, seed: int, step: int) -> str:
    """The mask by the definitions: '1' = active."""
    exact, mask = Fraction(p), ""
    for layer in range(num_layers):
        block = philox([1 + layer // 4, step, 0, 0], [seed, 0])  # NumPy counts up before its first block
        u = Fraction(block[layer % 4] >> 11, 2**53)
        left = num_layers - layer
        if "1" in mask:
            bound = exact
        elif exact == 0:
            bound = Fraction(1, left)
        else:
            bound = exact / (1 - (1 - exact) ** left)
        mask += "1" if u < bound else "0"
    return mask


def philox(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10: four 64-bit words."""
    word = 2**64
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = right // word ^ b ^ k0, right % word, left // word ^ d ^ k1, left % word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return [a, b, c, d]


def test_philox_is_salmons():
    """The plain-integer Philox gives the known answers of the Random123 distribution."""
    assert philox([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    ones = 2**64 - 1
    assert philox([ones] * 4, [ones] * 2)[0] == 0x87B092C3013FE90B


def _digits(mask: np.ndarray) -> str:
    assert mask.dtype == bool
    return "".join(map(str, mask.astype(int)))


def _chi2(counts, law) -> float:
    counts, law = np.asarray(counts, dtype=float), np.asarray(law)
    assert abs(law.sum() - 1) < 1e-12
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())
