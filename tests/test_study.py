"""The study: what its cells are, what decides about settings, in which order it runs, and what is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from copra_llm.errors import InputError
from copra_llm.figures.study import outcomes
from copra_llm.protocols import runs
from copra_llm.protocols.comparisons import Comparison, Selection, cells, chosen_runs, read_study
from copra_llm.protocols.runs import Store, difference
from copra_llm.protocols.study import run_study, waves
from copra_llm.protocols.study_cost import cost_lines
from copra_llm.report import find_results
from copra_llm.results import Result, read_result, write_result
from copra_llm.summaries.study import means_table

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"lora": {"method": "lora"}, "copra": {"method": "copra"}}
PLAN = Comparison(
    model="minilm",
    tasks=["sst2", "agnews"],
    variants=VARIANTS,
    seeds=[0, 1, 2],
    learning_rate=[1e-3, 1e-2],
    max_steps=[4],
    settings={"lora_r": 2, "max_length": 32, "max_train_samples": 16, "max_eval_samples": 8, "checkpoint_at": []},
)


def plan(**changes) -> Comparison:
    return dataclasses.replace(PLAN, **changes)


def quiet(text: str) -> None:
    """Says nothing."""


# --- cells ------------------------------------------------------------------------------------------------


def test_a_cell_is_a_variant_at_a_level_of_each_factor():
    factors = {"rank": {"r2": {}, "r8": {"lora_r": 8}}, "init": {"shared": {"init_seed": 0}}}
    names = [cell.name for cell in cells(plan(factors=factors))]
    assert names == ["lora", "copra", "lora-r8", "copra-r8", "lora-shared", "copra-shared"]
    crossed = [cell.name for cell in cells(plan(factors=factors, crossed=True))]
    assert crossed == ["lora", "copra", "lora-shared", "copra-shared", "lora-r8-shared", "copra-r8-shared"]


def test_each_cell_has_a_folder_of_its_own():
    factors = {"rank": {"r8": {"lora_r": 8}}, "init": {"shared": {"init_seed": 0}}}
    whole = plan(factors=factors, variants=VARIANTS | {"late": {"p_start": 0.5}})
    found = [cell.run("sst2", 1e-3, 4) for cell in cells(whole)]
    assert len({run.place for run in found}) == len({str(run.config.flat()) for run in found}) == 9
    methods = [run for run in found if run.variant is None]
    assert [str(run.place) for run in methods] == ["minilm/sst2/lora", "minilm/sst2/copra"]


def test_a_level_that_changes_nothing_is_the_variant_itself():
    """Entries whose common settings differ so share the runs that they have in common."""
    assert cells(plan(factors={"rank": {"r2": {"lora_r": 2}}})) == cells(PLAN)


def test_a_variants_own_steps_stand_in_place_of_the_candidates():
    (_, longer) = cells(plan(variants={"lora": {"method": "lora"}, "longer": {"max_steps": 8}}))
    assert longer.candidates == [(1e-3, 8), (1e-2, 8)] and longer.run("sst2", 1e-3, 8).variant == "longer"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"seeds": []}, "seeds is empty"),
        ({"tune": "test"}, "tune is 'test'"),
        ({"reference": "lara"}, 'did you mean "lora"'),
        ({"variants": {"lora": {"method": "lora"}, "late": 3}}, "late is 3"),
        ({"variants": VARIANTS | {"a/b": {"p_start": 0.5}}}, "names a folder"),
        ({"variants": VARIANTS | {"late": {"p_strat": 0.5}}}, 'did you mean "p_start"'),
        ({"factors": {"rank": {"r0": {"lora_r": 0}}}}, "--lora_r is 0"),
        ({"factors": {"a": {"x": {"lora_r": 4}}, "b": {"x": {"lora_r": 8}}}}, "two cells of the name lora-x"),
        ({"points": {"fusion": 4}}, "line of 4 points"),
        ({"groups": [["sst2", "mnli"]]}, "two or more of its tasks"),
        ({"groups": [["sst2", "agnews"]], "tune": "per_task"}, "give tune: over_tasks"),
        ({"densities": [0.0]}, "the density is 0"),
        ({"tasks": ["sst3"]}, 'no task "sst3"'),
    ],
)
def test_a_comparison_that_is_wrong_is_refused(changes, expected):
    with pytest.raises(InputError) as refusal:
        plan(**changes)
    assert expected in str(refusal.value)


def test_the_committed_plan_asks_for_what_the_page_promises():
    plans = read_study(ROOT / "eval" / "study" / "plan.yaml")
    headline = plans["headline"]
    assert len(headline.tasks) >= 8 and len(headline.seeds) >= 5 and not headline.screening
    assert len({p.model for p in plans.values()}) >= 3 and len(plans["clip"].tasks) >= 2
    assert plans["screening"].screening
    assert list(read_study(ROOT / "eval" / "study" / "plan.yaml", ["clip"])) == ["clip"]
    with pytest.raises(InputError, match='did you mean "headline"'):
        read_study(ROOT / "eval" / "study" / "plan.yaml", ["headlines"])


# --- tuning -----------------------------------------------------------------------------------------------


def record(run, dev: float, test: float = 50.0, seconds: float = 4.0) -> Result:
    (task,) = run.config.data.tasks
    metrics = {f"{split}/{task}/{name}": value for split, accuracy in (("dev", dev), ("test", test))
               for name, value in (("accuracy", accuracy), ("loss", 1.0))}  # fmt: skip
    made = Result("train", run.config.flat(), metrics, seconds, steps=4, environment={"base_model": "minilm"})
    return runs.portable(made, run.variant)


def chosen(whole: Comparison, dev: dict, task: str = "sst2") -> list[float]:
    """Rates chosen for copra when `dev[task, rate]` is the dev accuracy."""

    def made(run):
        (of,) = run.config.data.tasks
        return record(run, dev[of, run.config.train.learning_rate], test=100 - dev[of, run.config.train.learning_rate])

    return [run.config.train.learning_rate for run in chosen_runs(whole, cells(whole)[1], task, made)]


DEV = {("sst2", 1e-3): 60, ("sst2", 1e-2): 70, ("agnews", 1e-3): 90, ("agnews", 1e-2): 70}


def test_the_mean_dev_accuracy_over_tasks_decides():
    """Test accuracy is the opposite of dev's here, and does not count."""
    assert chosen(PLAN, DEV) == chosen(PLAN, DEV, "agnews") == [1e-3]
    assert chosen(plan(tuning_tasks=["sst2"]), DEV, "agnews") == [1e-2]


def test_tasks_can_be_tuned_apart_or_not_at_all():
    apart = plan(tune="per_task")
    assert chosen(apart, DEV) == [1e-2] and chosen(apart, DEV, "agnews") == [1e-3]
    assert chosen(plan(tune="none"), {}) == [1e-3, 1e-2]
    assert chosen(plan(learning_rate=[1e-2]), {}) == [1e-2]


def test_nothing_is_chosen_while_a_record_is_missing():
    assert chosen_runs(PLAN, cells(PLAN)[0], "sst2", lambda run: None) == []


# --- order, stops, records of others ------------------------------------------------------------------------


class Trainer:
    """Stands for training: notes what is trained; dev accuracy is best at the higher rate."""

    def __init__(self, stop_after: int | None = None):
        self.done: list[tuple] = []
        self.stop_after = stop_after

    def __call__(self, config, tasks, output):
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt
        (output / "adapter").mkdir(parents=True)
        self.done.append((config.train.seed, config.train.learning_rate, tasks[0], config.schedule.method))
        run = runs.Run(config.replace(output_dir="runs", resume_from_checkpoint=None))
        return record(run, dev=1000 * config.train.learning_rate)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the plan with a new `Trainer`, and returns what it has trained."""

    def run(comparison=PLAN, selection=None, others=(), stop_after=None) -> list[tuple]:
        trainer = Trainer(stop_after)
        monkeypatch.setattr(runs, "train_adapter", trainer)
        folders = tmp_path / "results", tmp_path / "work"
        with contextlib.suppress(KeyboardInterrupt):
            run_study({"a": comparison}, *folders, None, selection=selection, others=others, say=quiet, workers=1)
        return trainer.done

    return run


def test_settings_are_tuned_first_and_then_seed_after_seed_is_whole(study):
    done = study()
    tuning, rest = done[:8], done[8:]
    assert {d[0] for d in tuning} == {0} and len(set(tuning)) == 8
    both = list(itertools.product(("sst2", "agnews"), ("lora", "copra")))
    assert rest == [(seed, 1e-2, *of) for seed in (1, 2) for of in both]


def test_wherever_it_stops_it_goes_on_and_does_nothing_twice(study):
    whole = study(stop_after=5) + study(stop_after=4)
    whole += study()
    assert len(whole) == len(set(whole)) == 8 + 8
    assert study() == []


def test_a_part_can_be_chosen_and_tunes_as_the_whole_does(study):
    """One task and variant: its tuning runs are of all tasks, since they decide together."""
    done = study(selection=Selection(["sst2"], ["copra"], [1]))
    assert {d[2:] for d in done[:4]} == {("sst2", "copra"), ("agnews", "copra")}
    assert done[4:] == [(1, 1e-2, "sst2", "copra")]


@pytest.mark.parametrize(
    "selection, flag", [(Selection(tasks=["mnli"]), "--tasks"), (Selection(variants=["lara"]), "--variants"),
                        (Selection(seeds=[7]), "--seeds")],
)  # fmt: skip
def test_what_no_entry_has_is_refused(selection, flag, study):
    with pytest.raises(InputError, match=flag):
        study(selection=selection)


def test_records_of_others_count_where_the_settings_are_the_same(study, tmp_path):
    """The same run is taken over; one of another rank, though of the same name, is not."""
    run = cells(PLAN)[0].run("sst2", 1e-2, 4)
    same, other = record(run, 10.0), record(run.replace(lora_r=4), 10.0)
    assert difference(same, run) is None and difference(other, run) == "lora_r"
    name = run.place / f"{run.name}.json"
    write_result(tmp_path / "others" / name, same)
    write_result(tmp_path / "different" / name, other)
    done = study(others=(tmp_path / "different", tmp_path / "others"))
    assert (0, 1e-2, "sst2", "lora") not in done and len(done) == 15
    assert read_result(tmp_path / "results" / name) == same


def test_a_record_whose_adapter_is_gone_stays_as_it_is(tmp_path, monkeypatch):
    """What is trained for its adapter alone does not change what has been published."""
    trainer, run = Trainer(), cells(PLAN)[0].run("sst2", 1e-2, 4)
    monkeypatch.setattr(runs, "train_adapter", trainer)
    store = Store(tmp_path / "results", tmp_path / "work", quiet)
    published = record(run, dev=33.0)
    write_result(store.record_file(run), published)
    assert store.train(run) == published and not trainer.done
    assert store.train(run, adapter_wanted=True) == published and len(trainer.done) == 1
    assert store.has_adapter(run) and read_result(store.record_file(run)) == published
    store.train(run, adapter_wanted=True)
    assert len(trainer.done) == 1


def test_a_record_of_other_settings_is_not_taken_for_the_plans(study):
    study()
    with pytest.raises(InputError, match="another lora_r than the plan has"):
        study(plan(settings=PLAN.settings | {"lora_r": 4}))


class Failing(Trainer):
    """Stands for training of which some runs diverge, or meet a fault of ours."""

    def __init__(self, wrong: dict[tuple, Exception]):
        super().__init__()
        self.wrong = wrong

    def __call__(self, config, tasks, output):
        error = self.wrong.get((config.train.seed, tasks[0], config.schedule.method))
        if error is not None:
            raise error
        return super().__call__(config, tasks, output)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    trainer, said = Failing({(1, "sst2", "copra"): InputError("by step 3 it diverged; lower --learning_rate"),
                             (2, "agnews", "lora"): RuntimeError("a fault of ours")}), []  # fmt: skip
    monkeypatch.setattr(runs, "train_adapter", trainer)
    with pytest.raises(InputError) as refusal:
        run_study({"a": PLAN}, tmp_path / "results", tmp_path / "work", None, say=said.append, workers=1)
    assert len(trainer.done) == 8 + 8 - 2
    first = "minilm/sst2/copra/lr0.01-steps4-seed1: by step 3 it diverged"
    assert str(refusal.value).startswith(f"2 runs or measurements failed, the first: {first}")
    places = {
        text.split(" ")[0] + text[:60].split("/")[1]: i for i, text in enumerate(said) if text.startswith("FAILED")
    }
    assert said[places["FAILEDagnews"]] == "FAILED minilm/agnews/lora/lr0.01-steps4-seed2: a fault of ours"
    traces = [i for i, text in enumerate(said) if text.startswith("Traceback")]
    assert traces == [places["FAILEDagnews"] - 1], "what is known of a fault of ours, and of nothing else"


def test_a_study_ends_where_every_run_fails(tmp_path, monkeypatch):
    wrong = {(0, task, method): InputError("no room; make some") for task in PLAN.tasks for method in VARIANTS}
    trainer = Failing(wrong)
    monkeypatch.setattr(runs, "train_adapter", trainer)
    many = plan(learning_rate=[1e-4, 1e-3, 1e-2])
    with pytest.raises(InputError, match="^10 runs or measurements failed"):
        run_study({"a": many}, tmp_path / "results", tmp_path / "work", None, say=quiet, workers=1)
    assert trainer.done == []


def test_data_that_is_not_there_is_refused_before_the_first_run(tmp_path, monkeypatch):
    """The packaged sample has no Yelp."""
    trainer = Trainer()
    monkeypatch.setattr(runs, "train_adapter", trainer)
    with pytest.raises(InputError, match="has no yelp"):
        run_study({"a": plan(tasks=["sst2", "yelp"])}, tmp_path / "results", tmp_path / "work", "sample", say=quiet,
                  workers=1)  # fmt: skip
    assert trainer.done == []


def test_what_is_missing_is_counted_and_timed(study, tmp_path):
    """Before: 8 tuning runs and 2 more seeds of 4 cells, not yet timed. With seed 2 missing: four runs of 4 seconds."""
    before = list(cost_lines({"a": PLAN}, tmp_path / "results", None, Selection()))
    assert "16 train to do" in before[0] and "never been timed" in before[0] and "still to be tuned" in before[0]
    study(selection=Selection(seeds=[0, 1]))
    (line, total) = cost_lines({"a": PLAN}, tmp_path / "results", None, Selection())
    assert line == "a: 4 train to do, some 0 min on one process" and total == "in all some 0 min on one process"
    long = list(cost_lines({"a": plan(seeds=list(range(62)))}, tmp_path / "results", None, Selection()))
    assert "240 train to do, some 16 min" in long[0]
    study()
    assert next(cost_lines({"a": PLAN}, tmp_path / "results", None, Selection())).startswith("a: nothing to do")


# --- the whole of it on a tiny model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny_bert, tmp_path_factory) -> tuple[Comparison, Path, Path, list[str]]:
    """A study of two variants and two seeds with every outcome: plan, results, work, what it said."""
    folder, said = tmp_path_factory.mktemp("study"), []
    whole = plan(
        model=str(tiny_bert), seeds=[0, 1], learning_rate=[1e-2], points={"fusion": 3, "align": 3},
        pruned=["every-other"], densities=[0.5], shapley_samples=4, distances=True, groups=[["sst2", "agnews"]],
        settings=PLAN.settings | {"checkpoint_at": [0.25]},
    )  # fmt: skip
    run_study({"a": whole}, folder / "results", folder / "work", "sample", say=said.append, workers=1)
    return whole, folder / "results", folder / "work", said


def test_every_outcome_leaves_a_record(measured):
    records = find_results([measured[1]])
    count = {kind: sum(r.protocol == kind for r in records) for kind in {r.protocol for r in records}}
    each = dict.fromkeys(("train", "interpolation", "pruning", "shapley", "distance"), 2 * 2 * 2)
    assert count == each | {"multitask": 2 * 2 * 2}


def test_pairs_are_evaluated_as_soon_as_their_runs_are_there(measured):
    files = [text.split(": ")[0].rpartition("/")[2] for text in measured[3] if ".json: " in text and "/lora/" in text]
    place = {name: i for i, name in enumerate(files)}
    seed1, line = "lr0.01-steps4-seed1.json", "fusion-lr0.01-steps4-seeds0-1.json"
    assert place[seed1] < place[line] < place[f"pruned-{seed1}"]


def test_a_line_ends_in_the_single_adapters(measured, tiny_bert):
    """What is evaluated once for all lines of a seed is what the run itself has found."""
    known = outcomes(r for r in find_results([measured[1]]) if r.config["method"] == "lora")
    (drop,), (fused,) = known["fusion drop"]["sst2"].values(), known["fusion"]["sst2"].values()
    assert drop + fused == pytest.approx(np.mean(list(known["single"]["sst2"].values())))
    (align,) = known["align drop"]["sst2"].values()
    assert align + known["align"]["sst2"][0, 1] == pytest.approx(drop + fused)


def test_the_tasks_adapters_of_a_seed_are_merged_with_each_other(measured):
    """One adapter on two tasks: in the tables the group is a task of its own."""
    whole = measured[0]
    records = find_results([measured[1]])
    known = outcomes(r for r in records if r.config["method"] == "lora")
    assert {task: set(own) for task, own in known["together fusion"].items()} == {"sst2+agnews": {(0,), (1,)}}
    (made,) = (r for r in records if r.protocol == "multitask" and r.config["method"] == "lora"
               and r.config["merge_name"] == "fusion" and r.config["seed"] == 0)  # fmt: skip
    for task in whole.tasks:
        assert made.metrics[f"test/{task}/accuracy/single"] == known["single"][task][0,]
    assert "tasks in one, fused" in means_table(records, whole)


def test_groups_that_share_a_task_train_its_missing_adapter_once(measured, tmp_path):
    """Where records alone were kept, and two groups want the adapter of sst2."""
    whole, results, work, _ = measured
    results, work = shutil.copytree(results, tmp_path / "results"), shutil.copytree(work, tmp_path / "work")
    for made in results.glob("*/sst2+agnews"):
        shutil.rmtree(made)
    for adapter in work.glob("*/*/lora/*seed0/"):
        shutil.rmtree(adapter)
    twice = dataclasses.replace(whole, groups=[["sst2", "agnews"], ["agnews", "sst2"]])
    part, said = Selection(variants=["lora"], seeds=[0]), []
    *_, kept, merged = waves(Store(results, work, quiet), twice, part, "sample")
    assert [job.name.split("/")[1] for job in kept] == ["sst2", "agnews"], "jobs of a list run side by side"
    assert [job.name.split("/")[1] for job in merged] == ["sst2+agnews", "agnews+sst2"]
    run_study({"a": twice}, results, work, "sample", selection=part, say=said.append, workers=1)
    assert sum("no adapter there" in text for text in said) == 2
    assert len(list(results.glob("*/*+*/lora/*.json"))) == 4


def test_distances_are_those_of_the_adapters(measured):
    """Delta W starts at 0; from T/4 on it has gone some way, and not further than from there and back."""
    known = outcomes(find_results([measured[1]]))
    assert all(value > 0 for value in known["from_initialisation"]["sst2"].values())
    assert all(0 < value < 2 for value in known["from_early"]["sst2"].values())


def test_nothing_measured_is_done_twice(measured, monkeypatch):
    whole, results, work, _ = measured
    monkeypatch.setattr(runs, "train_adapter", lambda *a: pytest.fail("a run was trained again"))
    before = {f: f.stat().st_mtime_ns for f in results.rglob("*.json")}
    run_study({"a": whole}, results, work, "sample", say=quiet, workers=1)
    assert {f: f.stat().st_mtime_ns for f in results.rglob("*.json")} == before


def test_a_seed_more_is_merged_with_those_before_it(measured, tmp_path):
    whole, results, work, _ = measured
    results, work = shutil.copytree(results, tmp_path / "results"), shutil.copytree(work, tmp_path / "work")
    more = dataclasses.replace(whole, seeds=[0, 1, 2], shapley_samples=0, distances=False, pruned=[], densities=[])
    part = Selection(tasks=["sst2"], variants=["lora"])
    run_study({"a": more}, results, work, "sample", selection=part, say=quiet, workers=1)
    names = {f.name for f in results.glob("*/sst2/lora/fusion-*.json")}
    assert names == {f"fusion-lr0.01-steps4-seeds{i}-{j}.json" for i, j in ((0, 1), (0, 2), (1, 2))}
