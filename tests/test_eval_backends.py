"""eval/backends: its plan compares like with like, and its measurements are what the processes saw."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from examples import tiny_adapter
from safetensors.torch import load_file, save_file
from test_processes import ROUNDING
from transformers import AutoConfig

from copra_llm.adapters import load_adapter_weights
from copra_llm.protocols.plans import read_plans
from copra_llm.results import read_result

sys.path.insert(0, str(ROOT / "eval" / "backends"))
multi_node = importlib.import_module("multi_node")
backends = importlib.import_module("run")
PLANS = read_plans(ROOT / "eval" / "backends" / "plan.yaml", backends.BackendPlan)


@pytest.mark.parametrize("name", PLANS)
def test_an_entry_is_compared_with_the_same_run_on_one_process(name, tmp_path):
    """The same micro-batches, so the same examples, and the same settings otherwise; the reference is its own."""
    plan, reference = PLANS[name], PLANS[PLANS[name].reference]
    assert (reference.processes, reference.reference) == (1, plan.reference)
    assert reference.needs_gpu == plan.needs_gpu
    assert (ROOT / "accelerate_configs" / plan.config).is_file()
    ours, theirs = (p.run_config("copra", tmp_path, None, tmp_path).flat() for p in (plan, reference))
    steps = ours.pop("gradient_accumulation_steps") * plan.processes
    assert steps == theirs.pop("gradient_accumulation_steps") * reference.processes
    # In which type 4-bit numbers are packed is no other number.
    packed = [settings.pop("bnb_4bit_quant_storage") for settings in (ours, theirs)]
    assert packed == [("float32" if name == "qlora-zero3" else None), None]
    assert ours == theirs


def test_why_a_launch_failed():
    """The sentence, once for all processes; without one, the end of what was printed."""
    said = "a warning\nerror: no\nerror: no\nTraceback of the launcher"
    assert backends.why(said) == "error: no"
    assert backends.why("x" + "y" * 2000) == "y" * 2000


def test_what_cannot_run_here_is_left_out(monkeypatch):
    """With the reason."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backends.left_out(PLANS["gpu-ddp"]) == "it needs 2 GPUs, and there are 1"
    assert backends.left_out(PLANS["gpu"]) is None
    monkeypatch.setattr(multi_node, "why_not", lambda: "no nodes")
    assert backends.left_out(PLANS["ddp-static"]) == "no nodes"
    assert backends.left_out(PLANS["ddp"]) is None


def rank(network: int, starts: list[float], cpu: float, sent: int, peak: int) -> dict:
    """What meter.py writes of a process whose every step takes the same CPU time and sends the same."""
    ticks = [(start, cpu * i, 1000 + sent * i) for i, start in enumerate(starts)]
    return {"ticks": ticks, "peak_memory_bytes": peak, "network": network}


def test_what_a_step_takes():
    """Wall time of the first process, CPU time of all, bytes of each network once; what warms up does not count."""
    starts = [0.0, 9.0, 18.0, 27.0, 36.0, 45.0, 45.25, 45.5, 45.75]
    one = rank(7, starts, cpu=0.25, sent=100, peak=5)
    seen = backends.steps_of([one, rank(7, starts, cpu=0.5, sent=100, peak=6)])
    assert seen == {"seconds_per_step": 0.25, "cpu_seconds_per_step": 0.75, "bytes_per_step": 100.0,
                    "peak_memory_bytes": 6}  # fmt: skip
    assert backends.steps_of([one, rank(8, starts, cpu=0.5, sent=30, peak=6)])["bytes_per_step"] == 130.0


def test_differences_are_relative(tiny_llama, tmp_path):
    """One module's B is enlarged by a part in ten thousand: so far is that module, and all together less."""
    first = tiny_adapter(tiny_llama, tmp_path / "first", seed=0)
    second = tiny_adapter(tiny_llama, tmp_path / "second", seed=0)
    assert backends.differences(second, first) == {"difference": 0.0, "largest_difference": 0.0}
    tensors = load_file(second / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] * (1 + 2**-13)
    save_file(tensors, second / "adapter_model.safetensors", {"format": "pt"})
    rounding = 2 * torch.finfo(torch.float32).eps
    found = backends.differences(second, first)
    assert found["largest_difference"] == pytest.approx(2**-13, abs=rounding)
    norms = {n: float(f.delta_weight().norm()) for n, f in load_adapter_weights(first).factors.items()}
    share = norms[next(n for n in norms if n in name)] / math.hypot(*norms.values())
    assert 0.1 < share < 0.9 and found["difference"] == pytest.approx(2**-13 * share, abs=rounding)


def test_dropout_is_off_and_nothing_else_changes(tiny_bert, tmp_path):
    """In the copy; the model that it was made of keeps its own."""
    model = tmp_path / "bert"
    config = AutoConfig.from_pretrained(tiny_bert)
    config.hidden_dropout_prob = 0.1
    with_dropout = tmp_path / "with"
    with_dropout.mkdir()
    for path in tiny_bert.iterdir():
        (with_dropout / path.name).write_bytes(path.read_bytes())
    config.save_pretrained(with_dropout)
    backends.without_dropout(str(with_dropout), model)
    before, after = (json.loads((p / "config.json").read_text(encoding="utf-8")) for p in (with_dropout, model))
    assert (before["hidden_dropout_prob"], after["hidden_dropout_prob"]) == (0.1, 0.0)
    assert before | {"hidden_dropout_prob": 0.0} == after
    assert sorted(p.name for p in model.iterdir()) == sorted(p.name for p in with_dropout.iterdir())


PLAN = """
all: {{model: {model}, tasks: [sst2], methods: [lora], batch: 4, settings: {{max_steps: 8, max_eval_samples: 4}}}}
one: {{label: one process, config: single.yaml, processes: 1, micro_batches: 2}}
ddp: {{label: DDP, config: cpu.yaml}}
refused: {{label: refused, config: cpu.yaml, settings: {{fp16: true}}}}
gpu: {{label: GPUs, config: ddp.yaml, processes: 99, needs_gpu: true}}
"""


@pytest.mark.slow
def test_a_plan_is_run(tiny_llama, tmp_path):
    """Records of what runs, with the reason of what does not; what needs more GPUs than there are has none."""
    (tmp_path / "plan.yaml").write_text(PLAN.format(model=tiny_llama), encoding="utf-8")
    folders = {"--plan": tmp_path / "plan.yaml", "--results": tmp_path / "results", "--work": tmp_path / "work"}
    command = [sys.executable, ROOT / "eval" / "backends" / "run.py", "--data_root", "sample"]
    command += [word for pair in folders.items() for word in pair]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = {path.stem: read_result(path) for path in (tmp_path / "results").iterdir()}
    assert sorted(records) == ["ddp-lora", "one-lora", "refused-lora"]
    ddp, refused = records["ddp-lora"], records["refused-lora"]
    # DDP adds as one process does.
    assert ddp.metrics["starts"] == 1 and ddp.metrics["difference"] < ROUNDING
    assert (ddp.environment["world_size"], ddp.environment["backend"]) == (2, "DDP")
    (adapter,) = (tmp_path / "work").glob("ddp/*/*/adapter/adapter_model.safetensors")
    gradients = 2 * sum(tensor.nbytes for tensor in load_file(adapter).values())
    if multi_node.why_not() is None:
        # Every process sends each gradient once; headers and what else they tell each other come on top.
        assert gradients < ddp.metrics["bytes_per_step"] < 2 * gradients
    assert refused.metrics == {"starts": 0.0}
    assert refused.data["said"] == "error: --fp16 needs a GPU, and there is none; use --bf16 or neither"
