"""Merge rules where the answer is known: copies, orthogonal, untrained, single and unequal adapters; bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from examples import random_adapter
from merge_reference import dense, factors, near, trimmed

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError
from copra_llm.merge import AVERAGES, METHODS, check_line, merge, options_of
from copra_llm.merge.fusion import fuse
from copra_llm.merge.ties import elect

# --- known answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "knots", "dare", "dare-ties"])
@pytest.mark.parametrize("on", ["factors", "delta"])
def test_nothing_is_dropped_at_density_one(method, on):
    """Weights (1, 0) and copies of one adapter then give that adapter."""
    first, second = (factors(seed, 3, (14, 9), 2.0) for seed in range(2))
    options = {"density": 1.0} | ({} if method == "knots" else {"on": on})
    assert near(METHODS[method]([first, second], [1.0, 0.0], **options), dense(first))
    assert near(METHODS[method]([first] * 3, [1 / 3] * 3, **options), dense(first))


def test_an_exact_tie_elects_nothing():
    """Equal votes for both signs: 0, whatever the order; weights break the tie."""
    votes = torch.tensor([[2.0, 2.0, 1.0], [-2.0, 4.0, 0.0]], dtype=torch.float64)
    assert elect(votes, [1.0, 1.0]).tolist() == elect(votes.flip(0), [1.0, 1.0]).tolist() == [0.0, 3.0, 1.0]
    assert elect(votes, [3.0, 1.0]).tolist() == [2.0, 2.5, 1.0]


def test_tsv_m_of_copies_is_their_mean():
    """Shared directions count once: 1 each by default, as in the paper."""
    first = factors(0, 3, (14, 9), 2.0)
    assert near(METHODS["tsv-m"]([first] * 3, [1.0] * 3), dense(first))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fusion", "align", "align-learned"}))
def test_a_negative_scaling_is_a_sign(method):
    """s B A = -s (-B) A, for the first adapter and for others."""
    fs = [factors(seed, 3, (14, 9), scaling) for seed, scaling in enumerate((-2.0, 0.5, -0.7))]
    positive = [dataclasses.replace(f, lora_B=-f.lora_B, scaling=-f.scaling) if f.scaling < 0 else f for f in fs]
    assert near(METHODS[method](fs, [0.5, 0.3, 0.2]), dense(METHODS[method](positive, [0.5, 0.3, 0.2])))


def test_knots_of_copies_trims_their_right_vectors():
    """[dW, dW, dW] has three singular values, not nine: directions without one take no part in the trimming."""
    first = factors(0, 3, (14, 9), 2.0)
    U, S, Vh = np.linalg.svd(dense(first), full_matrices=False)
    merged = METHODS["knots"]([first] * 3, [1.0] * 3, density=0.5)
    assert near(merged, (U[:, :3] * S[:3]) @ trimmed(Vh[:3], 0.5)) and merged.r == 3


def test_tsv_m_of_orthogonal_adapters_is_their_sum():
    """Nothing interferes, so nothing changes."""
    first = LoraFactors(torch.eye(6, dtype=torch.float64)[:2], torch.eye(8, dtype=torch.float64)[:, :2], 3.0)
    second = LoraFactors(torch.eye(6, dtype=torch.float64)[2:4], torch.eye(8, dtype=torch.float64)[:, 4:6], 0.5)
    assert near(METHODS["tsv-m"]([first, second], [1.0, -2.0]), dense(first) - 2.0 * dense(second))


@pytest.mark.parametrize("method", sorted(set(METHODS) - AVERAGES - {"ties", "dare-ties", "knots", "core-space"}))
def test_an_untrained_adapter_adds_nothing(method):
    """B is 0 before training: its directions are arbitrary, and must not disturb the others'."""
    trained, other = (factors(seed, 3, (14, 9), 2.0) for seed in range(2))
    untrained = dataclasses.replace(other, lora_B=torch.zeros_like(other.lora_B))
    options = {"density": 1.0} if method == "dare" else {}
    alone = METHODS[method]([trained], [1.0], **options)
    assert near(METHODS[method]([trained, untrained], [1.0, 1.0], **options), dense(alone))
    nothing = METHODS[method]([untrained, untrained], [1.0, 1.0])
    assert dense(nothing).shape == (14, 9) and not dense(nothing).any() and nothing.r >= 1


@pytest.mark.parametrize("method", ["ties", "dare-ties", "knots", "core-space"])
def test_untrained_adapters_alone_are_nothing(method):
    other = factors(1, 3, (14, 9), 2.0)
    untrained = dataclasses.replace(other, lora_B=torch.zeros_like(other.lora_B))
    for options in [{}] if method in ("knots", "core-space") else [{"on": "factors"}, {"on": "delta"}]:
        nothing = METHODS[method]([untrained, untrained], [1.0, 1.0], **options)
        assert not dense(nothing).any() and bool(torch.isfinite(nothing.lora_A).all())


@pytest.mark.parametrize("method", sorted(set(METHODS) - AVERAGES))
def test_scale_is_a_factor_of_the_result(method):
    adapters = [random_adapter(i, dtype=torch.float64) for i in range(2)]
    once, twice = (merge(adapters, method, [0.3, 0.9], scale=s) for s in (1.0, -2.0))
    for name, f in once.factors.items():
        assert torch.equal(twice.factors[name].delta_weight(), -2.0 * f.delta_weight())


def test_one_adapter_is_negated_scaled_and_cut():
    """Task arithmetic's forgetting, and cutting an adapter to a rank; without either the adapter is itself."""
    one = random_adapter(0, dtype=torch.float64)
    negated = merge([one], "task-arithmetic", [-1.0], scale=0.5)
    cut = merge([one], "truncated", rank=2)
    assert merge([one], "truncated", rank=4) is one and merge([one], "ties", density=0.1) is one
    for name, f in one.factors.items():
        assert torch.allclose(negated.factors[name].delta_weight(), -0.5 * f.delta_weight())
        lost = np.linalg.norm(dense(cut.factors[name]) - dense(f))
        assert lost == pytest.approx(np.linalg.norm(np.linalg.svd(dense(f))[1][2:])) and cut.factors[name].r == 2


def test_default_weights():
    """Shares of 1 for averages, 1 each for the others."""
    adapters = [random_adapter(i) for i in range(2)]
    total, mean = merge(adapters, "task-arithmetic"), merge(adapters, "mixture")
    for name, f in mean.factors.items():
        assert torch.allclose(total.factors[name].delta_weight(), 2.0 * f.delta_weight(), atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fusion", "align", "align-learned"}))
def test_unequal_targets_are_joined(method):
    """An adapter without a module counts as 0 there."""
    names = list(random_adapter(0).factors)
    adapters = [random_adapter(0, {n: 3 for n in names[:4]}), random_adapter(1, {n: 3 for n in names[2:]})]
    merged = merge(adapters, method)
    assert merged.factors.keys() == set(names)
    # Where only one adapter has the module, it is what the rule makes of that one.
    options = {"module": names[0]} if method in ("dare", "dare-ties", "core-space") else {}
    weight = 0.5 if method in AVERAGES else 1.0
    alone = METHODS[method]([adapters[0].factors[names[0]]], [weight], **options)
    assert torch.equal(merged.factors[names[0]].delta_weight(), alone.delta_weight())


def test_every_pair_is_checked():
    """What the first adapter lacks, the others must agree on."""
    names = list(random_adapter(0).factors)
    first = random_adapter(0, {names[0]: 2})
    heads = [
        dataclasses.replace(random_adapter(i, {names[0]: 2}), heads={"t.weight": torch.ones(1) * i}) for i in (1, 2)
    ]
    with pytest.raises(InputError, match="adapter-1 and adapter-2 have different heads for t,"):
        merge([first, *heads], "mixture")


# --- unequal ranks, padded ------------------------------------------------------------------------------------------


def test_fusion_padded_with_zeros():
    """Rows that one adapter lacks are averaged with zeros; so are modules that it lacks."""
    names = list(random_adapter(0).factors)
    first, second = random_adapter(0, {names[0]: 4, names[1]: 2}, 2.0), random_adapter(1, {names[0]: 3}, 2.0)
    fused = merge([first, second], "fusion", [0.25, 0.75], pad="zero")
    a, b = first.factors[names[0]], second.factors[names[0]]
    lora_A, lora_B = 0.25 * a.lora_A.double().numpy(), 0.25 * a.lora_B.double().numpy()
    lora_A[:3] += 0.75 * b.lora_A.double().numpy()
    lora_B[:, :3] += 0.75 * b.lora_B.double().numpy()
    assert near(fused.factors[names[0]], 2.0 * lora_B @ lora_A)
    assert near(fused.factors[names[1]], 0.25**2 * dense(first.factors[names[1]]))
    assert fused.factors[names[0]].r == 4


@pytest.mark.parametrize("method", ["ties", "dare-ties"])
def test_election_on_factors_of_unequal_rank(method):
    """Refused with a way out, or padded; a row that one adapter lacks is the others'."""
    adapters = [random_adapter(0, 2), random_adapter(1, 4)]
    with pytest.raises(InputError, match=r"q_proj: .* needs equal ranks, but they are 2 and 4; use --on delta or"):
        merge(adapters, method)
    padded = merge(adapters, method, density=1.0, pad="zero")
    for name, f in padded.factors.items():
        other = adapters[1].factors[name]
        assert torch.allclose(f.lora_A[2:].double(), other.scaling**0.5 * other.lora_A[2:].double())


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "unknown option": ("fusion", {"rnk": 2}, ["fusion has no option rnk", "it takes pad"]),
    "option of another rule": (
        "ties",
        {"inner": "dare"},
        ["ties has no option inner", "density, on, rank, pad, scale"],
    ),
    "no options": ("mixture", {"rank": 2}, ["mixture has no option rank", "it takes none"]),
    "nearest": ("core-space", {"densty": 2}, ['(did you mean "density"?)']),
    "scale of an average": ("fusion", {"scale": 2.0}, ["fusion has no option scale"]),
    "rank 0": ("truncated", {"rank": 0}, ["--rank is 0", "from 1 on"]),
    "rank a fraction": ("truncated", {"rank": 1.5}, ["--rank is 1.5"]),
    "density 0": ("ties", {"density": 0.0}, ["--density is 0.0", "above 0 and at most 1"]),
    "density above 1": ("dare", {"density": 1.5}, ["--density is 1.5"]),
    "density no number": ("dare", {"density": float("nan")}, ["--density is nan"]),
    "seed": ("dare", {"seed": -1}, ["--seed is -1"]),
    "steps": ("align-learned", {"steps": 0}, ["--steps is 0"]),
    "on": ("ties", {"on": "weights"}, ["--on is 'weights'", "factors or delta"]),
    "pad": ("fusion", {"pad": "one"}, ["--pad is 'one'", "zero"]),
    "inner": ("core-space", {"inner": "fusion"}, ["--inner is 'fusion'", "task-arithmetic, ties"]),
    "inner without density": ("core-space", {"inner": "iso-c", "density": 0.5}, ["iso-c has none"]),
    "scale": ("iso-c", {"scale": float("inf")}, ["--scale is inf"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_options_are_refused(kind):
    method, options, expected = BAD[kind]
    with pytest.raises(InputError) as refusal:
        merge([random_adapter(0), random_adapter(1)], method, **options)
    assert all(part in str(refusal.value) for part in expected), refusal.value


@pytest.mark.parametrize("method", ["ties", "dare-ties", "knots", "core-space"])
def test_negative_shares_are_refused(method):
    with pytest.raises(InputError, match="a weight is -0.5, but where signs are elected"):
        merge([random_adapter(0), random_adapter(1)], method, [1.0, -0.5])


def test_lines_end_in_the_adapters():
    check_line("align")
    with pytest.raises(InputError, match="iso-c changes an adapter even at weights 1 and 0"):
        check_line("iso-c")


def test_options_are_the_rules_own():
    assert options_of("ties") == ["density", "on", "rank", "pad", "scale"]
    assert options_of("fusion") == ["pad"] and options_of("mixture") == []
    assert fuse is METHODS["fusion"]
