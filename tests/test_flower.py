"""The federated protocol through Flower: the same adapter as without it. `make test-flower`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from examples import random_adapter
from test_federated import plan, quiet, weights_of, work_of

from copra_llm.adapters import AdapterWeights, save_adapter_weights
from copra_llm.errors import InputError
from copra_llm.protocols.federated import run_federation
from copra_llm.protocols.plans import merge_rules
from copra_llm.results import read_result


def test_without_flower_the_extra_is_named(monkeypatch):
    """Where flwr is absent or broken, the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "copra_llm.protocols.flower", raising=False)
    with pytest.raises(InputError, match=r"flwr is not installed whole .*pip install copra_llm\[federated\]"):
        import copra_llm.protocols.flower  # noqa: F401


@pytest.mark.flower
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_adapter_travels_unchanged(tmp_path, dtype):
    """Factors of unequal ranks and scalings, heads, and what is no factor; half precision arrives as float32."""
    from flwr.app import RecordDict

    from copra_llm.protocols.flower import from_records, to_records

    names = list(random_adapter(0).factors)
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    adapter = random_adapter(0, ranks, {name: 0.5 + i for i, name in enumerate(names)}, dtype=dtype)
    head, labels = {"sst2.weight": torch.randn(2, 6)}, {"labels": '{"sst2": ["Bad", "Good"]}'}
    adapter = AdapterWeights(adapter.factors, adapter.config, {"extra.weight": torch.ones(3)}, head, labels, "a")
    arrived = from_records(RecordDict(to_records(adapter)))
    wanted = torch.float32 if dtype is torch.bfloat16 else dtype
    before, after = adapter.state_dict(), arrived.state_dict()
    assert before.keys() == after.keys() and list(arrived.factors) == names
    assert all(torch.equal(tensor, after[key].to(tensor.dtype)) for key, tensor in before.items())
    assert {f.lora_A.dtype for f in arrived.factors.values()} == {wanted}
    assert [f.scaling for f in arrived.factors.values()] == [f.scaling for f in adapter.factors.values()]
    assert torch.equal(arrived.heads["sst2.weight"], head["sst2.weight"])
    assert arrived.config == adapter.config and arrived.head_metadata == labels and arrived.source == "a"
    save_adapter_weights(arrived, tmp_path / "adapter")


@pytest.fixture
def simulation(monkeypatch) -> None:
    """Workers of Ray find the package and the tests, and nobody is told of the run."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield
    import ray

    ray.shutdown()


UNEQUAL = {"lora_r": [2, 3], "lora_layers_to_transform": [[0, 5, 11], [10, 11]]}


@pytest.mark.flower
def test_flower_reaches_the_plain_protocols_adapter(tiny_bert, tmp_path, simulation):
    """Two clients of unequal rank and depth, two rounds, in Ray's processes: byte for byte; and the same record."""
    from copra_llm.protocols.flower import simulate_plan

    chosen = plan(tiny_bert, rounds=2, merges={"mixture": {}}, each=UNEQUAL, split="dirichlet")
    run_federation("case", chosen, tmp_path / "plain" / "results", tmp_path / "plain" / "work", "sample", quiet, 1)
    simulate_plan("case", chosen, tmp_path / "flower" / "results", tmp_path / "flower" / "work", "sample", quiet)
    place = work_of(tmp_path / "plain")
    (merged,) = (tmp_path / "flower" / "work").glob("*/sst2/copra/case-mixture-*")
    assert weights_of(merged) == weights_of(place / "mixture" / "round2" / "merged")
    plain, flower = (
        read_result(next((tmp_path / engine / "results").rglob("*.json"))) for engine in ("plain", "flower")
    )
    assert flower.data == plain.data and flower.metrics == plain.metrics and flower.steps == plain.steps
    assert flower.config == plain.config | {"engine": "flower"}


@pytest.mark.flower
def test_a_client_that_fails_ends_the_run_in_a_sentence(tiny_bert, tmp_path, simulation):
    """Here two clients cannot share one example; no record is left."""
    from copra_llm.protocols.flower import simulate

    chosen = plan(tiny_bert, settings={"max_train_samples": 1, "max_steps": 1})
    (config,), (rule,) = chosen.configs("sample"), merge_rules(chosen.merges)
    with pytest.raises(InputError, match="in round 1 node .* failed: .*cannot be divided among 2 clients"):
        simulate("case", chosen, config, rule, tmp_path / "results", tmp_path / "work")
    assert not (tmp_path / "results").exists()
