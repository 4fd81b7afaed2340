"""Answers by greedy decoding, and their scores: batched as alone, ended by the template, scored without a hub."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate as evaluate_library
import pytest
import torch

from copra_llm.adapters import load_adapter_weights
from copra_llm.answer_scores import (
    exact_match,
    last_number,
    longest_common_subsequence,
    normalised,
    numeric,
    rouge_l,
    token_f1,
)
from copra_llm.cli import main
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.generate import ANSWER_METRICS, Prompt, Stop, generate, metric_path, prompts_of, question, stop_of
from copra_llm.models import load_adapter, load_base, load_tokenizer
from copra_llm.settings import ModelSettings
from copra_llm.tasks.instruct.encode import Encoder
from copra_llm.tasks.instruct.records import Text
from copra_llm.train import train_adapter

PAIRS = [("the film", "was long"), ("her song is a joy", "3 to hear"), ("once", "4 and more"), ("dull", "1,200")]


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory) -> Path:
    """An adapter that has learnt the pairs by heart, and their file."""
    folder = tmp_path_factory.mktemp("generate")
    data = folder / "pairs.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) for q, a in PAIRS]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = RunConfig().replace(
        model_name_or_path=str(tiny_llama), dataset_name=[str(data)], eval_dataset_name=[str(data)], method="lora",
        max_steps=150, per_device_train_batch_size=4, learning_rate=0.02, max_length=48, chat_template="plain",
        lora_target_modules=["all-linear"], checkpoint_at=[],
    )  # fmt: skip
    result = train_adapter(config, ["instruct"], folder / "run")
    assert result.metrics["dev/instruct/accuracy"] == 100.0, "learnt by heart"
    return folder


@pytest.fixture(scope="module")
def learnt(run, tiny_llama):
    """Model, encoder and prompts."""
    base = load_base(ModelSettings(model_name_or_path=str(tiny_llama)))
    encoder = Encoder(base.tokenizer, "plain")
    return load_adapter(base, run / "run" / "adapter"), encoder, prompts_of(encoder, [question(q) for q, _ in PAIRS])


# --- generation -------------------------------------------------------------------------------------------


def test_what_was_learnt_is_answered(learnt):
    """The chat template's prompt, unequal lengths in one batch, ended by the template's end of turn."""
    model, encoder, prompts = learnt
    assert len({len(p.input_ids) for p in prompts}) > 1, "padding takes part"
    stop = stop_of(encoder, chat=True)
    answers = generate(model, encoder.tokenizer, prompts, stop, max_new_tokens=20)
    assert answers == [answer for _, answer in PAIRS]


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_gives_what_each_prompt_gives_alone(learnt, batch_size):
    """Of untrained text too, to the last token, in the order asked; a model in training mode stays in it."""
    model, encoder, _ = learnt
    texts = ["a", "the song was long and dull but her film", "more", "to hear is a joy", "and", "once more once more"]
    prompts = prompts_of(encoder, [question(text) for text in texts])
    stop = stop_of(encoder, chat=True)
    alone = [generate(model, encoder.tokenizer, [p], stop, max_new_tokens=24)[0] for p in prompts]
    model.train()
    together = generate(model, encoder.tokenizer, prompts, stop, max_new_tokens=24, batch_size=batch_size)
    assert model.training
    assert together == alone and len(set(alone)) > 1
    plain = Stop((-1,))  # nothing ends it
    long = generate(model, encoder.tokenizer, prompts, plain, max_new_tokens=24, batch_size=batch_size)
    assert any(a != b for a, b in zip(long, alone, strict=True)), "the end of turn ends answers"


def test_it_is_greedy_decoding(learnt):
    """Against the likeliest token of the whole text, one after the other."""
    model, encoder, prompts = learnt
    ids = list(prompts[1].input_ids)
    with torch.no_grad():
        while len(ids) < 60 and ids[-1] != encoder.tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = encoder.tokenizer.decode(ids[len(prompts[1].input_ids) : -1]).strip()
    assert generate(model, encoder.tokenizer, prompts[1:2], stop_of(encoder, chat=True)) == [expected]


def test_a_models_own_settings_do_not_count(learnt, monkeypatch):
    model, encoder, prompts = learnt
    stop = stop_of(encoder, chat=True)
    settings = model.get_base_model().generation_config
    for name, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(settings, name, value)
    assert generate(model, encoder.tokenizer, prompts, stop, max_new_tokens=20) == [a for _, a in PAIRS]


def test_prompts_are_what_training_saw(tiny_llama):
    """The tokens before the first trained one, whichever template."""
    tokenizer = load_tokenizer(str(tiny_llama))
    from copra_llm.tasks.instruct.records import Conversation

    turns = ({"role": "user", "content": "the film"}, {"role": "assistant", "content": "was long"})
    for name in ("plain", "chatml", "alpaca"):
        encoder = Encoder(tokenizer, name)
        record = Conversation(turns, (), "here")
        whole = encoder.encode(record)
        (prompt,) = prompts_of(encoder, [record])
        assert prompt.input_ids == whole.input_ids[: len(prompt.input_ids)].tolist()
        assert int(whole.trained.argmax()) == len(prompt.input_ids) and prompt.reference == "was long"
    (prompt,) = prompts_of(encoder, [Text("the film", " was", "here")])
    assert tokenizer.decode(prompt.input_ids) == "the film" and prompt.reference == " was"
    with pytest.raises(InputError, match="here is text without a prompt"):
        prompts_of(encoder, [Text("", "was", "here")])


def test_what_ends_an_answer(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    eos = tokenizer.eos_token_id
    assert stop_of(Encoder(tokenizer, "plain"), chat=True) == Stop((eos,))
    assert stop_of(Encoder(tokenizer), chat=False) == Stop((eos,)), "text needs no template"
    assert stop_of(Encoder(tokenizer, "chatml"), chat=True) == Stop((eos,), "<|im_end|>"), "no token of this tokenizer"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    own = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_of(Encoder(tokenizer, "chatml"), chat=True) == Stop(tuple(sorted((eos, own))))


def test_a_text_can_end_answers(learnt):
    """Where the end of turn is several tokens: nothing after it, and not itself, is kept."""
    model, encoder, prompts = learnt
    (full,) = generate(model, encoder.tokenizer, prompts[1:2], Stop((encoder.tokenizer.eos_token_id,)))
    assert full == "3 to hear"
    stop = Stop((encoder.tokenizer.eos_token_id,), "to he")
    assert generate(model, encoder.tokenizer, prompts[:2], stop) == ["was long", "3"]


def test_no_room_for_an_answer(learnt):
    model, encoder, prompts = learnt
    with pytest.raises(InputError, match="tokens and --max_new_tokens 600 are more than the model's 512"):
        generate(model, encoder.tokenizer, prompts, Stop((1,)), max_new_tokens=600)
    with pytest.raises(InputError, match="--max_new_tokens is 0"):
        generate(model, encoder.tokenizer, [Prompt([1], None, "here")], Stop((1,)), max_new_tokens=0)


def test_adapters_are_swapped_by_the_evaluator(run, learnt):
    """One loaded model, several adapters; at scale 0 the base model answers."""
    from dataclasses import replace

    from copra_llm.saved_runs import read_run

    config = read_run(run / "run").config
    weights = load_adapter_weights(run / "run")
    silent = replace(weights, factors={k: replace(f, lora_B=f.lora_B * 0) for k, f in weights.factors.items()})
    evaluator = AdapterEvaluator(config, ["instruct"], "dev")
    _, encoder, prompts = learnt
    answers = []
    for adapter in (weights, silent, weights):
        evaluator.attach(adapter)
        model = evaluator.bench.classifier.model
        answers.append(generate(model, encoder.tokenizer, prompts, stop_of(encoder, chat=True), max_new_tokens=16))
    assert answers[0] == answers[2] == [a for _, a in PAIRS]
    assert answers[1] != answers[0]


# --- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She has 3 + 4 = 7 apples.", "7"),
        ("#### 18", "18"),
        ("16 - 3 - 4 = 9\n9 * 2 = $18\n#### 1,234.50 dollars, of 2000", "1234.50"),
        ("It costs -$5.25 a day", "-5.25"),
        ("from 10-3", "3"),
        ("(2)-1", "1"),
        ("$-5", "-5"),
        ("about .5 kg", "0.5"),
        ("1,2,3", "3"),
        ("in 2,000,000 years.", "2000000"),
        ("18.", "18"),
        ("7 #### none", "7"),
        ("48/2=<<48/2=24>>24", "24"),
        ("−3 degrees", "-3"),
        ("none", None),
    ],
)
def test_the_last_number(text, expected):
    from decimal import Decimal

    assert last_number(text) == (None if expected is None else Decimal(expected))


def test_numeric_answers():
    assert numeric("so she pays $18.00", "9 * 2 = 18\n#### 18") == 1.0
    assert numeric("18 or 19", "#### 18") == 0.0 and numeric("eighteen", "#### 18") == 0.0
    with pytest.raises(ValueError, match="has no number"):
        numeric("18", "eighteen")


def test_exact_match_and_f1():
    """By hand: 2 common words of 3 and 4 are 2 * 2 / 7."""
    assert normalised("The  Film, was\nan ART!") == "film was art"
    assert exact_match("The film.", "film") == 1.0 and exact_match("films", "film") == 0.0
    assert token_f1("film was long", "was it long indeed") == pytest.approx(4 / 7)
    assert token_f1("was was", "was") == pytest.approx(2 / 3), "with multiplicity"
    assert token_f1("", "") == token_f1("the", "a") == 1.0 and token_f1("film", "") == 0.0


def test_rouge_l():
    """Lin's own example (section 3.1): police kill the gunman, with LCS 3 and 2 of 4 words."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("The gunman!", reference) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert rouge_l("", reference) == rouge_l("nothing", reference) == 0.0
    assert longest_common_subsequence("ABCBDAB", "BDCABA") == 4


def test_rouge_l_is_rouge_scores(run):
    """Against the published package, where it is installed (with the extra lm-eval)."""
    rouge_score = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score")
    scorer = rouge_score.RougeScorer(["rougeL"], use_stemmer=False)
    for a, b in [
        ("The film was long, and dull.", "A long film; it was dull!"),
        ("x y z", "z y x y z"),
        ("1 200", "1,200"),
    ]:
        assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


def test_metrics_load_from_their_files(tmp_path, monkeypatch):
    """Through evaluate, offline, in percent."""
    said, wanted = ["the 7", "a long film"], ["7", "film"]
    expected = {"exact_match": 50.0, "f1": (100 + 2 / 3 * 100) / 2, "rouge_l": 100 * (2 / 3 + 1 / 2) / 2}
    for name in ANSWER_METRICS:
        metric = evaluate_library.load(metric_path(name), keep_in_memory=True)
        if name == "numeric":
            assert metric.compute(predictions=["the 7", "none"], references=["#### 7", "8"]) == {"numeric": 50.0}
        else:
            (found,) = metric.compute(predictions=said, references=wanted).items()
            assert found == (name, pytest.approx(expected[name]))
    with pytest.raises(InputError, match='no metric "rouge" .did you mean "rouge_l"'):
        metric_path("rouge")


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_answers(run, capsys):
    assert main(["generate", str(run / "run"), "--prompt", "the film", "once", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == ["was long", "4 and more"]


def test_the_command_scores_a_file(run, tmp_path, capsys):
    output = tmp_path / "record.json"
    command = ["generate", str(run / "run"), "--dataset_name", str(run / "pairs.jsonl"), "--max_new_tokens", "20"]
    assert main([*command, "--metrics", "exact_match", "rouge_l", "f1", "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == ["exact_match: 100.000", "rouge_l: 100.000", "f1: 100.000"]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["metrics"]["generate/f1"] == 100.0 and record["protocol"] == "generate"
    assert record["data"]["answers"][0]["answer"] == record["data"]["answers"][0]["reference"] == "was long"
    assert record["data"]["answers"][1]["place"].endswith("pairs.jsonl, line 2")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "give either --prompt TEXT or --dataset_name FILE"),
        (["--prompt", "a", "--dataset_name", "b"], "give either --prompt"),
        (["--prompt", "a", "--metrics", "f1"], "--prompt has none"),
        (["--dataset_name", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--dataset_name", "PAIRS", "--metrics", "rouge"], 'did you mean "rouge_l"?'),
        (["--dataset_name", "PAIRS", "--metrics", "numeric"], "line 1: the answer has no number"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--prompt", "a", "--max_new_tokens", "600"], 'the prompt "a": '),
        (["--prompt", "a", "--chat_template", "chatmi"], 'did you mean "chatml"?'),
        (["--prompt", "a", "--output", "FOLDER"], "which is a folder"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, capsys, flags, expected):
    places = {"PAIRS": str(run / "pairs.jsonl"), "FOLDER": str(tmp_path)}
    assert main(["generate", str(run / "run"), *(places.get(flag, flag) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
