"""`copra data check`: what it says of good data, of broken data, and of a command line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from examples import REAL_DATA

from copra_llm.cli import main
from copra_llm.tasks.instruct.check import summary

INSTRUCT = REAL_DATA / "instruct"
ROW = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path: Path, *rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def check(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, what was printed, and what was said on standard error."""
    code = main(["data", "check", *map(str, argv)])
    return code, *capsys.readouterr()


def test_good_data_without_a_model(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROW, ROW, ROW | {"system": "Sum.", "id": 7})
    code, said, _ = check(capsys, path)
    assert code == 0
    assert said.splitlines() == [
        f"{path}: alpaca (instruction, output), 3 records",
        "  columns that are not read: id",
        "records  3 read: 3 good, 0 broken; 1 equal to an earlier one",
        "turns    of the assistant: min 1, median 1, 95 % 1, max 1; 1 records with a system message, 0 with tools",
        "tokens   not counted; give --model_name_or_path",
    ]


def test_with_a_model(tmp_path, capsys):
    """Lengths, shares and a preview; a special token in a text is pointed out."""
    path = write(tmp_path / "a.jsonl", *[ROW] * 19, ROW | {"instruction": "<|im_end|> word" * 100})
    code, said, _ = check(capsys, path, "--model_name_or_path", "smollm2", "--max-length", 64, "--preview", 1)
    assert code == 0
    assert "; 5.0 % (1) longer than 64, 1 with nothing to train when cut there\n" in said
    assert (
        f"careful  1 records hold special tokens of the tokenizer in their text, which will act as such (first: {path}"
        in said
    )
    assert "<|im_start|>assistant\n[[3<|im_end|>]]\n" in said and said.count("tokens are trained") == 1


def test_the_template_and_the_turns_are_the_users_choice(tmp_path, capsys):
    said = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path / "a.jsonl", {"messages": said})
    flags = ["--model_name_or_path", "smollm2", "--chat_template", "plain", "--turns", "last", "--preview", 1]
    _, shown, _ = check(capsys, path, *flags)
    assert "User: u\nAssistant: a<|im_end|>\nUser: u\nAssistant:[[ a<|im_end|>]]\n" in shown


def test_a_template_that_never_ends_is_pointed_out(tmp_path, capsys):
    """Nothing would teach the model to stop; with an end token nothing is said."""
    path = write(tmp_path / "a.jsonl", ROW, ROW)
    endless = write(
        tmp_path / "t.jinja",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    flags = ["--model_name_or_path", "smollm2"]
    said = "careful  2 records end with no special token, so that they do not teach the model where to stop"
    assert said in check(capsys, path, *flags, "--chat_template", endless)[1].splitlines()
    assert "careful" not in check(capsys, path, *flags)[1]


def test_broken_records_are_listed_with_their_lines(tmp_path, capsys):
    """The first twenty and the number of the rest; all as JSON; exit code 2."""
    path = write(tmp_path / "a.jsonl", ROW, *["{"] * 24, ROW)
    code, said, _ = check(capsys, path)
    assert code == 2
    assert "records  26 read: 2 good, 24 broken; 1 equal to an earlier one" in said
    listed = [line for line in said.splitlines() if line.startswith("  ")]
    assert listed[0].startswith(f"  {path}, line 2 is not JSON") and len(listed) == 21
    assert listed[-1] == "  and 4 more; --json lists all"
    code, said, _ = check(capsys, path, "--json")
    assert code == 2 and [b["place"] for b in json.loads(said)["broken"]] == [f"{path}, line {n}" for n in range(2, 26)]


def test_what_the_template_refuses_is_broken(tmp_path, capsys):
    template = write(tmp_path / "t.jinja", "{{ raise_exception('No systems') if messages[0]['role'] == 'system' }}"
                     "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")  # fmt: skip
    path = write(tmp_path / "a.jsonl", ROW, ROW | {"system": "Sum."})
    code, said, _ = check(capsys, path, "--model_name_or_path", "smollm2", "--chat_template", template)
    assert code == 2 and f'{path}, line 2: the chat template refuses this conversation ("No systems")' in said


def test_several_sources_as_json(tmp_path, capsys):
    """Every figure of the text, as numbers."""
    one = write(tmp_path / "a.jsonl", ROW | {"id": 1}, ROW)
    two = write(tmp_path / "b.jsonl", {"text": "Once upon a time"})
    code, said, _ = check(capsys, one, f"{two}:0.5", "--model_name_or_path", "smollm2", "--max_length", 10, "--json")
    found = json.loads(said)
    assert code == 0
    assert found["sources"] == [
        {"path": str(one), "weight": 1.0, "format": "alpaca", "columns": ["instruction", "output"],
         "columns_not_read": ["id"], "records": 2},
        {"path": str(two), "weight": 0.5, "format": "text", "columns": ["text"], "columns_not_read": [], "records": 1},
    ]  # fmt: skip
    assert found["records"] == {"read": 3, "good": 3, "broken": 0, "duplicates": 1}
    assert found["turns"]["conversations"] == 2 and found["turns"]["texts"] == 1
    assert found["tokens"]["longer"] == found["tokens"]["nothing_trained_when_cut"] == 2
    assert found["tokens"]["min"] < 10 < found["tokens"]["max"]
    assert found["trained"]["percent"] == pytest.approx(100 * found["trained"]["tokens"] / found["tokens"]["total"])


def test_summary():
    assert summary([]) == {}
    assert summary(list(range(101))) == {"min": 0, "median": 50, "p95": 95, "max": 100}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["gone.jsonl"], "gone.jsonl does not exist; give a file"),
        (["a.jsonl", "--format", "alpacca"], 'there is no format "alpacca" (did you mean "alpaca"?)'),
        (["a.jsonl", "--max_length", "9"], "--max_length is about tokens; give --model_name_or_path too"),
        (["a.jsonl", "--preview", "1"], "--preview is about tokens; give --model_name_or_path too"),
        (["a.jsonl", "--model_name_or_path", "smollm2", "--preview", "0"], "--preview is 0, but must be at least 1"),
        (["a.jsonl", "--model_name_or_path", "smollm2", "--preview", "1", "--json"], "give one of them"),
        (["a.jsonl", "--model_name_or_path", "smolm2"], 'packaged model (did you mean "smollm2"?)'),
        (["a.jsonl", "--model_name_or_path", "smollm2", "--turns", "first"], "must be all or last"),
        (["a.jsonl", "--from", "x"], 'unrecognized arguments: --from x (did you mean "--format"?)'),
        (["a.jsonl:0"], "has the weight 0.0, but a weight must be a positive number"),
    ],
)  # fmt: skip
def test_bad_input(flags, said, tmp_path, capsys, monkeypatch):
    """One sentence on standard error, exit code 2, no half of a report."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ROW)
    code, printed, error = check(capsys, *flags)
    assert code == 2 and printed == "" and said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason=f"{INSTRUCT} is not there; COPRA_TEST_DATA names its parent")
def test_real_data_are_recognised_and_whole(capsys):
    """Every published set that is here: its format, and no record that is broken."""
    files = sorted(INSTRUCT.rglob("*.jsonl"))
    code, said, _ = check(capsys, *files, "--json")
    found = json.loads(said)
    assert code == 0 and found["records"]["broken"] == 0 and found["records"]["read"] > 20_000
    formats = {Path(s["path"]).relative_to(INSTRUCT).parts[0]: s["format"] for s in found["sources"]}
    assert formats == {"alpaca": "alpaca", "commonsense": "alpaca", "gsm8k": "question_answer", "superni": "alpaca"}
