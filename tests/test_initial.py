"""Where an adapter starts: what PiSSA and OLoRA take out of the base is given back in every saved adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from copra_llm import train
from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.gates import LayerGates
from copra_llm.initial import refuse_start
from copra_llm.merge import merge
from copra_llm.results import read_result
from copra_llm.settings import LoraSettings
from copra_llm.train import train_adapter

IDS = torch.arange(40)[None]
BASE = {"tasks": ["sst2"], "data_root": "sample", "max_length": 40, "max_eval_samples": 8, "max_steps": 8,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "lora_r": 2, "lora_target_modules": ["all-linear"],
        "checkpoint_at": []}  # fmt: skip
CHANGING = ["pissa", "pissa_niter_4", "olora"]


@pytest.fixture
def config(tiny_llama):
    def make(**changes) -> RunConfig:
        return RunConfig().replace(**BASE | {"model_name_or_path": str(tiny_llama)} | changes)

    return make


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def trained(run: RunConfig, folder: Path, monkeypatch):
    """The model as it stands when its run has ended."""
    made = []
    monkeypatch.setattr(train, "build", lambda *args: made.append(build(*args)) or made[0])
    train_adapter(run, ["sst2"], folder)
    return made[0].classifier.model


# --- the start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", *CHANGING])
def test_every_start_is_pefts_own_and_changes_no_answer(config, tiny_llama, init):
    """A, B and the base's weights are bit for bit PEFT's; the answers are the base's, to float32's rounding."""
    model = build(config(init_lora_weights=init, seed=3), ["sst2"], splits=("dev",)).classifier.model
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    # Weights of 0.2 and scaling 8: OLoRA's residual is some ten times as large as the weight.
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-4)
    torch.manual_seed(3)
    kind = True if init == "default" else init
    lora = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=kind, task_type="CAUSAL_LM")
    expected = get_peft_model(plain, lora).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("init", CHANGING)
def test_off_is_the_residual_base(config, tiny_llama, init):
    """All layers left out is PEFT's disabled adapter, bit for bit, and that is not the base as it was."""
    model = build(config(init_lora_weights=init), ["sst2"], splits=("dev",)).classifier.model
    gates = LayerGates(model)
    with gates.applied([False] * gates.num_layers):
        off = logits(model)
    with model.disable_adapter():
        assert torch.equal(off, logits(model))
    assert (off - logits(AutoModelForCausalLM.from_pretrained(tiny_llama))).abs().max() > 0.1


# --- what is saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", CHANGING)
def test_the_saved_adapter_is_the_trained_model_on_the_untouched_base(
    config, tiny_llama, tmp_path, monkeypatch, init, more
):
    """Loaded by plain PEFT; float32's rounding of the residual weights (measured: at most 6e-5 of logits up to 5)."""
    model = trained(config(init_lora_weights=init, **more), tmp_path, monkeypatch)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=3e-4)
    assert (logits(loaded) - before).abs().max() > 1.0, "or nothing was trained"
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before), "the base was left alone"
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["init_lora_weights"], said["use_rslora"]) == (4, True, False)


def test_a_base_of_16_bits_rounds_the_residual_once(config, tiny_llama, tmp_path, monkeypatch):
    """The saved adapter is off by what bfloat16 rounds: not more than four times what the base's own forward is."""
    run = config(init_lora_weights="pissa", dtype="bfloat16")
    model = trained(run, tmp_path, monkeypatch)
    load = AutoModelForCausalLM.from_pretrained
    loaded = logits(PeftModel.from_pretrained(load(tiny_llama, dtype=torch.bfloat16), tmp_path / "adapter"))
    own = logits(load(tiny_llama)) - logits(load(tiny_llama, dtype=torch.bfloat16)).float()
    assert (loaded.float() - logits(model).float()).square().mean() < 16 * own.square().mean()


def test_the_tools_take_it_as_any_adapter(config, tmp_path):
    """Evaluated on a fresh base it has the run's own loss; merged with another seed's it still has what both share."""
    runs = []
    for seed in (0, 1):
        result = train_adapter(config(init_lora_weights="pissa", seed=seed), ["sst2"], tmp_path / str(seed))
        runs.append((load_adapter_weights(tmp_path / str(seed)), result))
    evaluator = AdapterEvaluator(config(), ["sst2"], "dev")
    for adapter, result in runs:
        assert evaluator(adapter, "sst2").loss == pytest.approx(result.metrics["dev/sst2/loss"], rel=1e-4)
    assert evaluator.environment()["base_fingerprint"] == runs[0][1].environment["base_fingerprint"]
    fused = merge([adapter for adapter, _ in runs], "fusion", [0.5, 0.5])
    for name, f in fused.factors.items():
        halves = [adapter.factors[name].lora_A[2:] for adapter, _ in runs]
        assert torch.equal(*halves), "PiSSA starts every seed alike"
        torch.testing.assert_close(f.lora_A[2:], halves[0], rtol=1e-6, atol=1e-7)  # a mean of two equal numbers


def test_the_best_adapter_comes_back(config, tmp_path):
    """The run ends with the adapter of its least dev loss, read back from the file written for the untouched base."""
    run = config(init_lora_weights="pissa", method="lora", learning_rate=3.0, eval_steps=1, load_best_model_at_end=True)
    result = train_adapter(run, ["sst2"], tmp_path)
    losses = [entry["dev/sst2/loss"] for entry in result.data["dev"]]
    assert losses.index(min(losses)) < len(losses) - 1, "or the best is the last"
    assert result.metrics["dev/sst2/loss"] == pytest.approx(min(losses), rel=1e-6)
    found = AdapterEvaluator(run, ["sst2"], "dev")(load_adapter_weights(tmp_path), "sst2").loss
    assert found == pytest.approx(min(losses), rel=1e-4)


# --- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CHANGING)
def test_a_resumed_run_ends_with_the_same_bytes(config, tmp_path, init):
    """In a process of its own, which makes start and residual anew from the base and the seed."""
    run = config(init_lora_weights=init, save_steps=4, output_dir=str(tmp_path / "again"))
    train_adapter(run, ["sst2"], tmp_path / "once" / "sst2")
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    folder = tmp_path / "again" / "sst2"
    for gone in ("adapter", "checkpoint-8"):
        shutil.rmtree(folder / gone)
    (folder / "result.json").unlink()
    command = [sys.executable, str(ROOT / "recipes" / "train_mtl15.py"), "--config", str(folder / "config.yaml")]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "latest"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "once" / "sst2")
    assert read_result(folder / "result.json").metrics == read_result(tmp_path / "once/sst2/result.json").metrics
    start, end = (load_adapter_weights(folder / name) for name in ("checkpoint-4", "adapter"))
    assert any(not torch.equal(f.lora_A, end.factors[name].lora_A) for name, f in start.factors.items())


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"init_lora_weights": "pisa"}, r'is "pisa" \(did you mean "pissa"\?\), but must be'),
        ({"init_lora_weights": "pissa_niter_"}, "but must be default, gaussian"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, "needs an even rank, but --lora_r is 3"),
        ({"init_lora_weights": "pissa", "lora_r": 33}, "--lora_r is 33, but model.layers.0.self_attn.q_proj has no"),
        ({"init_lora_weights": "olora", "init_adapter": "somewhere"}, "--init_adapter and --init_lora_weights olora"),
        (
            {"init_lora_weights": "pissa", "lora_target_modules": ["embed_tokens"]},
            r"not right for model.embed_tokens \(Embedding, float32\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(config, changes, said):
    with pytest.raises(InputError, match=said):
        build(config(**changes), ["sst2"], splits=("dev",))


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_a_quantised_base_is_refused(config, init):
    """It would round the residual: the saved adapter would not be what was trained."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(
        InputError, match=rf"--init_lora_weights {init} is not right for .*q_proj \(Linear4bit, uint8\)"
    ):
        build(config(init_lora_weights=init, load_in_4bit=True), ["sst2"], splits=("dev",))
    build(config(init_lora_weights="gaussian", load_in_4bit=True), ["sst2"], splits=("dev",))


def test_a_tied_weight_is_refused():
    """PiSSA on an output layer would change the embedding that is the same tensor; apart, it may be adapted."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)

    model, settings = Tied(), LoraSettings(lora_r=2, init_lora_weights="pissa")
    refuse_start(model, ["head"], settings)
    model.head.weight = model.embed.weight
    with pytest.raises(InputError, match="would change head, whose weight is also another module's"):
        refuse_start(model, ["head"], settings)
    refuse_start(model, ["head"], LoraSettings(lora_r=2, init_lora_weights="gaussian"))


def test_gpt2s_transposed_weights(tmp_path):
    """PEFT's PiSSA transposes them, its OLoRA does not."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    with pytest.raises(InputError, match=r"olora is not right for .*c_attn \(Conv1D, float32\)"):
        refuse_start(model, ["c_attn"], LoraSettings(lora_r=2, init_lora_weights="olora"))
    refuse_start(model, ["c_attn"], LoraSettings(lora_r=2, init_lora_weights="pissa"))
    before = logits(model)
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True)
    attached = get_peft_model(model, lora)
    torch.testing.assert_close(logits(attached), before, rtol=0, atol=1e-5)
    assert any(value.abs().max() > 0 for key, value in get_peft_model_state_dict(attached).items() if "lora_B" in key)
