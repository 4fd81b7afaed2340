"""What a step of the loop must not do: wait for the device, or work below the lowest active layer."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from examples import write_conversations
from torch.utils._python_dispatch import TorchDispatchMode

import copra_llm
from copra_llm import masks, train
from copra_llm.activations import checkpoint_activations
from copra_llm.attention import without_cudnn_attention
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.train import _accelerator, fit

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")
"""Operations that read values of the device, or whose result has a size that depends on them."""
OURS = [str(Path(module.__file__).parent) + os.sep for module in (copra_llm, transformers)]
COMMON = {"max_steps": 6, "per_device_train_batch_size": 2, "max_length": 32, "lora_target_modules": ["all-linear"],
          "checkpoint_at": [], "logging_steps": 6, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes where the host waits, for each step: the innermost file and function of this package or transformers."""

    def __init__(self):
        super().__init__()
        self.steps: list[set[tuple[str, str]]] = [set()]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in WAITING:
            frames = [f for f in traceback.extract_stack() if any(f.filename.startswith(place) for place in OURS)]
            self.steps[-1].add((Path(frames[-1].filename).name, frames[-1].name))
        return function(*args, **kwargs or {})


def conversations(model: Path, folder: Path, **changes) -> RunConfig:
    data = write_conversations(folder / "train.jsonl", 24)
    own = {"model_name_or_path": str(model), "dataset_name": [str(data)], "tasks": ["instruct"], "dev_size": 4,
           "chat_template": "plain"}  # fmt: skip
    return RunConfig().replace(**COMMON | own | changes)


def waits(config: RunConfig, folder: Path) -> list[set]:
    """Of each step of a run, whose last one is logged."""
    bench = build(config, config.data.tasks)
    with Waits() as seen:
        fit(Accelerator(), bench, config, folder, on_step=lambda: seen.steps.append(set()))
    return seen.steps


def test_no_step_of_ours_waits_but_those_that_are_logged(tiny_llama, tmp_path):
    """transformers asks of each forward pass whether its row holds several examples, or its batch padding. On a CPU,
    where nothing waits, the loss of a language model looks for ties; the test below has the GPU's way."""
    words = RunConfig().replace(**COMMON, model_name_or_path=str(tiny_llama), data_root="sample", max_train_samples=16,
                                max_eval_samples=2)  # fmt: skip
    for name, config in (("talk", conversations(tiny_llama, tmp_path)), ("words", words)):
        steps = waits(config, tmp_path / name)
        assert {file for step in steps[1:6] for file, _ in step} - {"linear_loss.py"} == {"masking_utils.py"}
        assert ("train.py", "mean") in steps[6], "the test sees what waits"


@pytest.mark.gpu
def test_no_step_of_ours_waits_on_a_gpu(tiny_llama, tmp_path):
    config = conversations(tiny_llama, tmp_path)
    bench, done = build(config, config.data.tasks), []

    def on_step() -> None:
        done.append(None)
        torch.cuda.set_sync_debug_mode("warn" if len(done) < config.train.max_steps - 1 else "default")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fit(_accelerator(config, tmp_path / "run"), bench, config, tmp_path / "run", on_step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = {Path(w.filename).name for w in said if "synchronizing CUDA operation" in str(w.message)}
    assert waited <= {"masking_utils.py"} and len(done) == config.train.max_steps


def test_steps_leave_out_cudnns_attention_and_nothing_else(tiny_llama, tmp_path):
    """Whose gradients may be no numbers where there is padding; before and after, torch is as it was."""
    config, asked = conversations(tiny_llama, tmp_path, max_steps=2), []
    bench = build(config, config.data.tasks)
    bench.base.model.model.layers[0].register_forward_pre_hook(lambda *args: asked.append(kernels()))
    before = kernels()
    fit(_accelerator(config, tmp_path / "run"), bench, config, tmp_path / "run", lambda: None)
    assert before[0], "cuDNN's is allowed by torch itself"
    assert asked[-1] == (False, *before[1:]) and kernels() == before


def kernels() -> tuple[bool, ...]:
    """Which attention kernels torch may choose, cuDNN's first."""
    cuda = torch.backends.cuda
    return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.gpu
def test_padding_on_the_left_has_finite_gradients_on_a_gpu():
    """At the length at which cuDNN's backward pass may fail on Hopper: 64, with rows that attend to nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    allowed = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril().repeat(2, 1, 1, 1)
    allowed[0, :, :, :20] = False
    with without_cudnn_attention():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        out[:, :, 20:].square().sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lowest", [0, 1, 3])
def test_nothing_is_kept_or_recomputed_below_the_lowest_active_layer(
    tiny_llama, tmp_path, monkeypatch, lowest: int, checkpointing: bool
):
    """In the loop: a block keeps activations, or runs again, from the lowest active one on; only active layers step."""
    config = conversations(tiny_llama, tmp_path, max_steps=1, gradient_accumulation_steps=1)
    bench = build(config, config.data.tasks)
    if checkpointing:
        checkpoint_activations(bench.base.model)
    mask = [i in (lowest, 3) for i in range(4)]
    monkeypatch.setattr(train, "sample_mask", lambda p, n, seed, step: masks.np.array(mask))
    kept, runs, now = [0] * 4, [0] * 4, [None]
    for i, block in enumerate(bench.base.model.model.layers):
        block.register_forward_pre_hook(lambda *args, i=i: now.__setitem__(0, i))
        block.register_forward_hook(lambda *args: now.__setitem__(0, None))
        # The pass before the first step, which trains nothing, is in evaluation mode.
        block.self_attn.register_forward_pre_hook(lambda own, _, i=i: runs.__setitem__(i, runs[i] + own.training))
    before = {name: p.detach().clone() for name, p in bench.classifier.named_parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if now[0] is not None:
            kept[now[0]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fit(Accelerator(), bench, config, tmp_path / "run")
    if not checkpointing:  # whose own hooks would be asked
        assert [n > 0 for n in kept] == [i >= lowest for i in range(4)]
    assert runs == [1 + (checkpointing and i >= lowest) for i in range(4)]
    moved = {int(n.split(".layers.")[1].split(".")[0]) for n, p in bench.classifier.named_parameters()
             if not torch.equal(p, before[n])}  # fmt: skip
    assert moved == {lowest, 3}
