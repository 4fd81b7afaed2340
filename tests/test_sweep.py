"""Sweeps: which runs they hold, what they leave, and that nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from copra_llm.adapters import load_adapter_weights
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.protocols import runs
from copra_llm.protocols.plans import read_plans
from copra_llm.protocols.runs import Store
from copra_llm.protocols.sweep import Sweep, run_sweep
from copra_llm.report import find_results

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {
    "model": "minilm",
    "tasks": ["sst2"],
    "variants": {"copra": {"method": "copra"}, "cosine": {"ramp_shape": "cosine"}},
    "seeds": [0, 1],
    "learning_rate": [1e-2],
    "max_steps": [4],
    "points": {"fusion": 3},
    "settings": {"lora_r": 2, "max_length": 32, "max_train_samples": 16, "max_eval_samples": 8, "checkpoint_at": []},
}
KINDS = ("train", "interpolation", "merge_over_steps", "shapley")


def sweep(**changes) -> Sweep:
    return Sweep(**ENTRIES | changes)


def test_the_grid_is_whole():
    grid = sweep(tasks=["sst2", "agnews"], learning_rate=[1e-3, 1e-2], max_steps=[4, 8]).runs(None)
    cells = {(r.config.data.tasks[0], r.variant, r.config.train.learning_rate, r.config.train.max_steps) for r in grid}
    assert len(grid) == len(cells) == 2 * 2 * 2 * 2


def test_a_variant_is_its_settings_and_has_a_place_of_its_own():
    """The three methods' own runs lie where every protocol has them."""
    plain, cosine = sweep().runs(None)
    assert plain.variant is None and plain.place == Path("minilm/sst2/copra")
    assert cosine.variant == "cosine" and cosine.place == Path("minilm/sst2/cosine")
    p = [run.config.schedule.schedule()(0.25) for run in (plain, cosine)]
    assert p == pytest.approx([1 / 3, 1 / 4])


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"variants": {}}, "variants is empty"),
        ({"variants": {"cosine": 3}}, "variant cosine is 3"),
        ({"variants": {"cosine": {"ramp_shape": "cosin"}}}, "'cosin'"),
        ({"tasks": ["sst3"]}, 'no task "sst3"'),
        ({"points": {"fusion": 2}}, "line of 2 points"),
        ({"fractions": [0.0]}, "must lie in (0, 1]"),
        ({"fractions": [0.5], "seeds": [0]}, "at least two"),
    ],
)
def test_a_sweep_that_is_wrong_is_refused(changes, expected):
    with pytest.raises(InputError) as refusal:
        sweep(**changes)
    assert expected in str(refusal.value)


def test_the_committed_plan_is_read():
    plans = read_plans(ROOT / "eval" / "sweep" / "plan.yaml", Sweep)
    assert plans.keys() == {"grid", "along", "schedules"}
    assert [run for plan in plans.values() for run in plan.runs(None)]


@pytest.fixture(scope="module")
def swept(tiny_bert, tmp_path_factory) -> tuple[Sweep, Path, Path]:
    """A sweep with a curve along the run, done once: the sweep, its results and its work."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = sweep(model=str(tiny_bert), fractions=[0.5, 1.0], shapley_samples=8)
    run_sweep(plan, folder / "results", folder / "work", "sample", lambda text: None, workers=1)
    return plan, folder / "results", folder / "work"


def test_every_run_pair_and_curve_leaves_a_record(swept):
    records = find_results([swept[1]])
    count = {kind: sum(r.protocol == kind for r in records) for kind in KINDS}
    assert count == {"train": 2 * 2, "interpolation": 2, "merge_over_steps": 2, "shapley": 2 * 2}
    assert {r.config.get("variant") for r in records} == {None, "cosine"}
    labels = {r.config["label"] for r in records if r.protocol == "interpolation"}
    assert labels == {"copra", "cosine"}


def test_the_curve_along_a_run_is_of_its_checkpoints(swept):
    """Each point is what the two checkpoints give, alone and merged; the last is the finished runs' merge."""
    plan, results, work = swept
    run = plan.runs("sample")[0]
    (record,) = [r for r in find_results([results / run.place]) if r.protocol == "merge_over_steps"]
    assert record.data["steps"] == [2, 4]
    store = Store(results, work, lambda text: None)
    ends = [store.checkpoints(run.replace(seed=s, checkpoint_at=plan.fractions), [2, 4]) for s in plan.seeds]
    evaluator = AdapterEvaluator(run.config, ["sst2"], "test")
    for i, pair in enumerate(zip(*ends, strict=True)):
        assert record.data["single_loss"][i] == pytest.approx(np.mean([evaluator(e, "sst2").loss for e in pair]))
        assert record.data["merged_loss"][i] == evaluator(merge(list(pair), "fusion"), "sst2").loss
    final = [load_adapter_weights(store.folder(run.replace(seed=seed))) for seed in plan.seeds]
    for whole, checkpoint in zip(final, (end[-1] for end in ends), strict=True):
        assert all((whole.factors[n].lora_B == f.lora_B).all() for n, f in checkpoint.factors.items())


def test_nothing_is_done_twice(swept, monkeypatch):
    plan, results, work = swept
    monkeypatch.setattr(runs, "train_adapter", lambda *a: pytest.fail("a run was trained again"))
    before = {f: f.stat().st_mtime_ns for f in results.rglob("*.json")}
    run_sweep(plan, results, work, "sample", lambda text: None, workers=1)
    assert {f: f.stat().st_mtime_ns for f in results.rglob("*.json")} == before


def test_two_workers_leave_the_same_records(swept, tmp_path):
    """Side by side or one after the other: the same metrics."""
    plan, results, _ = swept
    run_sweep(plan, tmp_path / "results", tmp_path / "work", "sample", workers=2)
    alone, both = (
        {f.relative_to(folder): record.metrics for f in sorted(folder.rglob("*.json")) for record in find_results([f])}
        for folder in (results, tmp_path / "results")
    )
    assert alone == both
