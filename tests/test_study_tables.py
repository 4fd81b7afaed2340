"""The study's tables: what they are made of, and how far their intervals can be trusted."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from test_study import PLAN, plan, record

from copra_llm.estimates import Estimate
from copra_llm.figures.study import against, outcomes, over_tasks
from copra_llm.protocols import runs
from copra_llm.protocols.comparisons import Comparison, cells
from copra_llm.results import Result
from copra_llm.summaries.study import (
    SCREENING,
    against_table,
    levels_table,
    means_table,
    progress_table,
    tasks_table,
)
from copra_llm.summaries.verdicts import advice_table, verdict, verdicts_table


def line_of(run, pair: tuple[int, int], single: float, fused: float) -> Result:
    (task,) = run.config.data.tasks
    where = f"test/{task}/"
    metrics = {f"{where}accuracy@0": single, f"{where}accuracy@0.5": fused, f"{where}accuracy@1": single,
               f"{where}accuracy_barrier": max(single - fused, 0.0)}  # fmt: skip
    config = run.config.flat() | {"task": task, "split": "test", "seeds": list(pair), "merge_method": "fusion"}
    return runs.portable(Result("interpolation", config, metrics, environment={"base_model": "minilm"}), run.variant)


def synthetic(whole: Comparison) -> list[Result]:
    """LoRA: 80 and 60 on the two tasks, fused 10 less; CopRA: 2 less, fused 4 less than that.

    At a factor's level 3 more. Seeds do not differ.
    """
    records = []
    for cell, (task, level) in itertools.product(cells(whole), (("sst2", 80.0), ("agnews", 60.0))):
        copra = cell.variant == "copra"
        run = cell.run(task, 1e-2, 4)
        single, drop = level - 2 * copra + 3 * len(cell.levels), 4.0 if copra else 10.0
        records += [record(run.replace(seed=seed), 50.0, single) for seed in whole.seeds]
        records += [line_of(run, pair, single, single - drop) for pair in itertools.combinations(whole.seeds, 2)]
    return records


ONE_RATE = plan(learning_rate=[1e-2])


def test_the_tables_say_what_the_records_hold():
    made = synthetic(ONE_RATE)
    lora, copra = means_table(made, ONE_RATE).splitlines()[2:]
    assert lora == "| lora | 0.01, 4 | 2, 3 | 70.0 | 60.0 | 10.0 | 10.0 | 4 |"
    assert copra == "| copra | 0.01, 4 | 2, 3 | 68.0 | 64.0 | 4.0 | 4.0 | 4 |"
    (difference_,) = against_table(made, ONE_RATE).splitlines()[2:]
    expected = "| copra | 0.01, 4 | 2, 3 | -2.0 [-2.0, -2.0] | 4.0 [4.0, 4.0] | -6.0 [-6.0, -6.0] | -6.0 [-6.0, -6.0] |"
    assert difference_ == expected
    by_task = tasks_table("fusion")(made, ONE_RATE).splitlines()[2:]
    assert by_task[:2] == ["| sst2 | 70.0 | 4.0 [4.0, 4.0] |", "| agnews | 50.0 | 4.0 [4.0, 4.0] |"]
    assert by_task[2:] == ["| **mean over tasks** | – | 4.0 [4.0, 4.0] |"]


@pytest.mark.parametrize(
    "low, high, larger, seeds, said",
    [(0.5, 2.0, True, 3, "yes"), (0.5, 2.0, False, 3, "no: worse"), (-2.0, -0.5, True, 5, "no: worse"),
     (-2.0, -0.5, False, 5, "yes"), (-1.0, 1.0, True, 5, "not shown"), (math.nan, math.nan, True, 1, "not shown"),
     (0.5, 2.0, True, 2, "not shown")],
)  # fmt: skip
def test_verdicts(low, high, larger, seeds, said):
    """Two seeds that happen to agree show nothing."""
    assert verdict(Estimate((low + high) / 2, low, high), larger, seeds) == said


def test_verdicts_and_advice_are_those_of_the_records():
    """CopRA is 2 lower alone and 4 higher fused, on the one entry that has been run. Another has the same model."""
    longer = plan(max_steps=[8, 16])
    entries = {"headline": ONE_RATE, "half_long": longer, "smollm2": plan(model="smollm2"), "clip": plan(model="clip")}
    made = synthetic(ONE_RATE)
    rows = [line.strip("| ").split(" | ") for line in verdicts_table(made, entries).splitlines()[2:]]
    assert rows == [
        ["an adapter alone is better", "minilm, 4 steps", "-2.0 [-2.0, -2.0] (2, 3)", "no: worse"],
        ["two seeds, fused, are better", "minilm, 4 steps", "4.0 [4.0, 4.0] (2, 3)", "yes"],
        ["fusing two seeds loses less", "minilm, 4 steps", "-6.0 [-6.0, -6.0] (2, 3)", "yes"],
        ["the barrier between two seeds is lower", "minilm, 4 steps", "-6.0 [-6.0, -6.0] (2, 3)", "yes"],
    ]
    advised = dict(line.strip("| ").split(" | ") for line in advice_table(made, entries).splitlines()[2:])
    assert advised["serve it alone"] == "lora"
    assert advised["average runs of one task (seeds, clients), rank as it is"] == "copra: +4.0 [+4.0, +4.0]"
    assert advised["keep half of the layers"] == "–"
    assert verdicts_table([], entries) == advice_table([], entries) == ""


def test_variants_are_judged_against_copra_too():
    """A third variant, made as LoRA is: 2 higher alone, 4 lower fused. LoRA itself is left to the other table."""
    whole = plan(learning_rate=[1e-2], variants=ONE_RATE.variants | {"late": {"p_start": 0.5}})
    entries = {"headline": whole, "half_long": plan(max_steps=[8]), "smollm2": plan(model="a"), "clip": plan(model="b")}
    head, _, *rows = verdicts_table(synthetic(whole), entries, "copra").splitlines()
    assert head == "| claim, against CopRA | model | late − CopRA (tasks, seeds) | |"
    assert rows[0] == "| an adapter alone is better | minilm, 4 steps | 2.0 [2.0, 2.0] (2, 3) | yes |"
    assert rows[1] == "| two seeds, fused, are better | minilm, 4 steps | -4.0 [-4.0, -4.0] (2, 3) | no: worse |"


def test_a_seed_that_not_every_task_has_does_not_count_yet():
    """An unfinished third seed: the means are those of the two that are whole."""
    made = [r for r in synthetic(ONE_RATE) if not (r.config["tasks"] == ["agnews"] and 2 in _seeds(r))]
    assert "| copra | 0.01, 4 | 2, 2 | 68.0 |" in means_table(made, ONE_RATE)
    assert means_table([], ONE_RATE) == against_table([], ONE_RATE) == ""


def _seeds(r: Result) -> list[int]:
    return r.config.get("seeds") or [r.config["seed"]]


def test_the_page_says_how_far_the_study_has_come():
    made = [r for r in synthetic(ONE_RATE) if 2 not in _seeds(r)]
    whole = dataclasses.replace(ONE_RATE, points={"fusion": 3})
    (row,) = progress_table(made, {"a": whole}).splitlines()[2:]
    assert row.startswith("| a | minilm | 2 | 2 | 3 | 8 of 12 | 4 of 12 |")
    assert progress_table([], {"a": whole}) == ""


def test_untuned_rows_are_compared_at_equal_settings_and_screening_says_so():
    whole = plan(tune="none", screening=True)
    made = synthetic(whole)
    text = against_table(made, whole)
    assert text.startswith(SCREENING) and text.count("| copra |") == 1
    assert not means_table(made, ONE_RATE).startswith(SCREENING)


def test_a_factors_level_is_compared_with_the_variant_as_it_is_and_with_lora_at_the_level():
    whole = plan(learning_rate=[1e-2], factors={"rank": {"r8": {"lora_r": 8}}})
    made = synthetic(whole)
    assert [line.split(" | ")[::3] for line in levels_table(made, whole).splitlines()[2:]] == [
        ["| lora-r8", "3.0 [3.0, 3.0]", "0.0 [0.0, 0.0] |"],
        ["| copra-r8", "3.0 [3.0, 3.0]", "0.0 [0.0, 0.0] |"],
    ]
    assert "| copra-r8 | 0.01, 4 | 2, 3 | -2.0 [-2.0, -2.0] |" in against_table(made, whole)
    assert levels_table(synthetic(ONE_RATE), ONE_RATE) == ""


def test_what_has_nothing_in_common_is_not_compared():
    assert over_tasks({"a": {(0,): 1.0}, "b": {(1,): 1.0}}) is None
    assert against({"a": {(0,): 1.0}}, {"b": {(0,): 1.0}}) is None
    assert against({"a": {(0,): 3.0}, "b": {(0,): 9.0}}, {"a": {(0,): 1.0}}).estimate.mean == 2.0


@pytest.mark.parametrize("pair_noise, least, most", [(0.0, 0.93, 0.97), (2.0, 0.95, 1.0)])
def test_the_intervals_hold_the_truth_as_often_as_they_say(pair_noise, least, most):
    """Differences over pairs of five seeds and three tasks: 95 % where seeds alone vary, more where pairs do too.

    The jackknife of a mean over pairs is exact in the first case and errs to the wide side in the second. With 1000
    repetitions the share of a true 95 % interval lies within 0.014 of it (two standard errors).
    """
    rng, held, repetitions = np.random.default_rng(0), 0, 1000
    pairs, truth = list(itertools.combinations(range(5), 2)), 1.5
    for _ in range(repetitions):
        first, second = (_simulated(rng, pairs, level, pair_noise) for level in (truth, 0.0))
        estimate = against(first, second).estimate
        held += estimate.low <= truth <= estimate.high
    assert least <= held / repetitions <= most


def _simulated(rng, pairs, level: float, pair_noise: float) -> dict:
    values = {}
    for task in ("a", "b", "c"):
        of_seed = rng.normal(size=5)
        values[task] = {(i, j): level + (of_seed[i] + of_seed[j]) / 2 + pair_noise * rng.normal() for i, j in pairs}
    return values


def test_what_was_not_finite_is_left_out():
    run = cells(PLAN)[0].run("sst2", 1e-2, 4)
    made = [record(run, 50.0, 80.0), record(run.replace(seed=1), 50.0, math.nan)]
    assert outcomes(made)["single"]["sst2"] == {(0,): 80.0}
