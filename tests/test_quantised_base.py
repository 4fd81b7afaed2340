"""Training on a base that bitsandbytes holds in 4 or 8 bits; real bitsandbytes, on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from copra_llm import quantised_base
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.results import read_result
from copra_llm.train import train_adapter

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BASE = {"tasks": ["sst2"], "data_root": "sample", "max_length": 24, "max_train_samples": 16, "max_eval_samples": 8,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 6, "checkpoint_at": [],
        "lora_target_modules": ["all-linear"], "logging_steps": 1}  # fmt: skip
BITS = pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])


@pytest.fixture
def config(tiny_llama):
    return RunConfig().replace(**BASE, model_name_or_path=str(tiny_llama))


def adapter(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@BITS
def test_the_base_is_quantised_and_the_output_layer_is_not(config, bits):
    bench = build(config.replace(**{bits: True}), ["sst2"], splits=("dev",))
    kinds = {type(m).__name__ for m in bench.base.model.modules()}
    assert ("Linear4bit" if bits == "load_in_4bit" else "Linear8bitLt") in kinds
    assert type(bench.base.model.get_output_embeddings()) is torch.nn.Linear


@BITS
def test_training_goes_on_after_an_evaluation(config, bits, tmp_path):
    """With an evaluation after every step the run ends as without: none of them changes the base."""
    for name, steps in (("often", 1), ("never", None)):
        train_adapter(config.replace(**{bits: True}, eval_steps=steps), ["sst2"], tmp_path / name)
    assert adapter(tmp_path / "often") == adapter(tmp_path / "never")
    log = read_result(tmp_path / "often" / "result.json").data["log"]
    assert all(entry["grad_norm"] > 0 for entry in log), "a gradient in every step"


def test_without_the_guard_an_evaluation_would_end_the_training(config, tmp_path, monkeypatch):
    """What the guard is for, on CPUs that have the instructions; others never pack."""
    from bitsandbytes.nn import Linear4bit

    if not Linear4bit(8, 8).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so that bitsandbytes packs nothing")
    monkeypatch.setattr("copra_llm.models.keep_trainable", lambda model: None)
    run = config.replace(load_in_4bit=True, method="lora", eval_steps=1)
    try:
        train_adapter(run, ["sst2"], tmp_path)
    except (InputError, RuntimeError):
        return  # stopped, one way or another
    log = read_result(tmp_path / "result.json").data["log"]
    plain = train_adapter(run.replace(eval_steps=None), ["sst2"], tmp_path / "plain").data["log"]
    assert [e["grad_norm"] for e in log] != [e["grad_norm"] for e in plain]


@BITS
def test_all_gates_closed_is_the_quantised_base(config, bits):
    """Bit for bit, as on a base of full precision (C6)."""
    bench = build(config.replace(**{bits: True}), ["sst2"], splits=("dev",))
    model, ids = bench.classifier.model.eval(), torch.arange(8)[None]
    gates = LayerGates(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        with gates.applied([False] * gates.num_layers):
            assert torch.equal(model(input_ids=ids).logits, base)
        assert not torch.equal(model(input_ids=ids).logits, base)


def test_what_cannot_be_is_refused(config, monkeypatch):
    with pytest.raises(InputError, match="choose one"):
        config.replace(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(InputError, match="must be nf4 or fp4"):
        config.replace(bnb_4bit_quant_type="int4")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        quantised_base.importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(InputError, match=r"--load_in_8bit needs bitsandbytes: pip install copra_llm\[quantization\]"):
        build(config.replace(load_in_8bit=True), ["sst2"], splits=("dev",))
