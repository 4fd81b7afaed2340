"""Pruned and quantised adapters: what is kept, how much of it, and that plain PEFT loads just that."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from examples import MODULES, Blocks, deltas_in, deltas_loaded_by_peft, peft_adapter, random_adapter, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from copra_llm.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from copra_llm.adapters import AdapterWeights, LoraFactors, load_adapter_weights
from copra_llm.adapters import save_adapter_weights as save
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.prune import (
    BY_ENTRIES,
    THIRDS,
    Variant,
    kept_count,
    largest,
    shrunk,
    size,
    structured,
    structured_names,
    unstructured,
)
from copra_llm.quantise import KINDS, NF4, int8, nf4, quantise, quantised_bytes

IDS = torch.arange(4, 4 + 2 * 9).view(2, 9)
"""Token ids `(batch 2, tokens 9)` of the tiny models."""
MODELS = {
    "llama": (AutoModelForCausalLM, ["q_proj", "v_proj"], {}),
    "bert": (AutoModel, ["query", "value"], {}),
    "t5": (AutoModelForSeq2SeqLM, ["q", "v"], {"decoder_input_ids": IDS}),
}
EXTRAS = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "biases": {"bias": "all"},
    "head": {"modules_to_save": ["norm"]},
    "patterns": {"rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "regular expression": {"target_modules": r".*layers\.\d\.self_attn\.(q|v)_proj"},
    "outside": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def tiny(tiny_llama, tiny_bert, tiny_t5):
    """Makes a fresh base model by its name in `MODELS`, in evaluation mode."""
    folders = {"llama": tiny_llama, "bert": tiny_bert, "t5": tiny_t5}
    return lambda name: MODELS[name][0].from_pretrained(folders[name]).eval()


def adapt(model: nn.Module, folder, **lora) -> PeftModel:
    """The model with a random adapter, which is saved in the folder."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5} | lora)).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


@torch.no_grad()
def output(model: nn.Module, name: str) -> torch.Tensor:
    return model(IDS, **MODELS[name][2])[0]


def loaded(model: nn.Module, weights: AdapterWeights, folder) -> PeftModel:
    """Plain PEFT's model with the adapter, written to the folder: it adapts just these modules, and misses nothing."""
    save(weights, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("error", ".*keys did not match any targeted module")
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    assert deltas_in(adapted).keys() == weights.factors.keys()
    return adapted


def same_files(a: AdapterWeights, b: AdapterWeights) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def entries(weights: AdapterWeights) -> list[torch.Tensor]:
    """All matrices in the documented order."""
    return [m for n in sorted(weights.factors) for m in (weights.factors[n].lora_A, weights.factors[n].lora_B)]


def nonzero(weights: AdapterWeights) -> int:
    return sum(int(m.count_nonzero()) for m in entries(weights))


# --- by layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("keep", ["every-other", "low", "middle", "high", "1,2"])
def test_the_written_adapter_is_the_masked_one(tiny, tmp_path, extra, keep):
    """Plain PEFT with the smaller file, and the whole adapter with the other layers' gates closed: bit for bit."""
    whole = adapt(tiny("llama"), tmp_path / "whole", **{"target_modules": ["q_proj", "v_proj"]} | EXTRAS[extra])
    gates = LayerGates(whole)
    kept = {"every-other": [0, 2], "low": [0], "middle": [1], "high": [2, 3], "1,2": [1, 2]}[keep]
    with gates.applied([i in kept for i in range(4)]):
        masked = output(whole, "llama")
    pruned = structured(load_adapter_weights(tmp_path / "whole"), keep)
    assert size(pruned).layers == tuple(gates.keys[i] for i in kept)
    assert torch.equal(output(loaded(tiny("llama"), pruned, tmp_path / "pruned"), "llama"), masked)
    assert not torch.equal(masked, output(whole, "llama"))


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("keep", ["every-other", "low", "high"])
def test_layers_are_ordered_like_gates_in_each_tower(tiny, tmp_path, name, keep):
    """Twelve layers (2 before 10), and two towers that are each counted from their first layer."""
    whole = adapt(tiny(name), tmp_path / "whole", target_modules=MODELS[name][1])
    keys = LayerGates(whole).keys
    if name == "bert":
        kept = {"every-other": range(0, 12, 2), "low": range(4), "high": range(8, 12)}[keep]
        assert keys == [f"encoder.layer.{i}" for i in range(12)]
    else:
        # Two layers a tower: the decoder's are 0 and 1, the encoder's 2 and 3.
        assert keys == ["decoder.block.0", "decoder.block.1", "encoder.block.0", "encoder.block.1"]
        kept = {"every-other": [0, 2], "low": [], "high": [1, 3]}[keep]
    weights = load_adapter_weights(tmp_path / "whole")
    if not kept:
        with pytest.raises(InputError, match='"low" keeps no layer of'):
            structured(weights, keep)
        return
    pruned = structured(weights, keep)
    assert size(pruned).layers == tuple(keys[i] for i in kept)
    with LayerGates(whole).applied([i in kept for i in range(len(keys))]):
        masked = output(whole, name)
    assert torch.equal(output(loaded(tiny(name), pruned, tmp_path / "pruned"), name), masked)


def test_trained_biases_of_dropped_layers_stay(tiny, tmp_path):
    """Biases are no players: PEFT loads them into the plain modules, where the dropped adapters were."""
    whole = adapt(tiny("bert"), tmp_path / "whole", target_modules=["query"], bias="lora_only")
    kept = [i % 2 == 0 for i in range(12)]
    with LayerGates(whole).applied(kept):
        masked = output(whole, "bert")
    pruned = structured(load_adapter_weights(tmp_path / "whole"), "every-other")
    assert len(pruned.extras) == 12
    assert torch.equal(output(loaded(tiny("bert"), pruned, tmp_path / "pruned"), "bert"), masked)


@pytest.mark.parametrize(
    "keep, part", [("q", ".q"), ("decoder.block", "decoder."), ("encoder.block.1", "encoder.block.1")]
)
def test_a_target_module_a_tower_or_a_layer_alone(tiny, tmp_path, keep, part):
    whole = adapt(tiny("t5"), tmp_path / "whole", target_modules=["q", "v"])
    weights = load_adapter_weights(tmp_path / "whole")
    pruned = structured(weights, keep)
    assert set(pruned.factors) == {name for name in weights.factors if part in f"{name}"} != set(weights.factors)
    gates = LayerGates(whole, granularity="module")
    with gates.applied([key in pruned.factors for key in gates.keys]):
        masked = output(whole, "t5")
    assert torch.equal(output(loaded(tiny("t5"), pruned, tmp_path / "pruned"), "t5"), masked)


def named_layers(*counts: int) -> AdapterWeights:
    """An adapter of towers with so many layers."""
    factors = {
        f"tower{t}.layers.{i}.q": LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        for t, n in enumerate(counts)
        for i in range(n)
    }
    return AdapterWeights({}, {"peft_type": "LORA", "r": 1, "lora_alpha": 1}).with_factors(factors, "towers")


@pytest.mark.parametrize("n", range(1, 14))
def test_thirds_cover_the_layers_in_order_and_differ_by_one_at_most(n):
    weights = named_layers(n)
    present = [third for third in THIRDS if third in structured_names(weights)]
    parts = [list(size(structured(weights, third)).layers) for third in present]
    assert sum(parts, []) == list(size(weights).layers)
    sizes = [len(part) for part in parts] + [0] * (3 - len(parts))
    assert max(sizes) - min(sizes) <= 1


def test_every_other_starts_with_the_first_layer_of_each_tower():
    kept = size(structured(named_layers(5, 3), "every-other")).layers
    assert kept == tuple(f"tower{t}.layers.{i}" for t, i in [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2)])


def test_layers_are_named_by_number_in_every_tower_or_in_full_in_one():
    weights = named_layers(3, 3)
    assert size(structured(weights, "0,2")).layers == tuple(f"tower{t}.layers.{i}" for t in (0, 1) for i in (0, 2))
    assert size(structured(weights, "tower1.layers.2, tower0.layers.0")).layers == (
        "tower0.layers.0",
        "tower1.layers.2",
    )


def test_all_variants_by_name():
    assert structured_names(named_layers(3)) == ["all", "every-other", "low", "middle", "high"]
    assert structured_names(named_layers(1)) == ["all", "every-other", "high"]
    assert structured_names(named_layers(3, 3))[5:] == ["tower0.layers", "tower1.layers"]
    assert structured_names(random_adapter(0))[-3:] == ["o_proj", "q_proj", "v_proj"]


def test_a_layer_pattern_says_what_a_layer_is():
    """Stages of blocks: the block's number counts, and each stage is a stack of its own."""
    names = [f"stages.{s}.blocks.{b}.q" for s in range(2) for b in range(2)]
    one = LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    weights = AdapterWeights({}, {"r": 1, "lora_alpha": 1}).with_factors(dict.fromkeys(names, one), "stages")
    pattern = r"stages\.\d+\.blocks\.\d+"
    assert set(structured(weights, "every-other").factors) == set(names[:2])
    assert set(structured(weights, "every-other", pattern).factors) == {names[0], names[2]}


def test_keeping_everything_changes_nothing(tmp_path):
    peft_adapter(tmp_path, target_modules="all-linear", use_dora=True)
    weights = load_adapter_weights(tmp_path)
    assert same_files(structured(weights, "all"), weights)
    assert same_files(structured(weights, "0,1"), weights)
    assert same_files(Variant().of(weights), weights)


def test_the_file_is_smaller_and_holds_no_dropped_module(tmp_path):
    """Half of the layers: half of the tensors' bytes; nothing of the others is named in the files."""
    peft_adapter(tmp_path / "whole", r=64, use_dora=True)
    weights = load_adapter_weights(tmp_path / "whole")
    save(structured(weights, "every-other"), tmp_path / "half")
    sizes = [(tmp_path / kind / WEIGHTS_FILE).stat().st_size for kind in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert 2 * size(load_adapter_weights(tmp_path / "half")).bytes == size(weights).bytes
    assert "layers.1" not in (tmp_path / "half" / CONFIG_FILE).read_text(encoding="utf-8")
    assert b"layers.1" not in (tmp_path / "half" / WEIGHTS_FILE).read_bytes()


def test_a_dropped_module_whose_name_ends_like_a_kept_one_is_not_adapted(tmp_path):
    """PEFT takes every module whose name ends in a target's: the dropped one must be named to be left out."""

    def model() -> nn.Module:
        tower = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 3)})])})
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 3)})]), "side": tower})

    get_peft_model(model(), LoraConfig(r=2, target_modules=["q"])).save_pretrained(tmp_path / "whole")
    weights = load_adapter_weights(tmp_path / "whole")
    assert set(weights.factors) == {"layers.0.q", "side.layers.0.q"}
    for keep in ("layers.0", "side.layers.0"):
        save(structured(weights, keep), tmp_path / keep)
        assert deltas_in(PeftModel.from_pretrained(model(), str(tmp_path / keep))).keys() == {f"{keep}.q"}


# --- by entries -------------------------------------------------------------------------------------------

DENSITY = st.floats(0.01, 1.0)


@settings(max_examples=40, deadline=None)
@given(density=DENSITY, by=st.sampled_from(BY_ENTRIES), seed=st.integers(0, 2**32 - 1))
def test_the_number_of_entries_is_exact(density, by, seed):
    """No entry of a random adapter is 0, so those that are left are those that were kept; they are unchanged."""
    weights = random_adapter(3)
    pruned = unstructured(weights, density, by, seed)
    whole, left = entries(weights), entries(pruned)
    if by == "matrix":
        assert [int(m.count_nonzero()) for m in left] == [kept_count(density, m.numel()) for m in whole]
    else:
        assert nonzero(pruned) == kept_count(density, nonzero(weights))
    assert all(torch.equal(b, a.where(b != 0, 0)) for a, b in zip(whole, left, strict=True))
    assert all(f.scaling == weights.factors[name].scaling for name, f in pruned.factors.items())


@pytest.mark.parametrize("by", ["magnitude", "matrix"])
def test_the_largest_entries_stay(by):
    """None that is gone was larger than one that is left, over the adapter or in its matrix."""
    weights = random_adapter(5)
    parts = zip(entries(weights), entries(unstructured(weights, 0.3, by)), strict=True)
    parts = [(before.flatten(), after.flatten()) for before, after in parts]
    if by == "magnitude":
        parts = [tuple(map(torch.cat, zip(*parts, strict=True)))]
    for before, after in parts:
        assert before.abs()[after != 0].min() >= before.abs()[after == 0].max()


@pytest.mark.parametrize("by", BY_ENTRIES)
def test_what_was_kept_is_kept_at_every_higher_density(by):
    weights = random_adapter(7)
    before = None
    for density in (0.05, 0.1, 0.35, 0.5, 0.9, 1.0):
        now = [m != 0 for m in entries(unstructured(weights, density, by, seed=1))]
        if before is not None:
            assert all(bool((new | ~old).all()) for old, new in zip(before, now, strict=True))
            assert sum(int(m.sum()) for m in now) > sum(int(m.sum()) for m in before)
        before = now


@pytest.mark.parametrize("by", BY_ENTRIES)
def test_density_one_changes_nothing(by, tmp_path):
    peft_adapter(tmp_path, use_dora=True, modules_to_save=["head"])
    weights = load_adapter_weights(tmp_path)
    assert same_files(unstructured(weights, 1.0, by), weights)
    assert same_files(Variant(density=1.0, by=by).of(weights), weights)


def test_among_equals_the_earlier_entry_stays():
    """Modules by name, A before B, row by row."""
    ones = {name: LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0) for name in ("layers.0.q", "layers.0.k")}
    weights = AdapterWeights({}, {"r": 1, "lora_alpha": 1}).with_factors(ones, "equal")
    pruned = unstructured(weights, 0.6)  # of 10 entries: A and B of k, and the first entry of A of q
    assert [m.flatten().tolist() for m in entries(pruned)] == [[1, 1, 1], [1, 1], [1, 0, 0], [0, 0]]
    assert largest(torch.tensor([2.0, 1, 1, 3, 1]), 4).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("density, n, kept", [(0.5, 5, 3), (0.35, 10, 4), (0.1, 4, 0), (0.1, 5, 1), (1.0, 7, 7)])
def test_counts_are_rounded_with_halves_up(density, n, kept):
    assert kept_count(density, n) == kept


def test_random_is_a_function_of_its_seed_alone():
    """Neither of the values nor of a global generator, which it does not move."""
    weights = random_adapter(0)
    doubled = {n: dataclasses.replace(f, lora_A=2 * f.lora_A.flip(0)) for n, f in weights.factors.items()}
    state = torch.get_rng_state()
    first, second = (unstructured(w, 0.4, "random", seed=11) for w in (weights, weights.with_factors(doubled, "other")))
    assert torch.equal(torch.get_rng_state(), state)
    assert [(m != 0).tolist() for m in entries(first)] == [(m != 0).tolist() for m in entries(second)]
    other = unstructured(weights, 0.4, "random", seed=12)
    assert [(m != 0).tolist() for m in entries(first)] != [(m != 0).tolist() for m in entries(other)]


def test_random_reaches_every_entry_alike():
    """Each of 200 entries is kept in about half of 400 draws: five standard deviations are 12.5 %."""
    one = {"layers.0.q": LoraFactors(torch.ones(4, 30), torch.ones(20, 4), 1.0)}
    weights = AdapterWeights({}, {"r": 4, "lora_alpha": 4}).with_factors(one, "ones")
    rate = sum(torch.cat([m.flatten() for m in entries(unstructured(weights, 0.5, "random", s))]) for s in range(400))
    assert float((rate / 400 - 0.5).abs().max()) < 0.125


# --- ranks that add nothing -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(density=st.floats(0.1, 0.6), by=st.sampled_from(BY_ENTRIES), seed=st.integers(0, 99))
def test_without_empty_ranks_delta_weight_is_the_same(density, by, seed, tmp_path_factory):
    """Also as plain PEFT loads it: each module with its own rank and the old scaling."""
    pruned = unstructured(random_adapter(seed), density, by, seed)
    small = shrunk(pruned)
    folder = tmp_path_factory.mktemp("shrunk")
    save(small, folder)
    as_loaded = deltas_loaded_by_peft(folder)
    assert as_loaded.keys() == small.factors.keys()
    for name, f in pruned.factors.items():
        live = (f.lora_A != 0).any(1) & (f.lora_B != 0).any(0)
        assert (small.factors[name].r if name in small.factors else 0) == int(live.sum())
        left = small.factors[name].delta_weight() if name in small.factors else torch.zeros_like(f.delta_weight())
        # The same products, summed in float64 in another order.
        assert torch.allclose(left, f.delta_weight(), rtol=0, atol=1e-14)
        if name in small.factors:
            assert bool((abs(as_loaded[name] - left) <= rounding(small, name)).all())


def test_a_file_without_empty_ranks_is_smaller(tmp_path):
    weights = random_adapter(0)
    factors = {}
    for name, f in weights.factors.items():
        lora_A, lora_B = f.lora_A.clone(), f.lora_B.clone()
        lora_A[0], lora_B[:, 3] = 0, 0
        factors[name] = dataclasses.replace(f, lora_A=lora_A, lora_B=lora_B)
    small = shrunk(weights.with_factors(factors, "holes"))
    save(weights, tmp_path / "whole")
    save(small, tmp_path / "small")
    assert {f.r for f in small.factors.values()} == {2}
    assert 2 * size(small).bytes == size(weights).bytes
    assert (tmp_path / "small" / WEIGHTS_FILE).stat().st_size < (tmp_path / "whole" / WEIGHTS_FILE).stat().st_size


@pytest.mark.parametrize("extra, stays", [({}, False), ({"use_dora": True}, True), ({"lora_bias": True}, True)])
def test_an_empty_module_goes_unless_something_else_is_stored_for_it(extra, stays, tmp_path):
    """DoRA's magnitude and a LoRA bias act without A and B."""
    model = peft_adapter(tmp_path, **extra)
    for name, parameter in model.named_parameters():
        if "layers.0.q_proj.lora_A" in name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    small = shrunk(load_adapter_weights(tmp_path))
    assert ("model.layers.0.q_proj" in small.factors) == stays
    if stays:
        assert small.factors["model.layers.0.q_proj"].r == 1
        assert not small.factors["model.layers.0.q_proj"].delta_weight().any()


def test_of_an_adapter_that_adds_nothing_a_rank_of_zeros_stays(tmp_path):
    """PEFT loads no adapter without a module."""
    empty = Variant(density=0.001, by="magnitude").of(random_adapter(0))
    assert len(empty.factors) == 1 and nonzero(empty) == 0
    save(empty, tmp_path)
    assert not any(delta.any() for delta in deltas_loaded_by_peft(tmp_path).values())


@pytest.mark.parametrize("extra", ["plain", "dora", "lora bias"])
def test_plain_peft_computes_what_the_unpruned_ranks_do(tiny, tmp_path, extra):
    """Empty ranks left out, or zeros in a file of full size: the same logits up to the order of sums in float32."""
    adapt(tiny("llama"), tmp_path / "whole", target_modules=["q_proj", "v_proj"], **EXTRAS[extra])
    pruned = unstructured(load_adapter_weights(tmp_path / "whole"), 0.02)
    small = shrunk(pruned)
    assert size(small).bytes < size(pruned).bytes
    full, left = (output(loaded(tiny("llama"), w, tmp_path / f"{i}"), "llama") for i, w in enumerate((pruned, small)))
    torch.testing.assert_close(left, full, rtol=1e-5, atol=1e-5)  # logits of size 1, 24-bit sums over 4 layers


# --- in fewer bits ----------------------------------------------------------------------------------------


def test_int8_rounds_to_a_127th_of_the_rows_largest():
    matrix = torch.tensor([[127.0, 0.4, -0.6, 50.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.01, 1.0, 0.0]])
    expected = torch.tensor([[127.0, 0.0, -1.0, 50.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.0, 1.0, 0.0]])
    assert torch.allclose(int8(matrix), expected, rtol=0, atol=1e-7)


def test_nf4_takes_the_nearest_of_sixteen_values_in_blocks_of_64():
    """Against a search over all values; the 65th entry begins a block with a scale of its own."""
    matrix = torch.randn(5, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat, codes = matrix.flatten(), torch.tensor(NF4, dtype=torch.float64)
    for start in range(0, 135, 64):
        block = flat[start : start + 64]
        nearest = (block[:, None] / block.abs().max() - codes).abs().argmin(1)
        assert torch.equal(nf4(matrix).flatten()[start : start + 64], codes[nearest] * block.abs().max())


@pytest.mark.parametrize("shape", [(4, 384), (384, 4), (3, 50), (2, 2), (8, 64)])
def test_nf4_is_what_bitsandbytes_makes_of_it(shape):
    """Same codes, same scales, same values. Its last block may be short too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix[0, 0] = 0.0
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    ours = nf4(matrix)
    assert torch.equal(ours, dequantize_4bit(packed, state))
    one = AdapterWeights({"q": LoraFactors(matrix, matrix.T.contiguous(), 1.0)}, {})
    assert quantised_bytes(one, "nf4") == 2 * (packed.nbytes + state.absmax.nbytes)


def test_bytes_are_those_of_codes_and_scales():
    """r 4: A (4, 6), B (8, 4); int8 has 4 bytes a row, nf4 4 bytes a block, both a code an entry."""
    one = random_adapter(0, {"model.layers.0.q_proj": 4})
    assert quantised_bytes(one, "int8") == (24 + 4 * 4) + (32 + 8 * 4)
    assert quantised_bytes(one, "nf4") == (12 + 4) + (16 + 4)
    extra = dataclasses.replace(one, extras={"base_model.model.head.weight": torch.ones(3)})
    assert quantised_bytes(extra, "nf4") == quantised_bytes(one, "nf4") + 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantising_twice_is_quantising_once_and_keeps_zeros(kind, dtype):
    weights = unstructured(random_adapter(2, dtype=dtype), 0.5)
    once = quantise(weights, kind)
    assert same_files(quantise(once, kind), once)
    for before, after in zip(entries(weights), entries(once), strict=True):
        assert after.dtype == dtype and after.shape == before.shape
        assert not after[before == 0].any()
    assert any(not torch.equal(a, b) for a, b in zip(entries(weights), entries(once), strict=True))


def test_a_quantised_adapter_is_loaded_by_peft(tmp_path):
    peft_adapter(tmp_path / "a", use_rslora=True, r=3)
    small = quantise(load_adapter_weights(tmp_path / "a"), "nf4")
    save(small, tmp_path / "b")
    for name, delta in deltas_loaded_by_peft(tmp_path / "b").items():
        assert bool((abs(delta - small.factors[name].delta_weight()) <= rounding(small, name)).all())


# --- all at once ------------------------------------------------------------------------------------------


def test_layers_then_entries_then_bits():
    """The density counts what the layers leave; the rounding keeps the zeros."""
    weights = random_adapter(0)
    variant = Variant("1", 0.5, "magnitude", "int8")
    assert (variant.kind, variant.name) == ("quantised", "1+magnitude+int8")
    by_hand = quantise(shrunk(unstructured(structured(weights, "1"), 0.5)), "int8")
    assert same_files(variant.of(weights), by_hand)
    assert nonzero(unstructured(structured(weights, "1"), 0.5)) == kept_count(0.5, nonzero(weights) // 2)
    assert variant.bytes_of(by_hand) == quantised_bytes(by_hand, "int8") < size(by_hand).bytes


def test_kinds_and_names_of_variants():
    named = {
        v.name: v.kind for v in (Variant(), Variant("low"), Variant(density=0.1, by="random"), Variant(quantise="nf4"))
    }
    assert named == {"all": "structured", "low": "structured", "random": "unstructured", "nf4": "quantised"}


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep, expected",
    [
        ("midle", 'nothing called "midle" to keep (did you mean "middle"?)'),
        ("q_porj", 'did you mean "q_proj"?'),
        ("0,5", 'nothing called "5" to keep'),
        ("low", '"low" keeps no layer of adapter-0, whose adapter has 2'),
        ("", 'nothing called ""'),
    ],
)
def test_what_the_adapter_has_not_cannot_be_kept(keep, expected):
    with pytest.raises(InputError) as refusal:
        structured(random_adapter(0), keep)
    assert expected in str(refusal.value)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"density": 0.0, "by": "random"}, "the density is 0, but is the fraction kept"),
        ({"density": 1.5, "by": "random"}, "must lie in (0, 1]"),
        ({"density": float("nan"), "by": "random"}, "the density is nan"),
        ({"density": 0.5}, "needs a way to choose entries"),
        ({"density": 0.5, "by": "magnitud"}, 'did you mean "magnitude"?'),
        ({"quantise": "int4"}, 'did you mean "int8"?'),
    ],
)
def test_a_variant_that_cannot_be_is_refused(settings, expected):
    with pytest.raises(InputError) as refusal:
        Variant(**settings)
    assert expected in str(refusal.value)


def with_nan(weights: AdapterWeights) -> AdapterWeights:
    first = next(iter(weights.factors))
    weights.factors[first].lora_A[0, 0] = float("nan")
    return weights


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda: unstructured(with_nan(random_adapter(0)), 0.5), "not finite"),
        (lambda: quantise(with_nan(random_adapter(0)), "nf4"), "not finite"),
        (lambda: quantise(random_adapter(0), "nf5"), 'did you mean "nf4"?'),
    ],
)
def test_what_cannot_be_made_smaller_is_refused(change, expected):
    with pytest.raises(InputError) as refusal:
        change()
    assert expected in str(refusal.value)


def test_adapters_of_embeddings_and_of_parameters_are_refused(tmp_path):
    class Embedding(Blocks):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 6)

    config = LoraConfig(r=2, target_modules=["q_proj", "embed"])
    get_peft_model(Embedding(), config).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    with pytest.raises(InputError, match="lora_embedding_A, and only the factors A and B of linear layers"):
        structured(load_adapter_weights(tmp_path / "a"), "all")
    peft_adapter(tmp_path / "b")
    path = tmp_path / "b" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["w"]}), encoding="utf-8")
    with pytest.raises(InputError, match="target_parameters"):
        unstructured(load_adapter_weights(tmp_path / "b"), 0.5)


def test_the_modules_of_the_examples_have_two_layers():
    """What the tests above count on."""
    assert size(random_adapter(0)).layers == ("model.layers.0", "model.layers.1") and len(MODULES) == 6
