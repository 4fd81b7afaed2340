"""Multiple choice by log-likelihood: read exactly, scored as lm-evaluation-harness does, used by the whole suite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.choice_model import ChoiceModel, encode_pair
from copra_llm.cli import main
from copra_llm.coalitions import CoalitionGame
from copra_llm.config import RunConfig
from copra_llm.conversations import INSTRUCT
from copra_llm.errors import InputError
from copra_llm.evaluate import evaluate
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import interpolate, line
from copra_llm.models import add_adapter, load_base
from copra_llm.tasks.choices import choice_task_names, get_choice_task, load_choices, read_choices
from copra_llm.tasks.mtl15 import task_names
from copra_llm.variants import figure_variants, variants_record

CHOOSE = "Please choose the correct answer to the question: "
FILL = "Please choose the correct answer to fill in the blank to complete the given sentence: "


def arc(question: str, *choices: str, answer: int) -> dict:
    listed = " ".join(f"Answer{i}: {choice}" for i, choice in enumerate(choices, 1))
    names = "/".join(f"answer{i}" for i in range(1, len(choices) + 1))
    text = f"{CHOOSE}{question}\n\n{listed}\n\nAnswer format: {names}"
    return {"instruction": text, "input": "", "output": f"the correct answer is answer{answer}",
            "answer": f"answer{answer}"}  # fmt: skip


def blank(sentence: str, first: str, second: str, answer: int) -> dict:
    text = f"{FILL}{sentence}\n\nOption1: {first} Option2: {second} Answer format: option1/option2"
    return {"instruction": text, "input": "", "output": "", "answer": f"option{answer}"}


RECORDS = {
    "arc_easy": [
        arc("What was the film?", "a joy to hear", "long and dull", "long and loud", "a", answer=2),
        arc("Which song is that, and\nwhose?", "hers", "the one of the year", "his own", answer=1),
        arc("The market fell because", "of rain", "of rain and of wind", "oil", "of war", "it did", answer=5),
        arc("Who won the match on Sunday, after so long a wait for it?", "the home team", "nobody", "x", "y", answer=3),
        arc("Is it?", "no", "yes", "maybe so", "never", answer=4),
    ],
    "winogrande": [
        blank("The trophy is not in the case because _ is too big.", "trophy", "the old case", 1),
        blank("_ was late, so the film began without him.", "Paul", "George", 2),
        blank("Anna gave it to Maria, for _ had asked.", "Anna", "Maria", 2),
    ],
    "boolq_closed": [
        {"instruction": "Please answer the following question with true or false, question: is it long?\n\n"
         "Answer format: true/false", "input": "", "output": "", "answer": answer}
        for answer in ("true", "false")
    ],
}  # fmt: skip
FOLDERS = {"arc_easy": "ARC-Easy", "boolq_closed": "boolq"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The records as a folder of evaluations."""
    folder = tmp_path_factory.mktemp("commonsense")
    for name, records in RECORDS.items():
        place = folder / FOLDERS.get(name, name) / "test.jsonl"
        place.parent.mkdir()
        place.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory) -> list[Path]:
    """Two adapters of the tiny model whose B is not zero."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (0, 1):
        config = RunConfig().replace(model_name_or_path=str(tiny_llama), lora_target_modules=["all-linear"])
        model = add_adapter(load_base(config.model), config.lora, seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.arange(p.numel()).reshape(p.shape).remainder(5 + seed).float() * 0.03)
        model.save_pretrained(folder / str(seed))
    return [folder / "0", folder / "1"]


@pytest.fixture
def config(tiny_llama, root):
    def make(**changes) -> RunConfig:
        own = {"model_name_or_path": str(tiny_llama), "data_root": str(root), "max_length": 256}
        return RunConfig().replace(**own | changes)

    return make


def reference_scores(model, tokenizer, pairs, max_length: int) -> list[float]:
    """Each choice alone, from the logits of the whole row."""
    scores = []
    for context, continuation in pairs:
        before, after = encode_pair(tokenizer, context, continuation)
        row = torch.tensor((before + after)[-max_length - 1 :])
        with torch.no_grad():
            log_probs = model(input_ids=row[None, :-1]).logits[0].float().log_softmax(-1)
        scores.append(float(log_probs[torch.arange(len(row) - 1), row[1:]][-len(after) :].sum()))
    return scores


# --- records ----------------------------------------------------------------------------------------------


def test_question_and_choices_are_read_out_of_the_instruction(root):
    first, second, *_ = load_choices(get_choice_task("arc_easy"), "test", root)
    assert first.choices == ("a joy to hear", "long and dull", "long and loud", "a") and first.label == 1
    assert first.pairs[0] == ("Question: What was the film?\nAnswer:", " a joy to hear")
    assert second.question == "Which song is that, and\nwhose?" and len(second.choices) == 3
    assert second.place.endswith("ARC-Easy/test.jsonl, line 2")
    trophy = load_choices(get_choice_task("winogrande"), "test", root)[0]
    assert trophy.pairs == (("The trophy is not in the case because trophy", " is too big."),
                            ("The trophy is not in the case because the old case", " is too big."))  # fmt: skip
    yes, no = load_choices(get_choice_task("boolq_closed"), "test", root)
    assert yes.pairs == (("Question: is it long?\nAnswer:", " no"), ("Question: is it long?\nAnswer:", " yes"))
    assert (yes.label, no.label) == (1, 0)


@pytest.mark.parametrize("name", choice_task_names())
def test_every_evaluation_has_its_shape(name):
    """An instruction made of the specification's own parts is read back."""
    task = get_choice_task(name)
    question = "so _ is it" if task.blank else "is it so?"
    if task.answers:
        body, answers = "Answer format: true/false", list(task.answers)
    else:
        answers = [f"{task.mark.lower()}{i}" for i in (1, 2)]
        body = f"{task.mark}1: one\n\n{task.mark}2: two\n\nAnswer format: {'/'.join(answers)}"
    row = {"instruction": f"{task.opening}{question}\n\n{body}", "input": "", "answer": answers[1]}
    (example,) = read_choices(task, [("here", row)])
    assert example.question == question and example.label == 1
    assert len(example.choices) == len(example.pairs) == 2


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda r: r | {"instruction": "What is this?"}, "line 2: the instruction is not"),
        (lambda r: r | {"answer": "answer9"}, 'line 2: the answer "answer9" is none of answer1, answer2, answer3'),
        (lambda r: {"answer": "answer1"}, 'line 2 has no text "instruction"'),
        (lambda r: r | {"input": "more"}, 'line 2: "input" holds text'),
        (lambda r: r | {"instruction": r["instruction"].replace("hers", "Answer2: hers")}, "line 2: the choices"),
        (lambda r: r | {"instruction": r["instruction"].replace("hers", "")}, "line 2: the question or a choice"),
        (lambda r: [r], 'line 2 has no text "instruction"'),
        (lambda r: "not JSON", "line 2 has no text"),
    ],
)
def test_a_record_of_another_shape_is_refused(tmp_path, change, expected):
    path = tmp_path / "ARC-Easy" / "test.jsonl"
    path.parent.mkdir()
    rows = [RECORDS["arc_easy"][0], change(RECORDS["arc_easy"][1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        load_choices(get_choice_task("arc_easy"), "test", tmp_path)


def test_a_sentence_needs_one_blank():
    for sentence in ("no blank here", "_ and _ went", "it ends with _"):
        with pytest.raises(InputError, match="here: the sentence needs one blank"):
            read_choices(get_choice_task("winogrande"), [("here", blank(sentence, "a", "b", 1))])


# --- for lm-evaluation-harness ----------------------------------------------------------------------------


def test_tasks_for_the_harness(root, tmp_path, capsys):
    """Data and settings say the same pairs: context, delimiter and choice joined are what is scored here."""
    out = tmp_path / "tasks"
    assert main(["data", "lm-eval", "arc_easy", "winogrande", "--data_root", str(root), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"lm_eval --include_path {out} --tasks copra_arc_easy,copra_winogrande ...\n"
    for name in ("arc_easy", "winogrande"):
        settings = yaml.safe_load((out / f"copra_{name}.yaml").read_text(encoding="utf-8"))
        lines = Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
        examples = load_choices(get_choice_task(name), "test", root)
        for example, row in zip(examples, map(json.loads, lines), strict=True):
            asked, target = row[settings["doc_to_text"]], row[settings["doc_to_target"]]
            space = settings["target_delimiter"]
            if isinstance(asked, int):  # then the choices are contexts, as the harness takes it
                label, pairs = asked, [(choice, space + target) for choice in row["choices"]]
            else:
                label, pairs = target, [(asked, space + choice) for choice in row["choices"]]
            assert (tuple(pairs), label) == (example.pairs, example.label)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["arc_hard"], 'there is no evaluation "arc_hard"'),
        (["arc_easy", "piqa"], "so piqa has no test split"),
        (["arc_easy", "--max_eval_samples", "0"], "--max_eval_samples is 0"),
    ],
)
def test_nothing_is_written_of_bad_input(root, tmp_path, capsys, words, expected):
    output = tmp_path / "tasks"
    assert main(["data", "lm-eval", *words, "--data_root", str(root), "--output", str(output)]) == 2
    assert expected in capsys.readouterr().err and not output.exists()


# --- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_scores_are_those_of_each_choice_alone(config, adapters, name, shares, monkeypatch):
    """Padding, unequal numbers of choices and shared prefixes change nothing beyond float32's rounding."""
    monkeypatch.setattr("copra_llm.choice_model.wide_enough", lambda model, max_length: shares)
    bench = build(config(), [name], adapter=adapters[0], splits=("test",))
    split, model = bench.splits["test"][name], bench.classifier.eval()
    assert any(e.shared for e in split.encoded) == shares
    batch = model.collate(bench.tasks[0], split.encoded, split.labels)
    with torch.no_grad():
        scores = model(batch, scores=True)
    examples = load_choices(bench.tasks[0], "test", config().data.data_root)
    for row, example in zip(scores, examples, strict=True):
        expected = reference_scores(model.model, model.tokenizer, example.pairs, 256)
        np.testing.assert_allclose(row[: len(expected)].numpy(), expected, atol=1e-4, rtol=0)
        assert torch.isneginf(row[len(expected) :]).all()


def test_what_is_too_long_loses_its_beginning(config, adapters, capsys):
    bench = build(config(max_length=10), ["arc_easy"], adapter=adapters[0], splits=("test",))
    split, model = bench.splits["test"]["arc_easy"], bench.classifier.eval()
    assert 0 < bench.counts["test"].cut <= bench.counts["test"].kept == 5
    assert max(len(row) for e in split.encoded for row in e.rows) == 11, "the last token is only predicted"
    with torch.no_grad():
        scores = model(model.collate(bench.tasks[0], split.encoded, split.labels), scores=True)
    for row, example in zip(scores, load_choices(bench.tasks[0], "test", config().data.data_root), strict=True):
        expected = reference_scores(model.model, model.tokenizer, example.pairs, 10)
        np.testing.assert_allclose(row[: len(expected)].numpy(), expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="line .: a choice has .* tokens, but must have 1 to --max_length 2"):
        build(config(max_length=2), ["arc_easy"], adapter=adapters[0], splits=("test",))
    command = ["evaluate", str(adapters[0]), "--task", "arc_easy", "--data_root", config().data.data_root]
    assert main([*command, "--max_length", "10"]) == 0
    assert "longer than --max_length 10 and were cut" in capsys.readouterr().err


def test_white_space_belongs_to_the_continuation(config, adapters):
    tokenizer = load_base(config().model).tokenizer
    assert encode_pair(tokenizer, "the film ", "was") == encode_pair(tokenizer, "the film", " was")
    before, after = encode_pair(tokenizer, "the film \n", "was")
    assert tokenizer.decode(before) == "the film" and tokenizer.decode(after) == " \nwas"


def test_outcomes_and_metrics(config, adapters):
    """Accuracy by the sum, acc_norm by the sum a character, loss of the softmax over the example's own choices."""
    evaluator = AdapterEvaluator(config(per_device_eval_batch_size=2), ["arc_easy"], "test")
    outcome = evaluator(load_adapter_weights(adapters[0]), "arc_easy")
    model = evaluator.bench.classifier
    examples = load_choices(evaluator.bench.tasks[0], "test", config().data.data_root)
    for i, example in enumerate(examples):
        scores = torch.tensor(reference_scores(model.model, model.tokenizer, example.pairs, 256))
        assert outcome.predicted[i] == scores.argmax()
        assert outcome.predicted_by_length[i] == (scores / torch.tensor([len(c) for c in example.choices])).argmax()
        expected = F.cross_entropy(scores[None], torch.tensor([example.label]))
        # A difference of sums of float32 log-probabilities around 30.
        assert outcome.nll[i] == pytest.approx(float(expected), abs=1e-4)
    metrics = outcome.metrics("test/arc_easy")
    right = [outcome.predicted_by_length[i] == e.label for i, e in enumerate(examples)]
    assert metrics["test/arc_easy/acc_norm"] == 100.0 * np.mean(right)
    assert metrics["test/arc_easy/accuracy"] == 100.0 * np.mean(outcome.correct)
    assert (outcome.predicted != outcome.predicted_by_length).any(), "or acc_norm is not shown to differ"


def test_the_loss_is_that_of_the_evaluation(config, adapters):
    bench = build(config(), ["arc_easy"], adapter=adapters[0], splits=("test",))
    split = bench.splits["test"]["arc_easy"]
    evaluator = AdapterEvaluator(config(), ["arc_easy"], "test")
    expected = evaluate(evaluator.accelerator, bench.classifier, split, 5).loss
    loss = bench.classifier.eval()(bench.classifier.collate(bench.tasks[0], split.encoded, split.labels))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


# --- the suite --------------------------------------------------------------------------------------------


def test_interpolation_pruning_and_shapley_values(config, adapters):
    weights = [load_adapter_weights(path) for path in adapters]
    evaluator = AdapterEvaluator(config(per_device_eval_batch_size=3), ["arc_easy", "winogrande"], "test")
    curve = interpolate(*weights, evaluator, "winogrande", method="fusion", alphas=line(3))
    assert curve.loss[-1] == evaluator(weights[0], "winogrande").loss != curve.loss[0]
    whole = figure_variants(["all"], 0, densities=(), quantised=("int8",))[:1]
    record = variants_record(weights[0], config(), "arc_easy", whole, evaluator)
    assert record.data["rows"][0]["loss"] == evaluator(weights[0], "arc_easy").loss
    masks = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)
    for task in ("arc_easy", "winogrande"):
        game = CoalitionGame(evaluator, weights[0], task)
        assert game.note is None, "hidden states are shared between coalitions too"
        found, plain = game.outcomes(masks), game.plain_outcomes(masks)
        assert np.array_equal(found.nll, plain.nll) and np.array_equal(found.correct, plain.correct)


def test_coalitions_are_run_one_at_a_time(config, adapters, monkeypatch):
    """An example has several rows, and not all as many: coalitions side by side are refused, and said to be."""
    monkeypatch.setattr("copra_llm.choice_model.wide_enough", lambda model, max_length: False)
    evaluator = AdapterEvaluator(config(), ["arc_easy"], "test")
    game = CoalitionGame(evaluator, load_adapter_weights(adapters[0]), "arc_easy", pack=2)
    assert game.pack == 1 and "several rows an example" in game.note
    masks = np.eye(4, dtype=bool)
    assert np.array_equal(game.outcomes(masks).nll, game.plain_outcomes(masks).nll)


def test_the_command(root, adapters, tmp_path, capsys):
    command = ["evaluate", str(adapters[0]), "--max_length", "256"]
    assert main([*command, "--task", "arc_easy", "--data_root", str(root), "--output", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "test/arc_easy/accuracy" in out and "test/arc_easy/acc_norm" in out
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["test/arc_easy/loss"] > 0


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--task", "arc_esay"], 'there is no task "arc_esay" (did you mean "arc_easy"?)'),
        (["--task", "arc_easy", "--split", "dev"], "so arc_easy has no dev split; give --split test"),
        (["--task", "piqa"], "give the folder that holds it as --data_root"),
        (["--task", "arc_easy", "--data_root", "hub"], 'arc_easy has no data under --data_root "hub"'),
    ],
)
def test_bad_input_is_one_sentence(root, adapters, capsys, flags, expected):
    assert main(["evaluate", str(adapters[0]), "--data_root", str(root), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_evaluations_are_not_trained_on_and_need_a_causal_model(config, tiny_bert, adapters):
    with pytest.raises(InputError, match="arc_easy is for evaluation"):
        build(config(), ["arc_easy"], splits=("train",))
    named = config(dataset_name=["data.jsonl"], tasks=["arc_easy"])
    with pytest.raises(InputError, match="these conversations are called arc_easy, which is an evaluation's name"):
        build(named, ["arc_easy"], splits=("train",))
    with pytest.raises(InputError, match="is of the kind encoder, but choices are scored by a causal"):
        ChoiceModel(load_base(config(model_name_or_path=str(tiny_bert)).model), torch.nn.Identity(), 128)
    with pytest.raises(InputError, match='there is no evaluation "sst2"'):
        build(config(), ["arc_easy", "sst2"], adapter=adapters[0], splits=("test",))


def test_no_evaluation_has_the_name_of_another_task():
    """One flag, `--task`, names them all."""
    assert not set(choice_task_names()) & {*task_names(), INSTRUCT}
