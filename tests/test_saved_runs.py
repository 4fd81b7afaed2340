"""Which runs lie below a folder, which of them are repetitions, and which settings were best on dev."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from examples import save_run, save_runs

from copra_llm.errors import InputError
from copra_llm.results import Result, write_result
from copra_llm.saved_runs import SavedRun, best_on_dev, find_runs, read_run, repeated_runs, same_but_seed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"))


def test_runs_are_found_with_their_settings_and_checkpoints(runs):
    found = find_runs(runs)
    assert [(r.settings["method"], r.label) for r in found] == [
        ("copra", "run-0"), ("copra", "run-1"), ("lora", "run-0"), ("lora", "run-1"), ("lora", "run-fast")
    ]  # fmt: skip
    assert found[0].checkpoint(0.25) == runs / "copra" / "run-0" / "checkpoint-2"
    assert found[-1].checkpoint(0.25) is None and found[0].checkpoint(0.5) is None
    assert same_but_seed(found[0], found[1]) and same_but_seed(found[2], found[3])
    assert not same_but_seed(found[0], found[3]), "methods differ"
    assert not same_but_seed(found[2], found[4]), "learning rates differ"
    assert not same_but_seed(found[0], found[0]), "the same seed"


def test_a_runs_record_says_how_many_steps_it_took(tmp_path):
    """`max_steps` may be unset; the adapter's own folder leads to the run."""
    folder = save_run(tmp_path / "run", "lora", 0, 0.5, max_steps=-1)
    assert read_run(folder).steps() is None and read_run(folder).checkpoint(0.25) is None
    write_result(folder / "result.json", Result("train", {}, {}, steps=8))
    run = read_run(folder / "adapter")
    assert run.folder == folder and run.steps() == 8 and run.checkpoint(0.25) == folder / "checkpoint-2"


def test_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run lies below"):
        find_runs(tmp_path)


def names(choices: list[list[SavedRun]]) -> list[list[str]]:
    return [[run.folder.name for run in runs] for runs in choices]


def test_repetitions_are_the_runs_with_every_seed(runs, tmp_path):
    """In the order of the seeds; settings that only one seed tuned are left out, and so is a run without an adapter."""
    assert names(repeated_runs(runs / "lora", [1, 0])) == [["run-1", "run-0"]]
    assert names(repeated_runs(runs / "lora", [2])) == [["run-fast"]]
    assert names(repeated_runs(runs / "lora", [0])) == [["run-0"]], "one list for each settings"
    torn = shutil.copytree(runs / "copra", tmp_path / "torn")
    shutil.rmtree(torn / "run-1" / "adapter")
    assert names(repeated_runs(torn, [0])) == [["run-0"]]
    for folder, seeds in ((runs / "lora", [0, 1, 2]), (torn, [0, 1]), (tmp_path / "nowhere", [0])):
        with pytest.raises(
            InputError, match=f"has no settings trained with each of the seeds {seeds[0]}.*; train them"
        ):
            repeated_runs(folder, seeds)


def test_repetitions_may_differ_in_what_an_adapter_does_not_depend_on(tmp_path):
    save_run(tmp_path / "a", "lora", 0, data_root="sample", per_device_eval_batch_size=4)
    save_run(tmp_path / "b", "lora", 1, max_eval_samples=3, mask_seed=7)
    save_run(tmp_path / "c", "lora", 2, lora_r=2)
    assert names(repeated_runs(tmp_path, [0, 1])) == [["a", "b"]]
    with pytest.raises(InputError, match="no settings"):
        repeated_runs(tmp_path, [0, 2])


def test_the_settings_that_were_best_on_dev_are_taken(tmp_path):
    """The mean over seeds decides, then the smaller loss; test does not count."""

    def add(rate: float, seed: int, accuracy: float, loss: float = 0.5) -> None:
        folder = save_run(tmp_path / f"lr{rate}-seed{seed}", "copra", seed, learning_rate=rate)
        metrics = {"dev/sst2/accuracy": accuracy, "dev/sst2/loss": loss, "test/sst2/accuracy": 100.0 - accuracy}
        write_result(folder / "result.json", Result("train", {}, metrics))

    for rate, accuracies, loss in ((0.1, (70.0, 90.0), 0.5), (0.2, (85.0, 80.0), 0.5), (0.3, (82.5, 82.5), 0.6)):
        for seed, accuracy in enumerate(accuracies):
            add(rate, seed, accuracy, loss)
    add(0.4, 0, 99.0)
    assert names([best_on_dev(repeated_runs(tmp_path, [1, 0]), "sst2")]) == [["lr0.2-seed1", "lr0.2-seed0"]]
    (only,) = repeated_runs(save_run(tmp_path / "alone" / "run", "lora", 5).parent, [5])
    assert best_on_dev([only], "sst2") == only, "where there is no choice no record is needed"


def test_a_choice_needs_records(tmp_path):
    for rate in (0.1, 0.2):
        save_run(tmp_path / f"lr{rate}", "lora", 0, learning_rate=rate)
    with pytest.raises(InputError, match="result.json"):
        best_on_dev(repeated_runs(tmp_path, [0]), "sst2")
