"""Merging against dense float64 references: `copra_llm.merge`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from examples import (
    BASE,
    MODULES,
    Blocks,
    deltas_in,
    deltas_loaded_by_peft,
    peft_adapter,
    random_adapter,
    rounding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor

from copra_llm.adapters import AdapterWeights, LoraFactors, load_adapter_weights, save_adapter_weights
from copra_llm.errors import InputError
from copra_llm.merge import AVERAGES, LINES, METHODS, merge
from copra_llm.merge.fusion import fuse
from copra_llm.merge.mixture import mix

WEIGHTS = st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=3).map(lambda w: [*w, 1.0 - sum(w)])
"""Two to four weights that sum to 1, some of them negative."""
SCALINGS = st.sampled_from([2.0, 0.25, 1 / 3, -1.5, 16 / math.sqrt(6)])


def factors(seed: int, r: int, scaling: float, dtype: torch.dtype = torch.float64) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((r, 6), (8, r)))
    return LoraFactors(a, b, scaling)


def dense(f: LoraFactors) -> tuple[np.ndarray, np.ndarray]:
    return f.lora_A.double().numpy(), f.lora_B.double().numpy()


def in_double(adapters: list[AdapterWeights], method: str, weights: list[float]) -> AdapterWeights:
    """The merge of the same numbers without rounding to their dtype."""
    return merge([
        dataclasses.replace(a, factors={
            name: LoraFactors(f.lora_A.double(), f.lora_B.double(), f.scaling) for name, f in a.factors.items()
        })
        for a in adapters
    ], method, weights)  # fmt: skip


def close(a: Tensor | np.ndarray, b: Tensor | np.ndarray, scale: float = 100.0) -> bool:
    """Equal up to float64's own rounding of sums of such sizes."""
    return float(abs(torch.as_tensor(a) - torch.as_tensor(b)).max()) <= scale * 2.0**-50


def same_up_to_its_norm(merged: LoraFactors, single: LoraFactors) -> bool:
    """Equal up to 40 roundings of Delta W's norm, which is what QR and SVD promise (at most 7 were measured)."""
    delta = single.delta_weight()
    return close(merged.delta_weight(), delta, scale=10.0 * float(torch.linalg.matrix_norm(delta)))


# --- fusion -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, r=st.integers(1, 5), scaling=SCALINGS, seed=st.integers(0, 99))
def test_fusion_multiplies_the_averaged_factors(weights, r, scaling, seed):
    """Equal scalings: Delta W = s (sum w B)(sum w A), nothing else."""
    parts = [factors(seed + i, r, scaling) for i in range(len(weights))]
    lora_A = sum(w * dense(f)[0] for w, f in zip(weights, parts, strict=True))
    lora_B = sum(w * dense(f)[1] for w, f in zip(weights, parts, strict=True))
    fused = fuse(parts, weights)
    assert fused.scaling == scaling and fused.r == r
    assert close(fused.delta_weight(), scaling * lora_B @ lora_A, scale=1e3 * sum(map(abs, weights)) ** 2)


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(-1.0, 2.0), r=st.integers(1, 5), scaling=SCALINGS, seed=st.integers(0, 99))
def test_fusion_of_two_is_the_papers_formula(alpha, r, scaling, seed):
    """(alpha B1 + (1 - alpha) B2)(alpha A1 + (1 - alpha) A2)."""
    first, second = factors(seed, r, scaling), factors(seed + 1, r, scaling)
    (a1, b1), (a2, b2) = dense(first), dense(second)
    expected = scaling * (alpha * b1 + (1 - alpha) * b2) @ (alpha * a1 + (1 - alpha) * a2)
    assert close(fuse([first, second], [alpha, 1 - alpha]).delta_weight(), expected, scale=1e4)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, scalings=st.lists(SCALINGS, min_size=4, max_size=4), seed=st.integers(0, 99))
def test_fusion_brings_unequal_scalings_to_the_first(weights, scalings, seed):
    """A_i <- sqrt(|s_i / s_1|) A_i, B_i too with the sign: Delta W = sum_ij w_i w_j sqrt|s_i s_j| sign(s_i) B_i A_j."""
    parts = [factors(seed + i, 3, scalings[i]) for i in range(len(weights))]
    expected = np.zeros((8, 6))
    for i, b in enumerate(parts):
        for j, a in enumerate(parts):
            size = math.sqrt(abs(b.scaling * a.scaling))
            expected += weights[i] * weights[j] * math.copysign(size, b.scaling) * (dense(b)[1] @ dense(a)[0])
    assert close(fuse(parts, weights).delta_weight(), expected, scale=1e3 * sum(map(abs, weights)) ** 2)


@pytest.mark.parametrize("method", sorted(LINES))
@settings(max_examples=20, deadline=None)
@given(scalings=st.lists(SCALINGS, min_size=2, max_size=2), seed=st.integers(0, 99))
def test_one_hot_weights_give_that_adapters_delta(method, scalings, seed):
    """Weights (1, 0) and (0, 1), scalings of any sign; (1, 0) is exact in fusion: the first factors unchanged."""
    first, second = (factors(seed + i, 3, s, torch.float64) for i, s in enumerate(scalings))
    merged = METHODS[method]([first, second], [1.0, 0.0])
    assert same_up_to_its_norm(merged, first)
    assert same_up_to_its_norm(METHODS[method]([first, second], [0.0, 1.0]), second)
    if method == "fusion":
        assert torch.equal(merged.lora_A, first.lora_A) and torch.equal(merged.lora_B, first.lora_B)


def test_fusion_is_not_pefts_linear(tmp_path):
    """PEFT's `linear` weighs factors by sqrt(w): at equal weights twice our Delta W, also for two equal adapters."""
    for seed in (0, 1):
        peft_adapter(tmp_path / str(seed), seed=seed)

    def linear(first: str, second: str) -> dict[str, Tensor]:
        model = PeftModel.from_pretrained(Blocks(), tmp_path / first, adapter_name="a")
        model.load_adapter(tmp_path / second, adapter_name="b")
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "default", combination_type="linear")
        return deltas_in(model)

    theirs = linear("0", "1")
    ours = merge([load_adapter_weights(tmp_path / s) for s in "01"], "fusion")
    for name, f in ours.factors.items():
        assert torch.allclose(theirs[name], 2.0 * f.delta_weight(), atol=1e-5)
        assert not torch.allclose(theirs[name], f.delta_weight(), atol=0.1)
    itself = load_adapter_weights(tmp_path / "0")
    same = merge([itself, itself], "fusion")
    assert all(torch.equal(f.delta_weight(), itself.factors[n].delta_weight()) for n, f in same.factors.items())
    twice = linear("0", "0")
    assert all(torch.allclose(twice[n], 2.0 * f.delta_weight(), atol=1e-5) for n, f in itself.factors.items())


# --- mixture ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    weights=WEIGHTS,
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    scalings=st.lists(SCALINGS, min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_mixture_averages_delta_weight(weights, ranks, scalings, seed):
    """Delta W = sum w_i Delta W_i exactly: no cross terms, no truncation, rank sum r_i."""
    parts = [factors(seed + i, ranks[i], scalings[i]) for i in range(len(weights))]
    expected = sum(w * f.delta_weight() for w, f in zip(weights, parts, strict=True))
    mixed = mix(parts, weights)
    assert mixed.r == sum(f.r for f in parts)
    assert close(mixed.delta_weight(), expected, scale=1e3 * sum(map(abs, weights)))


@settings(max_examples=25, deadline=None)
@given(
    targets=st.lists(st.sets(st.sampled_from(sorted(MODULES)), min_size=1), min_size=2, max_size=3),
    ranks=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    scalings=st.lists(SCALINGS, min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_mixture_of_unequal_adapters_is_loaded_by_peft(targets, ranks, scalings, seed, tmp_path_factory):
    """Other targets, ranks and scalings: the union of the targets, each with the promised Delta W in plain PEFT."""
    adapters = [
        random_adapter(seed + i, dict.fromkeys(sorted(names), ranks[i]), scalings[i]) for i, names in enumerate(targets)
    ]
    weights = [0.5, 0.3, 0.2] if len(adapters) == 3 else [0.7, 0.3]
    mixed = merge(adapters, "mixture", weights)
    folder = tmp_path_factory.mktemp("mixed")
    save_adapter_weights(mixed, folder)
    loaded = deltas_loaded_by_peft(folder)
    assert loaded.keys() == set().union(*targets)
    for name in loaded:
        own = [(w, a.factors[name]) for a, w in zip(adapters, weights, strict=True) if name in a.factors]
        expected = sum(w * f.delta_weight() for w, f in own)
        assert bool((abs(loaded[name] - expected) <= rounding(mixed, name)).all()), name


def test_mixture_over_layers_that_only_one_adapter_transforms(tmp_path):
    """`layers_to_transform` of the first config must not keep the second adapter's layers out."""
    for i in range(2):
        peft_adapter(tmp_path / str(i), seed=i, layers_to_transform=[i])
    adapters = [load_adapter_weights(tmp_path / str(i)) for i in range(2)]
    save_adapter_weights(merge(adapters, "mixture"), tmp_path / "mixed")
    loaded = deltas_loaded_by_peft(tmp_path / "mixed")
    for adapter in adapters:
        for name, f in adapter.factors.items():
            assert torch.allclose(loaded[name], 0.5 * f.delta_weight(), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_written_merge_has_the_promised_delta(method, tmp_path):
    """Adapters made by PEFT with patterns and rsLoRA of unequal alpha, merged, saved, loaded by plain PEFT."""
    kinds = ({"lora_alpha": 8}, {"lora_alpha": 3, "use_rslora": True})
    for i, kind in enumerate(kinds):
        peft_adapter(tmp_path / str(i), seed=i, rank_pattern={"v_proj": 2}, **kind)
    adapters = [load_adapter_weights(tmp_path / str(i)) for i in range(2)]
    merged = merge(adapters, method, [0.3, 0.7])
    save_adapter_weights(merged, tmp_path / "merged")
    loaded = deltas_loaded_by_peft(tmp_path / "merged")
    for name, f in merged.factors.items():
        assert bool((abs(loaded[name] - f.delta_weight()) <= rounding(merged, name)).all())
        exact = in_double(adapters, method, [0.3, 0.7]).factors[name]
        assert bool((abs(loaded[name] - exact.delta_weight()) <= rounding(merged, name)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_merged_factors_have_the_first_adapters_dtype(method, dtype):
    """And are off by no more than storing them in it."""
    adapters = [random_adapter(i, scalings=s, dtype=d) for i, s, d in ((0, 2.0, dtype), (1, -0.7, torch.float64))]
    merged = merge(adapters, method, [0.25, 0.75])
    for name, f in merged.factors.items():
        assert f.lora_A.dtype == f.lora_B.dtype == dtype
        exact = in_double(adapters, method, [0.25, 0.75]).factors[name]
        assert bool((abs(f.delta_weight() - exact.delta_weight()) <= rounding(merged, name)).all())


# --- one adapter, and adapters that do not fit ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_merge_of_one_is_that_adapter(method, tmp_path):
    """Byte for byte, config included."""
    peft_adapter(tmp_path / "a", use_rslora=True, rank_pattern={"v_proj": 2}, modules_to_save=["head"])
    adapter = load_adapter_weights(tmp_path / "a")
    save_adapter_weights(adapter, tmp_path / "as it is")
    save_adapter_weights(merge([adapter], method), tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "as it is" / name).read_bytes()


Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"


def with_extra(seed: int, key: str, value: float):
    extras = {f"base_model.model.{key}": torch.full((2, 2), value), "base_model.model.equal": torch.ones(1)}
    return dataclasses.replace(random_adapter(seed), extras=extras)


def with_head(seed: int, value: float):
    return dataclasses.replace(random_adapter(seed), heads={"sst2.weight": torch.full((2, 3), value)})


def dora(seed: int):
    adapter = random_adapter(seed)
    return dataclasses.replace(adapter, config=adapter.config | {"use_dora": True})


def pissa(seed: int):
    adapter = random_adapter(seed)
    return dataclasses.replace(adapter, config=adapter.config | {"init_lora_weights": "pissa_niter_4"})


def broken(seed: int):
    adapter = random_adapter(seed)
    adapter.factors[V].lora_B[0, 0] = math.inf
    return adapter


def transposed(seed: int):
    adapter = random_adapter(seed)
    turned = {n: LoraFactors(f.lora_B.T.contiguous(), f.lora_A.T.contiguous(), 1.0) for n, f in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=turned)


ALL = {
    "weights are no numbers": ([random_adapter(0), random_adapter(1)], [math.nan, 0.5], ["nan"]),
    "weights are infinite": ([random_adapter(0), random_adapter(1)], [math.inf, 0.0], ["inf"]),
    "count of weights": ([random_adapter(0), random_adapter(1)], [1.0], ["2 adapters", "1 weights"]),
    "bases": ([random_adapter(0), random_adapter(1, base="owner/other")], None, [BASE, "owner/other"]),
    "shapes": ([random_adapter(0, {Q: 4}), transposed(1)], None, ["(8, 6)", "(6, 8)", Q]),
    "trained heads": ([with_head(0, 1.0), with_head(1, 2.0)], None, ["adapter-0", "adapter-1", "heads for sst2"]),
    "modules_to_save": ([with_extra(0, "head.weight", 1), with_extra(1, "head.weight", 2)], None,
                        ["adapter-0", "adapter-1", "head.weight"]),
    "modules_to_save of one": ([random_adapter(0), with_extra(1, "head.weight", 1)], None,
                               ["adapter-0", "adapter-1", "equal"]),
    "DoRA": ([dora(0), dora(1)], None, ["adapter-0 is a DoRA adapter", "fold"]),
    "DoRA second": ([random_adapter(0), dora(1)], None, ["adapter-1 is a DoRA adapter", "fold"]),
    "PiSSA": ([pissa(0), random_adapter(1)], None, ["adapter-0 was initialised by pissa_niter_4", "convert it"]),
    "not finite": ([random_adapter(0), broken(1)], None, ["adapter-1", V, "not finite"]),
    "embedding factors": ([with_extra(0, "wte.lora_embedding_A", 1)] * 2, None, ["adapter-0", "wte.lora_embedding_A"]),
}  # fmt: skip
FUSION_ONLY = {
    "ranks": ([random_adapter(0, {Q: 4}), random_adapter(1, {Q: 3})], None, ["4 and 3", "mixture"]),
    "targets": ([random_adapter(0, {Q: 4}), random_adapter(1, {Q: 4, V: 4})], None, [V, "mixture"]),
    "first scaling 0": ([random_adapter(0, scalings=0.0), random_adapter(1)], None, ["scaling is 0"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ALL)
def test_refused_by_all(method, kind):
    """One sentence with both values, before anything is computed."""
    adapters, weights, expected = ALL[kind]
    with pytest.raises(InputError) as refusal:
        merge(adapters, method, weights)
    assert all(part in str(refusal.value) for part in expected), refusal.value


@pytest.mark.parametrize("method", sorted(METHODS))
def test_weights_sum_to_one_where_they_are_shares(method):
    """Averages refuse any other sum; the rest take it."""
    adapters = [random_adapter(0), random_adapter(1)]
    if method in AVERAGES:
        with pytest.raises(InputError, match=f"the weights sum to 1.1, but {method} needs them to sum to 1"):
            merge(adapters, method, [0.5, 0.6])
    else:
        assert merge(adapters, method, [0.5, 0.6]).factors.keys() == adapters[0].factors.keys()


@pytest.mark.parametrize("kind", FUSION_ONLY)
def test_refused_by_fusion_and_mixed_instead(kind):
    """What fusion cannot do, mixture does."""
    adapters, weights, expected = FUSION_ONLY[kind]
    with pytest.raises(InputError) as refusal:
        merge(adapters, "fusion", weights)
    assert all(part in str(refusal.value) for part in expected), refusal.value
    assert merge(adapters, "mixture", weights).factors.keys() == set().union(*(a.factors for a in adapters))


def test_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match=r'no merge method "fusoin" \(did you mean "fusion"\?\)'):
        merge([random_adapter(0)], "fusoin")


def test_equal_heads_and_saved_modules_are_carried_along():
    """Heads of different tasks are joined; equal extras stay."""
    one, other = with_extra(0, "head.weight", 1.0), with_extra(1, "head.weight", 1.0)
    merged = merge([one, other], "fusion")
    assert merged.extras.keys() == one.extras.keys()
    a = dataclasses.replace(one, heads={"sst2.weight": torch.ones(2, 3)}, head_metadata={"labels": '{"sst2": ["a"]}'})
    b = dataclasses.replace(other, heads={"rte.weight": torch.zeros(2, 3)}, head_metadata={"labels": '{"rte": ["b"]}'})
    merged = merge([a, b], "fusion")
    assert merged.heads.keys() == {"sst2.weight", "rte.weight"}
    assert merged.head_metadata == {"labels": '{"sst2": ["a"], "rte": ["b"]}'}


def test_rslora_config_is_what_peft_would_read(tmp_path):
    """A mixture of rsLoRA adapters has scaling 1, so its config asks for plain scaling."""
    peft_adapter(tmp_path / "a", use_rslora=True)
    adapter = load_adapter_weights(tmp_path / "a")
    mixed = merge([adapter, adapter], "mixture")
    config = LoraConfig(**{k: mixed.config[k] for k in ("r", "lora_alpha", "use_rslora")})
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 8, False)
