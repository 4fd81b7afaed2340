"""Model folders that anybody may have written: no code of theirs runs, no pickle is read, one sentence refuses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import drawn, dumped, efforts, odd_values, refused, spoilt
from hypothesis import example, given
from hypothesis import strategies as st

from copra_llm.models import load_base, load_tokenizer
from copra_llm.settings import ModelSettings

CODE = """
from pathlib import Path
from transformers import PreTrainedConfig

Path({witness!r}).touch()

class OwnConfig(PreTrainedConfig):
    model_type = "own"
"""


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(model: Path, **changes) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_models_own_code_is_refused(model, tmp_path, monkeypatch):
    """It runs where it is asked for, and only there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    witness = tmp_path / "ran"
    (model / "own.py").write_text(CODE.format(witness=str(witness)), encoding="utf-8")
    edit(model, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    sentence = refused(lambda: load_base(ModelSettings(model_name_or_path=str(model))))
    assert "--trust_remote_code" in sentence and not witness.exists()
    refused(lambda: load_tokenizer(str(model)))
    assert not witness.exists()
    refused(lambda: load_base(ModelSettings(model_name_or_path=str(model), trust_remote_code=True)))
    assert witness.exists()


def test_pickled_weights_are_refused(model):
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "pickled ones can run code" in refused(lambda: load_base(ModelSettings(model_name_or_path=str(model))))


FIELDS = ("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
          "torch_dtype", "dtype", "rope_theta", "rope_parameters", "hidden_act", "tie_word_embeddings", "pad_token_id",
          "quantization_config", "is_encoder_decoder", "text_config", "vision_config", "intermediate_size")  # fmt: skip


@efforts(25, 500)
def test_any_config(examples, model):
    """Odd values in a model's `config.json`; large ones may ask for no more memory than the weights' own."""
    config, path = json.loads((model / "config.json").read_text(encoding="utf-8")), model / "config.json"
    content = path.read_bytes()

    @drawn(examples)
    @given(changes=st.dictionaries(st.sampled_from(FIELDS), odd_values, min_size=1, max_size=2), data=st.data())
    @example(changes={"architectures": 5}, data=None)
    @example(changes={"architectures": []}, data=None)
    def check(changes, data):
        spoil = data is not None and data.draw(st.booleans())
        path.write_bytes(data.draw(spoilt(content)) if spoil else dumped(config | changes))
        refused(lambda: load_base(ModelSettings(model_name_or_path=str(model))))

    check()


@efforts(25, 500)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_any_bytes(examples, name, model):
    """The other files cut, overwritten or of another kind."""
    content = (model / name).read_bytes()

    @drawn(examples)
    @given(data=st.data())
    def check(data):
        (model / name).write_bytes(data.draw(spoilt(content)))
        refused(lambda: load_base(ModelSettings(model_name_or_path=str(model))))

    check()
