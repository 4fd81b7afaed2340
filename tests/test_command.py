"""What a protocol's `run.py` takes from its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from copra_llm.protocols.command import chosen_plans, protocol_parser
from copra_llm.protocols.connectivity import Plan
from copra_llm.protocols.multitask import MultiTask
from copra_llm.protocols.sweep import Sweep

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = sorted(ROOT.glob("eval/*/run.py"))


def chosen(argv: list[str], kind: type = Plan, folder: str = "interpolation", entries: str = "models") -> dict:
    args = protocol_parser("", ROOT / "eval" / folder, entries).parse_args(argv)
    return dict(chosen_plans(args, kind))


def test_everything_is_done_unless_less_is_asked_for():
    assert chosen([]).keys() == {"minilm", "smollm2"}


def test_entries_tasks_and_methods_are_chosen():
    (plan,) = chosen(["--models", "minilm", "--tasks", "mnli", "sst2", "--methods", "copra"]).values()
    assert plan.tasks == ["sst2", "mnli"] and plan.methods == ["copra"]


def test_an_entry_with_nothing_left_to_do_is_left_out():
    assert chosen(["--tasks", "mnli"]).keys() == {"minilm"}


def test_variants_and_groups_are_chosen_by_their_names():
    (sweep,) = chosen(["--methods", "lora", "--sweeps", "grid"], Sweep, "sweep", "sweeps").values()
    assert list(sweep.variants) == ["lora"]
    assert not chosen(["--methods", "none"], Sweep, "sweep", "sweeps")
    argv = ["--plans", "minilm", "--tasks", "sst2", "agnews", "mnli"]
    (tasks,) = chosen(argv, MultiTask, "multitask", "plans").values()
    assert tasks.groups == [["sst2", "agnews"]]
    assert not chosen([*argv[:3], "sst2"], MultiTask, "multitask", "plans")


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda path: path.parent.name)
def test_every_runner_says_how_it_is_used(runner):
    done = subprocess.run([sys.executable, runner, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"python eval/{runner.parent.name}/run.py" in done.stdout
