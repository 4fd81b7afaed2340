"""The multi-task protocol: adapters of several tasks made one, evaluated on each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from examples import tiny_adapter

from copra_llm import evaluator as evaluator_module
from copra_llm.adapters import load_adapter_weights, save_adapter_weights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.protocols import runs as protocol_runs
from copra_llm.protocols.multitask import MultiTask, normalised, run_multitask
from copra_llm.protocols.plans import read_plans
from copra_llm.results import Result, read_result, unpack_bits
from copra_llm.summaries.together import multitask_details, multitask_table

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "lora_r": 2, "max_length": 24, "max_train_samples": 16, "max_eval_samples": 10, "checkpoint_at": [],
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
}  # fmt: skip
TASKS = ["sst2", "agnews", "mnli"]
MERGES = {"fusion": {}, "sum": {"method": "task-arithmetic", "scale": 0.7}}


def plan(model: Path | str, **changes) -> MultiTask:
    values = {"model": str(model), "groups": [TASKS[:2], TASKS], "methods": ["lora"], "seeds": [0],
              "merges": MERGES, "settings": SETTINGS}  # fmt: skip
    return MultiTask(**values | changes)


def run(chosen: MultiTask, folder: Path) -> list[Path]:
    run_multitask(chosen, folder / "results", folder / "work", "sample", lambda text: None, workers=1)
    return sorted((folder / "results").rglob("*.json"))


@pytest.fixture(scope="module")
def merged(tiny_bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multitask")
    run(plan(tiny_bert), folder)
    return folder


def single(folder: Path, task: str) -> Path:
    (found,) = (folder / "work").glob(f"*/{task}/lora/*")
    return found


@pytest.mark.parametrize("group", [TASKS[:2], TASKS])
@pytest.mark.parametrize("rule", ["fusion", "sum"])
def test_the_record_is_what_the_merged_adapter_does(merged, tiny_bert, group, rule):
    """Each task's own adapter and the merged one, evaluated here anew; ratios and means of the record's figures."""
    adapters = [load_adapter_weights(single(merged, task)) for task in group]
    both = merge(adapters, "fusion") if rule == "fusion" else merge(adapters, "task-arithmetic", scale=0.7)
    config = RunConfig().replace(**SETTINGS | {"model_name_or_path": str(tiny_bert), "data_root": "sample"})
    evaluator = AdapterEvaluator(config, group, "test")
    (path,) = (merged / "results").rglob(f"*/{'+'.join(group)}/lora/{rule}-seed0.json")
    record = read_result(path)
    shares = []
    for task, adapter in zip(group, adapters, strict=True):
        alone, together = evaluator(adapter, task), evaluator(both, task)
        assert record.metrics[f"test/{task}/accuracy/single"] == alone.accuracy
        assert record.metrics[f"test/{task}/accuracy/merged"] == together.accuracy
        # Batches hold other tasks' heads, but the same examples: the same sums.
        assert record.metrics[f"test/{task}/loss/merged"] == pytest.approx(together.loss, rel=1e-6)
        assert unpack_bits(record.data[f"correct/test/{task}"]) == together.correct.astype(int).tolist()
        shares.append(100 * together.accuracy / alone.accuracy)
        assert record.metrics[f"test/{task}/accuracy/normalised"] == pytest.approx(shares[-1])
    assert record.metrics["test/mean/accuracy/normalised"] == pytest.approx(sum(shares) / len(group))
    c = record.config
    assert record.protocol == "multitask" and c["tasks"] == group and c["method"] == "lora" and c["seed"] == 0
    assert c["weights"] == ([1 / len(group)] * len(group) if rule == "fusion" else [1.0] * len(group))
    assert str(merged) not in json.dumps(vars(record)) and str(tiny_bert.parent) not in json.dumps(vars(record))


def test_the_single_figures_are_those_of_the_runs(merged):
    """What an adapter alone reaches on its task is what its training run has recorded."""
    (path,) = (merged / "results").rglob("*/sst2+agnews+mnli/lora/fusion-seed0.json")
    for task in TASKS:
        own = read_result(single(merged, task) / "result.json").metrics[f"test/{task}/accuracy"]
        assert read_result(path).metrics[f"test/{task}/accuracy/single"] == own


def test_nothing_is_done_twice(merged, tiny_bert, monkeypatch):
    """Records are left alone; adapters that are there are taken, also by another rule."""
    before = {f: f.stat().st_mtime_ns for f in (merged / "results").rglob("*.json")}
    trained = []
    monkeypatch.setattr(protocol_runs, "train_adapter", lambda config, tasks, folder: trained.append(tasks))
    run(plan(tiny_bert), merged)
    assert {f: f.stat().st_mtime_ns for f in (merged / "results").rglob("*.json")} == before
    assert len(run(plan(tiny_bert, merges={"mixture": {}}), merged)) == len(before) + 2
    assert trained == []


def test_adapters_of_other_protocols_are_taken(tiny_bert, tmp_path, monkeypatch):
    """Anything in the run's folder that is an adapter: here untrained ones of different ranks."""
    monkeypatch.delattr(protocol_runs, "train_adapter")
    for seed, task in enumerate(TASKS[:2]):
        folder = tmp_path / "work" / tiny_bert.name / task / "lora" / "lr0.01-steps2-seed0"
        adapter = load_adapter_weights(tiny_adapter(tiny_bert, tmp_path / task, seed=seed, r=2 + seed))
        save_adapter_weights(adapter, folder / "adapter")
    (record,) = run(plan(tiny_bert, groups=[TASKS[:2]], merges={"mixture": {}}), tmp_path)
    assert read_result(record).config["merge_method"] == "mixture"
    assert not list((tmp_path / "work").rglob("result.json"))


def test_each_task_has_its_own_head(merged):
    """The merged adapter carries the heads of all its tasks, as they were saved with each."""
    adapters = [load_adapter_weights(single(merged, task)) for task in TASKS]
    both = merge(adapters, "fusion")
    assert both.heads.keys() == {f"{task}.weight" for task in TASKS}
    for task, adapter in zip(TASKS, adapters, strict=True):
        assert torch.equal(both.heads[f"{task}.weight"], adapter.heads[f"{task}.weight"])


def test_fixed_heads_are_made_before_the_model_moves(merged, tiny_bert, monkeypatch):
    """On the CPU, as for training: on a GPU they would round otherwise, and label words lie on the CPU."""
    config = RunConfig().replace(**SETTINGS | {"model_name_or_path": str(tiny_bert), "data_root": "sample"})
    evaluator = AdapterEvaluator(config, TASKS, "test")
    adapters = {task: load_adapter_weights(single(merged, task)) for task in TASKS}
    evaluator.attach(adapters["sst2"])
    monkeypatch.setattr(evaluator_module, "fixed_head", lambda *a: pytest.fail("a head was made after the model moved"))
    for task in ("agnews", "sst2", "mnli"):
        evaluator.attach(adapters[task])
        for other in TASKS:  # the tasks' heads are fixed, so an adapter's own is the one that others lack
            head = evaluator.bench.classifier.heads[other]
            assert torch.equal(head.detach(), adapters[other].heads[f"{other}.weight"])


def test_the_share_of_nothing_is_no_number():
    assert normalised(50.0, 80.0) == 62.5 and math.isnan(normalised(10.0, 0.0))


def test_the_committed_plan_is_read():
    (chosen,) = read_plans(ROOT / "eval" / "multitask" / "plan.yaml", MultiTask).values()
    assert len(chosen.seeds) >= 3 and {"fusion", "mixture"} <= set(chosen.merges) and len(chosen.groups) == 3


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"groups": []}, "groups is empty"),
        ({"groups": [["sst2"]]}, r"groups hold \['sst2'\], but tasks can only be merged from two on"),
        ({"groups": [["sst2", "sst3"]]}, 'no task "sst3"'),
        ({"groups": [["sst2", "sst2"]]}, "sst2 twice"),
        ({"methods": ["lara"]}, "'lara'"),
        ({"merges": {"tsvm": {}}}, 'did you mean "tsv-m"'),
        ({"tuned": {"sst2": []}}, r"tuned has \[\] for lora on sst2"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(changes, expected):
    with pytest.raises(InputError, match=expected):
        plan("minilm", **changes)


def record(method: str, seed: int, share: float, rule: str = "fusion") -> Result:
    config = {"model_name_or_path": "m", "tasks": ["sst2", "mnli"], "method": method, "seed": seed,
              "merge_method": rule, "merge_options": {}}  # fmt: skip
    values = {"single": 80.0, "merged": 0.8 * share, "normalised": share}
    return Result("multitask", config, {f"test/mean/accuracy/{name}": value for name, value in values.items()})


def test_the_table_pairs_seeds():
    """Normalised 85 and 95 against 80 and 80: differences 5 and 15; rules that only one method has show a dash."""
    results = [record("lora", 0, 80.0), record("lora", 1, 80.0), record("copra", 1, 95.0), record("copra", 0, 85.0)]
    everything = [*results, record("copra", 0, 70.0, "ties")]
    lines = multitask_details(everything).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    half = 12.706 * math.sqrt(50) / math.sqrt(2)
    assert rows[0][:6] == ["m", "sst2 + mnli", "fusion", "80.0 → 64.0", "80.0 → 72.0", "80.0 [80.0, 80.0]"]
    assert rows[0][6:] == [f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]" for mean in (90, 10)]
    assert rows[1] == ["m", "sst2 + mnli", "ties", "– → –", "80.0 → 56.0", "–", "70.0", "–"]
    assert multitask_table([]) == "" and multitask_table(everything).splitlines() == lines[:3]
