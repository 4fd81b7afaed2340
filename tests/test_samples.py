"""Answers while training: those of the adapter at that step, kept and shown, and without a trace in the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from copra_llm import samples
from copra_llm.config import COMMON, RunConfig, parse_run_config
from copra_llm.errors import InputError
from copra_llm.generate import generate, prompts_of, question, stop_of
from copra_llm.models import load_adapter, load_base
from copra_llm.results import read_result
from copra_llm.samples import prompt_records, shown
from copra_llm.settings import InstructSettings
from copra_llm.tasks.instruct.encode import Encoder
from copra_llm.train import train_adapter

PAIRS = [("the film", "was long"), ("her song is a joy", "to hear"), ("once", "and more"), ("dull", "but long")] * 5
PROMPTS = ["the film", "her song is a joy", "a long and dull song"]
BASE = {"method": "copra", "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.02, "max_length": 48,
        "lora_target_modules": ["all-linear"], "dev_size": 4, "chat_template": "plain", "checkpoint_at": [],
        "tasks": ["instruct"], "lora_dropout": 0.1, "neftune_noise_alpha": 1.0, "eval_steps": 3,
        "max_new_tokens": 6}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_llama, data):
    def make(**changes) -> RunConfig:
        own = {"model_name_or_path": str(tiny_llama), "dataset_name": [str(data)], "sample_prompts": PROMPTS}
        return RunConfig().replace(**BASE | own | changes)

    return make


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_run_stays_what_it_is(config, tmp_path, monkeypatch):
    """The adapter's bytes, the losses and the generators' states are those of a run that asks nothing."""
    before = []

    def spied(*args, **kwargs):
        state = torch.get_rng_state()
        answers = generate(*args, **kwargs)
        before.append(torch.equal(state, torch.get_rng_state()))
        return answers

    monkeypatch.setattr(samples, "generate", spied)
    asked = train_adapter(config(), ["instruct"], tmp_path / "asked")
    plain = train_adapter(config(sample_prompts=[]), ["instruct"], tmp_path / "plain")
    assert before == [True] * 3
    assert adapter_bytes(tmp_path / "asked") == adapter_bytes(tmp_path / "plain")
    assert (asked.metrics, asked.data["log"], asked.data["dev"]) == (
        plain.metrics,
        plain.data["log"],
        plain.data["dev"],
    )
    assert "samples" not in plain.data


def test_answers_are_those_of_the_adapter_at_that_step(config, tiny_llama, tmp_path, capsys):
    """At steps 3 and 6 and at the end, 8: what `generate` gives with the checkpoint of the step, all layers active."""
    result = train_adapter(config(save_steps=3), ["instruct"], tmp_path)
    assert result.data["samples"] == read_result(tmp_path / "result.json").data["samples"]
    kept = {(s["step"], s["prompt"]): s["text"] for s in result.data["samples"]}
    assert list(kept) == [(step, prompt) for step in (3, 6, 8) for prompt in PROMPTS]
    for step, folder in ((3, "checkpoint-3"), (6, "checkpoint-6"), (8, "adapter")):
        base = load_base(config().model)
        encoder = Encoder(base.tokenizer, "plain")
        prompts = prompts_of(encoder, [question(text) for text in PROMPTS])
        answers = generate(
            load_adapter(base, tmp_path / folder), base.tokenizer, prompts, stop_of(encoder, chat=True),
            max_new_tokens=6,
        )  # fmt: skip
        assert [kept[step, prompt] for prompt in PROMPTS] == answers
    assert len(set(kept.values())) > len(PROMPTS), "the adapter learns"
    out = capsys.readouterr().out
    assert [out.count(f"step {step}\n> the film\n{kept[step, 'the film']}\n") for step in (3, 6, 8)] == [1, 1, 1]


def test_a_resumed_run_has_them_all(config, tmp_path):
    """Those from before the stop come with the checkpoint; none is asked twice."""
    whole = train_adapter(config(save_steps=4), ["instruct"], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    again = train_adapter(config(save_steps=4, resume_from_checkpoint="latest"), ["instruct"], tmp_path / "run")
    assert again.data["samples"] == whole.data["samples"]
    assert [s["step"] for s in again.data["samples"]] == [3] * 3 + [6] * 3 + [8] * 3


def test_the_last_answers_are_the_saved_adapters(config, tmp_path):
    """Of a run of 8 steps that ends with its best adapter, 3 or 6: its answers are there, and none of 8."""
    result = train_adapter(config(method="lora", load_best_model_at_end=True), ["instruct"], tmp_path)
    assert [s["step"] for s in result.data["samples"]] == [3] * 3 + [6] * 3


def test_trackers_show_them(config, tmp_path):
    """TensorBoard, as text, under one name a prompt."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_adapter(config(report_to=["tensorboard"]), ["instruct"], tmp_path)
    (file,) = [
        f for f in tmp_path.rglob("events.out.tfevents.*") if EventAccumulator(str(f)).Reload().Tags()["tensors"]
    ]
    events = EventAccumulator(str(file)).Reload().Tensors("samples/1/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events}
    expected = {
        s["step"]: f"**{s['prompt']}**\n\n{s['text']}" for s in result.data["samples"] if s["prompt"] == PROMPTS[1]
    }
    assert texts == expected


def test_prompts_come_from_texts_and_files(tmp_path, data):
    lines = tmp_path / "prompts.txt"
    lines.write_text("the film\n\n her song \n", encoding="utf-8")
    config = parse_run_config(
        ["--dataset_name", "a", "--sample_prompts", "once more", str(lines), str(data), "--max_new_tokens", "4"],
        groups=(*COMMON, InstructSettings),
    )
    records = prompt_records(config.instruct)
    assert [shown(record) for record in records[:5]] == [
        "once more",
        "the film",
        "her song",
        *[q for q, _ in PAIRS[:2]],
    ]
    assert len(records) == 3 + len(PAIRS)
    assert RunConfig.from_flat(config.flat()) == config


@pytest.mark.parametrize(
    "word, content, said",
    [
        ("gone.txt", None, "gone.txt, which does not exist"),
        ("empty.txt", b"\n \n", "empty.txt, which is empty"),
        ("latin.txt", b"caf\xe9", r"latin.txt, which is not UTF-8 text \(byte 3\)"),
        ("gone.jsonl", None, "gone.jsonl does not exist"),
        (" ", None, "has an empty prompt"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(tmp_path, word, content, said):
    path = word if word == " " else str(tmp_path / word)
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(InputError, match=said):
        prompt_records(InstructSettings(dataset_name=["a"], sample_prompts=[path]))


def test_a_prompt_without_room_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(InputError, match="--max_new_tokens 600 are more than the model's 512"):
        train_adapter(config(max_new_tokens=600), ["instruct"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--max_new_tokens is 0, but must be at least 1"):
        config(max_new_tokens=0)
