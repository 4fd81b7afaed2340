"""A plain module with two numbered blocks, and LoRA adapters for it that PEFT itself has made."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from copra_llm.adapters import AdapterWeights, LoraFactors, save_adapter_weights
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.gates import base_name
from copra_llm.models import add_adapter, load_base
from copra_llm.settings import LoraSettings, ModelSettings

REAL_DATA = Path(os.environ.get("COPRA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "datasets"))
"""The data sets that lie beside the project where it is developed; tests that need them say so where they are not."""
BASE = "owner/blocks"
SHAPES = {"q_proj": (8, 6), "v_proj": (4, 6), "o_proj": (6, 8)}
"""Linear layers of a block: (out, in)."""
MODULES = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
"""All of them by name: (out, in)."""


class Blocks(nn.Module):
    """`model.layers.{0,1}.{q,v,o}_proj` and `head`: nothing that runs, but names as in real models."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(inputs, outputs) for name, (outputs, inputs) in SHAPES.items()})
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3)


def peft_adapter(folder: Path, seed: int = 0, base: str | None = BASE, **settings) -> PeftModel:
    """Save a LoRA adapter of `Blocks` with random factors, as PEFT does, and return the model it was on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
        model = get_peft_model(Blocks(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def deltas_in(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT adds to each adapted module, in float64."""
    layers = {base_name(name): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


def deltas_loaded_by_peft(folder: Path) -> dict[str, Tensor]:
    """What plain PEFT adds to each module of a fresh `Blocks` after loading the folder."""
    return deltas_in(PeftModel.from_pretrained(Blocks(), str(folder)))


def random_adapter(
    seed: int,
    ranks: dict[str, int] | int = 4,
    scalings: dict[str, float] | float = 2.0,
    dtype: torch.dtype = torch.float32,
    base: str = BASE,
) -> AdapterWeights:
    """An adapter in memory; `ranks` and `scalings` by module name, or one for all of `MODULES`."""
    ranks = dict.fromkeys(MODULES, ranks) if isinstance(ranks, int) else ranks
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, r in ranks.items():
        outputs, inputs = MODULES[name]
        a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((r, inputs), (outputs, r)))
        factors[name] = LoraFactors(a, b, scalings if isinstance(scalings, float) else scalings[name])
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "base_model_name_or_path": base}
    return AdapterWeights({}, config).with_factors(factors, source=f"adapter-{seed}")


def rounding(adapter: AdapterWeights, name: str) -> Tensor:
    """Bound on what storing the factors of a module in their dtype, and PEFT's product in it, may change.

    Each entry of A, of B and each product and sum is off by a factor 1 +- eps/2, r + 3 of them in a row.
    """
    f = adapter.factors[name]
    eps = torch.finfo(f.lora_A.dtype).eps
    return (f.r + 3) * eps * abs(f.scaling) * (f.lora_B.double().abs() @ f.lora_A.double().abs())


def tiny_adapter(model: Path, folder: Path, seed: int, *, r: int = 4, spread: float = 0.5) -> Path:
    """Save an adapter with random factors for a tiny model's queries and values, without training one."""
    base = load_base(ModelSettings(model_name_or_path=str(model)))
    peft_model = add_adapter(base, LoraSettings(lora_r=r), init_seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, spread, generator=generator)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def write_gguf(folder: Path, path: Path) -> None:
    """Write a saved LlamaForCausalLM and its byte-level tokenizer as an unquantised GGUF, as llama.cpp lays it out."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    normal, control = 1, 3
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([control if token in tokenizer.all_special_tokens else normal for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring entries of a head, transformers its two halves.
            heads = config.num_attention_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def distinct_prefixes(masks: np.ndarray) -> int:
    """Different beginnings, of every length, of the rows of `masks (n, gates)`."""
    return sum(len({row[: i + 1].tobytes() for row in masks}) for i in range(masks.shape[1]))


def save_run(folder: Path, method: str, seed: int, early: float | None = None, **settings) -> Path:
    """A run's folder without training; with `early`, its checkpoint at T/4 has this share of the final B."""
    adapter = random_adapter(10 * seed + len(method))
    save_adapter_weights(adapter, folder / "adapter")
    config = RunConfig().replace(**{"method": method, "seed": seed, "tasks": ["sst2"], "max_steps": 8} | settings)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    if early is not None:
        factors = {n: dataclasses.replace(f, lora_B=early * f.lora_B) for n, f in adapter.factors.items()}
        save_adapter_weights(adapter.with_factors(factors, "early"), folder / "checkpoint-2")
    return folder


def save_runs(folder: Path) -> Path:
    """Two methods, two seeds, and one run more of another learning rate."""
    for method, early in (("copra", 0.25), ("lora", 0.75)):
        for seed in (0, 1):
            save_run(folder / method / f"run-{seed}", method, seed, early)
    save_run(folder / "lora" / "run-fast", "lora", 2, learning_rate=0.1)
    return folder


def write_conversations(path: Path, n: int, seed: int = 0) -> Path:
    """n question-answer records of a few words each."""
    words = ["the", "film", "was", "long", "and", "dull", "but", "her", "song", "is", "a", "joy", "to", "hear"]
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(n):
        question, answer = (" ".join(rng.choice(words, int(rng.integers(1, 9)))) for _ in range(2))
        lines.append(json.dumps({"question": question, "answer": answer}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
