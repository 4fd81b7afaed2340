"""What is tried to make up for rare participation: rescaling, a higher rate, and ramps of each layer's own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from copra_llm.adapters import load_adapter_weights
from copra_llm.compensation import compensated, layer_scales
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.masks import marginal_prob, marginal_probs, sample_mask
from copra_llm.schedule import Schedule
from copra_llm.settings import ScheduleSettings
from copra_llm.train import train_adapter

CHI2_999_6 = 22.458
"""Upper 0.1 % point of chi-square with 6 degrees of freedom; seeds are fixed, so the test passes always or never."""


def law(p: list[float]) -> dict[tuple[bool, ...], float]:
    """Probabilities of all masks but the empty one, by the definition."""
    masks = [m for m in itertools.product((False, True), repeat=len(p)) if any(m)]
    weights = [math.prod(q if on else 1 - q for q, on in zip(p, m, strict=True)) for m in masks]
    return {m: w / sum(weights) for m, w in zip(masks, weights, strict=True)}


# --- a probability a layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [[0.2, 0.5, 0.9], [0.7, 0.05, 0.4]])
def test_masks_of_unequal_layers_follow_the_conditioned_law(p):
    drawn, expected = 4000, law(p)
    masks = [tuple(map(bool, sample_mask(p, 3, seed=1, step=step))) for step in range(drawn)]
    chi2 = sum((masks.count(m) - drawn * q) ** 2 / (drawn * q) for m, q in expected.items())
    assert chi2 < CHI2_999_6
    shares = [sum(q for m, q in expected.items() if m[layer]) for layer in range(3)]
    assert marginal_probs(p) == pytest.approx(shares, rel=1e-12)


def test_equal_probabilities_are_the_masks_of_one():
    for p in (0.0, 1e-300, 0.3, 1.0):
        for step in range(20):
            one, each = (sample_mask(q, 5, seed=2, step=step) for q in (p, [p] * 5))
            assert np.array_equal(one, each)
        assert marginal_probs([p] * 5) == pytest.approx([marginal_prob(p, 5)] * 5, rel=1e-12)


def test_a_layer_of_probability_0_is_never_drawn_beside_others():
    masks = np.array([sample_mask([0.0, 0.3, 0.0, 1e-9], 4, seed=0, step=step) for step in range(300)])
    assert not masks[:, [0, 2]].any() and masks.any(1).all()
    assert marginal_probs([0.0, 0.3, 1.0]) == [0.0, 0.3, 1.0]


def test_probabilities_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="num_layers=3"):
        sample_mask([0.5, 0.5], 3, seed=0, step=0)
    with pytest.raises(ValueError, match=r"p=\[0.5, 1.5\]"):
        sample_mask([0.5, 1.5], 2, seed=0, step=0)


# --- ramps of each layer's own ----------------------------------------------------------------------------


def test_without_a_spread_layers_are_alike():
    schedule = Schedule()
    for t in (0.0, 0.3, 0.75, 0.99):
        assert schedule.of_layers(t, 4) == [schedule(t)] * 4


def test_layers_ramp_one_after_another():
    first, last = Schedule(depth_spread=0.5), Schedule(depth_spread=-0.5)
    # Half of the ramp is 0.375 of the run: the first layer has begun at 0 and the last has not.
    assert first.of_layers(0.375, 3) == pytest.approx([1.0, 0.5, 0.0])
    assert last.of_layers(0.375, 3) == pytest.approx([0.0, 0.5, 1.0])
    assert first.of_layers(0.75, 3) == last.of_layers(0.9, 3) == [1.0] * 3
    assert first.of_layers(0.1, 1) == pytest.approx([0.1 / 0.375])
    with pytest.raises(InputError, match=r"depth_spread is 1.0, but must lie in \(-1, 1\)"):
        Schedule(depth_spread=1.0)


# --- scale of active layers -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def adapted(net: type[nn.Module]) -> nn.Module:
    """A net of three layers in double precision, with adapters that do something."""
    torch.manual_seed(0)
    model = get_peft_model(net().double(), LoraConfig(r=2, target_modules=["0", "1", "2"]),
                           autocast_adapter_dtype=False)  # fmt: skip
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


@pytest.fixture
def model() -> nn.Module:
    return adapted(Net)


@pytest.mark.parametrize("fused", [True, False])
def test_each_open_layer_has_its_scale(model, fused):
    gates, x = LayerGates(model, fused=fused), torch.randn(4, 6, dtype=torch.float64)
    before = [module.scaling for modules in gates.modules for module in modules]
    only = [[i == j for j in range(3)] for i in range(3)]
    with torch.no_grad():
        with gates.applied([False] * 3):
            base = model(x)
        updates = []
        for mask in only:
            with gates.applied(mask):
                updates.append(model(x) - base)
        with pytest.raises(RuntimeError, match="stopped"), gates.applied([True, False, True], [2.0, 5.0, 0.5]):
            scaled = model(x)
            raise RuntimeError("stopped")
    assert torch.allclose(scaled, base + 2.0 * updates[0] + 0.5 * updates[2], rtol=1e-12)
    after = [module.scaling for modules in gates.modules for module in modules]
    assert all(a is b for a, b in zip(before, after, strict=True)) and after[0] == {"default": 4.0}


def test_scales_keep_the_expected_weight_change():
    settings, p = ScheduleSettings(rescale_active=True), [0.2, 0.5, 0.0]
    scales = layer_scales(settings, p)
    expected = [sum(q * s for m, q in law(p).items() if m[i]) for i, s in enumerate(scales)]
    assert expected == pytest.approx([1.0, 1.0, 0.0]) and scales[2] == 1.0
    assert layer_scales(ScheduleSettings(), p) is None
    assert layer_scales(ScheduleSettings(rescale_active=True), [1.0, 1.0]) == [1.0, 1.0]


# --- learning rate ----------------------------------------------------------------------------------------


def test_the_rate_is_raised_for_one_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    share = marginal_prob(0.25, 4)
    with compensated(ScheduleSettings(rate_compensation=0.5), optimizer, [0.25] * 4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / math.sqrt(share))
    assert optimizer.param_groups[0]["lr"] == 0.1
    with compensated(ScheduleSettings(), optimizer, [0.25] * 4):
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"rate_compensation": 1.5}, r"--rate_compensation is 1.5, but must lie in \[0, 1\]"),
    ({"rate_compensation": 0.5, "depth_spread": 0.2}, "--depth_spread gives each its own; give one of them"),
    ({"depth_spread": -1.0}, r"depth_spread is -1.0, but must lie in \(-1, 1\)"),
])  # fmt: skip
def test_impossible_settings_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        RunConfig().replace(**changes)


# --- whole runs -------------------------------------------------------------------------------------------


def first_step(tiny_llama, folder, **changes) -> dict[str, np.ndarray]:
    """The factors B after one step of a constant schedule, which have begun at 0."""
    config = RunConfig().replace(
        model_name_or_path=str(tiny_llama), data_root="sample", tasks=["sst2"], max_steps=1, lora_r=2,
        per_device_train_batch_size=4, max_eval_samples=2, checkpoint_at=[], p_start=0.5, ramp_shape="constant",
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, **changes,
    )  # fmt: skip
    train_adapter(config, ["sst2"], folder)
    weights = load_adapter_weights(folder)
    return {name: factors.lora_B.double().numpy() for name, factors in weights.factors.items()}


def test_a_run_takes_the_higher_rate(tiny_llama, tmp_path):
    """Adam's first step is the learning rate, whatever the gradient: here it shows the compensation alone."""
    plain = first_step(tiny_llama, tmp_path / "plain")
    raised = first_step(tiny_llama, tmp_path / "raised", rate_compensation=1.0)
    gates = len({name.split("layers.")[1].split(".")[0] for name in plain})
    moved = [name for name, b in plain.items() if np.abs(b).max() > 0]
    assert moved
    for name in moved:
        largest = np.abs(raised[name]).max() / np.abs(plain[name]).max()
        assert largest == pytest.approx(1.0 / marginal_prob(0.5, gates), rel=1e-3)


def test_a_run_with_rescaled_layers_is_another_one(tiny_llama, tmp_path):
    """The first step's size does not show it (Adam), the loss and the second step would: the record's loss does."""
    config = RunConfig().replace(
        model_name_or_path=str(tiny_llama), data_root="sample", tasks=["sst2"], max_steps=6, lora_r=2,
        per_device_train_batch_size=4, max_eval_samples=2, checkpoint_at=[], p_start=0.3, logging_steps=1,
        learning_rate=1e-2,
    )  # fmt: skip
    losses = {}
    for name, changes in {"plain": {}, "rescaled": {"rescale_active": True}, "apart": {"depth_spread": 0.5}}.items():
        result = train_adapter(config.replace(**changes), ["sst2"], tmp_path / name)
        losses[name] = [entry["loss"] for entry in result.data["log"]]
    # All factors B are 0 in the first step: nothing there to scale.
    assert losses["plain"][0] == losses["rescaled"][0]
    assert losses["plain"][1:] != losses["rescaled"][1:] and losses["plain"] != losses["apart"]
