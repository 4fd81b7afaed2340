"""Two gloo processes: the same examples as one, one view of what happens, and an end instead of a wait."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from pairs import RECIPE, SECONDS, Pair
from safetensors.torch import load_file
from test_train import flags, settings, steps_saved

from copra_llm import train
from copra_llm.classifiers import LabelWordClassifier
from copra_llm.errors import InputError
from copra_llm.locks import FolderLock
from copra_llm.results import read_result
from copra_llm.train import train_adapter

# Half the accumulation on two processes ended with the same bytes here, half the batch 5e-8 away: a sum over a batch is
# made of two. Other machines may add in other orders.
ROUNDING = 1e-6


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def far(first: Path, second: Path) -> float:
    """Distance of two adapters, relative to the first's norm."""
    return float((weights(first) - weights(second)).norm() / weights(first).norm())


def pair(config, folder: Path, prepare=None) -> Pair:
    return Pair(flags(config.replace(output_dir=str(folder))), folder / "logs", prepare)


# --- the same steps on another number of processes --------------------------------------------------------

WHOLE = {"tasks": ["sst2"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def alone(tiny_llama, tmp_path_factory) -> Path:
    """A run on one process, 8 examples a step."""
    folder = tmp_path_factory.mktemp("alone") / "sst2"
    train_adapter(settings(tiny_llama, **WHOLE), ["sst2"], folder)
    return folder


@pytest.mark.parametrize(
    "smaller", [{"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 1}], ids=["batch", "accumulation"]
)
def test_two_processes_go_on_where_one_has_stopped(alone, tiny_llama, tmp_path, smaller: dict):
    """With half the batch or half the accumulation every step has the examples it would have had."""
    config = settings(tiny_llama, **WHOLE | smaller, resume_from_checkpoint=str(alone / "checkpoint-4"))
    with pair(config, tmp_path) as run:
        assert run.join() == [0, 0], run.said()
    result = read_result(tmp_path / "sst2" / "result.json")
    assert (result.environment["world_size"], result.steps, result.examples) == (2, 8, 64)
    assert far(alone / "adapter", tmp_path / "sst2" / "adapter") < ROUNDING


def test_other_examples_are_no_rounding(alone, tiny_llama, tmp_path):
    """What the tests here would see if the stream were cut by the size of the batches alone."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(alone / "checkpoint-4", checkpoint)
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"stream_batch_size": 2}))
    config = settings(tiny_llama, **WHOLE, resume_from_checkpoint=str(checkpoint))
    train_adapter(config, ["sst2"], tmp_path / "run")
    assert far(alone / "adapter", tmp_path / "run" / "adapter") > 1000 * ROUNDING


def test_one_process_goes_on_where_two_have_stopped(tiny_llama, tmp_path):
    """And the other way round; two tasks, one after the other in the same processes."""
    halves = settings(tiny_llama, **WHOLE | {"per_device_train_batch_size": 2, "tasks": ["sst2", "agnews"]})
    with pair(halves, tmp_path) as run:
        assert run.join() == [0, 0], run.said()
    assert (tmp_path / "agnews" / "adapter").is_dir()
    checkpoint = tmp_path / "sst2" / "checkpoint-4"
    for name, changes in (("batch", {"per_device_train_batch_size": 4}), ("steps", {"gradient_accumulation_steps": 4})):
        config = halves.replace(tasks=["sst2"], resume_from_checkpoint=str(checkpoint), **changes)
        train_adapter(config, ["sst2"], tmp_path / name)
        assert far(tmp_path / "sst2" / "adapter", tmp_path / name / "adapter") < ROUNDING
    with pytest.raises(InputError, match="with 8 examples an optimizer step, but this run has 4 "):
        train_adapter(halves.replace(resume_from_checkpoint=str(checkpoint)), ["sst2"], tmp_path / "other")


# --- one view ---------------------------------------------------------------------------------------------


def test_a_refusal_reaches_both_at_once(tiny_llama, tmp_path):
    """The main process finds the folder in use: it says so, the other one ends with it."""
    lock = FolderLock(tmp_path / "sst2")
    lock.take()
    try:
        with pair(settings(tiny_llama, tasks=["sst2"]), tmp_path) as run:
            assert run.join() == [2, 2], run.said()
    finally:
        lock.release()
    first, second = (log.read_text(encoding="utf-8") for log in run.logs)
    assert f"sst2 is in use by process {os.getpid()} on " in first and "error" not in second
    assert not (tmp_path / "sst2").exists()


def spoil_second(rank: int) -> None:
    """On rank 1 the loss of the fourth step is NaN; both keep their weights after every step."""
    honest, calls = LabelWordClassifier._loss, []

    def loss(self, batch):
        # The pass before the first step is in evaluation mode, and no step.
        if self.training:
            calls.append(None)
        return honest(self, batch) * (math.nan if rank == 1 and len(calls) == 4 else 1.0)

    save = train.save_checkpoint

    def keep(accelerator, classifier, optimizer, config, folder, progress):
        save(accelerator, classifier, optimizer, config, folder, progress)
        trained = [p.detach().flatten() for p in classifier.parameters() if p.requires_grad]
        torch.save(torch.cat(trained), folder / f"rank{rank}-{progress.step}.pt")

    LabelWordClassifier._loss, train.save_checkpoint = loss, keep


def test_a_loss_that_is_not_finite_on_one_is_left_out_on_both(tiny_llama, tmp_path):
    """The step moves nothing on either process, and they stay equal."""
    with pair(settings(tiny_llama, tasks=["sst2"], save_steps=1, method="lora"), tmp_path, spoil_second) as run:
        assert run.join() == [0, 0], run.said()
    assert read_result(tmp_path / "sst2" / "result.json").data["skipped_steps"] == 1
    kept = [[torch.load(tmp_path / "sst2" / f"rank{r}-{step}.pt") for step in range(1, 9)] for r in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(kept[0], kept[0][1:], strict=False)]
    assert moved == [True, True, False, True, True, True, True]


def test_sigterm_to_one_process_stops_both_after_the_same_step(tiny_llama, tmp_path):
    """Under torchrun: the signal reaches rank 1 alone, both end with 143, and one process resumes what they saved."""
    config = settings(tiny_llama, tasks=["sst2"], max_steps=2000, save_steps=4, save_total_limit=1,
                      output_dir=str(tmp_path))  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", RECIPE]
    surroundings = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with open(log, "w", encoding="utf-8") as f:
        agent = subprocess.Popen([*command, *flags(config)], env=surroundings, stdout=f, stderr=f)
    folder, end = tmp_path / "sst2", time.monotonic() + SECONDS
    try:
        while not steps_saved(folder):
            assert agent.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.01)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(agent.pid).children(recursive=True)}
        ranks["1"].send_signal(signal.SIGTERM)
        agent.wait(SECONDS)
    finally:
        if agent.poll() is None:
            for process in (*psutil.Process(agent.pid).children(recursive=True), agent):
                process.kill()
            agent.wait()
    said = log.read_text(encoding="utf-8")
    step = max(steps_saved(folder))
    assert (folder / "PREEMPTED").read_text() == f"stopped by SIGTERM after step {step}\n"
    assert said.count(f"stopped after step {step} of 2000; resume with") == 2
    assert json.loads((folder / f"checkpoint-{step}" / "state.json").read_text())["step"] == step
    assert not (folder / ".lock").exists()


# --- a process that is gone -------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_other(tiny_llama, tmp_path, rank: int, ended: signal.Signals):
    """With a sentence: at once where the connection closes, after --ddp_timeout where it stays silent."""
    timeout = 1800 if ended == signal.SIGKILL else 10
    config = settings(tiny_llama, tasks=["sst2"], max_steps=2000, save_steps=4, save_total_limit=1,
                      ddp_timeout=timeout)  # fmt: skip
    with pair(config, tmp_path) as run:
        run.wait_until(lambda: bool(steps_saved(tmp_path / "sst2")))
        os.kill(run.ranks[rank].pid, ended)
        other = run.ranks[1 - rank]
        other.join(60)
        assert other.exitcode == 1, run.said()
    said = run.logs[1 - rank].read_text(encoding="utf-8")
    assert "error: another process of this run has ended or does not answer; " in said
    assert "Traceback" not in said
