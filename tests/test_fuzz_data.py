"""Training and evaluation data that anybody may have written: read, or refused by one sentence with the line."""

from __future__ import annotations

import json

import pytest
from fuzzing import ODD_TEXTS, drawn, dumped, efforts, odd_values, refused, spoilt
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from copra_llm.tasks.clip.layouts import read_aircraft, read_folders, read_split
from copra_llm.tasks.instruct.formats import FORMATS
from copra_llm.tasks.instruct.records import Conversation
from copra_llm.tasks.instruct.sources import Reader, parse_sources, strict
from copra_llm.tasks.instruct.templates import ChatTemplate
from copra_llm.tasks.mtl15 import get_task, read_jsonl

COLUMNS = sorted({c for shape in FORMATS.values() for c in (*shape.columns, *shape.optional)})
GOOD_ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "c", "output": "b"},
    {"question": "a", "answer": "b"},
    {"text": "a"},
]
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])},
            optional={"content": odd_values, "tool_calls": odd_values, "weight": odd_values, "thinking": odd_values},
        ),
        odd_values,
    ),
    max_size=3,
)
rows = st.one_of(
    odd_values,
    st.dictionaries(st.sampled_from(COLUMNS), st.one_of(odd_values, messages), max_size=4),
    st.tuples(st.sampled_from(GOOD_ROWS), st.dictionaries(st.sampled_from(COLUMNS), odd_values, max_size=1)).map(
        lambda pair: pair[0] | pair[1]
    ),
)


@efforts(150)
def test_any_task_file(examples, tmp_path):
    """MTL15: lines that are no records, fields of other types, labels of other tasks."""
    path, task = tmp_path / "train.jsonl", get_task("sst2")
    good = {field: "a film" for field in task.fields} | {"label": task.labels[0]}

    @drawn(examples)
    @given(
        changes=st.dictionaries(st.sampled_from([*good, "x"]), odd_values, max_size=2), row=odd_values, data=st.data()
    )
    @example(changes={}, row=10**30, data=None)
    @example(changes={"label": "\ud800"}, row=good, data=None)
    @example(changes={task.fields[0]: "\ud800"}, row=good, data=None)
    def check(changes, row, data):
        content = b"\n".join((dumped(good), dumped(good | changes), dumped(row) if data is not None else b""))
        if data is not None and data.draw(st.booleans()):
            content = data.draw(spoilt(content))
        path.write_bytes(content)

        def read() -> None:
            for found in read_jsonl(path, task):
                assert 0 <= found.label < len(task.labels)
                assert all(text.encode() is not None for text in found.fields.values())

        refused(read)

    check()


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 20_000, '{"a": ' * 50_000, "\ufeff{}", "NaN", '"\\ud800"'])
def test_lines_that_python_cannot_read(line, tmp_path):
    for name in ("train.jsonl", "train.json"):
        (tmp_path / name).write_text(line, encoding="utf-8")
        assert refused(lambda name=name: read_jsonl(tmp_path / name, get_task("sst2")))
        assert refused(lambda name=name: list(strict(Reader(parse_sources([str(tmp_path / name)])[0]))))


@efforts(200)
def test_any_conversation_file(examples, tmp_path):
    """Instruction data in all its formats, named or recognised."""

    @drawn(examples)
    @given(
        found=st.lists(rows, min_size=1, max_size=3),
        name=st.sampled_from(["data.jsonl", "data.json"]),
        format=st.sampled_from([None, *FORMATS]),
        data=st.data(),
    )
    @example(
        found=[{"messages": GOOD_ROWS[0]["messages"], "tools": "[" * 5000}], name="d.jsonl", format=None, data=None
    )
    def check(found, name, format, data):
        content = dumped(found) if name.endswith(".json") else b"\n".join(map(dumped, found))
        if data is not None and data.draw(st.booleans()):
            content = data.draw(spoilt(content))
        (tmp_path / name).write_bytes(content)

        def read() -> None:
            for record in strict(Reader(parse_sources([str(tmp_path / name)], format)[0])):
                json.dumps(record.messages if isinstance(record, Conversation) else [record.prompt, record.completion])

        refused(read)

    check()


@efforts(60)
def test_any_list_of_sources(examples, tmp_path):
    """The YAML file that names several, with weights."""
    import yaml

    (tmp_path / "good.jsonl").write_bytes(dumped(GOOD_ROWS[0]))
    path, keys = tmp_path / "sources.yaml", ["path", "weight", "format", "split", "name", "x", ""]

    @drawn(examples)
    @given(entries=st.one_of(odd_values, st.lists(st.dictionaries(st.sampled_from(keys), odd_values), max_size=2)))
    def check(entries):
        try:
            path.write_text(yaml.safe_dump(entries), encoding="utf-8")
        except (ValueError, RecursionError, yaml.YAMLError):
            return  # a numeral that Python does not write
        refused(lambda: parse_sources([str(path)]))

    check()


@efforts(120)
def test_any_split_file(examples, tmp_path):
    """CoOp's split files: the images' names stay below their folder."""
    path, images = tmp_path / "split.json", tmp_path / "images"
    entry = st.one_of(
        st.tuples(st.one_of(st.just("a/b.jpg"), st.sampled_from(ODD_TEXTS)), odd_values, odd_values).map(list),
        st.tuples(st.just("a/b.jpg"), st.integers(0, 2), st.sampled_from(["cat", "dog"])).map(list),
        odd_values,
    )
    table = st.fixed_dictionaries({}, optional={
        name: st.one_of(st.lists(entry, max_size=3), odd_values) for name in ("train", "val", "test")
    })  # fmt: skip

    @drawn(examples)
    @given(content=st.one_of(table, odd_values).map(dumped), data=st.data())
    @example(content=dumped({"train": [["/etc/passwd", 0, "cat"]], "test": []}), data=None)
    @example(content=dumped({"train": [["../x.jpg", 0, "cat"]], "test": []}), data=None)
    @example(content=b"[" * 20_000, data=None)
    def check(content, data):
        path.write_bytes(data.draw(spoilt(content)) if data is not None and data.draw(st.booleans()) else content)

        def read() -> None:
            _, splits = read_split(path, images)
            for found in (e for examples in splits.values() for e in examples):
                assert found.source.is_relative_to(images) and ".." not in found.source.parts

        refused(read)

    check()


@efforts(60)
def test_any_aircraft_files(examples, tmp_path):
    texts = st.lists(
        st.one_of(st.sampled_from(["707 Boeing", "Boeing", "../707 Boeing"]), st.text(max_size=6)), max_size=3
    )

    @drawn(examples)
    @given(variants=texts, lines=texts)
    @example(variants=["Boeing"], lines=["../../x Boeing"])
    def check(variants, lines):
        (tmp_path / "variants.txt").write_text("\n".join(variants), encoding="utf-8", errors="ignore")
        for name in ("train", "val", "test"):
            file = tmp_path / f"images_variant_{name}.txt"
            file.write_text("\n".join(lines), encoding="utf-8", errors="ignore")

        def read() -> None:
            _, splits = read_aircraft(tmp_path, tmp_path / "images")
            assert all(".." not in e.source.parts for examples in splits.values() for e in examples)

        refused(read)

    check()


def test_links_among_image_folders_do_not_go_round(tmp_path):
    """A folder that holds itself by a link is walked once."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / split / "cat" / "a.png").write_bytes(b"")
        (tmp_path / split / "cat" / "again").symlink_to(tmp_path / split)
    _, splits = read_folders(tmp_path)
    assert [len(examples) for examples in splits.values()] == [1, 1]


TEMPLATES = ["{{ messages[0].content }}", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
             "{{ messages[0].__class__.__mro__ }}", "{% for i in range(10) %}{{ i }}{% endfor %}", "{{ 1/0 }}",
             "{{ raise_exception('no') }}", "{% if %}", "{{ x.y.z }}", "{{ messages | tojson }}", "{% include 'x' %}",
             "{{ cycler.__init__.__globals__ }}", "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
             "{{ range(10**9) | list }}", "{{ 'a' * 10**12 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
             "{{ messages[7].content }}", "{{ messages.append(1) }}", "{{ 'x' | unknown }}"]  # fmt: skip


@efforts(40)
def test_any_chat_template(examples, tiny_llama):
    """Broken, refusing, or meant to break out: one sentence, and what Jinja's sandbox forbids stays undone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    talk = Conversation(
        ({"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}), (), "line 1"
    )

    @drawn(examples)
    @given(parts=st.lists(st.one_of(st.sampled_from(TEMPLATES), st.text("{}%# abm.", max_size=8)), max_size=3))
    @example(parts=["{{ range(10**9) | list }}"])
    @example(parts=["{{ 'a' * 10**12 }}"])
    @example(parts=["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
    @example(parts=["{{ messages[7].content }}"])
    @example(parts=["{{ messages.append(1) }}"])
    @example(parts=["{{ 1/0 }}"])
    def check(parts):
        tokenizer.chat_template = "".join(parts)
        refused(lambda: ChatTemplate(tokenizer).render(talk))

    check()
