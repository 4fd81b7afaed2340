"""Tables, plots and the page from result records: `copra_llm.report`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import report_records

from copra_llm.errors import InputError
from copra_llm.estimates import Estimate, seed_estimate, t_975
from copra_llm.figures.pairs import difference_estimate, drop_estimate, metric_difference
from copra_llm.report import (
    connectivity_table,
    find_results,
    plot_curves,
    step_table,
    training_table,
    write_report,
)
from copra_llm.report.sections.connectivity import connectivity_cells
from copra_llm.results import Result, pack_bits, write_result

ALPHA = [0.0, 0.5, 1.0]
ENVIRONMENT = {"versions": {"torch": "2.13.0", "copra_llm": None}}


def curve(method: str, correct: list[int], losses=(0.5, 0.9, 0.7), merge_method="fusion", seeds=(0, 1), **config):
    """A record of 10 examples of which the first `correct[i]` are right at ALPHA[i]."""
    outcomes = [[k < hits for k in range(10)] for hits in correct]
    accuracy = [100.0 * np.mean(row) for row in outcomes]
    names = [f"@{a:g}" for a in ALPHA]
    metrics = {f"test/sst2/accuracy{n}": a for n, a in zip(names, accuracy, strict=True)}
    metrics |= {f"test/sst2/loss{n}": loss for n, loss in zip(names, losses, strict=True)}
    config = {
        "model_name_or_path": "minilm",
        "task": "sst2",
        "split": "test",
        "method": method,
        "label": method,
        "merge_method": merge_method,
        "learning_rate": 0.001,
        "max_steps": 150,
        "seeds": list(seeds),
    } | config
    data = {"alpha": ALPHA, "accuracy": accuracy, "loss": list(losses), "correct": [pack_bits(r) for r in outcomes]}
    return Result("interpolation", config, metrics, data=data, environment=ENVIRONMENT)


def run(method: str, seed: int, dev: float, test: float, loss: float = 0.25, seconds: float = 10.0, **config):
    config = {
        "model_name_or_path": "minilm",
        "tasks": ["sst2"],
        "method": method,
        "learning_rate": 0.001,
        "seed": seed,
    } | config
    metrics = {"dev/sst2/accuracy": dev, "test/sst2/accuracy": test, "dev/sst2/loss": 0.5, "test/sst2/loss": loss}
    return Result("train", config, metrics, seconds=seconds, steps=150, environment=ENVIRONMENT)


def rows(table: str) -> list[list[str]]:
    """The cells below the heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


RECORDS = [
    curve("copra", [8, 9, 8], losses=(0.4, 0.3, 0.4)),
    curve("copra", [8, 9, 8], losses=(0.4, 0.5, 0.4), seeds=(0, 2)),
    curve("copra", [8, 8, 8], merge_method="mixture", losses=(0.4, 0.35, 0.4)),
    curve("lora", [9, 5, 7], losses=(0.5, 0.9, 0.7)),
    curve("lora", [9, 6, 7], losses=(0.5, 1.1, 0.7), seeds=(0, 2)),
]


# --- estimates --------------------------------------------------------------------------------------------


def test_drop_is_the_mean_of_the_ends_minus_the_middle():
    """(90 + 70) / 2 - 50 and - 60."""
    drop = drop_estimate(RECORDS[3:])
    assert drop.mean == pytest.approx(25.0)
    assert 0.0 <= drop.low < 25.0 < drop.high <= 100.0


def test_a_constant_difference_has_no_width():
    """Every example right at the ends and wrong in the middle: 100, whatever is resampled."""
    assert drop_estimate([curve("lora", [10, 0, 10])] * 2) == Estimate(100.0, 100.0, 100.0)
    assert drop_estimate([curve("lora", [6, 6, 6])]) == Estimate(0.0, 0.0, 0.0)


def test_the_difference_between_methods_is_taken_on_the_same_examples():
    """Equal middles: no difference and no noise, though each alone is noisy."""
    equal = [curve("copra", [8, 5, 8]), curve("copra", [8, 6, 8])]
    assert difference_estimate(equal, RECORDS[3:]) == Estimate(0.0, 0.0, 0.0)
    better = difference_estimate(RECORDS[:2], RECORDS[3:])
    assert better.mean == pytest.approx(35.0) and better.low > 0.0
    assert difference_estimate(RECORDS[3:], RECORDS[:2]).mean == pytest.approx(-35.0)


def test_unequal_numbers_of_pairs_have_a_difference_without_an_interval():
    estimate = difference_estimate(RECORDS[:2], RECORDS[3:4])
    assert estimate.mean == pytest.approx(40.0) and math.isnan(estimate.low) and math.isnan(estimate.high)


def test_loss_differences_are_paired_by_seeds():
    """Shuffled records give the same; a constant difference has no width; unshared seeds are left out."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    first = [curve("copra", [8, 8, 8], losses=(0, 0.3 + i + j, 0), seeds=(i, j)) for i, j in pairs]
    second = [curve("lora", [8, 8, 8], losses=(0, 0.9 + i + j, 0), seeds=(i, j)) for i, j in [(1, 3), *pairs[::-1]]]
    estimate = metric_difference(first, second, "loss@0.5")
    assert [estimate.mean, estimate.low, estimate.high] == pytest.approx([-0.6] * 3)


def test_losses_of_records_without_shared_seeds_have_no_interval():
    """As `copra interpolate` writes them."""
    records = [curve("copra", [8, 8, 8], losses=(0, 0.3, 0)), curve("lora", [8, 8, 8], losses=(0, 0.9, 0))]
    for r in records:
        del r.config["seeds"]
    estimate = metric_difference(records[:1], records[1:], "loss@0.5")
    assert estimate.mean == pytest.approx(-0.6) and math.isnan(estimate.low)
    assert "-0.60" in connectivity_table(records)


def test_interval_over_seeds_is_students():
    """Three values 1 apart: mean +- 4.303 / sqrt(3); one value has none."""
    estimate = seed_estimate([80.0, 81.0, 82.0])
    assert (estimate.mean, estimate.high - estimate.mean) == (81.0, pytest.approx(4.303 / math.sqrt(3)))
    assert estimate.mean - estimate.low == pytest.approx(estimate.high - estimate.mean)
    assert str(seed_estimate([80.0])) == "80.0"
    assert seed_estimate([80.0] * 4) == Estimate(80.0, 80.0, 80.0)


def test_students_quantiles_are_the_tables():
    """From a printed table of t (0.975), to its three digits."""
    printed = {1: 12.706, 2: 4.303, 9: 2.262, 10: 2.228, 14: 2.145, 20: 2.086, 30: 2.042, 120: 1.980}
    assert {df: t_975(df) for df in printed} == pytest.approx(printed, abs=0.004)


def test_an_estimate_is_printed_with_its_interval():
    assert str(Estimate(1.26, 0.5, 2.0)) == "1.3 [0.5, 2.0]"
    assert f"{Estimate(1.256, 0.5, 2.0):.2f}" == "1.26 [0.50, 2.00]"


# --- tables -----------------------------------------------------------------------------------------------


def test_connectivity_table_says_what_the_records_say():
    """One row a method, LoRA first; each number by hand."""
    lora, copra = rows(connectivity_table(RECORDS))
    assert lora[:6] == ["minilm", "sst2", "LoRA", "0.001, 150", "80.0", "55.0"]
    assert lora[6].startswith("25.0 [") and lora[7:9] == ["–", "–"]
    assert lora[9:] == ["0.60 / 1.00 / –", "–"]
    assert copra[:6] == ["minilm", "sst2", "CopRA", "0.001, 150", "80.0", "90.0"]
    assert copra[6].startswith("-10.0 [") and copra[7].startswith("35.0 [") and copra[8] == "80.0"
    # Seed 0 is in both pairs: nothing says how much another one would change.
    assert copra[9:] == ["0.40 / 0.40 / 0.35", "-0.60"]


def test_tables_depend_on_the_records_alone():
    """Not on their order, and not on records of other protocols."""
    other = Result("merge", {}, {})
    assert connectivity_table(RECORDS[::-1] + [other]) == connectivity_table(RECORDS)
    runs = [run("lora", s, 80.0 + s, 70.0 + s) for s in range(3)]
    assert training_table(runs[::-1] + [other]) == training_table(runs)


def test_cells_keep_settings_models_and_tasks_apart():
    records = [curve("lora", [9, 5, 7]), curve("lora", [9, 5, 7], learning_rate=0.004),
               curve("lora", [9, 5, 7], model_name_or_path="smollm2")]  # fmt: skip
    cells = connectivity_cells(records)
    assert [(c.model, c.learning_rate) for c in cells] == [("minilm", 0.001), ("minilm", 0.004), ("smollm2", 0.001)]


def test_training_table_says_what_the_records_say():
    runs = [run("copra", s, 80.0 + s, 70.0 + s, loss=0.2 + s / 10, seconds=10.0 * (s + 1)) for s in range(3)]
    (row,) = rows(training_table(runs))
    assert row == ["minilm", "sst2", "CopRA", "0.001, 150", "3", "81.0 [78.5, 83.5]", "71.0 [68.5, 73.5]", "0.30", "20"]


def test_a_joint_run_has_a_row_for_each_task():
    joint = run("copra", 0, 80.0, 70.0, tasks=["sst2", "rte"])
    joint.metrics.update({"dev/rte/accuracy": 60.0, "test/rte/accuracy": 55.0, "test/rte/loss": 0.5})
    assert [(r[1], r[6]) for r in rows(training_table([joint]))] == [("rte", "55.0"), ("sst2", "70.0")]


def test_a_loss_that_was_not_finite_is_shown_as_such(tmp_path):
    """A diverged run does not keep the report from being made."""
    write_result(tmp_path / "result.json", run("lora", 0, 50.0, 50.0, loss=math.nan))
    assert rows(training_table(find_results([tmp_path])))[0][7] == "nan"


def test_step_table():
    """A column a contender; one that did not take part has a dash."""
    made = [["smollm2", "float32", "CPU", "50", "–", "1.20 [1.19, 1.21]", "–", "–", "–", "0.80 [0.79, 0.81]"]]
    assert rows(step_table(report_records.step_times())) == made


def test_no_records_no_table():
    assert connectivity_table([]) == training_table([]) == step_table([]) == ""


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """A folder of records as runs leave them, beside files that are none."""
    folder = tmp_path / "results"
    for i, record in enumerate([*RECORDS, run("lora", 0, 80.0, 70.0)]):
        write_result(folder / record.config["method"] / f"{i}.json", record)
    (folder / "lora" / "adapter").mkdir()
    (folder / "lora" / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "lora" / "state.json").write_text("{}", encoding="utf-8")
    return folder


def test_records_are_found_below_folders_and_by_name(written):
    assert len(find_results([written])) == 6
    assert len(find_results([written / "lora", written / "copra" / "0.json"])) == 4


def test_where_there_are_no_records_a_sentence_says_so(tmp_path):
    with pytest.raises(InputError, match=f"no result record below {tmp_path}"):
        find_results([tmp_path])
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="other.json is not a result record"):
        find_results([tmp_path])


def test_a_folder_gets_page_tables_and_plots(written, tmp_path):
    page = write_report([written], tmp_path / "out")
    records = find_results([written])
    assert page == tmp_path / "out" / "report.html"
    tables = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert tables.startswith("\n".join([connectivity_table(records), training_table(records)]))
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "curves.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_a_name_that_ends_in_html_is_the_page_alone(written, tmp_path, monkeypatch):
    """No plot library is needed for it: the page draws for itself."""
    monkeypatch.setattr("copra_llm.report.curves.importlib.util.find_spec", lambda name: None)
    page = write_report([written], tmp_path / "out" / "report.html", title="A & B")
    assert page == tmp_path / "out" / "report.html"
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]
    assert "<title>A &amp; B</title>" in page.read_text(encoding="utf-8")


def test_a_folder_may_be_called_html(written, tmp_path):
    folder = tmp_path / "out.html"
    folder.mkdir()
    assert write_report([written], folder) == folder / "report.html"


def test_the_same_records_give_the_same_bytes(written, tmp_path):
    """Page, table, PNG and SVG: made twice, a committed plot does not change."""
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        write_report([written], output)
    assert sorted(p.name for p in first.iterdir()) == ["curves.png", "curves.svg", "report.html", "table.md"]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_runs_alone_make_a_report_without_plots(tmp_path):
    write_result(tmp_path / "in" / "result.json", run("lora", 0, 80.0, 70.0))
    write_report([tmp_path / "in"], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "table.md"]


def test_the_plot_has_a_line_a_label_and_survives_a_missing_loss(tmp_path):
    """A point whose loss was not finite is a gap."""
    broken = curve("lora", [9, 5, 7])
    broken = dataclasses.replace(broken, data=broken.data | {"loss": [0.5, None, 0.7]})
    paths = plot_curves([broken, curve("copra", [8, 9, 8])], tmp_path / "deep" / "curves")
    assert paths == [tmp_path / "deep" / "curves.png", tmp_path / "deep" / "curves.svg"]
    drawn = paths[1].read_text(encoding="utf-8")
    assert "<!-- LoRA -->" in drawn and "<!-- CopRA -->" in drawn


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("copra_llm.report.curves.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install copra_llm\[report\]"):
        plot_curves(RECORDS, tmp_path / "curves")
    assert not list(tmp_path.iterdir())
