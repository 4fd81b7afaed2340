"""A run that is a part of something larger: a client's share, a span of a longer run, another adapter's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from examples import tiny_adapter
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_train import Witness, adapter_bytes, settings

from copra_llm import train
from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build, start_from
from copra_llm.checkpoint import refuse_other_settings
from copra_llm.config import RunConfig, parse_run_config
from copra_llm.errors import InputError
from copra_llm.protocols.runs import portable
from copra_llm.results import Result
from copra_llm.shards import shards
from copra_llm.train import train_adapter

# --- a client's share -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_clients_train_on_their_shares(tiny_llama, split: str):
    """What a run trains on is the share that `shards` gives its client; dev and test are whole."""
    own = {"num_clients": 3, "client_split": split, "dirichlet_beta": 0.3, "split_seed": 5, "max_train_samples": 30}
    whole = build(settings(tiny_llama, max_train_samples=30), ["sst2"]).splits
    parts = shards(whole["train"]["sst2"].labels, 3, split=split, beta=0.3, seed=5)
    for client, indices in enumerate(parts):
        shares = build(settings(tiny_llama, **own, client=client), ["sst2"]).splits
        assert shares["train"]["sst2"].encoded == [whole["train"]["sst2"].encoded[i] for i in indices]
        assert shares["test"]["sst2"].labels == whole["test"]["sst2"].labels


def test_more_clients_than_examples_are_refused(tiny_llama):
    config = settings(tiny_llama, num_clients=5, max_train_samples=4)
    with pytest.raises(InputError, match="4 training examples cannot be divided among 5 clients"):
        build(config, ["sst2"])


# --- a span of a longer run -------------------------------------------------------------------------------


def witnessed(config: RunConfig, folder: Path, monkeypatch) -> tuple[Witness, list]:
    """The run, and the arguments of its noise."""
    noise = []
    with monkeypatch.context() as patch:
        seed_noise = train._seed_noise
        patch.setattr(train, "_seed_noise", lambda *args: (noise.append(args), seed_noise(*args)))
        return Witness(config, folder), noise


@pytest.mark.parametrize("scheduler, warmup", [("cosine", 0), ("linear", 3), ("constant_with_warmup", 5)])
def test_rounds_are_the_parts_of_one_run(tiny_llama, tmp_path, monkeypatch, scheduler, warmup):
    """p(t), learning rate, masks, batches and noise of three spans are those of the whole run, one after the other."""
    same = {"lr_scheduler_type": scheduler, "warmup_steps": warmup, "gradient_accumulation_steps": 2}
    whole, noise = witnessed(settings(tiny_llama, max_steps=9, **same), tmp_path / "whole", monkeypatch)
    logs, batches, masks, noises = [], [], [], []
    for k in range(3):
        config = settings(tiny_llama, max_steps=3, schedule_span=[k / 3, (k + 1) / 3], **same)
        part, own_noise = witnessed(config, tmp_path / str(k), monkeypatch)
        logs += part.progress.log
        batches += part.batches
        masks += part.active
        noises += own_noise
    for key in ("activation_prob", "learning_rate", "active_layers"):
        assert [e[key] for e in logs] == [e[key] for e in whole.progress.log], key
    assert [e["step"] for e in logs] == [1, 2, 3] * 3
    assert masks == whole.active and noises == noise
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, whole.batches, strict=True))


@pytest.mark.parametrize(
    "span, steps, expected",
    [([0.0, 1.0], 7, (0, 7)), ([0.0, 0.5], 4, (0, 8)), ([2 / 3, 1.0], 5, (10, 15)), ([0.3, 0.65], 10, (9, 29))],
)
def test_a_span_in_steps(span, steps, expected):
    """To the nearest step, never beyond the end of the longer run."""
    assert RunConfig().replace(schedule_span=span).part.span_in_steps(steps) == expected


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 10, 49])
def test_spans_of_rounds_join_exactly(rounds: int):
    ends = [
        RunConfig().replace(schedule_span=[k / rounds, (k + 1) / rounds]).part.span_in_steps(5) for k in range(rounds)
    ]
    assert ends == [(5 * k, 5 * rounds) for k in range(rounds)]


def test_a_part_resumes_too(tiny_llama, tmp_path):
    """A client's second round that was stopped ends with the bytes of one that was not."""
    start = tiny_adapter(tiny_llama, tmp_path / "start", seed=1, r=2)
    config = settings(
        tiny_llama, max_steps=4, schedule_span=[0.5, 1.0], num_clients=2, client=1, init_adapter=str(start),
        warmup_steps=5, save_steps=1, lora_dropout=0.1,
    )  # fmt: skip
    train_adapter(config, ["sst2"], tmp_path / "straight")
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    train_adapter(config.replace(resume_from_checkpoint=str(checkpoint)), ["sst2"], tmp_path / "resumed")
    assert adapter_bytes(tmp_path / "resumed" / "adapter") == adapter_bytes(tmp_path / "straight" / "adapter")
    again = parse_run_config(["--config", str(tmp_path / "straight" / "config.yaml")])
    train_adapter(again, ["sst2"], tmp_path / "again")
    assert adapter_bytes(tmp_path / "again" / "adapter") == adapter_bytes(tmp_path / "straight" / "adapter")


# --- another adapter's weights ----------------------------------------------------------------------------


def test_a_run_starts_from_a_saved_adapter(tiny_llama, tmp_path):
    """The weights are those saved, bit for bit."""
    start = tiny_adapter(tiny_llama, tmp_path / "start", seed=1, r=2)
    bench = build(settings(tiny_llama, init_adapter=str(start)), ["sst2"])
    own, saved = get_peft_model_state_dict(bench.classifier.model), load_file(start / "adapter_model.safetensors")
    assert own.keys() == saved.keys() and all(torch.equal(own[key], saved[key]) for key in saved)


@pytest.mark.parametrize("changes", [{"lora_alpha": 3.0}, {"use_rslora": True}])
def test_with_another_scaling_the_weight_change_stays(tiny_llama, tmp_path, changes):
    start = tiny_adapter(tiny_llama, tmp_path / "start", seed=1, r=2)
    config = settings(tiny_llama, init_adapter=str(start), **changes)
    bench = build(config, ["sst2"])
    bench.classifier.model.save_pretrained(tmp_path / "own")
    own, saved = load_adapter_weights(tmp_path / "own"), load_adapter_weights(start)
    for name, f in saved.factors.items():
        assert own.factors[name].scaling == config.lora.scaling != f.scaling
        # One rounding of each factor in float32.
        torch.testing.assert_close(own.factors[name].delta_weight(), f.delta_weight(), rtol=1e-5, atol=1e-6)


def test_a_negative_scaling_goes_into_b(tiny_llama, tmp_path):
    """As task arithmetic with a negative weight writes it."""
    start = load_adapter_weights(tiny_adapter(tiny_llama, tmp_path / "start", seed=1, r=2))
    bench = build(settings(tiny_llama), ["sst2"])
    start_from(bench.classifier.model, start, -start.factors[next(iter(start.factors))].scaling)
    own = get_peft_model_state_dict(bench.classifier.model)
    assert all(torch.equal(own[key], (-1 if "lora_B" in key else 1) * t) for key, t in start.state_dict().items())


MORE_TARGETS = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"lora_r": 4}, r"has \(2, 32\) for .*k_proj.lora_A.weight, but this run has \(4, 32\)"),
        ({"lora_target_modules": ["q_proj"]}, "has .* for .*k_proj.lora_A.weight, but this run has nothing"),
        (MORE_TARGETS, "has nothing for .*o_proj"),
        ({"lora_layers_to_transform": [0, 1, 2]}, "layers.3.*but this run has nothing"),
    ],
)
def test_other_ranks_targets_or_layers_are_refused(tiny_llama, tmp_path, changes, expected):
    start = tiny_adapter(tiny_llama, tmp_path / "start", seed=1, r=2)
    with pytest.raises(InputError, match=f"--init_adapter .*start .*{expected}"):
        build(settings(tiny_llama, init_adapter=str(start), **changes), ["sst2"])


def test_an_init_adapter_that_is_none_is_refused(tiny_llama, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        build(settings(tiny_llama, init_adapter=str(tmp_path / "nowhere")), ["sst2"])


def test_a_trained_head_is_started_from(tiny_bert, tmp_path):
    """With --train_head the next round goes on with the head of the one before."""
    config = settings(tiny_bert, train_head=True, max_steps=2)
    train_adapter(config, ["sst2"], tmp_path / "first")
    bench = build(config.replace(init_adapter=str(tmp_path / "first")), ["sst2"])
    head = load_file(tmp_path / "first" / "adapter" / "head.safetensors")["sst2.weight"]
    assert torch.equal(bench.classifier.heads["sst2"], head)
    save_file({"sst2.weight": head + 1}, tmp_path / "first" / "adapter" / "head.safetensors")
    bench = build(config.replace(init_adapter=str(tmp_path / "first")), ["sst2"])
    assert torch.equal(bench.classifier.heads["sst2"], head + 1)


# --- depth ------------------------------------------------------------------------------------------------


def test_chosen_layers_alone_are_adapted(tiny_llama, tmp_path):
    """Plain PEFT loads the adapter with the same layers."""
    train_adapter(settings(tiny_llama, max_steps=1, lora_layers_to_transform=[1, 3]), ["sst2"], tmp_path)
    names = load_adapter_weights(tmp_path).factors
    assert {name.split(".")[2] for name in names} == {"1", "3"} and len(names) == 2 * 3
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert {n.split(".layers.")[1][0] for n, _ in loaded.named_parameters() if "lora_A" in n} == {"1", "3"}


def test_layers_that_are_not_there_are_refused(tiny_llama):
    with pytest.raises(InputError, match="names block 4, but the model's go from 0 to 3"):
        build(settings(tiny_llama, lora_layers_to_transform=[0, 4]), ["sst2"])


# --- settings ---------------------------------------------------------------------------------------------


def test_flags_are_read():
    words = ["--num_clients", "4", "--client", "3", "--client-split", "dirichlet", "--dirichlet_beta", "0.1"]
    words += ["--split_seed", "7", "--schedule_span", "0.25", "0.5", "--init_adapter", "a/b"]
    words += ["--lora_layers_to_transform", "0", "2"]
    config = parse_run_config(words)
    assert config.part.num_clients == 4 and config.part.client == 3 and config.part.client_split == "dirichlet"
    assert config.part.dirichlet_beta == 0.1 and config.part.split_seed == 7
    assert config.part.schedule_span == [0.25, 0.5] and config.part.init_adapter == "a/b"
    assert config.lora.lora_layers_to_transform == [0, 2]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_clients": 0}, "--num_clients is 0"),
        ({"client": 1}, "--client is 1, but --num_clients 1 leaves 0 to 0"),
        ({"client_split": "dirichelt"}, 'did you mean "dirichlet"'),
        ({"dirichlet_beta": 0.0}, "--dirichlet_beta is 0.0, but must be positive"),
        ({"dirichlet_beta": float("nan")}, "--dirichlet_beta is nan"),
        ({"split_seed": -1}, "--split_seed is -1"),
        ({"schedule_span": [0.5]}, r"--schedule_span is \[0.5\], but must be a start and a later end"),
        ({"schedule_span": [0.5, 0.5]}, "a later end"),
        ({"schedule_span": [0.5, 1.5]}, "a later end"),
        ({"schedule_span": [float("nan"), 1.0]}, "a later end"),
        ({"lora_layers_to_transform": []}, r"--lora_layers_to_transform is \[\]"),
        ({"lora_layers_to_transform": [-1]}, r"is \[-1\]"),
        ({"lora_layers_to_transform": [1], "lora_target_modules": ["all-linear"]}, "needs modules by name"),
    ],
)
def test_wrong_settings_are_refused(changes, expected):
    with pytest.raises(InputError, match=expected):
        RunConfig().replace(**changes)


def test_records_from_before_these_settings_stay_good():
    """They had the defaults, and a run with other values is still another run."""
    new = {"num_clients", "client", "client_split", "dirichlet_beta", "split_seed", "schedule_span", "init_adapter"}
    old = {k: v for k, v in RunConfig().flat().items() if k not in new | {"lora_layers_to_transform"}}
    assert RunConfig.from_flat(old) == RunConfig()
    refuse_other_settings(Path("run"), old, RunConfig())
    with pytest.raises(InputError, match="run was trained with num_clients = 1, but this run has num_clients = 2"):
        refuse_other_settings(Path("run"), old, RunConfig().replace(num_clients=2))


def test_a_record_names_the_init_adapter_without_its_folder(tmp_path):
    config = RunConfig().replace(init_adapter=str(tmp_path)).flat()
    text = json.dumps(portable(Result("train", config, {}, environment={"base_model": "minilm"})).config)
    assert str(tmp_path.parent) not in text and f'"init_adapter": "{tmp_path.name}"' in text
