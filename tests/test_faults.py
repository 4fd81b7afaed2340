"""What a run meets that is no fault of its settings: damaged checkpoints, another run in its folder, no room."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import adapter_bytes, flags, recipe, settings, steps_saved

from copra_llm import locks
from copra_llm.checkpoint import broken, checkpoints
from copra_llm.errors import InputError
from copra_llm.locks import FolderLock
from copra_llm.results import read_result, temporary_of
from copra_llm.train import train_adapter

SAVING = {"save_steps": 2, "lora_dropout": 0.2, "tasks": ["sst2"]}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints after steps 2, 4, 6, 8."""
    folder = tmp_path_factory.mktemp("whole") / "sst2"
    train_adapter(settings(tiny_llama, **SAVING), ["sst2"], folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """The same as if it had been killed after step 6."""
    for step in (2, 4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "sst2" / f"checkpoint-{step}")
    return tmp_path / "sst2"


def in_child(action: Callable[[], int], output: Path) -> tuple[int, str]:
    """Exit code and output of something done in a forked process, which may spoil what it likes."""
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            with open(output, "w", encoding="utf-8") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            # pytest's own capture replaces the streams of this process.
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = action()
            sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text(encoding="utf-8")


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# --- damaged checkpoints ----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without_manifest(checkpoint: Path) -> None:
    """As checkpoints were before there was one."""
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    state = {key: value for key, value in state.items() if key not in ("examples_a_step", "stream_batch_size")}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")


FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json")
DAMAGES = [
    *((name, damage, words) for name in FILES
      for damage, words in ((cut, r"has \d+ bytes instead of \d+"), (flip, "is not what was written"),
                            (Path.unlink, "is missing"))),
    ("manifest.json", cut, "is no manifest"),
    ("manifest.json", empty, "is no manifest"),
]  # fmt: skip
OLD_DAMAGES = [
    *((name, damage, words) for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json")
      for damage, words in ((cut, "cannot be read"), (empty, "cannot be read"), (Path.unlink, "is missing"))),
]  # fmt: skip


def named(value) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("name, damage, words", DAMAGES, ids=lambda value: named(value) or None)
def test_damage_is_found(stopped, name: str, damage: Callable, words: str):
    """Whatever file, however damaged: the reason names it."""
    assert [broken(checkpoint) for checkpoint in checkpoints(stopped)] == [None] * 3
    damage(stopped / "checkpoint-6" / name)
    assert re.fullmatch(f"{name} {words}.*", broken(stopped / "checkpoint-6"))


@pytest.mark.parametrize("name, damage, words", OLD_DAMAGES, ids=lambda value: named(value) or None)
def test_damage_without_a_manifest_is_found_by_reading(stopped, name: str, damage: Callable, words: str):
    """Of a checkpoint from before there were manifests: what cannot be read."""
    without_manifest(stopped / "checkpoint-6")
    assert broken(stopped / "checkpoint-6") is None
    damage(stopped / "checkpoint-6" / name)
    assert broken(stopped / "checkpoint-6").startswith(f"{name} {words}")


def test_latest_is_the_newest_whole_one(whole, stopped, tiny_llama, capsys):
    """Damaged ones are passed over, aloud, and the run ends with the bytes that it would have reached."""
    cut(stopped / "checkpoint-6" / "optimizer.safetensors")
    flip(stopped / "checkpoint-4" / "adapter_model.safetensors")
    train_adapter(settings(tiny_llama, **SAVING, resume_from_checkpoint="latest"), ["sst2"], stopped)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning", "note"))]
    assert said[0].startswith(f"warning: {stopped}/checkpoint-6 is passed over: optimizer.safetensors has ")
    assert said[1:] == [
        f"warning: {stopped}/checkpoint-4 is passed over: adapter_model.safetensors is not what was written (SHA-256)",
        f"note: going on from {stopped}/checkpoint-2",
    ]
    assert adapter_bytes(stopped / "adapter") == adapter_bytes(whole / "adapter")
    assert read_result(stopped / "result.json").data == read_result(whole / "result.json").data
    assert [broken(checkpoint) for checkpoint in checkpoints(stopped)] == [None] * 4


def test_a_checkpoint_between_two_log_entries_loses_no_loss(tiny_llama, tmp_path):
    """The next entry's mean is over all its steps, those before the checkpoint too."""
    config = settings(tiny_llama, logging_steps=4, save_steps=3)
    whole = train_adapter(config, ["sst2"], tmp_path / "whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train_adapter(config.replace(resume_from_checkpoint=checkpoint), ["sst2"], tmp_path / "resumed")
    assert [entry["step"] for entry in whole.data["log"]] == [4, 8]
    assert resumed.data["log"] == whole.data["log"]


def test_where_none_is_whole_the_run_begins_anew(whole, stopped, tiny_llama, capsys):
    """And says why."""
    for checkpoint in checkpoints(stopped):
        (checkpoint / "state.json").unlink()
    train_adapter(settings(tiny_llama, **SAVING, resume_from_checkpoint="latest"), ["sst2"], stopped)
    said = capsys.readouterr().err
    assert said.count("is passed over: state.json is missing") == 3
    assert f"warning: no checkpoint in {stopped} is whole: beginning anew" in said
    assert adapter_bytes(stopped / "adapter") == adapter_bytes(whole / "adapter")


def test_a_damaged_one_that_is_named_is_refused(stopped, tiny_llama):
    """Nothing is passed over that was asked for, and the folder stays as it was."""
    flip(stopped / "checkpoint-6" / "optimizer.safetensors")
    before = sorted(path.name for path in stopped.rglob("*"))
    config = settings(tiny_llama, **SAVING, resume_from_checkpoint=str(stopped / "checkpoint-6"))
    with pytest.raises(
        InputError, match="checkpoint-6, where optimizer.safetensors is not what was written .*; give a whole"
    ):
        train_adapter(config, ["sst2"], stopped)
    assert sorted(path.name for path in stopped.rglob("*")) == before


def test_checkpoints_without_a_manifest_still_resume(whole, stopped, tiny_llama):
    """Those of earlier versions, which did not note the examples of a step either; other batches are refused then."""
    without_manifest(stopped / "checkpoint-6")
    config = settings(tiny_llama, **SAVING, resume_from_checkpoint="latest")
    other = config.replace(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="was trained with per_device_train_batch_size = 4, but this run has .* = 2"):
        train_adapter(other, ["sst2"], stopped)
    train_adapter(config, ["sst2"], stopped)
    assert adapter_bytes(stopped / "adapter") == adapter_bytes(whole / "adapter")


def test_leftovers_of_killed_runs_are_removed(stopped, tiny_llama):
    """What was half-written when a run was killed goes; what belongs to somebody else stays."""
    litter = (".checkpoint-8.abcdefg1", ".adapter.x_y_z_00", ".best.01234567", ".removed-2")
    for name in litter:
        (stopped / name).mkdir()
    (stopped / ".result.json.12345678").touch()
    kept = (".mine.settings", ".checkpoint-8", "notes.txt")
    for name in kept:
        (stopped / name).touch()
    train_adapter(settings(tiny_llama, **SAVING, resume_from_checkpoint="latest"), ["sst2"], stopped)
    left = {path.name for path in stopped.iterdir()}
    assert not left & {*litter, ".result.json.12345678"} and set(kept) <= left


# --- another run in the same folder -----------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from copra_llm.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "sst2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_and_one_of_a_dead_run_is_not(holder, tiny_llama, tmp_path, capsys):
    """One sentence with process, host and time; once the other is killed, its lock stops nobody and goes."""
    config, folder = settings(tiny_llama, tasks=["sst2"], output_dir=str(tmp_path)), tmp_path / "sst2"
    (folder / ".checkpoint-2.abcdefg1").mkdir()  # the other one is writing it
    assert recipe(flags(config)) == 2
    error = last_line(capsys.readouterr().err)
    since = json.loads((folder / ".lock").read_text())["since"]
    assert error == (f"error: {folder} is in use by process {holder.pid} on {os.uname().nodename} since {since}; "
                     "wait until it has ended, or give another --output_dir")  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == [".checkpoint-2.abcdefg1", ".lock"]
    holder.kill()
    holder.wait()
    assert (folder / ".lock").exists()
    assert recipe(flags(config)) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "checkpoint-2", "config.yaml", "result.json"]


def test_a_lock_is_not_its_childrens(tmp_path):
    """A forked child that outlives the run, as a loader's process can, keeps nobody out."""
    lock = FolderLock(tmp_path)
    lock.take()
    begun, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b".")
        time.sleep(600)
        os._exit(0)
    try:
        os.read(begun, 1)  # until the child runs, it holds what its parent held
        os.close(lock._file)  # as the kernel does when the run is killed
        locks._held.discard(lock._file)
        other = FolderLock(tmp_path)
        assert other.take()
        other.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
        os.close(tell)


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it the other run ends and removes it: the lock is taken on a new one."""
    first, honest = FolderLock(tmp_path), fcntl.flock
    first.take()

    def end_first(file, how):
        monkeypatch.setattr(fcntl, "flock", honest)
        first.release()
        return honest(file, how)

    monkeypatch.setattr(fcntl, "flock", end_first)
    second = FolderLock(tmp_path)
    assert second.take()
    with pytest.raises(InputError, match="is in use by process"):
        FolderLock(tmp_path).take()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys):
    """Where the file system has none; nothing of another run's is removed then."""

    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    assert lock.take() is False
    lock.release()
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (No locks available)")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_no_folder(tmp_path):
    """A folder that the lock has made, and into which nothing was written, goes with it."""
    lock = FolderLock(tmp_path / "deep" / "run")
    lock.take()
    assert (tmp_path / "deep" / "run" / ".lock").exists()
    lock.release()
    assert list(tmp_path.iterdir()) == []


# --- no room, no permission -------------------------------------------------------------------------------


def half_written(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if temporary_of(path)]


def test_files_that_grow_too_large_end_the_run(whole, stopped, tiny_llama, tmp_path):
    """A limit of the system on file sizes: one sentence, code 2, the checkpoints before as they were, no litter."""
    config = settings(tiny_llama, **SAVING, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    sizes = {path.name: path.stat().st_size for path in (stopped / "checkpoint-6").iterdir()}
    limit = sizes["optimizer.safetensors"] - 1
    assert (whole / "config.yaml").stat().st_size < limit

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return recipe(flags(config))

    code, said = in_child(limited, tmp_path / "said")
    assert (code, last_line(said)) == (2, f"error: {stopped}/checkpoint-8: File too large; "
                                          "make room there, or give another path")  # fmt: skip
    assert steps_saved(stopped) == [2, 4, 6] and not half_written(stopped)
    assert recipe(flags(config)) == 0
    assert adapter_bytes(stopped / "adapter") == adapter_bytes(whole / "adapter")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run(whole, tiny_llama, small_disk, capsys):
    """Checkpoints until there is no room: one sentence, those before are whole; with room again the run goes on."""
    config = settings(tiny_llama, **SAVING, output_dir=str(small_disk), resume_from_checkpoint="latest")
    config, folder = config.replace(save_steps=1), small_disk / "sst2"
    for _ in range(2):  # the second attempt fills nothing up
        assert recipe(flags(config)) == 2
        error = last_line(capsys.readouterr().err)
        assert error.startswith(f"error: {folder}/checkpoint-{max(steps_saved(folder)) + 1}")
        assert error.endswith(": No space left on device; make room there, or give another path")
        assert not half_written(folder) and not (folder / ".lock").exists()
        assert [broken(checkpoint) for checkpoint in checkpoints(folder)] == [None] * len(steps_saved(folder))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert recipe(flags(config)) == 0
    assert adapter_bytes(folder / "adapter") == adapter_bytes(whole / "adapter")


def test_a_folder_that_cannot_be_written_is_refused(tiny_llama, tmp_path):
    """Before anything is loaded. Root may write anywhere, so the test is nobody for a while."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o555)

    def as_nobody() -> int:
        if os.geteuid() == 0:
            os.seteuid(65534)
        return recipe(flags(settings(tiny_llama, tasks=["sst2"], output_dir=str(place / "runs"))))

    try:
        code, said = in_child(as_nobody, tmp_path / "said")
        assert (code, last_line(said)) == (2, f"error: {place}/runs: Permission denied; give another path")
        assert list(place.iterdir()) == []
    finally:
        place.rmdir()


def test_a_file_in_place_of_the_folder_is_refused(tiny_llama, tmp_path, capsys):
    """Of the output folder, or of the task's."""
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sst2").write_text("a file")
    for output, name, reason in (("runs", "runs/sst2", "Not a directory"), ("other", "other/sst2", "File exists")):
        assert recipe(flags(settings(tiny_llama, tasks=["sst2"], output_dir=str(tmp_path / output)))) == 2
        error = last_line(capsys.readouterr().err)
        assert error == f"error: {tmp_path / name}: {reason}; give another path"
    assert (tmp_path / "runs").read_text() == (tmp_path / "other" / "sst2").read_text() == "a file"


# --- killed at random -------------------------------------------------------------------------------------


def test_kill_and_resume_trials(tmp_path):
    """Some trials of eval/faults: nothing lost, torn, different or left behind; a second call goes on after them."""
    command = [sys.executable, ROOT / "eval" / "faults" / "run.py", "--results", tmp_path, "--seed", "1"]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    for trials in ("3", "5"):
        done = subprocess.run([*command, "--trials", trials], env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    metrics = read_result(tmp_path / "seed-1.json").metrics
    assert metrics["trials"] == 5 and metrics["kills"] >= 3
    assert [metrics[name] for name in ("lost", "torn", "different", "left_behind")] == [0, 0, 0, 0]
