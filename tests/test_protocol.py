"""The connectivity protocol: what is tuned, what is run again, what the records say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from copra_llm.errors import InputError
from copra_llm.protocols import runs
from copra_llm.protocols.connectivity import Plan, dev_score, run_plan, tune
from copra_llm.protocols.plans import read_plans
from copra_llm.report import connectivity_table, find_results, training_table
from copra_llm.results import Result, read_result

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan(
    tasks=["sst2"],
    methods=["lora", "copra"],
    seeds=[0, 1],
    learning_rate=[1e-3, 1e-2],
    max_steps=[2, 3],
    points={"fusion": 3, "mixture": 3},
    settings={"lora_r": 2, "max_length": 32, "max_train_samples": 16, "max_eval_samples": 8, "checkpoint_at": []},
)


# --- tuning -----------------------------------------------------------------------------------------------


def asked(scores: dict) -> tuple:
    """What `tune` chooses, and which settings it asked for, in order."""
    seen = []

    def score(rate, steps):
        seen.append((rate, steps))
        return scores[rate, steps]

    plan = dataclasses.replace(PLAN, learning_rate=[0.1, 0.2, 0.3], max_steps=[10, 20])
    return tune(score, plan), seen


def test_rates_are_tried_at_the_fewest_steps_then_the_best_at_more():
    scores = {(0.1, 10): 1, (0.2, 10): 3, (0.3, 10): 2, (0.2, 20): 4}
    assert asked(scores) == ((0.2, 20), [(0.1, 10), (0.2, 10), (0.3, 10), (0.2, 20)])


def test_more_steps_are_taken_only_if_they_are_better_on_dev():
    scores = {(0.1, 10): 1, (0.2, 10): 3, (0.3, 10): 2, (0.2, 20): 2.9}
    assert asked(scores)[0] == (0.2, 10)


def test_dev_accuracy_decides_and_dev_loss_breaks_ties():
    """Test metrics are never looked at; a loss that was not finite is the worst."""

    def result(accuracy, loss, test):
        return Result("train", {}, {"dev/sst2/accuracy": accuracy, "dev/sst2/loss": loss, "test/sst2/accuracy": test})

    ranking = [result(80.0, float("nan"), 99), result(80.0, 0.9, 98), result(80.0, 0.3, 97), result(81.0, 2.0, 1)]
    scores = [dev_score(r, "sst2") for r in ranking]
    assert scores == sorted(scores) and len(set(scores)) == 4


def test_a_plan_is_tuned_on_dev_accuracy(tmp_path, monkeypatch):
    """Against dev loss, and against every test metric; all seeds are then trained at the settings chosen."""
    trained = []

    def train_adapter(config, tasks, output):
        (output / "adapter").mkdir(parents=True)
        rate, steps = config.train.learning_rate, config.train.max_steps
        trained.append((config.train.seed, rate, steps))
        best = (rate, steps) == (1e-2, 2)
        values = {"dev/sst2/accuracy": 90.0 if best else 80.0, "dev/sst2/loss": 0.9 if best else 0.1,
                  "test/sst2/accuracy": 10.0 if best else 99.0, "test/sst2/loss": 0.9 if best else 0.1}  # fmt: skip
        return Result("train", config.flat(), values, environment={"base_model": "minilm"})

    monkeypatch.setattr(runs, "train_adapter", train_adapter)
    plan = dataclasses.replace(PLAN, methods=["lora"], learning_rate=[1e-3, 1e-2, 1e-1], points={})
    run_plan("minilm", plan, tmp_path / "results", tmp_path / "work", None, lambda text: None)
    assert trained == [(0, 1e-3, 2), (0, 1e-2, 2), (0, 1e-1, 2), (0, 1e-2, 3), (1, 1e-2, 2)]


# --- the plan, run on a tiny model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> list[tuple]:
    """(method, seed, rate, steps) of every training run since it was last emptied."""
    return []


@pytest.fixture(scope="module")
def plan_folders(tiny_bert, tmp_path_factory, trained) -> tuple[Path, Path, list[str]]:
    """`results` and `work` of the plan, once run; and what it said."""
    folder = tmp_path_factory.mktemp("protocol")
    train_adapter = runs.train_adapter
    said = []

    def counted(config, tasks, output):
        trained.append((config.schedule.method, config.train.seed, config.train.learning_rate, config.train.max_steps))
        return train_adapter(config, tasks, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train_adapter", counted)
        run_plan(str(tiny_bert), PLAN, folder / "results", folder / "work", "sample", said.append)
        yield folder / "results", folder / "work", said


def again(plan_folders, tiny_bert, trained) -> tuple[list[tuple], list[str]]:
    """Run the same plan again: what is trained now, and what is said."""
    trained.clear()
    said = []
    run_plan(str(tiny_bert), PLAN, *plan_folders[:2], "sample", said.append)
    return list(trained), records_in(said)


def records_in(said: list[str]) -> list[str]:
    """Lines that name a record; the others tell which of the jobs are finished."""
    return [text for text in said if ".json" in text]


def test_every_run_and_every_pair_leaves_a_record(plan_folders, tiny_bert, trained):
    """Three tuning runs and the other seed a method; the pair of seeds by both merge methods."""
    results, _, said = plan_folders
    assert len(trained) == 2 * 4
    for method in ("lora", "copra"):
        runs = [run for run in trained if run[0] == method]
        assert [run[1:] for run in runs[:2]] == [(0, 1e-3, 2), (0, 1e-2, 2)]
        assert runs[2][1] == 0 and runs[2][3] == 3 and runs[3][1] == 1
        assert runs[3][2:] in {run[2:] for run in runs[:3]}
    records = find_results([results])
    assert sum(r.protocol == "train" for r in records) == 8
    assert sum(r.protocol == "interpolation" for r in records) == 4
    assert {f.relative_to(results).parts[:2] for f in results.rglob("*.json")} == {(tiny_bert.name, "sst2")}
    assert len(records_in(said)) == 12


def test_the_tables_are_made_from_the_records(plan_folders):
    records = find_results([plan_folders[0]])
    heading = 2
    assert len(connectivity_table(records).splitlines()) == heading + len(PLAN.methods)
    settings = {(r.config["method"], r.config["learning_rate"], r.steps) for r in records if r.protocol == "train"}
    assert len(training_table(records).splitlines()) == heading + len(settings)


def test_records_hold_no_local_folder(plan_folders, tiny_bert):
    """They can be committed: no path of this machine, and the model by its name alone."""
    results, work, _ = plan_folders
    files = list(results.rglob("*.json"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        record = json.loads(text)
        for folder in (results.parent, tiny_bert.parent, Path.home(), ROOT):
            assert str(folder) not in text
        assert record["config"]["model_name_or_path"] == record["environment"]["base_model"] == tiny_bert.name
        assert record["config"]["output_dir"] is record["config"]["data_root"] is None
        assert len(record["environment"]["base_fingerprint"]) == 16


def test_nothing_is_done_twice(plan_folders, tiny_bert, trained):
    """Neither trained nor merged again, and no record touched."""
    before = {f: f.stat().st_mtime_ns for f in plan_folders[0].rglob("*.json")}
    assert again(plan_folders, tiny_bert, trained) == ([], [])
    assert {f: f.stat().st_mtime_ns for f in plan_folders[0].rglob("*.json")} == before


def test_records_alone_are_enough(plan_folders, tiny_bert, trained, tmp_path):
    """A fresh checkout has the records without the adapters: nothing is trained until a curve is missing.

    Then the adapters are, and the curve is the only record that is written.
    """
    results = shutil.copytree(plan_folders[0], tmp_path / "results")
    assert again((results, tmp_path / "work"), tiny_bert, trained) == ([], [])
    (curve,) = results.glob("*/sst2/copra/fusion-*.json")
    before = read_result(curve)
    curve.unlink()
    runs, said = again((results, tmp_path / "work"), tiny_bert, trained)
    assert [run[:2] for run in runs] == [("copra", 0), ("copra", 1)] and len(said) == 1
    assert read_result(curve).data == before.data


def test_what_is_missing_is_done(plan_folders, tiny_bert, trained):
    """A lost curve is computed anew, equal to the old one; a lost record of a finished run is read from its folder."""
    results = plan_folders[0]
    (curve,) = results.glob("*/sst2/copra/fusion-*.json")
    single = next(results.glob("*/sst2/lora/lr0.001-steps2-seed0.json"))
    before = {file: read_result(file) for file in (curve, single)}
    curve.unlink(), single.unlink()
    runs, said = again(plan_folders, tiny_bert, trained)
    assert runs == [("lora", 0, 1e-3, 2)] and len(said) == 2
    assert read_result(single) == before[single]
    assert read_result(curve).metrics == before[curve].metrics and read_result(curve).data == before[curve].data


def test_methods_share_what_should_be_shared(plan_folders):
    """Same seed: the runs of two methods differ in the method alone."""
    configs = [next(plan_folders[0].glob(f"*/sst2/{method}/lr0.001-steps2-seed0.json")) for method in ("lora", "copra")]
    one, other = (read_result(file).config for file in configs)
    assert {key for key in one if one[key] != other[key]} == {"method"}


# --- plans as files ---------------------------------------------------------------------------------------


def test_the_committed_plan_is_read():
    plans = read_plans(ROOT / "eval" / "interpolation" / "plan.yaml", Plan)
    assert plans.keys() == {"minilm", "smollm2"}
    assert all(set(plan.methods) == {"lora", "copra", "coto"} and len(plan.seeds) >= 3 for plan in plans.values())


GOOD = """
all: {methods: [lora], seeds: [0, 1], settings: {lora_r: 2}}
minilm: {tasks: [sst2], learning_rate: [1e-3], max_steps: [2], points: {fusion: 3}, settings: {max_length: 9}}
"""


def test_shared_and_own_entries_are_joined(tmp_path):
    (tmp_path / "plan.yaml").write_text(GOOD, encoding="utf-8")
    (plan,) = read_plans(tmp_path / "plan.yaml", Plan).values()
    assert plan.settings == {"lora_r": 2, "max_length": 9}
    assert plan.learning_rate == [0.001] and plan.seeds == [0, 1]


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("tasks: [sst2], ", "", "the plan of minilm lacks tasks"),
        ("tasks: [sst2]", "tasks: [sst3]", 'no task "sst3"'),
        ("tasks: [sst2]", "tasks: []", "tasks is empty"),
        ("tasks: ", "task: sst2, tasks: ", "unknown entry task"),
        ("lora_r: 2", "lora_rank: 2", 'no setting "lora_rank" (did you mean "lora_r"?)'),
        ("lora_r: 2", "lora_r: 0", "--lora_r is 0"),
        ("[lora]", "[lara]", "'lara'"),
        ("[0, 1]", "[zero]", "seeds is 'zero', but must be of type int"),
        ("1e-3", "fast", "learning_rate is 'fast', but must be of type float"),
        ("fusion: 3", "fusoin: 3", 'did you mean "fusion"?'),
        ("fusion: 3", "fusion: 4", "line of 4 points"),
        ("points: {fusion: 3}", "points: 3", "points is 3"),
        ("minilm: {", "minilm: 3\nother: {", "minilm is 3"),
        ("all: {", "all: {{", "is not YAML"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_before_anything_runs(old, new, expected, tmp_path):
    path = tmp_path / "plan.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        read_plans(path, Plan)
    assert expected in str(refusal.value)


def test_a_missing_plan_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no\.yaml does not exist"):
        read_plans(tmp_path / "no.yaml", Plan)
