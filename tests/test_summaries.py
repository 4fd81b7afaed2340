"""Tables of sweeps and of many tasks, against records whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import report_records as made

from copra_llm.figures.runs import spread
from copra_llm.results import Result
from copra_llm.summaries.backends import SAME, backends_table
from copra_llm.summaries.faults import PHASES, faults_table
from copra_llm.summaries.mtl15 import suite_rows, suite_table
from copra_llm.summaries.speed import evaluation_table
from copra_llm.summaries.sweep import along_table, schedules_table, sweep_table


def pair(
    task: str, method: str, rule: str, accuracy: tuple, seeds=(0, 1), variant=None, rate=0.004, steps=300
) -> Result:
    """A line's record with these accuracies at its ends and middle, as outcomes of 100 examples."""
    rows = ["1" * n + "0" * (100 - n) for n in accuracy]
    metrics = {f"test/{task}/accuracy@{a}": v for a, v in zip(("0", "0.5", "1"), accuracy, strict=True)}
    metrics |= {f"test/{task}/loss@{a}": 1 - v / 100 for a, v in zip(("0", "0.5", "1"), accuracy, strict=True)}
    config = {"model_name_or_path": "minilm", "task": task, "split": "test", "method": method, "merge_method": rule,
              "seeds": list(seeds), "learning_rate": rate, "max_steps": steps, "points": 3}  # fmt: skip
    if variant:
        config["variant"] = variant
    return Result("interpolation", config, metrics, data={"alpha": [0.0, 0.5, 1.0], "correct": rows})


def made_even(share: float, seed: int) -> Result:
    """The record of an adapter trained by a cosine ramp, the top third of whose layers holds this share."""
    config = {"model_name_or_path": "minilm", "task": "sst2", "split": "dev", "metric": "loss", "method": "copra",
              "variant": "cosine", "learning_rate": 0.004, "max_steps": 300, "seed": seed}  # fmt: skip
    return Result("shapley", config, {"dev/sst2/top_third_share": share})


SUITE = [
    pair(task, method, rule, (80, 80 - drop, 90))
    for task, shift in (("sst2", 0), ("rte", 2))
    for method, rule, drop in (("lora", "fusion", 10 + shift), ("lora", "mixture", 0), ("copra", "fusion", 4))
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def suite(results: list[Result]) -> str:
    return suite_table(results, "minilm", ["cb", "rte", "sst2", "boolq"], 0.004, 300)


def test_a_row_a_task_and_the_mean_below():
    lines = suite(SUITE).splitlines()
    assert cells(lines[0])[1:] == ["LoRA: single / fused / mixture", "CopRA: single / fused / mixture",
                                   "CopRA minus LoRA, fused"]  # fmt: skip
    # Gains of 8 and 6 points: mean 7, and t with one degree of freedom times sqrt(2) / sqrt(2).
    assert [cells(line) for line in lines[2:5]] == [
        ["rte", "85.0 / 68.0 / 80.0", "85.0 / 76.0 / –", "8.0"],
        ["sst2", "85.0 / 70.0 / 80.0", "85.0 / 76.0 / –", "6.0"],
        ["**mean of 2**", "85.0 / 69.0 / 80.0", "85.0 / 76.0 / –", "7.0 [-5.7, 19.7]"],
    ]
    assert lines[6].startswith("The mean is over the 2 tasks that all methods have") and "over tasks" in lines[6]
    assert (
        lines[8] == "CopRA minus LoRA over these: single 0.0 [0.0, 0.0], drop when fused smaller by 7.0 [-5.7, 19.7]."
    )
    assert lines[10:] == ["Not run at this setting yet: cb, boolq."]


def test_only_one_setting_counts_and_no_variant():
    others = [
        pair("sst2", "lora", "fusion", (10, 10, 10), rate=0.001),
        pair("sst2", "lora", "fusion", (10, 10, 10), steps=150),
        pair("sst2", "copra", "fusion", (10, 10, 10), variant="cosine"),
    ]
    assert suite(SUITE + others) == suite(SUITE)
    assert suite_rows(others, "minilm", 0.004, 300) == {}


def test_a_task_that_a_method_lacks_is_no_part_of_the_mean():
    lines = suite([*SUITE, pair("cb", "lora", "fusion", (50, 50, 50))]).splitlines()
    assert cells(lines[2]) == ["cb", "50.0 / 50.0 / –", "–", "–"]
    assert cells(lines[5])[0] == "**mean of 2**" and lines[-1] == "Not run at this setting yet: boolq."


def test_one_task_has_no_mean():
    lines = suite(SUITE[:3]).splitlines()
    assert len(lines) == 5 and lines[-1] == "Not run at this setting yet: cb, rte, boolq."


def test_the_grid_has_a_column_a_rate():
    grid = [pair("sst2", "lora", "fusion", (80, 60, 80), rate=r, steps=s) for r in (0.001, 0.002) for s in (150, 300)]
    lines = sweep_table([*grid[:3], *SUITE[1:2]]).splitlines()
    assert cells(lines[0])[4:] == ["lr 0.001: single, fused", "lr 0.002: single, fused"]
    assert [cells(line)[3:] for line in lines[2:]] == [["150", "80.0, 60.0", "80.0, 60.0"], ["300", "80.0, 60.0", "–"]]


def test_schedules_are_compared_with_lora_by_pairs_of_seeds():
    seeds = [(0, 1), (0, 2), (1, 2)]
    lora = [pair("sst2", "lora", "fusion", (80, 70 + i, 80), s) for i, s in enumerate(seeds)]
    cosine = [pair("sst2", "copra", "fusion", (80, 75 + i, 80), s, variant="cosine") for i, s in enumerate(seeds)]
    shares = [made_even(0.5 + i / 10, seed=i) for i in range(3)]
    first, second = (cells(line) for line in schedules_table([*cosine, *lora, *shares]).splitlines()[2:])
    assert first[2] == "LoRA" and first[7] == "–" and first[5] == "71.0"
    # Five points in every pair: no spread, whatever the seeds.
    assert second[2] == "cosine" and second[7] == "5.0 [5.0, 5.0]"
    # Mean 0.6 and deviation 0.1 of three adapters: 4.303 * 0.1 / sqrt(3) to both sides.
    assert (first[11], second[11]) == ("–", "0.60 [0.35, 0.85]")


def test_spread_is_the_deviation_over_seeds():
    def run(values, steps=(10, 20)):
        log = [{"step": s, "loss": v} for s, v in zip(steps, values, strict=True)]
        return Result("train", {}, {}, data={"log": log})

    assert spread([run((1.0, 2.0)), run((1.0, 2.0))], "loss") == 0.0
    assert spread([run((1.0, 2.0)), run((3.0, 2.0))], "loss") == pytest.approx(np.std([1, 3], ddof=1) / 2 / 2)
    assert math.isnan(spread([run((1.0, 2.0))], "loss"))
    assert math.isnan(spread([run((1.0, 2.0)), run((1.0, 2.0), steps=(10, 30))], "loss"))
    assert math.isnan(spread([run((1.0, 2.0)), run((1.0, 2.0))], "grad_norm"))


def test_along_a_run_each_step_has_its_column():
    config = {"model_name_or_path": "minilm", "task": "sst2", "method": "copra", "merge_method": "fusion"}
    record = Result("merge_over_steps", config, {}, data={"steps": [2, 4], "single": [50.0, 80.0], "merged": [40, 75]})
    lines = along_table([record]).splitlines()
    assert cells(lines[0])[4:] == ["step 2: single, merged", "step 4: single, merged"]
    assert cells(lines[2])[2:] == ["CopRA", "fusion", "50.0, 40.0", "80.0, 75.0"]


def test_no_records_no_table():
    other = made.lines(("lora",), ("sst2",), merge_method="mixture", points=3)
    assert suite([]) == sweep_table(other) == schedules_table(other) == along_table(other) == ""


def test_trials_of_kills_and_resumes():
    """One row for all records, a column a phase; other protocols' records are none."""
    counts = {"trials": 3, "kills": 5, "lost": 0, "torn": 0, "different": 1, "left_behind": 0}
    phases = {f"kills/{phase}": number for phase, number in zip(PHASES, (2, 1, 1, 0, 1), strict=True)}
    lines = faults_table([*SUITE, *[Result("faults", {}, counts | phases)] * 2]).splitlines()
    assert cells(lines[0])[:3] == ["trials", "kills", "in start"]
    assert [cells(line) for line in lines[2:]] == [["6", "10", "4", "2", "2", "0", "2", "0", "0", "2", "0"]]
    assert faults_table(SUITE) == ""


# --- backends ---------------------------------------------------------------------------------------------


def backend_run(backend: str, method: str, **metrics: float) -> Result:
    measured = {"starts": 1.0, "difference": 0.0, "largest_difference": 0.0, "bytes_per_step": 446_100.0,
                "peak_memory_bytes": 8.7e8, "seconds_per_step": 0.2, "cpu_seconds_per_step": 0.13}  # fmt: skip
    return Result("backends", {"backend": backend, "method": method, "reference": "one"}, measured | metrics)


def test_the_table_of_backends_follows_the_plan():
    """A row a method that was run; what was not run says why; what moved too far is not the same adapter."""
    plan = {"one": {"label": "one process"}, "ddp": {"label": "DDP"}, "zero2": {"label": "ZeRO-2"},
            "zero3": {"label": "ZeRO-3"}, "gpu": {"label": "one GPU", "needs_gpu": True},
            "fsdp2": {"label": "FSDP2"}}  # fmt: skip
    records = [
        backend_run("zero2", "copra", difference=1.1e-6, largest_difference=3.2e-6),
        backend_run("ddp", "copra"),
        backend_run("ddp", "lora"),
        backend_run("one", "lora", bytes_per_step=0.0, seconds_per_step=0.4, cpu_seconds_per_step=0.125),
        backend_run("fsdp2", "lora", difference=2 * SAME, largest_difference=1.0),
        Result("backends", {"backend": "zero3", "method": "lora", "reference": "one"}, {"starts": 0.0}),
    ]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in backends_table(records, plan).splitlines()]
    assert rows[2:] == [
        ["one process", "LoRA", "yes", "yes", "0", "0", "0 kB", "1.00", "1.00", "870 MB"],
        ["DDP", "LoRA", "yes", "yes", "0", "0", "446 kB", "0.50", "1.04", "870 MB"],
        ["DDP", "CopRA", "yes", "yes", "0", "0", "446 kB", "–", "–", "870 MB"],
        ["ZeRO-2", "CopRA", "yes", "yes", "1e-06", "3e-06", "446 kB", "–", "–", "870 MB"],
        ["ZeRO-3", "LoRA", "no", *["–"] * 7],
        ["one GPU", "–", "needs a GPU", *["–"] * 7],
        ["FSDP2", "LoRA", "yes", "no", "2e-03", "1e+00", "446 kB", "0.50", "1.04", "870 MB"],
    ]
    assert "| ZeRO-2 | – | not run yet |" in backends_table(records[1:], plan)
    assert backends_table([], plan) == ""


def test_the_table_of_evaluations_has_a_row_a_task_and_their_mean():
    """Naive rows where they were run; what stacking could save at most stands below."""
    shown = {"sst2": (2, 1.9), "dbpedia": (14, 11.0)}
    ranges = {**{name: ratio for name, (_, ratio) in shown.items()}, "geometric_mean": 4.57, "stacking/minilm": 1.0}
    metrics = {f"{what}/{name}": ratio + shift for name, ratio in ranges.items()
               for what, shift in (("ratio", 0), ("ratio_min", -0.1), ("ratio_max", 0.1))}  # fmt: skip
    metrics |= {f"examples_per_second/{name}": 12.5 for name in shown} | {"naive_ratio/sst2": 2.6}
    metrics |= {f"largest_difference/{name}": 2e-5 for name in shown}
    tasks = {name: {"labels": labels, "examples": 30} for name, (labels, _) in shown.items()}
    record = Result("speed_evaluation", {}, metrics, data={"tasks": tasks, "stacking": {"minilm": [1.0]}})
    lines = evaluation_table([record]).splitlines()
    assert [cells(line) for line in lines[2:5]] == [
        ["sst2", "2", "30", "12.5", "1.90 [1.80, 2.00]", "2.6", "at most 2e-05 nats"],
        ["dbpedia", "14", "30", "12.5", "11.00 [10.90, 11.10]", "–", "at most 2e-05 nats"],
        ["geometric mean", "–", "–", "–", "4.57 [4.47, 4.67]", "–", "–"],
    ]
    assert "1.00 [0.90, 1.10] (minilm)" in lines[-1]
