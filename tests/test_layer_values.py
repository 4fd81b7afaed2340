"""Shapley values of an adapter's layers: the protocol, `copra shapley`, and the table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from examples import tiny_adapter

from copra_llm.cli import main
from copra_llm.coalitions import CoalitionGame
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError
from copra_llm.figures.shapley import thirds
from copra_llm.protocols.layer_values import Plan, run_plan
from copra_llm.protocols.plans import read_plans
from copra_llm.results import Result, read_result
from copra_llm.summaries.shapley import shapley_details, shapley_table

ROOT = Path(__file__).resolve().parents[1]


def copra(*argv) -> int:
    return main([str(a) for a in argv])


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """Grows by the number of coalitions whenever a game evaluates some."""
    counts, outcomes = [], CoalitionGame.outcomes

    def counting(self, coalitions):
        counts.append(len(coalitions))
        return outcomes(self, coalitions)

    monkeypatch.setattr(CoalitionGame, "outcomes", counting)
    return counts


@pytest.fixture
def command(tiny_llama, tmp_path) -> list[str]:
    """`copra shapley` on a random adapter of the four-layer model: 16 coalitions."""
    adapter = tiny_adapter(tiny_llama, tmp_path / "adapter", seed=0)
    return ["shapley", str(adapter), "--task", "sst2", "--data_root", "sample", "--max_eval_samples", "6",
            "--output", str(tmp_path / "out" / "record.json")]  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------


def test_copra_shapley_leaves_a_record_and_shows_a_table(command, tmp_path, capsys, evaluated):
    assert copra(*command) == 0
    shown = capsys.readouterr().out.splitlines()
    record = read_result(tmp_path / "out" / "record.json")
    assert record.protocol == "shapley"
    assert record.data["players"] == [f"model.layers.{i}" for i in range(4)]
    for player, value, line in zip(record.data["players"], record.data["values"], shown[1:5], strict=True):
        assert line.split()[:3] == [player, f"{value:.4f}", "exact"]
    assert any("█" in line for line in shown[1:5])
    assert sum(evaluated) == record.data["evaluations"] == 16
    assert record.data["standard_errors"] == [None] * 4
    change = record.data["v_full"] - record.data["v_empty"]
    assert sum(record.data["values"]) == pytest.approx(change, abs=1e-12)
    assert record.data["efficiency_gap"] == pytest.approx(0.0, abs=1e-12)
    assert {"dev/sst2/top_third_share", "dev/sst2/gini"} == set(record.metrics)
    expected = {"task": "sst2", "split": "dev", "metric": "loss", "estimator": "exact", "budget": 256,
                "granularity": "layer"}  # fmt: skip
    assert expected.items() <= record.config.items()
    assert record.seconds > 0


def test_values_are_shapleys(command, tmp_path):
    """By definition, from the evaluations beside the record."""
    assert copra(*command) == 0
    lines = (tmp_path / "out" / "record.evaluations.jsonl").read_text().splitlines()
    loss = {row["coalition"]: row["loss"] for row in map(json.loads, lines[1:])}
    values = read_result(tmp_path / "out" / "record.json").data["values"]
    weight = {0: 1 / 4, 1: 1 / 12, 2: 1 / 12, 3: 1 / 4}  # |S|! (3 - |S|)! / 4!
    for i, value in enumerate(values):
        others = [key for key in loss if key[i] == "0"]
        gains = [weight[key.count("1")] * (loss[key] - loss[key[:i] + "1" + key[i + 1 :]]) for key in others]
        assert value == pytest.approx(sum(gains), abs=1e-12)


def test_a_stopped_command_goes_on_and_ends_with_the_same_numbers(command, tmp_path, monkeypatch, evaluated):
    module = ["--granularity", "module", "--estimator", "permutation", "--budget", "60"]
    assert copra(*command[:-1], tmp_path / "whole.json", *module) == 0
    whole, spent = read_result(tmp_path / "whole.json"), sum(evaluated)

    outcomes, left = CoalitionGame.outcomes, [3]

    def dies(self, coalitions):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return outcomes(self, coalitions)

    evaluated.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CoalitionGame, "outcomes", dies)
        copra(*command, *module)
    assert not (tmp_path / "out" / "record.json").exists()
    assert 0 < sum(evaluated) < spent
    assert copra(*command, *module) == 0
    assert sum(evaluated) == spent, "what was known was evaluated again"
    again = read_result(tmp_path / "out" / "record.json")
    assert again.data == whole.data and again.metrics == whole.metrics
    assert len(whole.data["players"]) == 12 and sum(whole.data["standard_errors"]) > 0


def test_evaluations_serve_another_metric(command, tmp_path, evaluated):
    assert copra(*command) == 0
    shutil.copy(tmp_path / "out" / "record.evaluations.jsonl", tmp_path / "second.evaluations.jsonl")
    evaluated.clear()
    assert copra(*command[:-1], tmp_path / "second.json", "--metric", "accuracy") == 0
    assert not evaluated
    data = read_result(tmp_path / "second.json").data
    assert sum(data["values"]) == pytest.approx(data["v_full"] - data["v_empty"])


def test_groups_and_a_wanted_standard_error(command, tmp_path):
    assert copra(*command, "--groups", "2", "--standard_error", "100") == 0
    data = read_result(tmp_path / "out" / "record.json").data
    assert data["players"] == ["model.layers.0 to model.layers.1", "model.layers.2 to model.layers.3"]
    assert data["evaluations"] == 4


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--estimator", "owens"], '"owens", but must be one of exact, permutation, owen'),
        (
            ["--granularity", "module", "--estimator", "permutation", "--budget", "5"],
            "a budget of 5 evaluations",
        ),
        (["--estimator", "exact", "--budget", "15"], "exact values of 4 players take 16 evaluations, the budget is 15"),
        (["--metric", "f1"], 'the metric is "f1", but must be one of loss, accuracy'),
        (["--granularity", "head"], "granularity is 'head'"),
        (["--groups", "5"], "5 groups were asked for, but the adapter has 4 players"),
        (["--pack", "0"], "--pack is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--task", "sst3"], 'there is no task "sst3" (did you mean "sst2"?)'),
        (["--budgets", "5"], 'unrecognized arguments: --budgets 5 (did you mean "--budget"?)'),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, capsys, flags, sentence):
    assert copra(*command, *flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and sentence in said
    assert not (tmp_path / "out").exists()


def test_exact_values_of_too_many_players_are_refused(tiny_bert, tmp_path, capsys):
    adapter = tiny_adapter(tiny_bert, tmp_path / "adapter", seed=0)
    argv = ["shapley", adapter, "--task", "sst2", "--data_root", "sample", "--max_eval_samples", "2", "--granularity",
            "module", "--estimator", "exact", "--output", tmp_path / "record.json"]  # fmt: skip
    assert copra(*argv) == 2
    assert "2^36 evaluations" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_outputs_that_are_there_are_not_written_over(command, tmp_path, capsys):
    assert copra(*command) == 0
    before = (tmp_path / "out" / "record.json").read_bytes()
    assert copra(*command) == 2
    assert "which exists; give a new file" in capsys.readouterr().err
    (tmp_path / "out" / "record.json").unlink()
    assert copra(*command, "--max_length", "24", "--max_eval_samples", "5") == 2
    assert "holds values of another game: n_examples is 6 there and 5 here" in capsys.readouterr().err
    assert copra(*command) == 0
    assert read_result(tmp_path / "out" / "record.json").data == json.loads(before)["data"]
    assert copra(*command[:-1], tmp_path / "out") == 2
    assert "which is a folder" in capsys.readouterr().err


# --- the protocol -----------------------------------------------------------------------------------------


@pytest.fixture
def runs(tiny_bert, tmp_path) -> Path:
    """Two seeds of LoRA and of CopRA, as training leaves them but for the training."""
    for method in ("lora", "copra"):
        for seed in (0, 1):
            folder = tmp_path / "runs" / "tiny" / "sst2" / method / f"lr0.1-steps4-seed{seed}"
            tiny_adapter(tiny_bert, folder / "adapter", seed=seed + 2 * (method == "copra"))
            config = RunConfig().replace(model_name_or_path=str(tiny_bert), method=method, seed=seed, max_length=32)
            (folder / "config.yaml").write_text(dump_yaml(config))
    return tmp_path / "runs"


PLAN = Plan(tasks=["sst2"], methods=["lora", "copra"], seeds=[0, 1], budget=40, max_eval_samples=5,
            per_device_eval_batch_size=5)  # fmt: skip


def test_the_plan_leaves_a_record_an_adapter_and_metric(runs, tmp_path, evaluated):
    def run() -> dict[str, Result]:
        run_plan("tiny", PLAN, tmp_path / "results", runs, tmp_path / "work", "sample", say=said.append)
        found = sorted((tmp_path / "results").rglob("*.json"))
        return {str(p.relative_to(tmp_path / "results")): read_result(p) for p in found}

    said: list[str] = []
    records = run()
    assert set(records) == {
        f"tiny/sst2/{method}/layer-{metric}-lr0.1-steps4-seed{seed}.json"
        for method in ("lora", "copra") for metric in ("loss", "accuracy") for seed in (0, 1)
    }  # fmt: skip
    assert sum(evaluated) == 4 * 40, "both metrics come from the same evaluations"
    for name, record in records.items():
        assert record.config["method"] in name and record.config["metric"] in name
        assert f"seed{record.config['seed']}" in name and record.config["adapter"] in name
        assert record.config["estimator"] == "quadrature" and record.data["evaluations"] == 40
        assert record.config["output_dir"] is None and str(tmp_path) not in json.dumps(dataclasses.asdict(record))
    assert run() == records and sum(evaluated) == 4 * 40, "what has a record is not run again"

    lost = "tiny/sst2/copra/layer-accuracy-lr0.1-steps4-seed1.json"
    (tmp_path / "results" / lost).unlink()
    again = run()
    assert sum(evaluated) == 4 * 40 and again[lost].data == records[lost].data
    table = shapley_table(records.values())
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["LoRA", "CopRA"]


def test_the_projects_plan_can_be_read():
    plans = read_plans(ROOT / "eval" / "shapley" / "plan.yaml", Plan)
    assert plans["minilm"].budget >= 2**6, "six layers exactly"
    assert set(plans) == {"minilm", "smollm2"}


@pytest.mark.parametrize(
    "change, sentence",
    [({"metrics": ["f1"]}, "metrics is 'f1'"), ({"split": "valid"}, "split is 'valid'"), ({"seeds": []}, "seeds"),
     ({"granularity": "head"}, "granularity is 'head'")],
)  # fmt: skip
def test_plans_that_cannot_work(change, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(PLAN, **change)


# --- the table --------------------------------------------------------------------------------------------


def record(method: str, seed: int, share: float, task: str = "sst2", metric: str = "loss", values=(1.0, 2.0, 3.0)):
    config = {"model_name_or_path": "m", "task": task, "method": method, "metric": metric, "granularity": "layer",
              "split": "dev", "seed": seed}  # fmt: skip
    metrics = {f"dev/{task}/top_third_share": share, f"dev/{task}/gini": share / 2}
    return Result("shapley", config, metrics, data={"values": list(values), "v_empty": -7.0, "v_full": -1.0})


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_differences_are_paired_by_task_and_seed():
    """Seeds in another order, and one that the other method lacks."""
    records = [record("copra", 1, 0.5), record("copra", 0, 0.4), record("copra", 7, 0.9), record("lora", 0, 0.6),
               record("lora", 1, 0.7), record("copra", 0, 0.1, metric="accuracy")]  # fmt: skip
    lora, copra = (cells(row) for row in shapley_table(records).splitlines()[2:])
    assert lora[:6] == ["m", "sst2", "LoRA", "2", "6.00", "17 % / 33 % / 50 %"]
    assert lora[7] == "–" and copra[3] == "3"
    assert copra[7] == "-0.20 [-0.20, -0.20]" and copra[9] == "-0.10 [-0.10, -0.10]"
    assert copra[10:] == ["0.10", "0.05"]


def test_rows_over_all_tasks_come_last():
    records = [record(method, 0, share, task) for task in ("sst2", "agnews")
               for method, share in (("copra", 0.4), ("lora", 0.5))]  # fmt: skip
    rows = [cells(row)[1:4] for row in shapley_details(records).splitlines()[2:]]
    assert rows == [["agnews", "LoRA", "1"], ["agnews", "CopRA", "1"], ["sst2", "LoRA", "1"], ["sst2", "CopRA", "1"],
                    ["all", "LoRA", "2"], ["all", "CopRA", "2"]]  # fmt: skip
    one_task = record("lora", 0, 0.5)
    one_task.config["model_name_or_path"] = "n"
    brief = [cells(row)[:4] for row in shapley_table([*records, one_task]).splitlines()[2:]]
    assert brief == [["m", "all", "LoRA", "2"], ["m", "all", "CopRA", "2"], ["n", "sst2", "LoRA", "1"]]
    assert shapley_table([]) == shapley_details([]) == ""


def test_thirds_of_any_number_of_players():
    assert thirds(record("lora", 0, 0.0, values=(1, 2, 3, 4, 5, 5))) == pytest.approx([3 / 20, 7 / 20, 1 / 2])
    # Four players: the second and third are on the borders, a third and two thirds on either side.
    assert thirds(record("lora", 0, 0.0, values=(3, 3, 3, 3))) == pytest.approx([1 / 3] * 3)
    parts = thirds(record("lora", 0, 0.0, values=(3, 6, -3, 6)))
    assert parts == pytest.approx(np.array([3 + 2, 4 - 2, 6 - 1]) / 12)
