"""LoRA+ rates, NEFTune noise, and that both leave the loop's promises alone."""

from __future__ import annotations

import pytest
import torch

from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.optimizer import make_optimizer
from copra_llm.train import noisy_embeddings, train_adapter

BASE = {"tasks": ["sst2"], "data_root": "sample", "max_length": 24, "max_train_samples": 16, "max_eval_samples": 4,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 4, "checkpoint_at": []}  # fmt: skip


@pytest.fixture
def config(tiny_llama):
    return RunConfig().replace(**BASE, model_name_or_path=str(tiny_llama))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_adapter_weights(folder).state_dict()


def test_the_factors_b_learn_faster(config):
    """Every trained parameter is in one group, with its own rate; without the setting all learn alike."""
    bench = build(config, ["sst2"], splits=("train",))
    names = {id(p): name for name, p in bench.classifier.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(bench.classifier, config.replace(loraplus_lr_ratio=16.0, weight_decay=0.1).train)
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {0.01}
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups if group["params"])
    (alone,) = make_optimizer(bench.classifier, config.train).param_groups
    assert alone["lr"] == 0.01 and len(alone["params"]) == len(names)


def test_a_run_with_lora_plus_takes_larger_steps_in_b(config, tmp_path):
    """Adam's first step is the rate times the gradient's sign; A has no gradient yet, since B is 0."""
    for name, ratio in (("plain", None), ("plus", 8.0)):
        train_adapter(config.replace(max_steps=1, loraplus_lr_ratio=ratio, method="lora"), ["sst2"], tmp_path / name)
    plain, plus = (weights(tmp_path / name) for name in ("plain", "plus"))
    moved = [key for key in plain if "lora_B" in key and plain[key].abs().max() > 0]
    assert moved
    for key in moved:
        torch.testing.assert_close(plus[key], 8 * plain[key], rtol=1e-3, atol=1e-6)


def test_noise_is_a_function_of_seed_and_step(config, tmp_path):
    """The same run twice gives the same bytes, also resumed; without noise, or with another seed, others."""
    noisy = config.replace(neftune_noise_alpha=5.0, checkpoint_at=[0.5])
    runs = {"once": noisy, "again": noisy, "without": config, "other": noisy.replace(data_seed=7)}
    for name, run in runs.items():
        train_adapter(run, ["sst2"], tmp_path / name)
    half = noisy.replace(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-2"))
    train_adapter(half, ["sst2"], tmp_path / "resumed")
    file = "adapter/adapter_model.safetensors"
    read = {p.name: (p / file).read_bytes() for p in tmp_path.iterdir()}
    assert read["once"] == read["again"] == read["resumed"]
    assert len({read["once"], read["without"], read["other"]}) == 3


def test_noise_is_bounded_and_gone_afterwards(config):
    model = build(config, ["sst2"], splits=("train",)).base.model
    embeddings, ids = model.get_input_embeddings(), torch.arange(6)[None]
    clean = embeddings(ids)
    with noisy_embeddings(model, 3.0):
        noise = embeddings.train()(ids) - clean
        assert 0 < noise.abs().max() <= 3.0 / (clean.shape[1] * clean.shape[2]) ** 0.5 + 1e-6
        assert torch.equal(embeddings.eval()(ids), clean), "not in evaluation"
    assert torch.equal(embeddings.train()(ids), clean) and not embeddings._forward_hooks


@pytest.mark.parametrize("setting", ["loraplus_lr_ratio", "neftune_noise_alpha"])
def test_what_must_be_positive_is(config, setting):
    with pytest.raises(InputError, match=f"--{setting} is -1"):
        config.replace(**{setting: -1.0})
