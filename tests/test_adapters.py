"""Saved adapters as numbers: `copra_llm.adapters` reads and writes what plain PEFT does."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from examples import MODULES, deltas_in, deltas_loaded_by_peft, peft_adapter, random_adapter, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from copra_llm.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterWeights,
    LoraFactors,
    adapter_folder,
    load_adapter_weights,
    save_adapter_weights,
)
from copra_llm.errors import InputError

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.v_proj": 6}, "alpha_pattern": {"layers.0.q_proj": 7}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "all linear": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "one module": {"target_modules": ["model.layers.1.o_proj"]},
    "regular expression": {"target_modules": r".*\.0\.(q|o)_proj"},
    "some layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.q_proj"]},
    "head": {"modules_to_save": ["head"]},
}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_byte(kind, tmp_path):
    """Load and save give back the tensors' bytes and the config, whatever kind of LoRA PEFT has written."""
    peft_adapter(tmp_path / "a", **KINDS[kind])
    save_adapter_weights(load_adapter_weights(tmp_path / "a"), tmp_path / "b")
    assert same_bytes(load_file(tmp_path / "a" / WEIGHTS_FILE), load_file(tmp_path / "b" / WEIGHTS_FILE))
    a, b = (json.loads((tmp_path / x / CONFIG_FILE).read_text(encoding="utf-8")) for x in "ab")
    assert a == b


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weight_is_what_peft_adds(kind, tmp_path):
    """For every adapted module, up to PEFT's float32 product."""
    promised = deltas_in(peft_adapter(tmp_path, **KINDS[kind]))
    ours = load_adapter_weights(tmp_path)
    assert ours.factors.keys() == promised.keys()
    for name, f in ours.factors.items():
        assert bool((abs(f.delta_weight() - promised[name]) <= rounding(ours, name)).all()), name


def test_trained_head_is_kept_apart(tmp_path):
    """Tensors that are no LoRA factor are extras under PEFT's own keys."""
    peft_adapter(tmp_path, modules_to_save=["head"])
    assert load_adapter_weights(tmp_path).extras.keys() == {f"base_model.model.head.{p}" for p in ("weight", "bias")}


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=len(MODULES), max_size=len(MODULES)),
    scalings=st.lists(st.sampled_from([0.5, 1 / 3, 2.0, -1.5, 16 / math.sqrt(6)]), min_size=6, max_size=6),
    present=st.sets(st.sampled_from(sorted(MODULES)), min_size=1),
    kind=st.sampled_from(["plain", "rslora patterns", "regular expression", "some layers", "excluded"]),
)
def test_with_factors_is_loaded_by_peft_as_promised(ranks, scalings, present, kind, tmp_path_factory):
    """Other modules, ranks and scalings than the config had: PEFT loads exactly these, with this Delta W."""
    folder = tmp_path_factory.mktemp("adapter")
    peft_adapter(folder / "before", **KINDS[kind])
    wanted = dict(zip(MODULES, ranks, strict=True)), dict(zip(MODULES, scalings, strict=True))
    factors = random_adapter(1, {name: wanted[0][name] for name in sorted(present)}, wanted[1]).factors
    after = load_adapter_weights(folder / "before").with_factors(factors, source="after")
    save_adapter_weights(after, folder / "after")
    loaded = deltas_loaded_by_peft(folder / "after")
    assert loaded.keys() == factors.keys()
    for name, f in factors.items():
        assert bool((abs(loaded[name] - f.delta_weight()) <= rounding(after, name)).all()), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "head"])
def test_what_chose_the_old_modules_keeps_no_new_one_out(kind, tmp_path):
    """Regular expressions, `layers_to_transform`, `exclude_modules`: the new factors are all loaded."""
    peft_adapter(tmp_path / "before", **KINDS[kind])
    factors = random_adapter(1, 2).factors
    save_adapter_weights(load_adapter_weights(tmp_path / "before").with_factors(factors, "after"), tmp_path / "after")
    assert deltas_loaded_by_peft(tmp_path / "after").keys() == MODULES.keys()


def test_a_name_that_ends_another_keeps_its_own_rank(tmp_path):
    """PEFT matches rank patterns at a name's end; the patterns written here match one module alone."""

    def tower() -> nn.Module:
        deep = nn.ModuleDict({"q": nn.Linear(5, 5), "k": nn.Linear(5, 5)})
        return nn.ModuleDict({"q": nn.Linear(5, 5), "deep": deep})

    model = get_peft_model(tower(), LoraConfig(r=2, target_modules=["q", "k"]))
    model.save_pretrained(tmp_path / "a")
    a = load_adapter_weights(tmp_path / "a")
    widths = {"q": 3, "deep.q": 2, "deep.k": 2}
    factors = {n: LoraFactors(torch.ones(r, 5), torch.ones(5, r), r / 4) for n, r in widths.items()}
    save_adapter_weights(a.with_factors(factors, "b"), tmp_path / "b")
    loaded = deltas_in(PeftModel.from_pretrained(tower(), str(tmp_path / "b")))
    assert all(torch.equal(loaded[name], f.delta_weight()) for name, f in factors.items())


def test_run_folder_is_taken_for_its_adapter(tmp_path):
    """A run's folder holds `adapter/`; both names mean the same adapter."""
    peft_adapter(tmp_path / "run" / "adapter")
    assert adapter_folder(tmp_path / "run") == adapter_folder(tmp_path / "run" / "adapter")
    a, b = load_adapter_weights(tmp_path / "run"), load_adapter_weights(tmp_path / "run" / "adapter")
    assert same_bytes(a.state_dict(), b.state_dict())


def test_heads_are_saved_beside_the_adapter(tmp_path):
    """An encoder's heads and their labels survive the round trip."""
    adapter = random_adapter(0)
    head = {"sst2.weight": torch.randn(2, 3)}
    labels = {"labels": json.dumps({"sst2": ["Good", "Bad"]})}
    with_head = AdapterWeights(adapter.factors, adapter.config, {}, head, labels)
    save_adapter_weights(with_head, tmp_path / "a")
    again = load_adapter_weights(tmp_path / "a")
    assert same_bytes(again.heads, head)
    assert again.head_metadata == labels


# --- what is refused --------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(change(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def without_first(tensors):
    return {key: tensors[key] for key in sorted(tensors)[1:]}


REFUSED = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), CONFIG_FILE),
    "config is not JSON": (lambda f: (f / CONFIG_FILE).write_text("{\n'r': 4}"), f"{CONFIG_FILE}, line 2"),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "list"),
    "config is no text": (lambda f: (f / CONFIG_FILE).write_bytes(b'{"r": "\xff"}'), f"{CONFIG_FILE} is not UTF-8"),
    "config without rank": (lambda f: edit_config(f, r=None), "r is None"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "torn weights": (lambda f: cut(f / WEIGHTS_FILE), f"{WEIGHTS_FILE} is not a whole safetensors file"),
    "no factors": (lambda f: edit_tensors(f, lambda t: {"other": torch.ones(1)}), "no lora_A and lora_B"),
    "half a pair": (lambda f: edit_tensors(f, without_first), "model.layers.0.q_proj"),
    "rank of the config": (lambda f: edit_config(f, r=3), "have rank 4, but adapter_config.json says 3"),
    "convolution": (lambda f: edit_tensors(f, lambda t: {k: v[..., None, None] for k, v in t.items()}), "no matrices"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_place(kind, tmp_path):
    """What is no whole LoRA adapter is refused by a sentence that names the folder or file."""
    spoil, expected = REFUSED[kind]
    folder = tmp_path / "spoilt"
    peft_adapter(folder)
    spoil(folder)
    with pytest.raises(InputError) as refusal:
        load_adapter_weights(folder)
    assert expected in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_other_peft_types_are_refused(tmp_path):
    """An IA3 adapter has no A and B."""
    from examples import Blocks

    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(Blocks(), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"IA3 adapter, but must be LORA"):
        load_adapter_weights(tmp_path)
