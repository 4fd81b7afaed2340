"""Training on conversations: the loss counts exactly the trained tokens, packed or alone, and the suite works on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import write_conversations
from transformers import AutoModelForCausalLM

from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.coalitions import CoalitionGame
from copra_llm.config import COMMON, RunConfig, parse_run_config
from copra_llm.conversations import InstructTask
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import interpolate, line
from copra_llm.language_model import refuse_leaking_packs
from copra_llm.models import load_base
from copra_llm.results import read_result
from copra_llm.settings import InstructSettings, ModelSettings
from copra_llm.shapley import exact
from copra_llm.train import train_adapter

BASE = {"method": "copra", "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.02, "max_length": 48,
        "lora_target_modules": ["all-linear"], "logging_steps": 1, "dev_size": 6, "chat_template": "plain",
        "checkpoint_at": []}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", 40)


@pytest.fixture
def config(tiny_llama, data):
    def make(**changes) -> RunConfig:
        own = {"model_name_or_path": str(tiny_llama), "dataset_name": [str(data)], "tasks": ["instruct"]}
        return RunConfig().replace(**BASE | own | changes)

    return make


def reference_losses(bench, example) -> torch.Tensor:
    """-log p of the trained tokens of one example, from the model's own logits of all positions."""
    ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
    logits = bench.classifier.model(input_ids=ids).logits[0, :-1].float()
    losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    return losses[torch.from_numpy(example.trained[1:])]


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_trained_tokens_alone(config):
    """Of padded rows, against the model's own logits, example by example; float32 products in other shapes."""
    bench = build(config(), ["instruct"], splits=("train",))
    split = bench.splits["train"]["instruct"]
    rows = split.encoded[:5]
    assert len({len(row[0]) for row in rows}) > 1, "padding takes part"
    batch = bench.classifier.collate(InstructTask(), rows, [1] * 5)
    expected = [reference_losses(bench, row[0]) for row in rows]
    torch.testing.assert_close(bench.classifier(batch), torch.cat(expected).mean(), rtol=1e-5, atol=1e-6)
    scores = bench.classifier(batch, scores=True)
    torch.testing.assert_close(scores[:, 0].float(), torch.stack([e.sum() for e in expected]), rtol=1e-5, atol=1e-5)
    assert split.targets[:5].tolist() == [len(e) for e in expected] == [int(r[0].trained.sum()) for r in rows]


def test_packed_examples_are_what_they_are_alone(config):
    """Losses and gradients of rows with several examples equal those of each by itself."""
    alone, packed = (build(config(packing=p), ["instruct"], splits=("train",)) for p in (False, True))
    rows = packed.splits["train"]["instruct"].encoded
    assert max(map(len, rows)) > 1 and len(rows) < len(alone.splits["train"]["instruct"])
    examples = [example for row in rows for example in row]
    assert len(examples) == len(alone.splits["train"]["instruct"]), "every example is in one row"
    for module in (alone, packed):
        with torch.no_grad():
            for name, p in module.classifier.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.arange(p.numel()).reshape(p.shape).remainder(7).float() * 0.01)
    losses, _ = packed.classifier.token_losses(packed.classifier.collate(InstructTask(), rows, [1] * len(rows)))
    expected = torch.cat([reference_losses(alone, example) for example in examples])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    packed.classifier(packed.classifier.collate(InstructTask(), rows, [1] * len(rows))).backward()
    expected.mean().backward()
    of_alone = dict(alone.classifier.named_parameters())
    for name, p in packed.classifier.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, of_alone[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_without_isolation_packing_would_leak(config):
    """What the test above guards against is large: positions that run on let examples see each other."""
    bench = build(config(packing=True), ["instruct"], splits=("train",))
    rows = bench.splits["train"]["instruct"].encoded
    batch = bench.classifier.collate(InstructTask(), rows, [1] * len(rows))
    apart, _ = bench.classifier.token_losses(batch)
    width = batch["input_ids"].shape[1]
    leaking, _ = bench.classifier.token_losses(batch | {"position_ids": torch.arange(width).expand(len(rows), -1)})
    assert (apart - leaking).abs().max() > 0.01


def test_without_padding_each_row_is_what_it_was(config):
    """All rows in one, as for FlashAttention: the same losses and scores; here with attention that heeds positions."""
    bench = build(config(), ["instruct"], splits=("train",))
    rows = bench.splits["train"]["instruct"].encoded[:5]
    assert not bench.classifier.padding_free
    padded = bench.classifier.collate(InstructTask(), rows, [1] * 5)
    bench.classifier.padding_free = True
    free = bench.classifier.collate(InstructTask(), rows, [1] * 5)
    assert free["input_ids"].shape == (1, sum(len(row[0]) for row in rows)) and padded["input_ids"].shape[0] == 5
    for scores in (False, True):
        found, expected = (bench.classifier(batch, scores=scores) for batch in (free, padded))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_packed_examples_is_refused(config, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda self, *a, position_ids=None, **k: forward(self, *a, **k)
    )  # positions are not heeded
    with pytest.raises(InputError, match="does not keep packed examples apart"):
        build(config(packing=True), ["instruct"], splits=("train",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_keeps_packed_examples_apart_may_have_16_bits(dtype):
    """Whose rounding over thirty layers is a quarter of the largest logit, and no leak."""
    refuse_leaking_packs(load_base(ModelSettings(model_name_or_path="smollm2", dtype=dtype)))


def test_a_model_that_changes_its_logits_afterwards_is_asked_as_a_whole(config, monkeypatch):
    """As Gemma 2 caps them: the loss is that of the capped logits."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 0.05 * torch.tanh(out.logits / 0.05)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    bench = build(config(), ["instruct"], splits=("train",))
    rows = bench.splits["train"]["instruct"].encoded[:4]
    losses, _ = bench.classifier.token_losses(bench.classifier.collate(InstructTask(), rows, [1] * 4))
    expected = torch.cat([reference_losses(bench, row[0]) for row in rows])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_only_causal_models_hold_conversations(config, tiny_bert):
    with pytest.raises(InputError, match="is a encoder model|is an encoder model"):
        build(config(model_name_or_path=str(tiny_bert)), ["instruct"], splits=("train",))


# --- the run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_llama, data, tmp_path_factory) -> Path:
    """Two seeds, packed."""
    folder = tmp_path_factory.mktemp("instruct")
    for seed in (0, 1):
        own = {"model_name_or_path": str(tiny_llama), "dataset_name": [str(data)], "seed": seed, "packing": True}
        config = RunConfig().replace(**BASE | own | {"save_steps": 3})
        train_adapter(config, ["instruct"], folder / f"seed{seed}")
    return folder


def test_a_run_says_what_became_of_its_records(finished):
    result = read_result(finished / "seed0" / "result.json")
    assert result.data["records"]["train"]["read"] == 34 and result.data["records"]["dev"]["kept"] == 6
    assert result.metrics["dev/instruct/perplexity"] == pytest.approx(np.exp(result.metrics["dev/instruct/loss"]))
    assert result.config["packing"] is True and "test/instruct/loss" not in result.metrics


def test_dev_loss_is_the_mean_over_trained_tokens(finished):
    """Against plain PEFT on the saved adapter, token by token; 6 examples of unequal length."""
    from peft import PeftModel

    folder = finished / "seed0"
    config = RunConfig.from_flat(read_result(folder / "result.json").config)
    bench = build(config, ["instruct"], splits=("dev",))
    model = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path)
    bench.classifier.model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    with torch.no_grad():
        losses = torch.cat([reference_losses(bench, row[0]) for row in bench.splits["dev"]["instruct"].encoded])
    assert len(losses) == read_result(folder / "result.json").metrics["dev/instruct/tokens"]
    assert read_result(folder / "result.json").metrics["dev/instruct/loss"] == pytest.approx(
        losses.mean().item(), rel=1e-5
    )


def test_an_answer_is_right_if_greedy_decoding_gives_it(config, tiny_llama, tmp_path):
    """Whole answers, end of turn included, against generation by transformers."""
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"question": "the film", "answer": "was long"}) + "\n", encoding="utf-8")
    run = config(dataset_name=[str(one)], eval_dataset_name=[str(one)], max_steps=60, method="lora",
                 per_device_train_batch_size=1)  # fmt: skip
    result = train_adapter(run, ["instruct"], tmp_path / "run")
    assert result.metrics["dev/instruct/accuracy"] == 100.0, "learnt by heart"
    bench = build(run, ["instruct"], adapter=tmp_path / "run" / "adapter", splits=("dev",))
    ((example,),) = bench.splits["dev"]["instruct"].encoded
    start = int(example.trained.argmax())
    prompt = torch.from_numpy(example.input_ids[:start].astype("int64"))[None]
    out = bench.classifier.model.eval().generate(
        input_ids=prompt, max_new_tokens=int(example.trained.sum()), do_sample=False
    )
    assert out[0, start:].tolist() == example.input_ids[example.trained].tolist()
    fresh = train_adapter(run.replace(max_steps=1, learning_rate=1e-9), ["instruct"], tmp_path / "fresh")
    assert fresh.metrics["dev/instruct/accuracy"] == 0.0


def test_accumulated_tokens_count_alike(config, tmp_path):
    """Two micro-batches of 2 give the step of one batch of 4, though their numbers of trained tokens differ."""
    weights = []
    for name, batch, accumulate in (("whole", 4, 1), ("parts", 2, 2)):
        own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        run = config(**own, max_steps=1, method="lora", max_train_samples=4, max_grad_norm=0.0)
        train_adapter(run, ["instruct"], tmp_path / name)
        weights.append(load_adapter_weights(tmp_path / name))
    counts = build(run, ["instruct"], splits=("train",)).splits["train"]["instruct"].targets
    assert len(set(counts.tolist())) > 1, "or nothing is shown"
    for name, f in weights[0].factors.items():
        # Adam's first step is the sign of the gradient times the rate; rounding may move entries whose gradient is ~0.
        torch.testing.assert_close(f.lora_B, weights[1].factors[name].lora_B, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_end_where_one_does(tiny_llama, data, tmp_path):
    """Two processes of a micro-batch each take the step of one with two, bit for bit: a token counts alike anywhere."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "train_instruct.py"
    flags = [f"--{key}={value}" for key, value in BASE.items() if key not in ("lora_target_modules", "checkpoint_at")]
    flags += [f"--model_name_or_path={tiny_llama}", f"--dataset_name={data}", "--max_grad_norm=0"]
    for name, launch, accumulate in (
        ("one", [], 2),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 1),
    ):
        own = [f"--gradient_accumulation_steps={accumulate}", f"--output_dir={tmp_path / name}"]
        command = [sys.executable, *launch, str(recipe), *flags, *own]
        done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_result(tmp_path / name / "result.json") for name in ("one", "two"))
    assert (one.environment["world_size"], two.environment["world_size"]) == (1, 2)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_checkpointed_activations_change_nothing(config, tmp_path):
    for name, wanted in (("kept", False), ("again", True)):
        train_adapter(config(packing=True, gradient_checkpointing=wanted), ["instruct"], tmp_path / name)
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("kept", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_a_resumed_run_ends_with_the_same_bytes(finished, tmp_path):
    config = RunConfig.from_flat(read_result(finished / "seed0" / "result.json").config)
    shutil.copytree(finished / "seed0", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    train_adapter(config.replace(resume_from_checkpoint="latest"), ["instruct"], tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / "seed0" / name).read_bytes()


# --- the suite --------------------------------------------------------------------------------------------


def test_interpolation_and_shapley_values_of_conversations(finished):
    """Merged adapters are evaluated on the run's dev data; layers' values add up to the whole adapter's."""
    config = RunConfig.from_flat(read_result(finished / "seed0" / "result.json").config)
    adapters = [load_adapter_weights(finished / f"seed{seed}") for seed in (0, 1)]
    evaluator = AdapterEvaluator(config, ["instruct"], "dev")
    curve = interpolate(*adapters, evaluator, "instruct", method="fusion", alphas=line(3))
    for end, seed in ((0, 1), (-1, 0)):
        loss = read_result(finished / f"seed{seed}" / "result.json").metrics["dev/instruct/loss"]
        assert curve.loss[end] == pytest.approx(loss, rel=1e-6)
    game = CoalitionGame(evaluator, adapters[0], "instruct")
    assert game.note is None, "hidden states are shared"
    estimate = exact(game, game.n_players)
    assert -estimate.v_full == pytest.approx(curve.loss[-1], rel=1e-6) and abs(estimate.efficiency_gap) < 1e-9
    masks = np.eye(game.n_players, dtype=bool)
    assert np.array_equal(game.outcomes(masks).nll, game.plain_outcomes(masks).nll)


def test_the_command_evaluates_on_other_conversations(finished, tmp_path, capsys):
    from copra_llm.cli import main

    other = write_conversations(tmp_path / "other.jsonl", 5, seed=9)
    command = ["evaluate", str(finished / "seed0"), "--task", "instruct"]
    assert main([*command, "--split", "dev"]) == 0
    own = capsys.readouterr().out
    assert main([*command, "--dataset_name", str(other)]) == 0
    assert capsys.readouterr().out != own
    assert main(command) == 2
    assert "no test data" in capsys.readouterr().err
    assert main([*command[:-1], "sst2", "--data_root", "sample"]) == 0, (
        "an instruction adapter on a classification task"
    )


# --- the command line -------------------------------------------------------------------------------------


def test_the_recipe_has_the_flags_of_conversations(tmp_path):
    groups = (*COMMON, InstructSettings)
    config = parse_run_config(["--dataset_name", "a.jsonl:2", "b", "--packing", "--turns", "last"], groups=groups)
    assert config.instruct.dataset_name == ["a.jsonl:2", "b"] and config.instruct.packing
    assert RunConfig.from_flat(config.flat()) == config
    assert RunConfig().instruct is None and "dataset_name" not in RunConfig().flat()
    with pytest.raises(InputError, match="--dataset_name is empty"):
        parse_run_config([], groups=groups)
    with pytest.raises(InputError, match="there is no flag --dataset_name"):
        parse_run_config(["--dataset_name", "a"])


@pytest.mark.parametrize(
    "broken, expected",
    [
        ('{"question": "a", "answer": ""}', "line 21"),
        ('{"question": "a"', "line 21"),
        ('{"other": 1}', "line 21"),
    ],
)
def test_a_broken_record_is_one_sentence_with_its_line(config, tmp_path, broken, expected):
    good = write_conversations(tmp_path / "data.jsonl", 40).read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([*good[:20], broken, *good[20:]]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        train_adapter(config(dataset_name=[str(tmp_path / "data.jsonl")]), ["instruct"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_records_are_not_trained_on(config, data):
    """Also where a source counts twice; the same seed holds out the same records, whatever else differs."""
    twice = build(config(dataset_name=[f"{data}:2"]), ["instruct"], splits=("train", "dev"))
    places = {split: {row[0].place for row in twice.splits[split]["instruct"].encoded} for split in ("train", "dev")}
    assert len(places["dev"]) == 6 and not places["train"] & places["dev"]
    assert len(twice.splits["train"]["instruct"]) == 2 * 34
    other = build(config(max_train_samples=3, seed=5), ["instruct"], splits=("dev",))
    assert {r[0].place for r in other.splits["dev"]["instruct"].encoded} == {
        r[0].place for r in build(config(), ["instruct"], splits=("dev",)).splits["dev"]["instruct"].encoded
    }
    with pytest.raises(InputError, match="only 40 training records"):
        build(config(dev_size=40), ["instruct"], splits=("train",))


@pytest.mark.parametrize("tasks", [["sst2"], ["one", "other"]])
def test_a_name_that_is_not_the_conversations_own_is_refused(config, tasks):
    with pytest.raises(InputError, match="conversations have one name of their own"):
        build(config(tasks=tasks), tasks, splits=("train",))
