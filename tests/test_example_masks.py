"""A mask an example: drawn by the same law, and the same as training on each example with a mask of its own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from test_compensation import CHI2_999_6, adapted, law
from test_train import adapter_bytes
from torch import nn

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.example_masks import ExampleMasks, check_example_masks
from copra_llm.gates import LayerGates
from copra_llm.masks import sample_mask, sample_masks
from copra_llm.train import train_adapter

P = [0.2, 0.5, 0.9]


# --- the draws --------------------------------------------------------------------------------------------


def test_each_examples_mask_follows_the_conditioned_law():
    """Over the examples of one step, and over the steps of one example."""
    drawn = {"examples": sample_masks(P, 3, 4000, seed=1, step=5),
             "steps": np.array([sample_masks(P, 3, 3, seed=1, step=step)[2] for step in range(4000)])}  # fmt: skip
    for masks in drawn.values():
        rows = [tuple(map(bool, mask)) for mask in masks]
        chi2 = sum((rows.count(m) - 4000 * q) ** 2 / (4000 * q) for m, q in law(P).items())
        assert chi2 < CHI2_999_6


def test_an_examples_mask_depends_on_seed_step_and_its_number_alone():
    few, many = (sample_masks(0.4, 12, n, seed=3, step=7) for n in (4, 16))
    assert np.array_equal(few, many[:4])
    of_step = sample_mask(0.4, 12, seed=3, step=7)
    others = [sample_masks(0.4, 12, 16, seed=3, step=8), sample_masks(0.4, 12, 16, seed=4, step=7)]
    assert not any(np.array_equal(many, other) for other in others)
    assert len({mask.tobytes() for mask in (*many, of_step)}) == 17, "no two streams are one"
    assert sample_masks(0.0, 12, 16, seed=0, step=0).sum(1).tolist() == [1] * 16


# --- what they do -----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def model() -> nn.Module:
    return adapted(Net)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scales", [None, [2.0, 0.5, 3.0]])
def test_a_step_is_the_mean_of_its_examples_each_with_its_mask(model, fused, scales):
    """In two micro-batches: outputs of each row, and gradients, are those of single examples under their own gates."""
    gates = LayerGates(model, fused=fused)
    gates.find_shared_inputs(lambda: model(torch.zeros(1, 4, 6, dtype=torch.float64)))
    apart, x = ExampleMasks(gates, True, seed=5, examples=6), torch.randn(6, 4, 6, dtype=torch.float64)
    mask = apart.draw(np.ones(3, bool), [0.4] * 3, step=2)
    masks = sample_masks(0.4, 3, 6, seed=5, step=2)
    assert not masks.all(0).any() and len({m.tobytes() for m in masks}) > 2, "the case is of interest"
    outputs = []
    with apart.applied(), gates.applied(mask, scales):
        for rows in (x[:4], x[4:]):
            apart.turn(len(rows))
            outputs.append(model(rows))
            outputs[-1].square().sum().backward()
    together = gradients(model)
    for row, own in zip(x, masks, strict=True):
        with gates.applied(own, scales):
            out = model(row[None])
        out.square().sum().backward()
        assert torch.allclose(torch.cat(outputs)[[torch.equal(row, r) for r in x]], out, rtol=1e-12)
    for a, b in zip(together, gradients(model), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_a_layer_that_no_example_has_does_not_move(model, monkeypatch):
    gates = LayerGates(model, fused=True)
    apart = ExampleMasks(gates, True, seed=0, examples=2)
    monkeypatch.setattr("copra_llm.example_masks.sample_masks", lambda *a, **k: np.array([[1, 0, 0], [1, 0, 1]], bool))
    mask = apart.draw(np.ones(3, bool), P, step=0)
    assert mask.tolist() == [True, False, True]
    with apart.applied(), gates.applied(mask):
        apart.turn(2)
        model(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    grads = dict(zip((n for n, p in model.named_parameters() if p.requires_grad), gradients(model), strict=True))
    assert {name.split("layers.")[1][0] for name, grad in grads.items() if grad is None} == {"1"}


def test_masks_of_ones_are_plain_lora_and_nothing_stays_behind(model):
    gates, x = LayerGates(model, fused=True), torch.randn(3, 6, dtype=torch.float64)
    apart, plain = ExampleMasks(gates, True, seed=0, examples=3), model(x)
    mask = apart.draw(np.ones(3, bool), [1.0] * 3, step=0)
    with apart.applied(), LayerGates(model).applied(mask):
        apart.turn(3)
        assert torch.equal(model(x), plain)
    apart.draw(mask, [0.0] * 3, step=1)
    with pytest.raises(RuntimeError, match="stopped"), apart.applied():
        raise RuntimeError("stopped")
    assert torch.equal(model(x), plain)


def test_where_it_is_not_asked_for_the_steps_mask_is_all_there_is(model):
    apart, mask = ExampleMasks(LayerGates(model), False, seed=0, examples=3), np.array([True, False, True])
    assert apart.draw(mask, P, step=0) is mask
    with apart.applied():
        apart.turn(3)
        assert not any(module._forward_hooks for module in model.modules())


def test_rows_that_are_no_examples_are_refused(model):
    gates = LayerGates(model)
    apart = ExampleMasks(gates, True, seed=0, examples=4)
    mask = apart.draw(np.ones(3, bool), [0.5] * 3, step=0)
    with apart.applied(), gates.applied(mask), pytest.raises(InputError, match="got 2 rows for 4 examples"):
        apart.turn(4)
        model(torch.randn(2, 6, dtype=torch.float64))


# --- whole runs -------------------------------------------------------------------------------------------


def settings(model, **changes) -> RunConfig:
    own = {"model_name_or_path": str(model), "data_root": "sample", "tasks": ["sst2"], "max_steps": 6, "lora_r": 2,
           "per_device_train_batch_size": 4, "max_eval_samples": 2, "checkpoint_at": [], "p_start": 0.3,
           "logging_steps": 1, "learning_rate": 1e-2, "mask_per": "example"}  # fmt: skip
    return RunConfig().replace(**own | changes)


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama"])
def test_a_run_resumes_to_the_same_bytes_and_differs_from_one_of_steps(base, request, tmp_path, capsys):
    model = request.getfixturevalue(base)
    config = settings(model, gradient_accumulation_steps=2, save_steps=3)
    whole = train_adapter(config, ["sst2"], tmp_path / "whole")
    assert "takes part in some" not in capsys.readouterr().err, "a layer has some example in nearly every step"
    again = config.replace(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    train_adapter(again, ["sst2"], tmp_path / "resumed")
    assert adapter_bytes(tmp_path / "resumed" / "adapter") == adapter_bytes(tmp_path / "whole" / "adapter")
    of_steps = train_adapter(config.replace(mask_per="step"), ["sst2"], tmp_path / "steps")
    losses = [[entry["loss"] for entry in run.data["log"]] for run in (whole, of_steps)]
    assert losses[0] != losses[1] and whole.data["skipped_steps"] == 0


@pytest.mark.parametrize("changes, tasks, expected", [
    ({"packing": True, "dataset_name": ["talk.jsonl"]}, ["instruct"], "--packing puts several into one"),
    ({"use_dora": True}, ["sst2"], "not for --use_dora"),
    ({"torch_compile": True}, ["sst2"], "does not go with --torch_compile"),
    ({}, ["dtd5"], "one row for all of them in the text tower"),
])  # fmt: skip
def test_what_it_does_not_go_with_is_refused(changes, tasks, expected):
    with pytest.raises(InputError, match=expected):
        check_example_masks(RunConfig().replace(mask_per="example", **changes), Accelerator(), tasks)


def test_several_processes_and_deepspeed_are_refused():
    for found in (SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU),
                  SimpleNamespace(num_processes=1, distributed_type=DistributedType.DEEPSPEED)):  # fmt: skip
        with pytest.raises(InputError, match="--mask_per example is for one process"):
            check_example_masks(RunConfig(), found, ["sst2"])


@pytest.mark.parametrize("changes, expected", [
    ({"mask_per": "token"}, "--mask_per is 'token', but must be step or example"),
    ({"mask_per": "example", "rate_compensation": 0.5}, "with --mask_per example it moves in nearly all"),
])  # fmt: skip
def test_impossible_settings_are_refused(changes, expected):
    with pytest.raises(InputError, match=expected):
        RunConfig().replace(**changes)
