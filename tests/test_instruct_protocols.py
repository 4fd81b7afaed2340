"""The suite's protocols on conversations: seeds and skills are merged, adapters pruned, all under the data's names."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples import write_conversations

from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.protocols import layer_values, pruning
from copra_llm.protocols.multitask import MultiTask, run_multitask
from copra_llm.protocols.plans import read_plans
from copra_llm.protocols.sweep import Sweep, run_sweep
from copra_llm.report import connectivity_table, find_results
from copra_llm.results import Result, read_result
from copra_llm.summaries.instruct import learning_table, plot_learning, skills_table
from copra_llm.summaries.pruning import pruning_loss_table

INSTRUCT = Path(__file__).resolve().parents[1] / "eval" / "instruct"
SETTINGS = {"per_device_train_batch_size": 2, "max_length": 48, "lora_target_modules": ["all-linear"],
            "logging_steps": 1, "dev_size": 6, "chat_template": "plain", "checkpoint_at": [],
            "eval_steps": 2}  # fmt: skip
SKILLS = ("songs", "films")


def quiet(text: str) -> None:
    """Reports nothing."""


def own(skill: str) -> dict:
    return {"dataset_name": [f"$TINY_DATA/{skill}.jsonl"], "test_dataset_name": [f"$TINY_DATA/{skill}-test.jsonl"]}


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """Two data sets, two methods and two seeds, trained and merged once: the folder of results and work."""
    folder = tmp_path_factory.mktemp("protocols")
    for i, name in enumerate((*SKILLS, *(f"{skill}-test" for skill in SKILLS))):
        write_conversations(folder / f"{name}.jsonl", 40, seed=i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_DATA", str(folder))
        for skill in SKILLS:
            run_sweep(sweep(tiny_llama, skill), folder / "results", folder / "work", None, quiet, workers=1)
        yield folder


def sweep(model: Path, skill: str) -> Sweep:
    return Sweep(
        model=str(model), tasks=[skill], variants={"lora": {"method": "lora"}, "copra": {"method": "copra"}},
        seeds=[0, 1], learning_rate=[0.02], max_steps=[4], points={"fusion": 3}, settings=SETTINGS | own(skill),
    )  # fmt: skip


def skills(model: Path, **changes) -> MultiTask:
    values = {"model": str(model), "groups": [list(SKILLS)], "methods": ["lora", "copra"], "seeds": [0, 1],
              "merges": {"fusion": {}}, "settings": SETTINGS | {"learning_rate": 0.02, "max_steps": 4},
              "task_settings": {skill: own(skill) for skill in SKILLS}}  # fmt: skip
    return MultiTask(**values | changes)


def test_records_are_the_data_sets_and_nothing_is_done_twice(trained, tiny_llama):
    place = trained / "results" / tiny_llama.name
    found = {p.relative_to(place).as_posix(): p for p in place.rglob("*.json") if p.parts[-3] in SKILLS}
    assert len(found) == 2 * 2 * 3
    record = read_result(found["songs/copra/fusion-lr0.02-steps4-seeds0-1.json"])
    assert record.config["dataset_name"] == ["$TINY_DATA/songs.jsonl"] and "test/songs/loss@0.5" in record.metrics
    before = {p: p.stat().st_mtime_ns for p in found.values()}
    run_sweep(sweep(tiny_llama, "songs"), trained / "results", trained / "work", None, quiet, workers=1)
    assert {p: p.stat().st_mtime_ns for p in found.values()} == before
    assert "| songs | CopRA |" in connectivity_table(find_results([trained / "results"]))


def test_the_losses_along_the_runs_are_shown(trained, tmp_path):
    results = find_results([trained / "results"])
    lines = [[cell.strip() for cell in line.split("|")] for line in learning_table(results).splitlines()]
    assert lines[0][5:8] == ["step 2", "dev loss at the end", "test loss"] and len(lines) == 2 + 4
    runs = [r for r in results if r.protocol == "train" and r.config["tasks"] == ["songs"]]
    lora = [r for r in runs if r.config["method"] == "lora"]
    (row,) = [line for line in lines if line[2:4] == ["songs", "LoRA"]]
    for column, value in (5, lambda r: r.data["dev"][0]["dev/songs/loss"]), (6, lambda r: r.metrics["dev/songs/loss"]):
        assert row[column].split()[0] == f"{sum(map(value, lora)) / 2:.3f}"
    assert all(path.stat().st_size for path in plot_learning(results, tmp_path / "learning"))


def test_a_merged_skill_is_evaluated_on_its_own_data(trained, tiny_llama):
    """Each evaluated here anew, on the test records of that skill."""
    plan = skills(tiny_llama)
    run_multitask(plan, trained / "results", trained / "work", None, quiet, workers=1)
    folder = trained / "results" / tiny_llama.name / "+".join(SKILLS)
    record = read_result(folder / "copra" / "fusion-seed1.json")
    adapters = [load_adapter_weights(trained / "work" / tiny_llama.name / skill / "copra" / "lr0.02-steps4-seed1")
                for skill in SKILLS]  # fmt: skip
    merged = merge(adapters, "fusion")
    losses = {}
    for skill, single in zip(SKILLS, adapters, strict=True):
        config = RunConfig().replace(
            **SETTINGS | own(skill) | {"model_name_or_path": str(tiny_llama), "tasks": [skill]}
        )
        evaluator = AdapterEvaluator(config, [skill], "test")
        assert record.metrics[f"test/{skill}/loss/merged"] == evaluator(merged, skill).loss
        assert record.metrics[f"test/{skill}/loss/single"] == evaluator(single, skill).loss
        losses[skill] = evaluator(single, skill).loss
    assert len(set(losses.values())) == 2, "the skills have other test data"
    assert record.config["task_settings"]["films"] == own("films")


def test_skills_are_compared_by_what_merging_adds():
    """0.4 and 0.6 nats with LoRA, 0.1 and 0.3 with CopRA: 0.3 less with each seed."""

    def record(method: str, seed: int, added: float) -> Result:
        config = {"model_name_or_path": "m", "tasks": ["songs", "films"], "method": method, "seed": seed,
                  "merge_method": "fusion", "split": "test"}  # fmt: skip
        losses = {f"test/{task}/loss/single": 1.0 + seed for task in SKILLS}
        return Result("multitask", config, losses | {key.replace("single", "merged"): value + added
                                                     for key, value in losses.items()})  # fmt: skip

    records = [record("lora", 0, 0.4), record("lora", 1, 0.6), record("copra", 0, 0.1), record("copra", 1, 0.3)]
    rows = [[cell.strip() for cell in line.split("|")][4:-1] for line in skills_table(records).splitlines()[2:]]
    assert [row[:2] for row in rows] == [[skill, method] for method in ("LoRA", "CopRA") for skill in SKILLS]
    assert rows[0][4].startswith("0.500 [") and rows[0][5] == "–"
    assert rows[3][4].startswith("0.200 [") and rows[3][5] == "-0.300 [-0.300, -0.300]"


def test_task_settings_that_are_wrong_are_refused(tiny_llama):
    with pytest.raises(InputError, match=r"task_settings have 3 for films"):
        skills(tiny_llama, task_settings={"songs": own("songs"), "films": 3})
    with pytest.raises(InputError, match=r'no setting "datset_name" \(did you mean "dataset_name"'):
        skills(tiny_llama, task_settings={"songs": own("songs"), "films": {"datset_name": ["x"]}})
    with pytest.raises(InputError, match=r'no task "films"'):
        skills(tiny_llama, task_settings={"songs": own("songs")})


def test_conversations_adapters_are_pruned(trained, tiny_llama):
    """In loss as in accuracy; the whole adapter is the run's own."""
    plan = pruning.Plan(tasks=["songs"], methods=["lora", "copra"], seeds=[0, 1], densities=[0.5], by=["magnitude"],
                        quantise=["nf4"], early_tasks=[], early_methods=[])  # fmt: skip
    out = trained / "results" / "pruned"
    pruning.run_plan(tiny_llama.name, plan, trained / "work", out, trained / "again", None, quiet)
    records = find_results([out])
    assert len(records) == 4
    for r in records:
        run = read_result(trained / "results" / tiny_llama.name / "songs" / r.config["method"]
                          / f"lr0.02-steps4-seed{r.config['seed']}.json")  # fmt: skip
        assert r.data["rows"][0]["loss"] == pytest.approx(run.metrics["test/songs/loss"], rel=1e-6)
    lines = pruning_loss_table(records).splitlines()
    assert len(lines) == 4 and "| songs | CopRA |" in lines[3] and "rise minus LoRA's" in lines[0]


def test_conversations_layers_have_values(trained, tiny_llama):
    plan = layer_values.Plan(tasks=["films"], methods=["copra"], seeds=[0, 1], budget=16, max_eval_samples=6,
                             per_device_eval_batch_size=4)  # fmt: skip
    layer_values.run_plan(tiny_llama.name, plan, trained / "values", trained / "work", trained / "again", None, quiet)
    records = find_results([trained / "values"])
    assert {(r.config["metric"], r.config["seed"]) for r in records} == {
        (m, s) for m in ("loss", "accuracy") for s in (0, 1)
    }
    assert all(abs(r.data["efficiency_gap"]) < 1e-6 for r in records)


def test_runs_that_are_not_there_are_asked_for(trained, tiny_llama):
    plan = pruning.Plan(tasks=["song"], methods=["lora"], seeds=[0], densities=[], by=[], quantise=[], early_tasks=[],
                        early_methods=[])  # fmt: skip
    with pytest.raises(InputError, match="song.* has no settings trained with each of the seeds 0"):
        pruning.run_plan(tiny_llama.name, plan, trained / "work", trained / "out", trained / "again", None, quiet)
    assert not (trained / "out").exists()


def test_the_projects_plans_can_be_read_and_fit_together():
    """What is merged and pruned is what was trained."""
    plans = read_plans(INSTRUCT / "plan.yaml", Sweep)
    assert {"alpaca", "sentiment", "gsm8k"} <= set(plans)
    assert all(plan.settings["packing"] and plan.settings["dataset_name"] for plan in plans.values())
    (merged,) = read_plans(INSTRUCT / "skills.yaml", MultiTask).values()
    (pruned,) = read_plans(INSTRUCT / "pruning.yaml", pruning.Plan).values()
    for skill in merged.groups[0]:
        for method in merged.methods:
            ((run,),) = [[r for r in plans[skill].runs(None) if r.config.schedule.method == method]]
            assert merged.config(skill, method, 0, None) == run.config
    assert set(pruned.tasks) <= set(plans) and pruned.seeds == merged.seeds == plans["alpaca"].seeds
