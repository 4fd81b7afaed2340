"""Compiled blocks (`copra_llm.compiled`): how many graphs a schedule takes, and that a run stays what it was.

Graphs are those of the tracer; a backend that runs them as they are ("aot_eager") takes no time to compile, gives the
same bits, and sees what the default one sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import Pair
from safetensors.torch import load_file
from test_train import flags
from torch import Tensor, nn
from torch._dynamo.utils import counters

from copra_llm import compiled, train
from copra_llm.build import build
from copra_llm.compiled import check_compile, compiled_blocks
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.results import read_result
from copra_llm.train import train_adapter

STATES = 4
"""Adapters open or closed, input with or without a gradient; twice as many where some batches have no padding."""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def settings(model: Path, **changes) -> RunConfig:
    """CopRA's whole schedule: over its steps every state of a block occurs."""
    common = {"model_name_or_path": str(model), "tasks": ["sst2"], "data_root": "sample", "max_length": 24,
              "max_train_samples": 32, "max_eval_samples": 4, "per_device_train_batch_size": 4, "max_steps": 12,
              "checkpoint_at": [], "logging_steps": 1, "lora_target_modules": ["all-linear"], "learning_rate": 0.01,
              "torch_compile_backend": "aot_eager"}  # fmt: skip
    return RunConfig().replace(**common | changes)


def trained(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    train_adapter(config, ["sst2"], folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative distance of two adapters' factors."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / other[key].norm()) for key in one)


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """Layers that take one input are computed one by one, in compiled blocks and in what they are compared with."""
    monkeypatch.setattr(train, "_see_shared_inputs", lambda *args: None)


# --- graphs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tiny_llama", {}),
        ("tiny_llama", {"lora_dropout": 0.2, "gradient_checkpointing": True}),
        pytest.param("tiny_llama", {"use_fused_lora": False, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        ("tiny_bert", {"lora_dropout": 0.2}),
    ],
    ids=["plain", "dropout, checkpointing", "accumulation", "encoder"],
)
def test_a_schedule_takes_a_graph_a_state_and_gives_the_same_adapter(model, changes, request, tmp_path):
    """One random mask after another, and lengths that differ: each state is traced once, and no graph is broken."""
    config = settings(request.getfixturevalue(model), **changes)
    plain = trained(config, tmp_path / "plain")
    assert not counters["stats"]
    there = trained(config.replace(torch_compile=True), tmp_path / "compiled")
    assert STATES <= counters["stats"]["unique_graphs"] <= 2 * STATES and not counters["graph_break"]
    assert apart(there, plain) == 0.0
    one, other = (read_result(tmp_path / name / "result.json") for name in ("plain", "compiled"))
    assert one.data["log"] == other.data["log"] and one.metrics == other.metrics


@pytest.mark.slow
def test_mixed_precision(tiny_llama, tmp_path):
    """The first block gets float32, the others bfloat16; where casts are rounded differs, within a bfloat16 step."""
    config = settings(tiny_llama, bf16=True)
    plain = trained(config, tmp_path / "plain")
    there = trained(config.replace(torch_compile=True), tmp_path / "compiled")
    assert STATES <= counters["stats"]["unique_graphs"] <= 2 * STATES and not counters["graph_break"]
    assert apart(there, plain) <= 2**-8


@pytest.mark.slow
def test_kinds_of_blocks_have_graphs_of_their_own(tiny_t5, tmp_path):
    """Encoder and decoder, and in each the first block, which makes the positions' bias: four kinds, one method.

    Measured 9e-7 apart: sums of gradients come in another order.
    """
    config = settings(tiny_t5, max_steps=16)
    plain = trained(config, tmp_path / "plain")
    there = trained(config.replace(torch_compile=True), tmp_path / "compiled")
    assert STATES < counters["stats"]["unique_graphs"] <= 8 * STATES
    assert apart(there, plain) <= 1e-5


@pytest.mark.slow
def test_what_the_default_backend_gives(tiny_llama, tmp_path):
    """Other sums, the same dropout. Measured 9e-6 after 16 steps; another dropout would be 0.8 away."""
    config = settings(tiny_llama, lora_dropout=0.2, torch_compile_backend="inductor")
    plain = trained(config, tmp_path / "plain")
    assert 0 < apart(trained(config.replace(torch_compile=True), tmp_path / "compiled"), plain) <= 1e-3


def test_with_all_gates_closed_a_block_is_the_bases(tiny_llama):
    """C6: bit for bit what the frozen base gives in the same backend."""
    bench = build(settings(tiny_llama), ["sst2"], splits=("train",))
    model, ids = bench.base.model.train(), torch.arange(12).view(2, 6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    gates = LayerGates(bench.classifier, fused=True)
    with compiled_blocks(model, gates.keys, "aot_eager"):
        with gates.applied([False] * 4):
            closed = model(input_ids=ids, use_cache=False).logits
        with bench.classifier.model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
        opened = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(closed, base) and not closed.requires_grad and not torch.equal(opened, base)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_files_show_nothing(tiny_llama, tmp_path):
    config = settings(tiny_llama, torch_compile=True, lora_dropout=0.2, save_steps=5)
    whole = trained(config, tmp_path / "whole")
    resumed = config.replace(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert apart(trained(resumed, tmp_path / "again"), whole) == 0.0
    assert not any("_orig_mod" in key for key in whole)


def test_two_processes(tiny_llama, tmp_path):
    """As without compilation, bit for bit."""
    # Layers that take one input are computed one by one in both.
    plain = settings(tiny_llama, max_steps=6, checkpoint_at=[1.0], use_fused_lora=False)
    runs = [
        plain.replace(output_dir=str(tmp_path / name), torch_compile=name == "compiled") for name in ("a", "compiled")
    ]
    with Pair([flags(config) for config in runs], tmp_path / "logs") as pair:
        assert pair.join() == [0, 0], pair.said()
    one, other = (load_file(tmp_path / name / "sst2/adapter/adapter_model.safetensors") for name in ("a", "compiled"))
    assert apart(one, other) == 0.0


def test_evaluation_is_not_compiled_and_the_model_is_left_as_it_was(tiny_llama):
    bench = build(settings(tiny_llama), ["sst2"], splits=("train",))
    model, ids = bench.base.model, torch.arange(6)[None]
    block = model.model.layers[0]
    with compiled_blocks(model, ["model.layers.0"], "aot_eager"):
        model.eval()(input_ids=ids)
        assert not counters["stats"]
        model.train()(input_ids=ids, use_cache=False)
        assert counters["stats"]["unique_graphs"] == 1
    assert "forward" not in vars(block)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch_compile_backend": "inducter"}, 'is "inducter" .did you mean "inductor"'),
        ({"granularity": "module"}, "--granularity module has one for each choice"),
        ({"use_dora": True}, "--use_dora, whose layers fall into pieces"),
        ({"load_in_4bit": True}, "4 or 8 bits, whose products are not compiled"),
        ({"layer_pattern": r"self_attn\.\w"}, "is none; leave out --layer_pattern"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tiny_llama, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        train_adapter(settings(tiny_llama, torch_compile=True, **changes), ["sst2"], tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    config = RunConfig().replace(torch_compile=True)
    check_compile(config, CPU)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "c++-99")
    with pytest.raises(InputError, match="needs a C.. compiler, but there is no c..-99; install one"):
        check_compile(config, CPU)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs triton on a GPU"):
        check_compile(config, torch.device("cuda"))
