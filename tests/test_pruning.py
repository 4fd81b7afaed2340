"""The pruning protocol, `copra prune`, and the tables made from their records."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from examples import tiny_adapter

from copra_llm.adapters import load_adapter_weights
from copra_llm.cli import main
from copra_llm.config import RunConfig, read_settings
from copra_llm.errors import InputError
from copra_llm.estimates import t_975
from copra_llm.evaluate import Evaluation
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.figures.pruning import averaged, pruning_series
from copra_llm.protocols import pruning
from copra_llm.protocols.plans import read_plans
from copra_llm.protocols.pruning import Plan, run_plan
from copra_llm.prune import Variant, structured_names
from copra_llm.report import find_results
from copra_llm.results import Result, read_result
from copra_llm.saved_runs import SavedRun
from copra_llm.summaries.pruning import plot_pruning, pruning_details, pruning_table, structured_table
from copra_llm.train import train_adapter
from copra_llm.variants import evaluate_variants, figure_variants, unfinished_file

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan(
    tasks=["sst2"],
    methods=["copra"],
    seeds=[0, 1],
    densities=[0.5, 1.0],
    by=["magnitude", "random"],
    quantise=["int8"],
    early_tasks=["sst2"],
    early_methods=["copra"],
)
SHORT = {"max_steps": 4, "max_length": 32, "max_train_samples": 16, "max_eval_samples": 8, "lora_r": 2,
         "per_device_train_batch_size": 4, "learning_rate": 0.05, "data_root": "sample"}  # fmt: skip
COPRA = Path("tiny/sst2/copra")


def say_nothing(text: str) -> None:
    pass


def copra(*argv) -> int:
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def runs(tiny_bert, tmp_path_factory) -> Path:
    """Two seeds, one of which has kept no early checkpoint; and a run that only tuned."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        config = RunConfig().replace(**SHORT | {"model_name_or_path": str(tiny_bert), "seed": seed})
        train_adapter(config, ["sst2"], folder / COPRA / f"steps4-seed{seed}")
    shutil.rmtree(folder / COPRA / "steps4-seed1/checkpoint-1")
    tuning = folder / COPRA / "steps2-seed0"
    shutil.copytree(folder / COPRA / "steps4-seed0", tuning)
    settings = (tuning / "config.yaml").read_text(encoding="utf-8")
    (tuning / "config.yaml").write_text(settings.replace("max_steps: 4", "max_steps: 2"), encoding="utf-8")
    return folder


@pytest.fixture
def evaluations(monkeypatch) -> list:
    """Counts the passes over the data; `limit` of them are let through."""

    class Passes(list):
        limit = 10**6

    passes, evaluate = Passes(), AdapterEvaluator.__call__

    def counted(self, weights, task):
        if len(passes) >= passes.limit:
            raise KeyboardInterrupt
        passes.append(weights.source)
        return evaluate(self, weights, task)

    monkeypatch.setattr(AdapterEvaluator, "__call__", counted)
    return passes


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory) -> Path:
    """Results and work of the plan, once run."""
    folder = tmp_path_factory.mktemp("done")
    run_plan("tiny", PLAN, runs, folder / "results", folder / "work", None, say_nothing)
    return folder


# --- the protocol -----------------------------------------------------------------------------------------


def test_one_record_an_adapter(done):
    """The tuning run is left out; Early CopRA has records of its own."""
    names = {str(p.relative_to(done / "results" / COPRA)) for p in (done / "results").rglob("*.*")}
    assert names == {f"steps4-seed{seed}{early}.json" for seed in (0, 1) for early in ("", "-early")}


def test_a_plan_chooses_what_is_kept(runs):
    names = structured_names(load_adapter_weights(runs / COPRA / "steps4-seed1"))
    assert PLAN.kept(names) == names
    few = dataclasses.replace(PLAN, structured=["all", "low"])
    assert few.kept(names) == ["all", "low"]
    with pytest.raises(InputError, match="the plan's structured has fc1, but the adapter has all, every-other"):
        dataclasses.replace(PLAN, structured=["fc1"]).kept(names)


def test_a_record_holds_every_variant(done, runs):
    record = read_result(done / "results" / COPRA / "steps4-seed1.json")
    config = record.config
    assert (record.protocol, config["split"], config["task"], config["checkpoint"]) == (
        "pruning",
        "test",
        "sst2",
        "final",
    )
    assert (config["method"], config["seed"], config["lora_r"]) == ("copra", 1, 2)
    assert config["data_root"] is None and config["output_dir"] is None and "/" not in config["model_name_or_path"]
    wanted = PLAN.smaller(structured_names(load_adapter_weights(runs / COPRA / "steps4-seed1")), 1)
    rows = record.data["rows"]
    assert [(r["kind"], r["name"], r["density"]) for r in rows] == [(v.kind, v.name, v.density) for v in wanted]
    assert {"every-other", "low", "middle", "high", "query", "key", "value", "int8"} <= {r["name"] for r in rows}
    for row in rows:
        assert row["accuracy"] == record.metrics[f"test/sst2/accuracy/{row['name']}@{row['density']:g}"]
        assert row["accuracy"] == 100 * row["correct"].count("1") / len(row["correct"])
    by_name = {(r["name"], r["density"]): r for r in rows}
    whole, half = by_name["all", 1.0], by_name["every-other", 1.0]
    assert 2 * half["parameters"] == whole["parameters"] and 2 * half["bytes"] == whole["bytes"]
    assert by_name["int8", 1.0]["bytes"] < whole["bytes"]
    assert by_name["random", 0.5]["parameters"] <= whole["parameters"] / 2 + 1


def test_the_whole_adapter_is_as_good_as_training_said(done, runs):
    """Also at density 1, where nothing is chosen."""
    record = read_result(done / "results" / COPRA / "steps4-seed0.json")
    trained = read_result(runs / COPRA / "steps4-seed0/result.json")
    whole = record.data["rows"][0]
    assert whole["name"] == "all" and whole["correct"] == trained.data["correct/test/sst2"]
    assert whole["loss"] == pytest.approx(
        trained.metrics["test/sst2/loss"], abs=1e-6
    )  # the same float32 sums, reloaded
    for row in record.data["rows"]:
        if row["kind"] == "unstructured" and row["density"] == 1.0:
            assert row | {"kind": "structured", "name": "all"} == whole


def test_pruning_changes_what_is_evaluated(done):
    """Variants differ in loss, so none of them is another one's evaluation."""
    rows = read_result(done / "results" / COPRA / "steps4-seed0.json").data["rows"]
    losses = [row["loss"] for row in rows if row["kind"] == "structured" or row["density"] < 1.0]
    assert len(set(losses)) == len(losses)


def test_early_is_the_checkpoint_after_a_quarter(done, runs):
    """The run's own, or, where it has kept none, that of the same run repeated: whose end is the same to the byte."""
    again = done / "work" / COPRA
    assert [p.name for p in again.iterdir()] == ["steps4-seed1"]
    repeated, first = (f / "steps4-seed1/adapter/adapter_model.safetensors" for f in (again, runs / COPRA))
    assert repeated.read_bytes() == first.read_bytes()
    for seed, folder in ((0, runs / COPRA), (1, again)):
        record = read_result(done / "results" / COPRA / f"steps4-seed{seed}-early.json")
        config = RunConfig.from_flat(read_settings(folder / f"steps4-seed{seed}/config.yaml"))
        early = load_adapter_weights(folder / f"steps4-seed{seed}/checkpoint-1")
        outcome = AdapterEvaluator(config, ["sst2"], "test")(early, "sst2")
        assert record.config["checkpoint"] == "early"
        assert record.data["rows"][0]["loss"] == pytest.approx(outcome.loss, abs=1e-9)


def test_a_stopped_adapter_goes_on_where_it_was(done, runs, tmp_path, evaluations):
    """What has a record is not evaluated again, nor what was evaluated of an adapter that has none yet."""
    shutil.copytree(done, tmp_path / "done")
    record = tmp_path / "done/results" / COPRA / "steps4-seed0.json"
    record.unlink()
    evaluations.limit = 5
    places = runs, tmp_path / "done/results", tmp_path / "done/work"
    with pytest.raises(KeyboardInterrupt):
        run_plan("tiny", PLAN, *places, None, say_nothing)
    assert not record.exists() and unfinished_file(record).exists()
    evaluations.limit = 10**6
    run_plan("tiny", PLAN, *places, None, say_nothing)
    rows = read_result(record).data["rows"]
    assert rows == read_result(done / "results" / COPRA / "steps4-seed0.json").data["rows"]
    # Two curves have density 1, which is the whole adapter.
    assert len(evaluations) == len(rows) - 2
    assert not unfinished_file(record).exists()


class Constant:
    """An evaluator that needs no model: the loss is the number of the adapter's modules."""

    config, split = RunConfig(), "test"

    def __init__(self):
        self.asked = 0

    def __call__(self, weights, task):
        self.asked += 1
        ones = np.ones(2, dtype=int)
        return Evaluation(ones.astype(bool), ones * float(len(weights.factors)), ones, ones)


def test_what_was_kept_of_another_adapter_or_seed_is_not_used(tmp_path):
    from examples import random_adapter

    file = tmp_path / "record.json.partial"
    random = [Variant(density=0.5, by="random", seed=0)]
    for weights, variants, passes in [
        (random_adapter(0), random, 1),
        (random_adapter(0), random, 0),
        (random_adapter(0), [Variant(density=0.5, by="random", seed=1)], 1),
        (random_adapter(1), [Variant(density=0.5, by="random", seed=1)], 1),
    ]:
        evaluator = Constant()
        evaluate_variants(weights, variants, evaluator, "sst2", unfinished=file)
        assert evaluator.asked == passes


def test_all_variants_of_the_figure():
    """Ten densities by three ways, and the fewest bits after half of the layers or entries."""
    variants = figure_variants(["all", "low"], 0)
    assert len(set(variants)) == len(variants) == 2 + 30 + 2 + 2
    assert {v.density for v in variants if v.kind == "unstructured"} == {i / 10 for i in range(1, 11)}


# --- plans ------------------------------------------------------------------------------------------------


def test_the_committed_plan_is_read():
    plan = read_plans(ROOT / "eval" / "pruning" / "plan.yaml", Plan)["minilm"]
    assert len(plan.seeds) >= 3 and set(plan.methods) == {"lora", "coto", "copra"} and "copra" in plan.early_methods


GOOD = """
all: {methods: [lora], seeds: [0], densities: [0.5], by: [random], quantise: [nf4], early_methods: []}
minilm: {tasks: [sst2], early_tasks: []}
"""


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("tasks: [sst2], ", "", "the plan of minilm lacks tasks"),
        ("seeds: [0]", "seeds: []", "the plan's seeds is empty"),
        ("seeds: [0]", "seed: 1, seeds: [0]", "unknown entry seed"),
        ("[lora]", "[lara]", "'lara'"),
        ("[0.5]", "[1.5]", "the density is 1.5"),
        ("[0.5]", "[some]", "densities is 'some', but must be of type float"),
        ("[random]", "[randm]", 'did you mean "random"?'),
        ("[nf4]", "[nf5]", 'did you mean "nf4"?'),
        ("minilm: {", "minilm: 3\nother: {", "minilm is 3"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(old, new, expected, tmp_path):
    path = tmp_path / "plan.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        read_plans(path, Plan)
    assert expected in str(refusal.value)


def test_a_run_without_its_number_of_steps_has_no_quarter(runs, tmp_path):
    with pytest.raises(InputError, match="has no record and no max_steps"):
        pruning.early_checkpoint(SavedRun(runs / COPRA, RunConfig().flat()), tmp_path)


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_bert, tmp_path_factory) -> Path:
    return tiny_adapter(tiny_bert, tmp_path_factory.mktemp("adapter") / "a", seed=0)


DATA = ["--task", "sst2", "--data_root", "sample", "--max_eval_samples", "6", "--max_length", "32"]


def test_the_command_writes_one_and_says_what_was_kept(adapter, tmp_path, capsys):
    out = tmp_path / "small"
    assert copra("prune", adapter, "--keep", "low", "--density", "0.5", "--quantise", "int8", "--output", out) == 0
    said = capsys.readouterr().out
    whole, small = load_adapter_weights(adapter), load_adapter_weights(out)
    by_hand = Variant("low", 0.5, "magnitude", "int8").of(whole)
    assert small.factors.keys() == by_hand.factors.keys() and small.config == by_hand.config
    for name, f in small.factors.items():
        assert f.lora_A.equal(by_hand.factors[name].lora_A) and f.lora_B.equal(by_hand.factors[name].lora_B)
    for line in ("layers: 4 of 12: encoder.layer.0, encoder.layer.1, encoder.layer.2, encoder.layer.3",
                 "modules: 12 of 36: key, query, value", "bytes as int8: "):  # fmt: skip
        assert line in said, line


def test_the_command_evaluates_every_combination(adapter, tmp_path, capsys):
    out = tmp_path / "deep" / "record.json"
    lists = [
        "--keep",
        "all",
        "0,1",
        "--density",
        "1",
        "0.6",
        "--by",
        "magnitude",
        "random",
        "--quantise",
        "none",
        "nf4",
    ]
    assert copra("prune", adapter, *DATA, *lists, "--seed", "5", "--output", out) == 0
    record = read_result(out)
    rows = [(r["name"], r["density"]) for r in record.data["rows"]]
    assert len(rows) == len(set(rows)) == 2 * 2 * 2 * 2
    assert ("0,1+random+nf4", 0.6) in rows and ("magnitude", 1.0) in rows
    assert record.data["random_seeds"] == [5] and record.config["checkpoint"] == "final"
    assert "0,1+random+nf4" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["record.json"]


def test_the_command_evaluates_the_figure_if_nothing_is_listed(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterEvaluator, "__call__", lambda self, weights, task: Constant()(weights, task))
    assert copra("prune", adapter, *DATA, "--output", tmp_path / "record.json") == 0
    rows = read_result(tmp_path / "record.json").data["rows"]
    assert len(rows) == 8 + 30 + 2 + 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "neither --output nor --task was given"),
        (["--output", "{out}"], "0 variants were asked for"),
        (["--keep", "all", "low", "--output", "{out}"], "2 variants were asked for, but one folder is written"),
        (["--keep", "lwo", "--output", "{out}"], 'did you mean "low"?'),
        (["--by", "random", "--keep", "low", "--output", "{out}"], "no --density says how many"),
        (["--density", "0", "--output", "{out}"], "the density is 0"),
        (["--density", "0.5", "--by", "rank", "--output", "{out}"], 'entries are not chosen by "rank"'),
        (["--quantise", "int9", "--output", "{out}"], 'did you mean "int8"?'),
        (["--density", "0.0001", "--output", "{out}"], "nothing is left of"),
        (["--keep", "low", "--layer_pattern", "(", "--output", "{out}"], "is no regular expression"),
        (["--keep", "low", "--output", "{adapter}"], "is not empty"),
        (["--keep", "lwo", *DATA, "--output", "{out}"], 'did you mean "low"?'),
        ([*DATA, "--output", "{adapter}"], "which is a folder; give a file"),
        (["--keeps", "low"], "--keep"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_leaves_nothing(adapter, tmp_path, capsys, argv, expected):
    argv = [a.format(out=tmp_path / "out", adapter=adapter) for a in argv]
    assert copra("prune", adapter, *argv) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error
    assert not list(tmp_path.iterdir())


# --- tables from records ----------------------------------------------------------------------------------


def record(method: str, seed: int, accuracies: dict[tuple[str, float], float], task="sst2", early=False) -> Result:
    kinds = {"magnitude": "unstructured", "random": "unstructured", "nf4": "quantised"}
    rows = [
        {"kind": kinds.get(name, "structured"), "name": name, "density": density, "accuracy": accuracy, "loss": 0.5,
         "correct": "10", "parameters": 4, "bytes": 16}
        for (name, density), accuracy in accuracies.items()
    ]  # fmt: skip
    config = {"model_name_or_path": "minilm", "task": task, "method": method, "seed": seed, "split": "test",
              "checkpoint": "early" if early else "final", "learning_rate": 1e-3, "max_steps": 8}  # fmt: skip
    return Result("pruning", config, {}, data={"rows": rows})


def accuracies(whole: float, every_other: float, thirds: float, half: float) -> dict[tuple[str, float], float]:
    found = {("all", 1.0): whole, ("every-other", 1.0): every_other, ("nf4", 1.0): whole - 1}
    found |= {(third, 1.0): thirds for third in ("low", "middle", "high")}
    return found | {("magnitude", density): half for density in (0.1, 0.3, 0.5)}


RECORDS = [
    record("copra", 1, accuracies(91, 89, 85, 70)),
    record("copra", 0, accuracies(89, 85, 83, 74)),
    record("lora", 0, accuracies(90, 80, 70, 60)),
    record("lora", 1, accuracies(94, 88, 78, 62)),
    record("copra", 0, accuracies(60, 58, 50, 40), early=True),
]


def test_the_table_says_means_drops_and_the_paired_difference():
    """Drops by seed: LoRA (10 + 3 * 20) / 4 = 17.5 and (6 + 3 * 16) / 4 = 13.5; CopRA (4 + 18) / 4 and (2 + 18) / 4."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pruning_table(RECORDS).splitlines()]
    assert [line[2] for line in lines[2:]] == ["LoRA", "CopRA", "Early CopRA"]
    assert lines[2][3:8] == ["92.0", "84.0", "74.0", "74.0", "74.0"]
    half = t_975(1) * np.std([17.5, 13.5], ddof=1) / np.sqrt(2)
    assert lines[2][8] == f"15.5 [{15.5 - half:.1f}, {15.5 + half:.1f}]"
    half = t_975(1) * np.std([5.5 - 17.5, 5.0 - 13.5], ddof=1) / np.sqrt(2)
    assert lines[3][9] == f"-10.2 [{-10.25 - half:.1f}, {-10.25 + half:.1f}]"
    assert lines[2][9] == "–" and lines[4][9] == "–"
    assert lines[4][8] == "8.0"
    assert lines[3][10:] == ["72.0", "72.0", "72.0", "89.0"]


def test_tasks_are_averaged_seed_by_seed():
    """Only methods that every task has; the early checkpoint of one task alone is not."""
    more = [record(m, s, accuracies(80, 70, 60, 50), task="agnews") for m in ("lora", "copra") for s in (0, 1)]
    series = averaged(pruning_series(RECORDS + more))
    assert [(s.name, s.task) for s in series] == [("LoRA", "mean of 2"), ("CopRA", "mean of 2")]
    assert series[0].accuracy("all") == {0: 85.0, 1: 87.0}
    assert "| mean of 2 | LoRA | 86.0 |" in pruning_table(RECORDS + more)


def test_what_a_record_has_not_is_a_dash_and_no_row_or_column_of_its_own():
    bare = [record("lora", 0, {("all", 1.0): 90, ("high", 1.0): 70})]
    assert "| LoRA | 90.0 | – | – | – | 70.0 | – | – |\n" in pruning_table(bare)
    one = [*bare, record("copra", 0, {("all", 1.0): 80, ("magnitude", 0.3): 60})]
    assert "largest 30 % |\n" in pruning_table(one) and "60.0 |\n" in pruning_table(one)
    assert pruning_table([]) == "" == pruning_details([])


def test_the_short_table_is_the_long_ones_beginning():
    """Of finished adapters alone, up to the drop against LoRA."""
    long = [row.split("|") for row in pruning_table(RECORDS).splitlines() if "Early" not in row]
    assert [row.split("|")[:-1] for row in structured_table(RECORDS).splitlines()] == [row[:11] for row in long]


def test_the_details_hold_every_variant():
    details = pruning_details(RECORDS)
    assert details.startswith("### sst2, minilm")
    for name in ("all", "every-other", "low", "middle", "high", "magnitude, 0.1", "magnitude, 0.5", "nf4"):
        assert f"\n| {name} |" in details
    row = next(line for line in details.splitlines() if line.startswith("| every-other"))
    assert row.split("|")[2].strip().startswith("84.0 [")
    half = t_975(1) * np.std([85 - 80, 89 - 88], ddof=1) / np.sqrt(2)
    assert f"3.0 [{3 - half:.1f}, {3 + half:.1f}]" in row


def test_the_plot_is_a_function_of_the_records(done, tmp_path):
    results = find_results([done / "results"])
    first = [p.read_bytes() for p in plot_pruning(results, tmp_path / "a")]
    second = [p.read_bytes() for p in plot_pruning(reversed(results), tmp_path / "b")]
    assert first == second
    assert "Early CopRA" in pruning_table(results)


def test_the_plot_takes_values_whose_mean_is_beside_them(tmp_path):
    """Three times 2/17 %: their mean is less by a rounding."""
    same = 200 / 1700
    assert (same + same + same) / 3 < same or (same + same + same) / 3 > same
    records = [record("lora", seed, accuracies(same, same, same, same)) for seed in range(3)]
    assert all(path.stat().st_size for path in plot_pruning(records, tmp_path / "equal"))
