"""Blocks that are compiled (`copra_llm.compiled`): how many graphs a schedule takes, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from copra_llm.config import RunConfig
from copra_llm.results import read_result
from copra_llm.train import train_adapter

OPEN_OR_CLOSED_WITH_OR_WITHOUT_GRADIENT = 4
ROUNDING = 1e-4
"""Relative distance of B after 16 steps of Adam in float32, whose sums are made in another order."""


def settings(model: Path, **changes) -> RunConfig:
    common = {"model_name_or_path": str(model), "tasks": ["sst2"], "data_root": "sample", "max_length": 24,
              "max_train_samples": 32, "max_eval_samples": 4, "per_device_train_batch_size": 4, "max_steps": 16,
              "checkpoint_at": [], "logging_steps": 1, "lora_target_modules": ["all-linear"],
              "torch_compile_backend": "aot_eager"}  # fmt: skip
    return RunConfig().replace(**common | changes)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    train_adapter(config, ["sst2"], folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one: dict, other: dict) -> float:
    """The largest relative distance of two adapters' factors."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm()) for k in one)


CASES = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "pefts_own": {"use_fused_lora": False},
    "checkpointing": {"gradient_checkpointing": True, "lora_dropout": 0.2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert", "tiny_t5"])
@pytest.mark.parametrize("case", CASES)
def test_a_schedule_takes_few_graphs_and_gives_the_same_adapter(model: str, case: str, request, tmp_path):
    config = settings(request.getfixturevalue(model), **CASES[case])
    plain = trained(config, tmp_path / "plain")
    assert not counters["stats"]
    there = trained(config.replace(torch_compile=True), tmp_path / "compiled")
    print(dict(counters["stats"]), dict(counters["graph_break"]), counters["frames"], apart(there, plain))
    losses = [[e["loss"] for e in read_result(tmp_path / n / "result.json").data["log"]] for n in ("plain", "compiled")]
    print(max(abs(a-b)/a for a,b in zip(*losses)))
