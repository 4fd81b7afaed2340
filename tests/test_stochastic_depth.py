"""Stochastic depth: which blocks stay, what a step then computes, and that nothing of it is left afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_examples import TASK, image_config
from torch import nn

from copra_llm.batches import BatchStream, train_loader
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.stochastic_depth import StochasticDepth, survival
from copra_llm.train import train_adapter


class Tower(nn.Module):
    """Three blocks, x -> 2x, 3x, 4x."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Times(factor) for factor in (2.0, 3.0, 4.0))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states):
        return self.factor * hidden_states


KEYS = [f"layers.{i}" for i in range(3)]


def test_survival_falls_linearly_in_each_tower():
    keys = ["text.layers.0", "text.layers.1", "vision.layers.0", "vision.layers.1", "vision.layers.2"]
    assert survival(keys, 0.6) == pytest.approx([0.7, 0.4, 0.8, 0.6, 0.4])


def test_a_step_is_the_formula():
    """x + (b / q)(f(x) - x), block after block; in evaluation mode all of them, uncorrected."""
    tower = Tower()
    depth = StochasticDepth(tower, KEYS, 0.9, seed=3)
    seen = set()
    for step in range(40):
        x = expected = torch.tensor(1.5, dtype=torch.float64)
        for layer, q, stays in zip(tower.layers, depth.survival, depth.draw(step), strict=True):
            expected = expected + stays * (layer.factor * expected - expected) / q
        with depth.applied(step):
            assert torch.isclose(tower(x), expected, rtol=1e-12)
            tower.eval()
            assert tower(x) == 24 * x
            tower.train()
        assert tower(x) == 24 * x  # nothing is left of it
        seen.add(tuple(depth.draw(step)))
    assert len(seen) > 3


def test_blocks_stay_as_often_as_they_should():
    depth = StochasticDepth(Tower(), KEYS, 0.5, seed=0)
    shares = np.mean([depth.draw(step) for step in range(4000)], axis=0)
    # Four standard errors of a share of 4000; that all three are missing (and the first is kept) is as rare as 2.8 %.
    assert np.all(abs(shares - depth.survival - np.array([1 / 6 * 1 / 3 * 1 / 2, 0, 0])) < 4 * 0.5 / 4000**0.5)


def test_at_least_one_block_stays():
    depth = StochasticDepth(Tower(), KEYS, 0.999, seed=1)
    assert all(depth.draw(step).any() for step in range(200))


def test_without_a_rate_nothing_is_replaced():
    tower = Tower()
    with StochasticDepth(tower, KEYS, None, seed=0).applied(0):
        assert all("forward" not in vars(layer) for layer in tower.layers)


def test_the_text_tower_does_not_reuse_what_lies_below(tiny_clip, image_data):
    """What frozen layers below the lowest active one gave is kept from step to step, unless one of them is missing."""
    config = image_config(tiny_clip, image_data, method="lora", lora_dropout=0.0)
    losses = []
    for seen_before in (True, False):
        bench = build(config, [TASK])
        classifier = bench.classifier.train()
        gates = LayerGates(classifier)
        mask = ["text" not in key or key.endswith("2") for key in gates.keys]
        depth = StochasticDepth(classifier, gates.keys, 0.5, seed=0)
        lowest = next(i for i, key in enumerate(gates.keys) if "text" in key)
        step = next(step for step in range(100) if not depth.draw(step)[lowest])
        splits = list(bench.splits["train"].values())
        batch = next(iter(train_loader(classifier, splits, BatchStream(splits, 3, 0, 0, 1))))
        with gates.applied(mask):
            whole = float(classifier(batch)) if seen_before else None
            with depth.applied(step):
                losses.append(float(classifier(batch)))
            assert not seen_before or float(classifier(batch)) == whole != losses[0]
    assert losses[0] == losses[1]


def test_a_run_with_it_is_another_one_and_repeats(tiny_clip, image_data, tmp_path):
    def trained(name: str, **changes) -> bytes:
        config = image_config(tiny_clip, image_data, method="lora", **changes)
        train_adapter(config, [TASK], tmp_path / name)
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    thinned = trained("a", stochastic_depth=0.5)
    assert thinned == trained("b", stochastic_depth=0.5) != trained("c")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora", "stochastic_depth": 1.0}, "must lie in"),
        ({"method": "copra", "stochastic_depth": 0.5}, "plain LoRA"),
        ({"method": "lora", "p_start": 0.5, "stochastic_depth": 0.5}, "plain LoRA"),
    ],
)
def test_what_contradicts_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        RunConfig().replace(**changes)


def test_blocks_that_give_more_than_hidden_states_are_refused():
    class Pair(Times):
        def forward(self, hidden_states):
            return hidden_states, None

    tower = nn.Module()
    tower.layers = nn.ModuleList([Pair(1.0)])
    with (
        StochasticDepth(tower, ["layers.0"], 0.1, seed=0).applied(0),
        pytest.raises(InputError, match="Pair gives a tuple"),
    ):
        tower.layers[0](torch.ones(2))
