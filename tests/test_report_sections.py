"""Each section's numbers are the records', averaged over seeds: closed forms from `report_records`."""

from __future__ import annotations

import numpy as np
import pytest
import report_records as made

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.layers import barrier
from copra_llm.figures.merged import lora_of, merged_groups
from copra_llm.figures.pairs import curve_estimates, finest_lines
from copra_llm.report.document import Figure, Section
from copra_llm.report.sections.landscape import plane_section
from copra_llm.report.sections.layers import layers_section
from copra_llm.report.sections.merged import headline, merged_section
from copra_llm.report.sections.pruning import pruning_section
from copra_llm.report.sections.runs import runs_section
from copra_llm.report.sections.shapley import shapley_section
from copra_llm.report.sections.similarity import similarity_section
from copra_llm.report.sections.steps import step_section
from copra_llm.report.sections.sweeps import schedules_section, steps_section, sweep_section
from copra_llm.report.sections.together import federated_section, multitask_section
from copra_llm.report.tables import Table


def table_of(section: Section, caption: str) -> Table:
    """The table whose caption begins so."""
    (found,) = [t for t in section.tables if t.caption.startswith(caption)]
    return found


def row_of(table: Table, **wanted) -> dict:
    """The one row in which the named columns (underscores for blanks) have these values."""
    names = [c.name for c in table.columns]
    rows = [dict(zip(names, row, strict=True)) for row in table.rows]
    (found,) = [r for r in rows if all(r[key.replace("_", " ")] == value for key, value in wanted.items())]
    return found


def figure_of(section: Section, title: str) -> Figure:
    (found,) = [b for b in section.blocks if isinstance(b, Figure) and b.title.startswith(title)]
    return found


def around(estimate: Estimate) -> object:
    return pytest.approx((estimate.mean, estimate.low, estimate.high), nan_ok=True)


def parts(estimate: Estimate) -> tuple:
    return (estimate.mean, estimate.low, estimate.high)


# --- merged -----------------------------------------------------------------------------------------------


def test_merged_adapters_are_compared_with_lora_under_the_same_rule():
    section = merged_section(made.lines() + made.lines(merge_method="mixture", points=3))
    fusion, mixture = (table_of(section, f"Merged by {name}") for name in ("fusion", "mixture"))
    lora, copra = (row_of(fusion, task="sst2", method=m) for m in ("LoRA", "CopRA"))
    # Outcomes are whole examples, so accuracies are within half an example (1 %) of the closed form.
    assert lora["single acc."].mean == pytest.approx(made.quality("lora", 1), abs=1.0)
    assert lora["drop"].mean == pytest.approx(made.dip("lora"), abs=1.5)
    assert copra["drop"].mean == pytest.approx(made.dip("copra"), abs=1.5)
    assert lora["merged acc. minus LoRA's"] is None and lora["pairs"] == 3
    gain = copra["merged acc."].mean - lora["merged acc."].mean
    assert copra["merged acc. minus LoRA's"].mean == pytest.approx(gain)
    assert copra["merged loss minus LoRA's"].mean == pytest.approx(copra["merged loss"].mean - lora["merged loss"].mean)
    assert row_of(mixture, task="sst2", method="CopRA")["drop"].mean == pytest.approx(0.5, abs=1.5)


def test_curves_are_drawn_where_there_is_more_than_the_middle():
    """Three points are in the first figure already."""
    titles = [b.title for b in merged_section(made.lines() + made.lines(merge_method="mixture", points=3)).blocks]
    assert titles == ["What merging costs: fusion", "Accuracy along the line: fusion", "Loss along the line: fusion",
                      "What merging costs: mixture"]  # fmt: skip


def test_curves_hold_every_point_of_the_mean_curve():
    records = made.lines(("copra",), ("sst2",))
    section = merged_section(records)
    table = figure_of(section, "Accuracy along").table
    first, middle, last = (row_of(table, weight=alpha) for alpha in (0.0, 0.5, 1.0))
    assert middle["accuracy"].mean == pytest.approx(np.mean([r.data["accuracy"][5] for r in records]))
    # An end is the mean of two single adapters, one value a seed: Student's t over seeds.
    singles = seed_estimate([made.quality("copra", seed) for seed in made.SEEDS])
    assert parts(first["accuracy"]) == around(singles) and parts(last["accuracy"]) == around(singles)
    assert len(table.rows) == 11
    (panel,) = figure_of(section, "Accuracy along").panels
    assert panel.title == "sst2, minilm" and f"middle {middle['accuracy']:.1f}" in panel.words


def test_a_sweep_is_compared_setting_by_setting_and_shown_by_its_best_known():
    """LoRA at the same rate and steps; the overview takes the setting with most pairs."""
    records = made.sweep() + made.lines(("lora",), ("agnews_sweep",))[:2]
    groups = merged_groups(records)
    copra = [g for g in groups if g.label == "CopRA"]
    assert len(copra) == 9
    for g in copra:
        lora = lora_of(g, groups)
        assert (lora.label, lora.learning_rate, lora.steps) == ("LoRA", g.learning_rate, g.steps)
    assert [g.steps for g in headline([g for g in groups if g.label == "LoRA"])] == [300]


def test_one_pair_counts_once_and_its_finest_line_is_drawn():
    """Two of LoRA's three pairs were run with 3 points and again with 11."""
    records = made.lines(("lora",), ("sst2",), points=3) + made.lines(("lora",), ("sst2",))[:2]
    (g,) = merged_groups(records)
    assert [len(r.data["alpha"]) for r in g.records] == [11, 11, 3]
    alpha, values = curve_estimates(g.records, "accuracy")
    assert len(alpha) == len(values) == 11
    assert len(finest_lines(g.records)) == 2


# --- layers, planes ---------------------------------------------------------------------------------------


def test_a_barrier_is_the_deepest_dip_below_the_chord():
    """A parabola of depth d: d, whatever the slope of its chord; nothing for a line that bulges."""
    alpha = np.linspace(0, 1, 5)
    for slope in (0.0, 3.0):
        chord = 80 + slope * alpha
        assert barrier(alpha, chord - 4 * 7 * alpha * (1 - alpha), "accuracy") == pytest.approx(7.0)
        assert barrier(alpha, chord + 4 * 7 * alpha * (1 - alpha), "loss") == pytest.approx(7.0)
        assert barrier(alpha, chord, "accuracy") == pytest.approx(0.0)


def test_layer_wise_barriers():
    section = layers_section(made.layerwise())
    table = table_of(section, "Layer-wise barriers, fusion")
    first, last = (row_of(table, method="LoRA", of="accuracy", layer=str(k)) for k in (0, 5))
    assert first["pairs"] == 6
    assert first["barrier"].mean == pytest.approx(made.dip("lora") / 4)
    assert last["barrier"].mean == pytest.approx(made.dip("lora") / 4 * (1 + 5 / 6))
    # 0.2 (i + j - 2) is the mean of 0.4 (i - 1) and 0.4 (j - 1): one value a seed, so this is Student's t over seeds.
    assert parts(first["barrier"]) == around(seed_estimate([5 + 0.4 * (seed - 1) for seed in made.SEEDS]))
    whole = row_of(table, method="LoRA", of="accuracy", layer="(whole adapter)")["barrier"].mean
    assert whole == pytest.approx(3 * last["barrier"].mean)
    averaging = table_of(section, "Layer-wise averaging barriers")
    assert row_of(averaging, method="CopRA", of="loss", layer="2")["averaging barrier"].mean == pytest.approx(
        made.dip("copra") / 4 * (1 + 2 / 6) / 60
    )


def test_a_plane_says_what_is_at_its_corners():
    section = plane_section(made.planes())
    panel = figure_of(section, "Accuracy on").panels[0]
    assert panel.title == "LoRA: sst2, minilm"
    # The corners fall between grid points, at most half a cell (0.1) away in each direction.
    near = 88 - 2 * made.dip("lora") * 2 * 0.1**2
    said = [float(panel.words.split(f"seed {i} ")[1].split(",")[0].split(";")[0]) for i in range(3)]
    assert all(near - 0.05 <= value <= 88.0 for value in said)
    assert len(table_of(section, "Planes, loss").rows) == 3 * 11 * 11


# --- pruning, Shapley -------------------------------------------------------------------------------------


def test_pruned_adapters():
    section = pruning_section(made.prunings())
    structured = table_of(section, "Pruning, structured")
    row = row_of(structured, method="LoRA", pruning="every-other")
    assert parts(row["accuracy"]) == around(seed_estimate([made.quality("lora", s) - 30 for s in made.SEEDS]))
    assert (row["density"], row["seeds"], row["parameters"], row["bytes"]) == (0.5, 3, 18432, 73728)
    early = row_of(structured, method="Early CopRA", pruning="all")
    assert early["accuracy"].mean == pytest.approx(made.quality("copra", 1) - 10)
    curve = table_of(section, "Pruning, unstructured")
    assert row_of(curve, method="CopRA", pruning="random", density=0.25)["accuracy"].mean == pytest.approx(86 - 13.5)
    titles = [p.title for p in figure_of(section, "Entries taken away").panels]
    assert titles == ["sst2, minilm: magnitude", "sst2, minilm: random"]
    assert {row[-7] for row in table_of(section, "Pruning, quantised").rows} == {"int8", "nf4"}


def test_an_unknown_kind_of_pruning_is_shown_too():
    records = made.prunings(("lora",))
    for r in records:
        r.data["rows"].append({"kind": "new", "name": "x", "density": 0.5, "accuracy": 50.0, "loss": 1.0})
    table = table_of(pruning_section(records), "Pruned otherwise: new")
    assert row_of(table, pruning="x")["accuracy"].mean == 50.0


def test_shapley_values_over_adapters_and_of_one():
    """Over seeds Student's t; of one adapter the estimator's standard error, times 1.96."""
    section = shapley_section(made.shapleys() + made.shapleys(players=30, seeds=(0,)))
    table = table_of(section, "Shapley values, loss")
    records = made.shapleys(("lora",))
    several = row_of(table, model="minilm", method="LoRA", player="model.layers.5")
    assert parts(several["Shapley value"]) == around(seed_estimate([r.data["values"][5] for r in records]))
    (one,) = made.shapleys(("lora",), players=30, seeds=(0,))
    value = row_of(table, model="smollm2", method="LoRA", player="model.layers.29")["Shapley value"]
    assert parts(value) == pytest.approx((one.data["values"][29], value.mean - 0.0196, value.mean + 0.0196), abs=1e-5)
    evenness = table_of(section, "Evenness")
    row = row_of(evenness, model="minilm", method="CopRA")
    assert row["Gini"].mean == pytest.approx(0.01) and row["evaluations"].mean == 64 and row["players"] == 6
    assert row["share of the top third"].mean == pytest.approx(
        np.mean([r.metrics["test/sst2/top_third_share"] for r in made.shapleys(("copra",))])
    )
    assert row["efficiency gap"] == 1e-9
    exactly = shapley_section(made.shapleys(("lora",), seeds=(0,)))
    assert not table_of(exactly, "Shapley values").rows[0][-1].has_interval


# --- several adapters -------------------------------------------------------------------------------------


def test_federated_runs():
    section = federated_section(made.federated())
    table = section.tables[0]
    row = row_of(table, method="LoRA", split="iid")
    assert row["origin acc."].mean == pytest.approx(made.quality("lora", 1))
    assert parts(row["drop"]) == pytest.approx((20.0, 20.0, 20.0))
    assert (row["clients"], row["rounds"], row["runs"], row["merge options"]) == (3, 3, 3, "r 4")
    assert row_of(table, method="LoRA", split="dirichlet")["beta"] == 0.5
    rounds = section.tables[1]
    first = row_of(rounds, method="CopRA", round=1, setting="mixture (r 4), even: 3 clients, IID, 3 rounds")
    assert first["merged acc."].mean == pytest.approx(made.quality("copra", 1) - 12 - made.dip("copra"))
    assert [b.title for b in federated_section(made.federated(rounds=1)).blocks] == ["What merging the clients costs"]


def test_several_tasks_in_one_adapter():
    table = table_of(multitask_section(made.multitask()), "Several tasks")
    row = row_of(table, method="CopRA", task="mnli", merged_by="ties")
    single = made.quality("copra", 1, "mnli")
    assert row["single acc."].mean == pytest.approx(single)
    assert row["merged acc."].mean == pytest.approx(0.96 * single)
    assert row["normalised"].mean == pytest.approx(96.0) and row["merge options"] == "density 0.5"
    assert row_of(table, method="LoRA", task="mean", merged_by="fusion")["normalised"].mean == pytest.approx(75.0)


# --- sweeps -----------------------------------------------------------------------------------------------


def test_a_sweep_is_a_heat_map_single_and_merged():
    section = sweep_section(made.sweep())
    single, merged = section.blocks
    assert (single.title, merged.title) == ("Single accuracy on test", "Merged accuracy: fusion")
    row = row_of(single.table, method="LoRA", learning_rate=0.016, steps=75)
    value = row["accuracy of single adapters"]
    assert value.mean == pytest.approx(made.quality("lora", 1) - 400 * 0.012 - 225 / 50)
    assert "Best: 0.004 and 300 steps." in single.panels[0].words and len(single.panels) == 2


def test_one_rate_is_no_sweep_and_holes_stay_empty():
    assert sweep_section(made.runs()) is None
    records = [r for r in made.sweep() if r.protocol == "train" and (r.config["learning_rate"], r.config["max_steps"])
               in ((0.001, 75), (0.004, 75), (0.004, 300))]  # fmt: skip
    (figure,) = sweep_section(records).blocks
    assert str(figure.panels[0].drawing.content).count('class="none"') == 1


def test_accuracy_along_training():
    records = made.over_steps()
    section = steps_section(records)
    (table,) = section.tables
    assert parts(row_of(table, method="LoRA", of="merged", step=300)["accuracy"]) == around(
        seed_estimate([r.data["merged"][-1] for r in records if r.config["method"] == "lora"])
    )
    assert len(table.rows) == 3 * 2 * 6


def test_schedules_stand_beside_the_methods():
    section = schedules_section(made.runs() + made.lines() + made.schedules())
    (table,) = section.tables
    assert table.caption == "Schedules: minilm, sst2"
    assert [row[0] for row in table.rows] == ["LoRA", "CoTo", "CopRA", "cosine", "reversed"]
    row = row_of(table, schedule="reversed")
    assert (row["ramp shape"], row["seeds"]) == ("reversed", 3)
    losses = [2 - made.quality("copra", s) / 60 for s in made.SEEDS]
    assert row["spread of the loss"] == pytest.approx(np.std(losses, ddof=1))
    assert row["drop (fusion)"].mean == pytest.approx(made.dip("copra"), abs=1.5)
    assert schedules_section(made.runs()) is None


# --- similarity, runs -------------------------------------------------------------------------------------


def test_similarity_of_adapters():
    section = similarity_section(made.similarity())
    table = table_of(section, "Mean cosine")
    assert {row[1]: row[3] for row in table.rows if "and" not in row[1]} == pytest.approx(
        {f"{m}, other {what}": 0.6 for m in ("LoRA", "CoTo", "CopRA") for what in ("seed", "learning rate")}
    )
    assert row_of(table, pairs_of="LoRA and CopRA")["mean cosine"] == pytest.approx(0.1)
    (record,) = made.similarity()
    for i, p in enumerate(record.data["points"]):
        p["steps"] = 150 if i == 0 else 300
    kinds = {row[1] for row in table_of(similarity_section([record]), "Mean cosine").rows}
    assert {"LoRA, other steps and seed", "LoRA, other learning rate and steps"} <= kinds
    assert len(table_of(section, "Cosine of every two").rows) == 18 * 17 // 2
    (panel,) = figure_of(section, "Distance").panels
    assert "LoRA 0.52 [" in panel.words and "(6 adapters)" in panel.words
    (panel,) = figure_of(section, "Adapters by t-SNE").panels
    assert "The nearest neighbour of 18 of them is of the same method." in panel.words


def test_similarity_without_places_or_checkpoints():
    """Too few adapters for t-SNE, no checkpoint kept: the cosines alone."""
    (record,) = made.similarity()
    for p in record.data["points"]:
        p["x"] = p["y"] = None
    record.data["early_distance"] = []
    figure, table = similarity_section([record]).blocks
    assert (figure.title, table.caption) == ("Cosine similarity", "Mean cosine")


def test_single_runs():
    records = made.runs(("lora",), ("sst2",))
    records[0].data["skipped_steps"] = 2
    row = row_of(table_of(runs_section(records), "Single runs"), method="LoRA")
    assert parts(row["test acc."]) == around(seed_estimate([made.quality("lora", s) for s in made.SEEDS]))
    assert (row["seeds"], row["seconds"], row["skipped steps"]) == (3, 61.0, 2)


def test_the_time_of_a_step():
    table = table_of(step_section(made.step_times()), "Time of a step")
    row = row_of(table, loop="this loop, CopRA")
    assert row["a step [ms]"] == pytest.approx(40.0) and row["× frozen base"] == Estimate(0.8, 0.79, 0.81)
