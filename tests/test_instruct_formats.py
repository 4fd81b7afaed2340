"""Which records are in files of every shape, and what is said of those that are broken?"""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.formats import FORMATS, read_record, recognise
from copra_llm.tasks.instruct.mixture import epoch_order
from copra_llm.tasks.instruct.records import Broken, Conversation, Text, digest
from copra_llm.tasks.instruct.sources import Reader, Source, parse_sources, strict

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read(row: dict, name: str | None = None):
    return read_record(row, name or recognise(row), "f, line 1", only=name is None)


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def lines(path: Path, *rows) -> Path:
    """A JSONL file; text and bytes are lines as they stand."""
    written = (row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows)
    path.write_bytes(b"\n".join(row.encode() if isinstance(row, str) else row for row in written) + b"\n")
    return path


def through(path, **settings) -> list:
    return list(Reader(Source(str(path), **settings)))


# --- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("alpaca", ALPACA, [("user", "Add.\n\n1 and 2"), ("assistant", "3")]),
        ("alpaca", ALPACA | {"input": ""}, [("user", "Add."), ("assistant", "3")]),
        ("alpaca", {"instruction": "Add.", "output": "3"}, [("user", "Add."), ("assistant", "3")]),
        ("alpaca", ALPACA | {"input": None, "system": "Sum."},
         [("system", "Sum."), ("user", "Add."), ("assistant", "3")]),
        ("dolly", {"instruction": "Add.", "context": "1, 2", "response": "3"},
         [("user", "Add.\n\n1, 2"), ("assistant", "3")]),
        ("question_answer", {"question": "1 + 2?", "answer": "3"}, [("user", "1 + 2?"), ("assistant", "3")]),
        ("messages", {"messages": [USER, SAID]}, [("user", "Hi"), ("assistant", "Hello")]),
        ("messages", {"messages": [{"role": "developer", "content": "Be."}, USER, SAID], "text": "unread"},
         [("system", "Be."), ("user", "Hi"), ("assistant", "Hello")]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
         [("user", "Hi"), ("assistant", "Hello")]),
        ("sharegpt", {"conversations": [USER, SAID], "system": "Be."},
         [("system", "Be."), ("user", "Hi"), ("assistant", "Hello")]),
        ("prompt_completion", {"prompt": [USER], "completion": [SAID]}, [("user", "Hi"), ("assistant", "Hello")]),
    ],
)  # fmt: skip
def test_conversations(name, row, expected):
    """Recognised by their columns, in the roles of chat templates."""
    assert recognise(row) == name
    assert turns(read(row)) == expected


def test_texts():
    """For no chat template: a completion after its prompt, and plain text."""
    assert read({"prompt": "1 + 2 =", "completion": " 3"}) == Text("1 + 2 =", " 3", "f, line 1")
    assert read({"text": "Once"}) == Text("", "Once", "f, line 1")


def test_every_format_is_recognised_by_its_own_columns():
    for name, shape in FORMATS.items():
        assert recognise(dict.fromkeys(shape.columns, "x")) == name


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert turns(read({"messages": [USER, {"role": "assistant", "content": parts}]}))[1] == ("assistant", "Hello")


def test_tool_calls_get_objects_as_arguments():
    """As templates want them; OpenAI writes JSON text, ShareGPT a message of its own."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "3", "tool_call_id": "1"}
    openai = read({"messages": [USER, asked, answer, SAID], "tools": json.dumps([TOOL])})
    assert openai.messages[1]["tool_calls"][0] == call | {"function": {"name": "add", "arguments": {"a": 1}}}
    assert openai.messages[1]["content"] == "" and openai.messages[2]["tool_call_id"] == "1"
    assert openai.tools == (TOOL,)
    raw = [("human", "Hi"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "3"),
           ("gpt", "Hello")]  # fmt: skip
    sharegpt = read({"conversations": [{"from": who, "value": said} for who, said in raw], "tools": [TOOL]})
    assert sharegpt.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [m["role"] for m in sharegpt.messages] == [m["role"] for m in openai.messages]


def test_what_is_context_only():
    """Assistant turns of a prompt, and those that OpenAI's weight 0 names; a system column moves the indices on."""
    again = [USER, SAID]
    assert read({"prompt": [*again, USER], "completion": [SAID]}).untrained == {1}
    weighted = {"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}]}
    assert read(weighted).untrained == {1} and "weight" not in read(weighted).messages[1]
    shifted = {"conversations": weighted["messages"], "system": "Be."}
    assert read(shifted).untrained == {2}


def test_digest_knows_content_not_place():
    row = {"messages": [USER, SAID]}
    one, two = (read_record(row, "messages", f"f, line {i}") for i in (1, 2))
    assert digest(one) == digest(two)
    others = [
        read({"messages": [USER, SAID | {"content": "Hello!"}]}),
        read(row | {"tools": [TOOL]}),
        read({"prompt": "a", "completion": "b"}),
        read({"prompt": "", "completion": "ab"}),
        read({"messages": [USER, SAID | {"weight": 0}, USER, SAID]}),
        read({"messages": [USER, SAID, USER, SAID]}),
    ]
    assert len({digest(record) for record in (one, *others)}) == 1 + len(others)


# --- broken records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, said",
    [
        ([1], 'f, line 1 holds a list, but must be an object with named columns'),
        (ALPACA | {"output": " "}, 'the column "output" is empty; fill it, or remove the record'),
        (ALPACA | {"instruction": "", "input": ""}, 'the column "instruction" is empty'),
        (ALPACA | {"output": 3}, 'the column "output" is a number (3), but must be text'),
        (ALPACA | {"input": ["a"]}, 'the column "input" is a list, but must be text'),
        (ALPACA | {"output": "a \ud83d"}, "holds half a character (\\ud83d), which no tokenizer reads"),
        ({"instruction": "Add."}, 'the column "output" is missing; alpaca needs instruction and output'),
        ({"text": "a"}, 'the record is of the format "text", but "alpaca" is expected here'),
    ],
)  # fmt: skip
def test_a_broken_row(row, said):
    with pytest.raises(InputError) as refused:
        read_record(row, "alpaca", "f, line 1")
    assert str(refused.value).startswith("f, line 1") and said in str(refused.value)


@pytest.mark.parametrize(
    "messages, said",
    [
        ("Hi", "the conversation is text, but must be a list of messages"),
        ([], "the conversation is empty, but must be a list of messages"),
        (["Hi"], "message 1 is text, but must be an object with role and content"),
        ([USER, {"content": "x"}], "message 2 has no role, but the roles are system, user, assistant, tool"),
        ([USER, {"role": "critic", "content": "x"}], "message 2 has the role 'critic'"),
        ([USER, SAID | {"content": "\n"}], "message 2, the assistant's, is empty; fill it, or remove the record"),
        ([USER, {"role": "assistant"}], "message 2: its content is missing, but must be text"),
        ([USER, SAID | {"content": [{"type": "image_url"}]}], 'message 2 holds a part of type "image_url"'),
        ([SAID], "begins with a message of role assistant, but must go on with system or user"),
        ([USER, USER, SAID], "has after message 1, the user's, a message of role user, but must go on with assistant"),
        ([USER, SAID, SAID], "must go on with user or tool; mend the order"),
        ([USER, SAID, USER], "ends with a message of role user, but must end with assistant; remove the rest"),
        ([USER, SAID | {"weight": 0}], "no assistant message is to be trained; remove the record"),
        ([USER, SAID | {"tool_calls": "add"}], "message 2: tool_calls is text, but must be a list"),
        ([USER, SAID | {"tool_calls": [{}]}], "message 2 has a tool call without a function's name"),
        ([USER, SAID | {"tool_calls": [{"name": "add", "arguments": "a=1"}]}],
         "message 2: the arguments of add is text that is not JSON"),
    ],
)  # fmt: skip
def test_a_broken_conversation(messages, said):
    with pytest.raises(InputError) as refused:
        read({"messages": messages}, "messages")
    assert str(refused.value).startswith("f, line 1") and said in str(refused.value)


@pytest.mark.parametrize("tools, said", [("{", "text that is not JSON"), ({}, "must be a list"), (["add"], "its JSON")])
def test_broken_tools(tools, said):
    with pytest.raises(InputError, match=said):
        read({"messages": [USER, SAID], "tools": tools or {"a": 1}})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "weight"]
    ), inner, max_size=4),
)  # fmt: skip
ROLE = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "function_call", "observation"])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": st.text(max_size=3) | JSON}, optional={"tool_calls": JSON})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_record_it_is_read_or_refused_with_its_place(data):
    """No other exception, in any format; what is read can be told from others and ends with something to train."""
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    shape = FORMATS[name]
    value = JSON | st.text() | st.lists(MESSAGE, max_size=4)
    required, optional = (dict.fromkeys(columns, value) for columns in (shape.columns, shape.optional))
    row = data.draw(st.fixed_dictionaries(required, optional=optional))
    try:
        record = read_record(row, name, "f, line 1", only=False)
    except InputError as refused:
        assert str(refused).startswith("f, line 1") and str(refused)[len("f, line 1")] in ":, "
        return
    assert len(digest(record)) == 16
    assert record.completion if isinstance(record, Text) else record.messages[-1]["role"] == "assistant"


# --- files ------------------------------------------------------------------------------------------------


def test_a_line_that_cannot_be_read_costs_that_line_alone(tmp_path):
    path = lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(ALPACA).encode(), "", '{"instruction": "A', ALPACA,
                 b'{"instruction": "\xff"}', "[" * 100_000, ALPACA)  # fmt: skip
    found = through(path)
    assert [record.place for record in found] == [f"{path}, line {n}" for n in (1, 3, 4, 5, 6, 7)]
    assert [type(record) for record in found] == [Conversation, Broken, Conversation, Broken, Broken, Conversation]
    assert found[1].sentence == (
        f"{path}, line 3 is not JSON (Unterminated string starting at, column 17); mend or remove it"
    )
    assert found[3].sentence == f"{path}, line 5 is not UTF-8 text (byte 18); mend or remove it"
    assert "JSON too deep" in found[4].sentence


def test_strict_reading_stops_at_the_first_with_the_number_of_the_others(tmp_path):
    path = lines(tmp_path / "a.jsonl", ALPACA, "{", ALPACA, ALPACA | {"output": ""}, {"text": "a"})
    with pytest.raises(InputError) as refused:
        list(strict(through(path)))
    assert str(refused.value).startswith(f"{path}, line 2 is not JSON")
    assert str(refused.value).endswith("(and 2 more broken after it: `copra data check` lists them)")
    alone = lines(tmp_path / "b.jsonl", ALPACA, "{")
    with pytest.raises(InputError, match="mend or remove it$"):
        list(strict(through(alone)))
    assert len(list(strict(through(lines(tmp_path / "c.jsonl", ALPACA, ALPACA))))) == 2


def test_formats_are_not_mixed_in_one_file_unless_one_is_named(tmp_path):
    both = {"messages": [USER, SAID], **ALPACA}
    path = lines(tmp_path / "a.jsonl", ALPACA, {"question": "a", "answer": "b"}, both)
    kinds = [record.sentence if isinstance(record, Broken) else None for record in through(path)]
    assert kinds[0] is None
    assert 'is of the format "question_answer", but "alpaca" is expected' in kinds[1]
    assert 'is of the format "messages", but "alpaca" is expected' in kinds[2]
    assert not isinstance(through(path, format="alpaca")[2], Broken)


def test_a_file_of_no_known_shape(tmp_path):
    """The columns that are there, and those of every format; a later record may still be known."""
    first, second = through(lines(tmp_path / "a.jsonl", {"q": "a", "a": "b"}, ALPACA))
    assert "its columns (q, a) fit no format; rename them to those of one (messages: messages;" in first.sentence
    assert isinstance(second, Conversation)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_list_keeps_its_lines(tmp_path, ending):
    """Whatever the file is called."""
    path = tmp_path / f"a.{ending}"
    path.write_text(json.dumps([ALPACA, ALPACA | {"output": ""}, ALPACA], indent=1), encoding="utf-8")
    found = through(path)
    assert [record.place for record in found] == [f"{path}, line {n}" for n in (2, 7, 12)]
    assert [isinstance(record, Broken) for record in found] == [False, True, False]


@pytest.mark.parametrize(
    "text, good, said",
    [
        (b'[\n{"text": "a"},\n{"text": "b"\n', 1, "line 3 is not JSON (Expecting ',' delimiter, line 4), and nothing"),
        (b'[\n{"text": "a"}\n{"text": "b"}]', 1, "line 3 has no comma or ] after a record, and the rest could not be"),
        (b'[\n{"text": "a"},\n', 1, "line 3 is not JSON (Expecting value, line 3), and nothing from here on"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}]', 0, "line 3 is not UTF-8 text, and so no record of the list could be"),
    ],
)
def test_a_list_that_breaks_off(tmp_path, text, good, said):
    """What stood before is read, what follows is said to be lost."""
    path = tmp_path / "a.json"
    path.write_bytes(text)
    *before, last = through(path)
    assert len(before) == good and not any(isinstance(record, Broken) for record in before)
    assert said in last.sentence


def test_json_that_holds_a_record_a_line(tmp_path):
    assert len(through(lines(tmp_path / "a.json", ALPACA, ALPACA))) == 2


def test_parquet(tmp_path):
    """Arrow's own nulls, which every record gets for the keys of the others, are gone."""
    import pyarrow
    from pyarrow import parquet

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [USER, SAID | {"tool_calls": [call]}, {"role": "tool", "content": "3"}, SAID]},
        {"messages": [USER, SAID | {"tool_calls": [{"function": {"name": "sub", "arguments": {"b": 1}}}]}]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second, third = through(path)
    assert first.place == f"{path}, row 1"
    assert first.messages[1]["tool_calls"][0]["function"] == call["function"]
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"b": 1}
    assert "tool_calls" not in first.messages[0]
    assert third.sentence.startswith(f"{path}, row 3, message 2, the assistant's, is empty")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="could not be read as Parquet"):
        through(path)


@pytest.mark.parametrize("how", ["data files", "save_to_disk"])
def test_a_folder_through_datasets(tmp_path, how, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    if how == "data files":
        lines(folder / "train.jsonl", ALPACA, ALPACA | {"input": None})
        lines(folder / "test.jsonl", ALPACA)
    else:
        both = {"train": [ALPACA, ALPACA | {"input": None}], "test": [ALPACA]}
        datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in both.items()}).save_to_disk(str(folder))
    found = through(folder)
    assert [record.place for record in found] == [f"{folder}, train row {i}" for i in (1, 2)]
    assert turns(found[0])[0] == ("user", "Add.\n\n1 and 2") and turns(found[1])[0] == ("user", "Add.")
    assert len(through(folder, split="test")) == 1
    with pytest.raises(InputError, match=r"\(split dev\) could not be loaded as a data set"):
        through(folder, split="dev")


def test_a_hub_id_out_of_reach():
    with pytest.raises(InputError, match=r"^owner/name \(split train\) could not be loaded as a data set"):
        through("owner/name")


@pytest.mark.parametrize(
    "name, said",
    [("gone.jsonl", "does not exist; give a file"), ("a.csv", 'ends in ".csv", but is read as .jsonl'),
     ("empty.jsonl", "holds no record"), ("empty.json", "holds no record")],
)  # fmt: skip
def test_a_source_that_is_none(tmp_path, name, said):
    (tmp_path / "a.csv").write_text("text\na\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "empty.json").write_text("[ ]", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        through(tmp_path / name)
    assert said in str(refused.value)


def test_columns_that_are_not_read_are_known(tmp_path):
    reader = Reader(Source(str(lines(tmp_path / "a.jsonl", ALPACA | {"id": 1}, ALPACA | {"topic": "x"}))))
    assert len(list(reader)) == reader.records == 2
    assert (reader.format, reader.unused) == ("alpaca", {"id", "topic"})


def test_a_large_file_is_never_in_memory(tmp_path):
    """30 MB of lines pass in less than 2 MB: a file read whole would need all of it."""
    path = lines(tmp_path / "a.jsonl", *[ALPACA | {"output": "x" * 10_000}] * 3_000)
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    count = sum(1 for _ in Reader(Source(str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3_000 and peak < 2e6


# --- several sources --------------------------------------------------------------------------------------


def test_sources_of_the_command_line(tmp_path):
    odd = tmp_path / "odd:2"
    odd.write_text("", encoding="utf-8")
    words = ["a.jsonl", "b.jsonl:0.5", "owner/name:2", "c:d", str(odd)]
    found = [(s.path, s.weight, s.format) for s in parse_sources(words, "text")]
    assert found == [("a.jsonl", 1, "text"), ("b.jsonl", 0.5, "text"), ("owner/name", 2, "text"), ("c:d", 1, "text"),
                     (str(odd), 1, "text")]  # fmt: skip


def test_sources_of_a_yaml_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("- a.jsonl\n- {path: o/n, weight: 2, name: main, split: test, format: text}\n", encoding="utf-8")
    assert parse_sources([str(path)]) == [Source("a.jsonl"), Source("o/n", 2, "text", "test", "main")]


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1", "must hold a list of sources"),
        ("- weight: 1", "source 1 has no path"),
        ("- {path: a, wieght: 1}", 'there is no setting "wieght" (did you mean "weight"?)'),
        ("- {path: a, weight: -1}", "a has the weight -1, but a weight must be a positive number"),
        ("- {path: a, weight: much}", "a has the weight much"),
        ("- {path: a, format: alpacca}", 'there is no format "alpacca" (did you mean "alpaca"?)'),
        ("[", "is not YAML"),
    ],
)
def test_a_yaml_file_that_lists_no_sources(tmp_path, text, said):
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        parse_sources([str(path)])
    assert said in str(refused.value)


def test_an_epoch_reads_each_source_by_its_weight():
    """Weight 1: once; 2.5: two or three times; 0.25: a quarter. Another epoch draws anew."""
    order = epoch_order([8, 4, 100], [1, 2.5, 0.25], seed=3, epoch=0)
    times = Counter(map(tuple, order.tolist()))
    assert [times[0, i] for i in range(8)] == [1] * 8
    assert sorted(times[1, i] for i in range(4)) == [2, 2, 3, 3]
    assert sorted(times[2, i] for i in range(100)) == [0] * 75 + [1] * 25
    assert np.array_equal(order, epoch_order([8, 4, 100], [1, 2.5, 0.25], seed=3, epoch=0))
    later = epoch_order([8, 4, 100], [1, 2.5, 0.25], seed=3, epoch=1)
    assert set(map(tuple, later.tolist())) != set(times)
