"""Result records and atomic writes: `copra_llm.results`."""

from __future__ import annotations

import errno
import json
import math
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copra_llm import results
from copra_llm.errors import InputError
from copra_llm.results import (
    SCHEMA,
    Result,
    atomic_folder,
    environment,
    pack_bits,
    peak_memory_bytes,
    read_result,
    temporary_of,
    unpack_bits,
    write_atomic,
    write_result,
)

RECORD = Result(
    protocol="train",
    config={"seed": 1, "tasks": ["sst2"], "p_start": None},
    metrics={"test/sst2/accuracy": 87.5, "dev/sst2/loss": 0.25},
    seconds=1.5,
    peak_memory_bytes=2**30,
    steps=10,
    examples=160,
    data={"correct/test/sst2": "1101"},
    environment={"device": "cpu"},
)


def files_below(folder: Path) -> list[str]:
    """Every file and folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- records ----------------------------------------------------------------------------------------------


def test_a_record_has_the_designs_fields(tmp_path):
    """DESIGN section 5; `data` holds what plots and intervals need beyond it."""
    write_result(tmp_path / "result.json", RECORD)
    stored = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(stored) == {"schema", "protocol", "created", "config", "metrics", "seconds", "peak_memory_bytes",
                           "steps", "examples", "environment", "data"}  # fmt: skip
    assert stored["schema"] == SCHEMA == 1
    assert datetime.fromisoformat(stored["created"]).utcoffset() == timedelta(0)


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_result(tmp_path / "result.json", RECORD)
    assert read_result(tmp_path / "result.json") == RECORD


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(value, tmp_path):
    """JSON has no NaN; a metric stays a number for whoever makes a table of it."""
    path = tmp_path / "result.json"
    nested = {"nested": [1.0, value, {"deep": (value, 2)}]}
    write_result(path, Result("train", {}, {"test/sst2/loss": value, "test/sst2/accuracy": 50.0}, data=nested))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["metrics"] == {"test/sst2/loss": None, "test/sst2/accuracy": 50.0}
    assert stored["data"] == {"nested": [1.0, None, {"deep": [None, 2]}]}
    metrics = read_result(path).metrics
    assert math.isnan(metrics["test/sst2/loss"]) and metrics["test/sst2/accuracy"] == 50.0


def test_a_newer_schema_is_refused(tmp_path):
    """By both numbers, with what to do."""
    path = tmp_path / "result.json"
    stored = {"schema": SCHEMA + 1, "protocol": "train", "config": {}, "metrics": {}, "new": 1}
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        read_result(path)
    assert str(refusal.value) == f"{path} has schema 2, this version reads up to 1; update copra_llm"


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "line 1 is not JSON"),
        (b'{\n"schema": 1,\n"metrics": {}', "line 3 is not JSON"),
        (b"[1, 2]", "is not a result record: it lacks schema"),
        (b'{"schema": 1, "metrics": {}, "config": {}}', "is not a result record: it lacks protocol"),
        (b'{"schema": 1, "metrics": {}, "protocol": "train"}', "is not a result record: it lacks config"),
        (b'{"schema": 1, "metrics": [], "config": {}, "protocol": "t"}', "is not a result record: it lacks metrics"),
        (b'{"schema": "1", "metrics": {}, "config": {}, "protocol": "t"}', "is not a result record: it lacks schema"),
        (b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_what_is_no_record_is_refused(content, expected, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_result(path)
    assert str(path) in str(refusal.value) and expected in str(refusal.value)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_path_that_is_no_file_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="is no file"):
        read_result(tmp_path / name)


def test_environment_names_versions_machine_and_commit():
    found = environment(device="cpu", base_fingerprint="abc")
    assert found["device"] == "cpu" and found["base_fingerprint"] == "abc"
    assert found["versions"].keys() >= {"torch", "transformers", "peft", "accelerate"}
    assert all(found["versions"][name] for name in ("torch", "transformers", "peft", "accelerate"))
    assert found["git_commit"] is None or len(found["git_commit"]) == 40
    assert "cores" in found["machine"]
    assert 2**20 < peak_memory_bytes() < 2**45


@given(st.lists(st.booleans(), max_size=50))
def test_unpack_inverts_pack(outcomes):
    packed = pack_bits(outcomes)
    assert len(packed) == len(outcomes) and set(packed) <= {"0", "1"}
    assert unpack_bits(packed) == outcomes


# --- atomic writes ----------------------------------------------------------------------------------------


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "text"
    write_atomic(path, "old")
    write_atomic(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert files_below(tmp_path) == ["a", "a/b", "a/b/text"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A crash before the rename: a reader still sees the old text, and no temporary file stays."""
    path = tmp_path / "text"
    write_atomic(path, "old")

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert files_below(tmp_path) == ["text"]


def test_a_write_onto_a_folder_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", "text")
    assert files_below(tmp_path) == ["folder"]


def test_atomic_folder_appears_when_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "run") as fresh:
        (fresh / "a").write_text("1", encoding="utf-8")
        assert not (tmp_path / "deep" / "run").exists()
    assert files_below(tmp_path) == ["deep", "deep/run", "deep/run/a"]
    assert (tmp_path / "deep" / "run").stat().st_mode & 0o777 == 0o755


def test_atomic_folder_replaces_an_old_one_whole(tmp_path):
    """Nothing of the old folder stays in the new one."""
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "run") as fresh:
            (fresh / name).write_text(name, encoding="utf-8")
    assert files_below(tmp_path) == ["run", "run/new"]


def test_atomic_folder_leaves_nothing_on_an_exception(tmp_path):
    """No folder where there was none; the old one as it was."""
    for before in ([], ["run", "run/old"]):
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "run") as fresh:
            (fresh / "half").write_text("1", encoding="utf-8")
            raise ZeroDivisionError
        assert files_below(tmp_path) == before
        if not before:
            os.mkdir(tmp_path / "run")
            (tmp_path / "run" / "old").write_text("0", encoding="utf-8")


def test_what_the_system_refuses_names_the_path(tmp_path, monkeypatch):
    """A full disk says no path, safetensors says it in words of its own, a temporary file has a name of no use."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as raised:
            write_atomic(tmp_path / "x.json", "text")
        assert raised.value.filename == str(tmp_path / "x.json")
    with pytest.raises(OSError, match="No space left") as raised, atomic_folder(tmp_path / "run"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError) as raised, atomic_folder(tmp_path / "run") as fresh:
        (fresh / "nowhere" / "file").write_text("text")
    assert raised.value.filename == str(tmp_path / "run")
    with pytest.raises(FileNotFoundError) as raised, atomic_folder(tmp_path / "run"):
        (tmp_path / "other").read_text()
    assert raised.value.filename == str(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_temporary_names_are_recognised(tmp_path):
    """Those of the writers here, while they write; no name that anybody else would give."""
    with atomic_folder(tmp_path / "checkpoint-2") as fresh:
        assert temporary_of(fresh) == "checkpoint-2"
    for name in ("checkpoint-2", ".lock", ".checkpoint-2", ".x.short", ".x.muchtoolong", "x.abcdefgh", ".x.ABCDEFGH"):
        assert temporary_of(tmp_path / name) is None
