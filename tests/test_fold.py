"""`copra fold`: the written model is the adapted one, and plain transformers loads it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from examples import tiny_adapter, write_gguf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from copra_llm.adapters import load_adapter_weights
from copra_llm.cli import main
from copra_llm.models import PACKAGED, add_adapter, load_base
from copra_llm.settings import LoraSettings, ModelSettings

IDS = torch.arange(4, 4 + 2 * 9).view(2, 9)
CLOSE = 2e-5
"""Folding adds two weights before the product, an adapter adds two products, so that float32 rounds otherwise: measured
7.1e-6 at most, on logits up to 5.4."""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def copra(*argv) -> int:
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def bases(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The tiny model with a chat template and settings for generation: as it is, and with tied embeddings."""
    folders = {}
    for name in ("untied", "tied"):
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        if name == "tied":
            model.config.tie_word_embeddings = True
            model.tie_weights()
            assert model.lm_head.weight is model.model.embed_tokens.weight
        model.generation_config.update(do_sample=True, temperature=0.3)
        model.save_pretrained(folders[name])
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folders[name])
    return folders


def adapter_of(base: Path, folder: Path, auto: type = AutoModelForCausalLM, **lora) -> Path:
    """An adapter for the base, each of its parameters moved away from its initial value."""
    model = auto.from_pretrained(base)
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | lora
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied embeddings
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(**lora))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: nn.Module, **more) -> Tensor:
    return model.eval()(input_ids=IDS, **more).logits


def adapted_logits(base: Path, adapter: Path, auto: type = AutoModelForCausalLM, **more) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(auto.from_pretrained(base), adapter), **more)


# --- the folded model is the adapted one ------------------------------------------------------------------

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.1": 2}, "alpha_pattern": {"layers.2": 64, "q_proj": 3}},
    "some": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 3]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folded_model_is_the_adapted_one(bases, tmp_path, variant: str, base: str):
    """Whatever PEFT adapts, embeddings that share their weight included: one changed alone is written alone."""
    adapter = adapter_of(bases[base], tmp_path / "adapter", **VARIANTS[variant])
    assert copra("fold", adapter, "--output", tmp_path / "out") == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = adapted_logits(bases[base], adapter)
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=CLOSE)
    plain = logits(AutoModelForCausalLM.from_pretrained(bases[base]))
    assert float((expected - plain).abs().max()) > 1e3 * CLOSE
    ends = folded.get_input_embeddings().weight, folded.get_output_embeddings().weight
    kept = base == "tied" and variant not in ("whole head", "head", "embedding", "both ends", "tied adapters")
    assert (ends[0] is ends[1]) == folded.config.tie_word_embeddings == kept
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not kept)  # noqa: SIM118


def test_seq2seq(tiny_t5, tmp_path):
    """An encoder-decoder: adapters in both stacks and across."""
    adapter = adapter_of(tiny_t5, tmp_path / "adapter", AutoModelForSeq2SeqLM, target_modules=["q", "v", "wo"])
    assert copra("fold", adapter, "--output", tmp_path / "out") == 0
    start = {"decoder_input_ids": IDS[:, :4]}
    folded = logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"), **start)
    expected = adapted_logits(tiny_t5, adapter, AutoModelForSeq2SeqLM, **start)
    torch.testing.assert_close(folded, expected, rtol=0, atol=CLOSE)
    assert float((expected - logits(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), **start)).abs().max()) > 0.02


# --- what is written --------------------------------------------------------------------------------------

PLAIN = """
import sys
sys.modules["copra_llm"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.arange(4, 22).view(2, 9)
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.save({"logits": logits, "temperature": model.generation_config.temperature, "peft": "peft" in sys.modules,
            "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)}, out)
"""


def test_plain_transformers_loads_it(bases, tmp_path, capsys):
    """In a process of its own without this package and PEFT: weights in shards, chat template, generation settings."""
    adapter, out = adapter_of(bases["untied"], tmp_path / "adapter"), tmp_path / "deep" / "out"
    assert copra("fold", adapter, "--output", out, "--max_shard_size", "100KB") == 0
    said = capsys.readouterr().out
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (out / "model.safetensors").exists()
    # A tensor larger than that has a shard of its own.
    assert all(f.stat().st_size < 110_000 or len(load_file(f)) == 1 for f in shards)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(bases["untied"]).parameters())
    assert said == (f"{out}: {bases['untied']} with {adapter} folded in, {parameters:,} parameters in float32, "
                    f"{len(shards)} files\n")  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "seen.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    torch.testing.assert_close(seen["logits"], adapted_logits(bases["untied"], adapter), rtol=0, atol=CLOSE)
    assert (seen["temperature"], seen["peft"], seen["chat"]) == (0.3, False, "user: hi\n")


def test_nothing_but_the_model_is_written(bases, tmp_path):
    """No trace of the adapter, of a quantisation, or of where the base lay; what is not adapted keeps its bits."""
    adapter = adapter_of(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
    assert copra("fold", adapter, "--output", tmp_path / "out") == 0
    before, after = bases["untied"], tmp_path / "out"
    assert {f.name for f in after.iterdir()} == {f.name for f in before.iterdir()}
    for file in after.glob("*.json*"):
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in ("quantization", "gguf", "lora", str(before), str(tmp_path))), file
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) == ("q_proj" not in key) for key in old)


@pytest.mark.parametrize("dtype, expected", [(None, torch.bfloat16), ("float32", torch.float32),
                                             ("float16", torch.float16)])  # fmt: skip
def test_dtype(bases, tmp_path, dtype: str | None, expected: torch.dtype):
    """By default the base's own; the sum is formed in float32 and rounded once."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases["untied"]).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(bases["untied"]).save_pretrained(base)
    adapter = adapter_of(base, tmp_path / "adapter")
    out = tmp_path / "out"
    assert copra("fold", adapter, "--output", out, *(["--dtype", dtype] if dtype else [])) == 0
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    old = load_file(base / "model.safetensors")
    for name, factors in load_adapter_weights(adapter).factors.items():
        key = f"{name}.weight"
        exact = old[key].double() + factors.delta_weight()
        # Beside the last rounding (at most half a unit), float32's own of B A and of the sum, r = 4 products.
        step = torch.finfo(expected).eps / 2 + 8 * torch.finfo(torch.float32).eps
        spread = exact.abs() + 4 * (factors.lora_B.double().abs() @ factors.lora_A.double().abs())
        # Below float16's normal numbers the units no longer shrink.
        assert bool(((tensors[key].double() - exact).abs() <= step * spread + 2.0**-25).all())


def test_the_adapters_own_tokenizer_goes_first(bases, tmp_path):
    """Trainers save the tokenizer they trained with beside the adapter, chat template and all."""
    adapter = adapter_of(bases["untied"], tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(bases["untied"])
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(adapter)
    assert copra("fold", adapter, "--output", tmp_path / "out") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "own"


def test_a_runs_folder_and_another_base(bases, tmp_path):
    """The run's folder is taken for its adapter; `--model_name_or_path` goes before the base that it names."""
    adapter_of(bases["untied"], tmp_path / "run" / "adapter", target_modules=["q_proj"])
    argv = ["--model-name-or-path", bases["tied"], "--output", tmp_path / "out"]
    assert copra("fold", tmp_path / "run", *argv) == 0
    expected = adapted_logits(bases["tied"], tmp_path / "run" / "adapter")
    folded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(folded, expected, rtol=0, atol=CLOSE)


def test_a_gguf_base(bases, tmp_path, monkeypatch):
    """It is dequantised before, and what is written is an ordinary model."""
    monkeypatch.setenv("COPRA_CACHE", str(tmp_path / "cache"))
    write_gguf(bases["untied"], tmp_path / "tiny.gguf")
    adapter = adapter_of(bases["untied"], tmp_path / "adapter")
    argv = ["--model_name_or_path", tmp_path / "tiny.gguf", "--output", tmp_path / "out"]
    assert copra("fold", adapter, *argv) == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = adapted_logits(bases["untied"], adapter)
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=CLOSE)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- what is refused --------------------------------------------------------------------------------------


def edited(base: Path, folder: Path, **changes) -> Path:
    """A copy of the base with entries of its configuration changed."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_values(adapter: Path, value: float) -> Path:
    """The adapter with one entry changed."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(t for key, t in tensors.items() if "lora_B" in key)[0, 0] = value
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def quantised(bases, tiny_bert, adapter, folder) -> list:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return [adapter, "--model_name_or_path", edited(bases["untied"], folder / "base", quantization_config=config)]


def with_head(bases, tiny_bert, adapter, folder) -> list:
    encoder = tiny_adapter(tiny_bert, folder / "encoder", 0)
    save_file({"sst2.weight": torch.zeros(2, 32)}, encoder / "head.safetensors", metadata={"labels": "{}"})
    return [encoder]


def misfit(bases, tiny_bert, adapter, folder) -> list:
    base = edited(bases["untied"], folder / "base", num_hidden_layers=2)
    return [adapter, "--model_name_or_path", base]


def no_place_for_a_bias(bases, tiny_bert, adapter, folder) -> list:
    return [adapter_of(bases["untied"], folder / "biased", target_modules=["q_proj"], lora_bias=True)]


def nameless(bases, tiny_bert, adapter, folder) -> list:
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return [adapter]


REFUSED = {
    "4 bit": (lambda b, t, a, f: [a, "--load_in_4bit"], "--load_in_4bit would fold into rounded weights.*quantise"),
    "8 bit": (lambda b, t, a, f: [a, "--load-in-8bit"], "--load_in_8bit would fold into rounded weights.*quantise"),
    "quantised base": (quantised, "/base is quantised.*full-precision base with --model_name_or_path, then quantise"),
    "head": (with_head, "/encoder has an encoder's head.*load it with PEFT and its head.safetensors"),
    "encoder": (lambda b, t, a, f: [tiny_adapter(t, f / "encoder", 0)], "no causal or seq2seq.*load the adapter with"),
    "other base": (misfit, r"adapts model.layers.2.*which .*/base does not have; give the base"),
    "no base": (nameless, "does not say which base model it is for; give --model_name_or_path"),
    "nan": (lambda b, t, a, f: [with_values(a, math.nan)], "cannot be folded .*an earlier checkpoint"),
    "bias": (no_place_for_a_bias, "/biased cannot be folded .*base layer has no bias.*an adapter that PEFT can merge"),
    "float16": (lambda b, t, a, f: [with_values(a, 1e6), "--dtype", "float16"], "not finite in torch.float16; write"),
    "dtype": (lambda b, t, a, f: [a, "--dtype", "int8"], '--dtype is "int8", but must be float32'),
    "shard size": (lambda b, t, a, f: [a, "--max_shard_size", "big"], '--max_shard_size is "big", but must be'),
    "no adapter": (lambda b, t, a, f: [f / "none"], "/none is not a folder; give a folder that PEFT's save_pretrained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(bases, tiny_bert, tmp_path, capsys, case: str):
    """Exit code 2, one sentence, nothing written."""
    make, sentence = REFUSED[case]
    adapter = adapter_of(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
    argv = make(bases, tiny_bert, adapter, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert copra("fold", *argv, "--output", tmp_path / "new" / "out") == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and re.search(sentence, lines[0]), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_is_there_is_kept(bases, tmp_path, capsys, kind: str):
    """A file, or a folder with something in it."""
    adapter = adapter_of(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
    kept = tmp_path / "out" if kind == "file" else tmp_path / "out" / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert copra("fold", adapter, "--output", tmp_path / "out") == 2
    assert f"--output names {tmp_path / 'out'}, which is" in capsys.readouterr().err
    assert kept.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"adapter", "out"}


def test_nothing_half_written_is_left(bases, tmp_path, monkeypatch, capsys):
    """A disk that fills up after the weights."""
    adapter = adapter_of(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])

    def full(self, folder, *args, **kwargs):
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert copra("fold", adapter, "--output", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


# --- a real model -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The packaged model, which an adapter names by its hub id: tied, with its chat template."""
    base = load_base(ModelSettings(model_name_or_path="smollm2"))
    model = add_adapter(base, LoraSettings(lora_r=4), init_seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(model.double())
    assert copra("fold", tmp_path / "adapter", "--output", tmp_path / "out", "--max_shard_size", "200MB") == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert folded.get_input_embeddings().weight is folded.get_output_embeddings().weight
    # In float64, so that only the written weights are rounded: measured 1e-4 on logits up to 31. In float32 the model's
    # own rounding over thirty layers is twenty times as much, folded or not.
    torch.testing.assert_close(logits(folded.double()), expected, rtol=0, atol=5e-4)
    assert model.peft_config["default"].base_model_name_or_path == PACKAGED["smollm2"].hub_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base.source.load_from).chat_template
