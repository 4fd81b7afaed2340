"""Result records that anybody may have written: the report shows them, or refuses them by one sentence."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import report_records
from fuzzing import copra, drawn, dumped, efforts, odd_values, refused, spoilt
from hypothesis import given
from hypothesis import strategies as st

from copra_llm.results import read_result


def good_records() -> list[dict]:
    """One of each kind of record that the report knows, as JSON values."""
    made = report_records.everything()
    kinds = {record.protocol: record for record in reversed(made)}
    return [json.loads(json.dumps(asdict(record))) for record in kinds.values()]


def places(value, path=()):
    """The path of every entry in a record, lists by their first entry alone."""
    yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(record: dict, path: tuple, value) -> dict:
    record = copy.deepcopy(record)
    if not path:
        return value
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return record


@efforts(120)
def test_any_record_is_read_or_refused(examples, tmp_path):
    """Any entry of any protocol's record replaced, or the file's bytes."""
    records = good_records()
    every = [(record, path) for record in records for path in places(record)]
    file = tmp_path / "result.json"

    @drawn(examples)
    @given(chosen=st.sampled_from(every), value=odd_values, data=st.data())
    def check(chosen, value, data):
        content = dumped(changed(*chosen, value))
        file.write_bytes(data.draw(spoilt(content)) if data.draw(st.booleans()) else content)
        refused(lambda: read_result(file))

    check()


@efforts(60)
def test_any_record_is_shown_or_refused(examples, tmp_path):
    """On the page and in the tables; where it is refused, there is no page."""
    records = good_records()
    every = [(record, path) for record in records for path in places(record) if path]
    folder, output = tmp_path / "records", tmp_path / "page.html"
    folder.mkdir()

    @drawn(examples)
    @given(chosen=st.sampled_from(every), value=odd_values)
    def check(chosen, value):
        (folder / "result.json").write_bytes(dumped(changed(*chosen, value)))
        if copra(["report", str(folder), "--output", str(output)], output):
            output.unlink()

    check()
