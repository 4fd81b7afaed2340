"""The federated protocol: clients, rounds, what is merged with which weight, what the records say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from examples import MODULES, random_adapter

from copra_llm import train
from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig, parse_run_config
from copra_llm.errors import InputError
from copra_llm.merge import merge
from copra_llm.protocols import federated
from copra_llm.protocols.federated import Federation, for_client, run_federation
from copra_llm.protocols.plans import merge_rules, read_plans
from copra_llm.results import Result, read_result, unpack_bits
from copra_llm.summaries.together import federated_table
from copra_llm.train import train_adapter

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "lora_r": 2, "max_length": 24, "max_train_samples": 18, "max_eval_samples": 8, "checkpoint_at": [],
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
}  # fmt: skip


def plan(model: Path | str, **changes) -> Federation:
    values = {"model": str(model), "tasks": ["sst2"], "methods": ["copra"], "seeds": [1], "clients": 2,
              "merges": {"fusion": {}}, "settings": SETTINGS}  # fmt: skip
    return Federation(**values | changes)


def quiet(text: str) -> None:
    pass


def run(chosen: Federation, folder: Path, name: str = "case") -> list[Path]:
    """Run the plan in the folder; its records."""
    run_federation(name, chosen, folder / "results", folder / "work", "sample", quiet, workers=1)
    return sorted((folder / "results").rglob("*.json"))


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def work_of(folder: Path) -> Path:
    """The one federation's folder."""
    (place,) = (folder / "work").glob("*/*/*/*")
    return place


@pytest.fixture
def trained(monkeypatch) -> list[RunConfig]:
    """The settings of every run that is trained."""
    seen = []

    def counted(config, tasks, folder):
        if not (folder / "result.json").is_file():
            seen.append(config)
        return train_adapter(config, tasks, folder)

    monkeypatch.setattr(federated, "train_adapter", counted)
    return seen


# --- one round --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_round(tiny_bert, tmp_path_factory) -> Path:
    """Three clients with unequal shares of the data, merged by two rules."""
    folder = tmp_path_factory.mktemp("one_round")
    chosen = plan(tiny_bert, clients=3, split="dirichlet", beta=0.5, merges={"fusion": {}, "mixture": {}})
    run(chosen, folder)
    return folder


def test_the_record_says_what_was_trained_and_merged(one_round, tiny_bert):
    """Clients' figures are those of their own records, the merged adapter that of `merge` with their shares."""
    place = work_of(one_round)
    runs = [place / "round1" / f"client{k}" for k in range(3)]
    singles = [read_result(folder / "result.json") for folder in runs]
    adapters = [load_adapter_weights(folder) for folder in runs]
    for rule in ("fusion", "mixture"):
        (record,) = (read_result(f) for f in (one_round / "results").rglob(f"case-{rule}-*.json"))
        ((entry,), c) = record.data["rounds"], record.config
        sizes = [client["examples"] for client in entry["clients"]]
        assert sum(sizes) == 18 and len(set(sizes)) > 1
        assert [sum(client["labels"]) for client in entry["clients"]] == sizes
        merged = merge(adapters, rule, [size / 18 for size in sizes])
        saved = load_adapter_weights(place / rule / "round1" / "merged")
        assert all(torch.equal(tensor, saved.state_dict()[key]) for key, tensor in merged.state_dict().items())
        assert [client["accuracy"] for client in entry["clients"]] == [s.metrics["test/sst2/accuracy"] for s in singles]
        mean = sum(s.metrics["test/sst2/loss"] for s in singles) / 3
        assert record.metrics["test/sst2/loss/origin"] == pytest.approx(mean, rel=1e-12)
        hits = unpack_bits(entry["merged"]["correct"])
        assert record.metrics["test/sst2/accuracy/merged"] == entry["merged"]["accuracy"] == 100 * sum(hits) / 8
        assert record.steps == 12 and record.protocol == "federated"
        assert (c["clients"], c["rounds"], c["split_kind"], c["beta"], c["merge_method"]) == (
            3, 1, "dirichlet", 0.5, rule,
        )  # fmt: skip
        assert c["model_name_or_path"] == tiny_bert.name and str(one_round) not in json.dumps(
            dataclasses.asdict(record)
        )


def test_every_client_has_a_seed_and_a_share_of_its_own(one_round):
    configs = [
        RunConfig.from_flat(read_result(work_of(one_round) / "round1" / f"client{k}" / "result.json").config)
        for k in range(3)
    ]
    assert [c.train.seed for c in configs] == [3, 4, 5] and [c.part.client for c in configs] == [0, 1, 2]
    assert {c.part.split_seed for c in configs} == {1}
    different = {key for key, value in configs[0].flat().items() if value != configs[1].flat()[key]}
    assert different == {"seed", "client", "output_dir"}


def test_a_clients_config_repeats_its_run(one_round, tmp_path):
    """As the recipe does: from the file alone, in another folder."""
    client = work_of(one_round) / "round1" / "client2"
    train_adapter(parse_run_config(["--config", str(client / "config.yaml")]), ["sst2"], tmp_path)
    assert weights_of(tmp_path / "adapter") == weights_of(client / "adapter")


def test_nothing_is_done_twice_and_rules_share_the_clients(one_round, tiny_bert, trained):
    """Again: no record touched. A rule more: no client trained."""
    before = {f: f.stat().st_mtime_ns for f in (one_round / "results").rglob("*.json")}
    chosen = plan(tiny_bert, clients=3, split="dirichlet", beta=0.5, merges={"fusion": {}, "mixture": {}})
    run(chosen, one_round)
    assert {f: f.stat().st_mtime_ns for f in (one_round / "results").rglob("*.json")} == before
    more = dataclasses.replace(chosen, merges={"half": {"method": "ties", "density": 0.5}})
    records = run(more, one_round)
    assert trained == [] and len(records) == 3
    (record,) = (read_result(f) for f in records if f.name.startswith("case-half-"))
    assert record.config["merge_method"] == "ties" and record.config["merge_options"] == {"density": 0.5}


def test_a_case_that_has_changed_is_refused(one_round, tiny_bert):
    """The clients in its folder were trained with other settings."""
    chosen = plan(tiny_bert, clients=3, split="dirichlet", beta=0.1, merges={"truncated": {}})
    with pytest.raises(InputError, match="was trained with dirichlet_beta = 0.5, but this run has dirichlet_beta"):
        run(chosen, one_round)


def test_one_client_and_one_round_are_plain_training(tiny_bert, tmp_path):
    """The same bytes as an ordinary run: the client's adapter, and what is merged of it alone."""
    run(plan(tiny_bert, clients=1, seeds=[4]), tmp_path)
    config = RunConfig().replace(
        **SETTINGS | {"model_name_or_path": str(tiny_bert), "tasks": ["sst2"], "seed": 4, "data_root": "sample"}
    )
    train_adapter(config, ["sst2"], tmp_path / "plain")
    place = work_of(tmp_path)
    for folder in (place / "round1" / "client0" / "adapter", place / "fusion" / "round1" / "merged"):
        assert weights_of(folder) == weights_of(tmp_path / "plain" / "adapter")


def test_equal_weights(tiny_bert):
    rule, ties = merge_rules({"fusion": {}, "ties": {}})
    by_examples, equal = plan(tiny_bert), plan(tiny_bert, weights="equal")
    assert by_examples.shares(rule, [30, 10]) == [0.75, 0.25] and equal.shares(rule, [30, 10]) == [0.5, 0.5]
    # A rule that adds counts an adapter as 1 by default, not as 1 / K.
    assert by_examples.shares(ties, [30, 10]) == [1.5, 0.5] and equal.shares(ties, [30, 10]) == [1.0, 1.0]


# --- more rounds ------------------------------------------------------------------------------------------

UNEQUAL = {
    "lora_r": [2, 3],
    "lora_layers_to_transform": [[0, 5, 11], [10, 11]],
    "lora_target_modules": [["query"], ["qkv"]],
}


@pytest.fixture(scope="module")
def two_rounds(tiny_bert, tmp_path_factory) -> Path:
    """Two clients of unequal ranks, depth and targets, two rounds, by mixture."""
    folder = tmp_path_factory.mktemp("two_rounds")
    run(plan(tiny_bert, rounds=2, merges={"mixture": {}}, each=UNEQUAL), folder)
    return folder


def test_clients_of_unequal_ranks_targets_and_depth(two_rounds):
    """Each goes on with its own; the mixture has them all, and is cut to a client's rank on the way back."""
    place = work_of(two_rounds)
    first = [load_adapter_weights(place / "round1" / f"client{k}") for k in (0, 1)]
    second = [load_adapter_weights(place / "mixture" / "round2" / f"client{k}") for k in (0, 1)]
    merged = load_adapter_weights(place / "mixture" / "round1" / "merged")
    assert [len(a.factors) for a in first] == [3, 6]
    assert merged.factors.keys() == first[0].factors.keys() | first[1].factors.keys()
    both = "encoder.layer.11.attention.self.query"
    assert merged.factors[both].r == 2 + 3
    for k, r in enumerate((2, 3)):
        start = load_adapter_weights(place / "mixture" / "round2" / f"start{k}")
        assert start.factors.keys() == second[k].factors.keys() == first[k].factors.keys()
        assert {f.r for f in second[k].factors.values()} == {r}
        U, S, Vh = torch.linalg.svd(merged.factors[both].delta_weight())
        best = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
        # Factors stored in float32.
        torch.testing.assert_close(start.factors[both].delta_weight(), best, rtol=1e-4, atol=1e-6)
    (record,) = (read_result(f) for f in (two_rounds / "results").rglob("*.json"))
    assert [[c["r"] for c in entry["clients"]] for entry in record.data["rounds"]] == [[2, 3], [2, 3]]
    assert [entry["round"] for entry in record.data["rounds"]] == [1, 2]


def test_rounds_are_parts_of_one_run(two_rounds):
    """p(t) and the learning rate run over both; the second round starts from what the server sent."""
    place = work_of(two_rounds)
    logs, starts = [], []
    for folder in (place / "round1" / "client0", place / "mixture" / "round2" / "client0"):
        result = read_result(folder / "result.json")
        config = RunConfig.from_flat(result.config)
        starts.append((config.part.schedule_span, config.part.init_adapter, config.train.max_steps))
        logs.append(result.data["log"][-1])
    assert starts == [([0.0, 0.5], None, 2), ([0.5, 1.0], str(place / "mixture" / "round2" / "start0"), 2)]
    assert [entry["activation_prob"] for entry in logs] == [pytest.approx(4 * 1 / 12), 1.0]
    rates = [1e-2 * 0.5 * (1 + math.cos(math.pi * t)) for t in (0.5, 1.0)]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(rates, abs=1e-12)


def test_killed_in_any_round_it_goes_on_to_the_same_end(two_rounds, tiny_bert, tmp_path, monkeypatch):
    """Stopped right after a checkpoint in each client's run, once more after each: bytes and record are the same."""
    chosen = plan(tiny_bert, rounds=2, merges={"mixture": {}}, each=UNEQUAL, settings=SETTINGS | {"save_steps": 1})
    save, stops = train.save_checkpoint, []

    class Killed(BaseException):
        pass

    def save_and_stop(accelerator, classifier, optimizer, config, folder, progress):
        save(accelerator, classifier, optimizer, config, folder, progress)
        if folder not in stops:
            stops.append(folder)
            raise Killed

    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    for _ in range(4):
        with pytest.raises(Killed):
            run(chosen, tmp_path)
    (record,) = run(chosen, tmp_path)
    assert len(stops) == 4
    (straight,) = (read_result(f) for f in (two_rounds / "results").rglob("*.json"))
    assert read_result(record).metrics == straight.metrics and read_result(record).data == straight.data
    one, other = (work_of(f) / "mixture" / "round2" / "merged" for f in (two_rounds, tmp_path))
    assert weights_of(one) == weights_of(other)


def test_what_a_client_is_sent():
    """Its modules of the server's adapter; as they are where the rank is its own, else the best of its rank."""
    names = list(MODULES)
    server = random_adapter(0, ranks=dict.fromkeys(names, 4))
    own = random_adapter(1, ranks=dict.fromkeys(names[:4], 4))
    sent = for_client(server, own)
    assert list(sent.factors) == names[:4]
    assert all(torch.equal(sent.factors[n].lora_A, server.factors[n].lora_A) for n in sent.factors)
    smaller = for_client(server, random_adapter(1, ranks=dict.fromkeys(names[:4], 2)))
    for name in names[:4]:
        U, S, Vh = torch.linalg.svd(server.factors[name].delta_weight())
        best = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
        torch.testing.assert_close(smaller.factors[name].delta_weight(), best, rtol=1e-5, atol=1e-5)


# --- plans ------------------------------------------------------------------------------------------------


def test_the_committed_plan_is_read():
    plans = read_plans(ROOT / "eval" / "federated" / "plan.yaml", Federation)
    assert {"iid", "dirichlet"} <= set(plans)
    assert all(p.clients == 5 and len(p.seeds) >= 3 and {"fusion", "mixture"} <= set(p.merges) for p in plans.values())


def test_tuned_settings_win():
    tuned = {"sst2": {"copra": {"max_steps": 6, "learning_rate": "1e-3"}}}
    chosen = plan("minilm", tasks=["sst2", "agnews"], methods=["lora", "copra"], tuned=tuned)
    got = {(c.data.tasks[0], c.schedule.method): (c.train.max_steps, c.train.learning_rate) for c in chosen.configs("")}
    assert got == {
        ("sst2", "lora"): (4, 1e-2), ("sst2", "copra"): (6, 1e-3), ("agnews", "lora"): (4, 1e-2),
        ("agnews", "copra"): (4, 1e-2),
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"merges": {}}, "merges is empty"),
        ({"merges": {"fusoin": {}}}, 'did you mean "fusion"'),
        ({"merges": {"ties": {"density": 2}}}, "density is 2"),
        ({"merges": {"ties": 3}}, "merge rule ties is 3"),
        ({"clients": 0}, "--num_clients is 0"),
        ({"rounds": 3}, "max_steps is 4, but must be a multiple of the 3 rounds"),
        (
            {"rounds": 2, "settings": SETTINGS | {"init_lora_weights": "pissa"}},
            "init_lora_weights is pissa, which starts from a base of its own, but the plan has 2 rounds",
        ),
        ({"rounds": 0}, "rounds is 0, but must be at least 1"),
        ({"settings": SETTINGS | {"max_steps": -1}}, "max_steps is -1, but must be a multiple"),
        ({"split": "dirichelt"}, '--client_split is "dirichelt"'),
        ({"split": "dirichlet", "beta": 0.0}, "--dirichlet_beta is 0.0"),
        ({"weights": "size"}, 'weights are "size", but must be examples or equal'),
        ({"each": {"lora_r": [2]}}, r"lora_r of each client is \[2\], but must be a list of 2 values"),
        ({"each": {"lora_rr": [2, 2]}}, 'no setting "lora_rr"'),
        ({"each": {"lora_r": [2, "four"]}}, "lora_r is 'four', but must be of type int"),
        ({"tuned": {"sst2": {"copra": 3}}}, "tuned has 3 for copra on sst2"),
        ({"tuned": {"sst2": {"copra": {"max_step": 3}}}}, 'no setting "max_step"'),
        (
            {"each": {"model_name_or_path": ["minilm", "smollm2"]}},
            "clients 0 and 1 have different base models, minilm and smollm2: an adapter is a change to its own base's",
        ),
    ],
)
def test_a_plan_that_is_wrong_is_refused_before_anything_runs(changes, expected):
    with pytest.raises(InputError, match=expected):
        plan("minilm", **changes)


def test_unequal_ranks_are_refused_by_fusion(tiny_bert, tmp_path):
    chosen = plan(tiny_bert, each={"lora_r": [2, 3]}, settings=SETTINGS | {"max_steps": 1})
    with pytest.raises(InputError, match="differ in rank: 2 and 3; fusion needs equal ranks"):
        run(chosen, tmp_path)
    assert not (tmp_path / "results").exists()


# --- the table --------------------------------------------------------------------------------------------


def record(method: str, seed: int, origin: float, merged: float, **about) -> Result:
    config = {"model_name_or_path": "m", "task": "sst2", "method": method, "seed": seed, "split_kind": "iid",
              "clients": 5, "rounds": 1, "beta": None, "each": {}, "merge_method": "fusion",
              "merge_options": {}}  # fmt: skip
    metrics = {"accuracy/origin": origin, "accuracy/merged": merged, "loss/merged": 0.5, "loss/origin": 0.4}
    return Result("federated", config | about, {f"test/sst2/{k}": v for k, v in metrics.items()})


def test_the_table_pairs_seeds():
    """Differences 3 and 5: mean 4, Student's t with one degree of freedom; a seed that one method lacks is left out."""
    results = [
        record("lora", 0, 70.0, 60.0), record("lora", 1, 72.0, 62.0), record("lora", 2, 74.0, 64.0),
        record("copra", 1, 71.0, 67.0), record("copra", 0, 69.0, 63.0),
    ]  # fmt: skip
    lines = federated_table(results).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    half = 12.706 * math.sqrt(2) / math.sqrt(2)
    assert cells[:6] == ["m", "sst2", "5, iid", "fusion", "72.0", "70.0"]
    assert cells[-1] == f"4.0 [{4 - half:.1f}, {4 + half:.1f}]"
    assert cells[6].startswith("62.0 [") and cells[7].startswith("65.0 [")


def test_what_differs_has_a_row_of_its_own():
    results = [
        record("lora", 0, 70.0, 60.0),
        record("lora", 0, 70.0, 60.0, merge_method="mixture"),
        record("lora", 0, 70.0, 60.0, merge_method="ties", merge_options={"density": 0.5}),
        record("lora", 0, 70.0, 60.0, split_kind="dirichlet", beta=0.5),
        record("lora", 0, 70.0, 60.0, rounds=3, each={"lora_r": [2, 4]}),
    ]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in federated_table(results).splitlines()[2:]]
    assert [row[2:4] for row in rows] == [
        ["5, Dirichlet 0.5", "fusion"], ["5, iid", "fusion"], ["5, iid", "mixture"], ["5, iid", "ties (density 0.5)"],
        ["5, iid, 3 rounds, lora_r 2 4", "fusion"],
    ]  # fmt: skip
    assert federated_table([]) == ""
