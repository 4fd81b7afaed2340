"""One layer interpolated at a time: `copra_llm.layerwise`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from examples import MODULES, random_adapter, tiny_adapter

from copra_llm.adapters import AdapterWeights, LoraFactors, load_adapter_weights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import Curve, interpolate, line
from copra_llm.layerwise import LayerLines, layer_lines, layers_of, layerwise_record, merge_modules
from copra_llm.merge import merge
from copra_llm.results import read_result, write_result

BLOCKS = ["model.layers.0", "model.layers.1"]


def with_head(adapter: AdapterWeights) -> AdapterWeights:
    """The same with one more module, outside the blocks."""
    generator = torch.Generator().manual_seed(len(adapter.source) + adapter.factors[next(iter(MODULES))].r)
    outside = LoraFactors(torch.randn(4, 6, generator=generator), torch.randn(3, 4, generator=generator), 2.0)
    return adapter.with_factors(adapter.factors | {"head": outside}, adapter.source)


def same(first: AdapterWeights, second: AdapterWeights) -> bool:
    """Bit for bit, scalings included."""
    if first.factors.keys() != second.factors.keys():
        return False
    pairs = [(first.factors[name], second.factors[name]) for name in first.factors]
    return all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) and a.scaling == b.scaling
               for a, b in pairs)  # fmt: skip


# --- what is merged ---------------------------------------------------------------------------------------


def test_layers_are_blocks_and_what_lies_outside_belongs_to_none():
    layers = layers_of([with_head(random_adapter(0))])
    assert list(layers) == BLOCKS
    assert layers[BLOCKS[1]] == [name for name in MODULES if name.startswith(BLOCKS[1])]


def test_an_adapter_without_layers_is_refused():
    one = with_head(random_adapter(0))
    with pytest.raises(InputError, match="adapter-0 adapts no module inside a numbered transformer block"):
        layers_of([dataclasses.replace(one, factors={"head": one.factors["head"]})])
    with pytest.raises(InputError, match="no regular expression"):
        layers_of([one], layer_pattern="(")


@pytest.mark.parametrize("method", ["fusion", "mixture"])
def test_all_modules_at_once_are_the_whole_merge(method):
    first, second = with_head(random_adapter(0)), with_head(random_adapter(1))
    merged = merge_modules(first, second, list(first.factors), method, 0.3)
    assert same(merged, merge([first, second], method, [0.3, 0.7]))


@pytest.mark.parametrize("method", ["fusion", "mixture"])
def test_other_modules_stay_the_firsts(method):
    first, second = with_head(random_adapter(0)), with_head(random_adapter(1))
    modules = layers_of([first])[BLOCKS[0]]
    merged = merge_modules(first, second, modules, method, 0.3)
    whole = merge([first, second], method, [0.3, 0.7])
    for name, f in merged.factors.items():
        source = whole if name in modules else first
        assert torch.equal(f.lora_A, source.factors[name].lora_A) and torch.equal(f.lora_B, source.factors[name].lora_B)
    assert merged.with_factors(merged.factors, "x").config == merged.config, "the config fits the factors"


def test_a_layer_that_only_one_adapter_has_is_merged_by_mixture():
    """With weight 1 - alpha the second's layer comes in; of one that only the first has, the share alpha stays."""
    lower = {name: 4 for name in MODULES if name.startswith(BLOCKS[0])}
    upper = {name: 3 for name in MODULES if name.startswith(BLOCKS[1])}
    first, second = random_adapter(0, ranks=lower), random_adapter(1, ranks=upper)
    name = next(iter(upper))
    merged = merge_modules(first, second, list(upper), "mixture", 0.25)
    assert torch.allclose(merged.factors[name].delta_weight(), 0.75 * second.factors[name].delta_weight(), rtol=1e-6)
    assert merged.factors.keys() == lower.keys() | upper.keys()
    name = next(iter(lower))
    merged = merge_modules(first, second, list(lower), "mixture", 0.25)
    assert torch.allclose(merged.factors[name].delta_weight(), 0.25 * first.factors[name].delta_weight(), rtol=1e-6)


# --- barriers on lines made by hand -----------------------------------------------------------------------


def curve(accuracies: tuple[float, ...], losses: tuple[float, ...]) -> Curve:
    """Ten examples a point; alpha = 0 first."""
    correct = np.array([[i < a / 10 for i in range(10)] for a in accuracies])
    return Curve(np.linspace(0, 1, len(accuracies)), correct, np.array([[loss] * 10 for loss in losses]))


# Rows of points: alpha = 0, 1/2, 1. The first adapter has 80 % and 0.2 nats, the second 60 % and 0.4 nats.
LINES = LayerLines(
    ["layer.0", "layer.1"],
    [curve((70, 60, 80), (0.3, 0.6, 0.2)), curve((80, 80, 80), (0.2, 0.2, 0.2))],
    curve((60, 40, 80), (0.4, 0.9, 0.2)),
)


def test_a_barrier_is_measured_from_the_lines_own_ends():
    """Layer 0: chord 75, middle 60. Layer 1 is flat."""
    m = LINES.metrics("test/sst2")
    assert m["test/sst2/accuracy_barrier/layer.0"] == pytest.approx(15.0)
    assert m["test/sst2/loss_barrier/layer.0"] == pytest.approx(0.35)
    assert m["test/sst2/accuracy_barrier/layer.1"] == m["test/sst2/loss_barrier/layer.1"] == 0.0
    assert m["test/sst2/accuracy_barrier_whole"] == pytest.approx(30.0)
    assert m["test/sst2/loss_barrier_whole"] == pytest.approx(0.6)
    assert m["test/sst2/accuracy_barrier_mean"] == pytest.approx(7.5)


def test_an_averaging_barrier_is_measured_from_the_two_whole_adapters():
    """Their mean: 70 % and 0.3 nats. A layer that costs nothing shows as a gain on it."""
    assert LINES.averaging_barriers("accuracy") == pytest.approx([10.0, -10.0, 30.0])
    assert LINES.averaging_barriers("loss") == pytest.approx([0.3, -0.1, 0.6])
    m = LINES.metrics("test/sst2")
    assert m["test/sst2/loss_averaging_barrier/layer.1"] == pytest.approx(-0.1)
    assert m["test/sst2/loss_averaging_barrier_mean"] == pytest.approx(0.1)
    assert m["test/sst2/loss_averaging_barrier_whole"] == pytest.approx(0.6)


# --- a tiny model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tiny_llama, tmp_path_factory) -> tuple[RunConfig, list[AdapterWeights]]:
    """Two adapters of a model of four layers whose answers differ."""
    folder = tmp_path_factory.mktemp("ends")
    config = RunConfig().replace(
        model_name_or_path=str(tiny_llama), data_root="sample", max_length=32, max_eval_samples=12,
        max_train_samples=8, per_device_eval_batch_size=12,
    )  # fmt: skip
    adapters = [load_adapter_weights(tiny_adapter(tiny_llama, folder / str(seed), seed)) for seed in (1, 2)]
    return config, adapters


@pytest.fixture
def evaluator(ends) -> AdapterEvaluator:
    return AdapterEvaluator(ends[0], ["sst2"], "test")


def exchanged(first: AdapterWeights, second: AdapterWeights, layer: str) -> AdapterWeights:
    """The first with the second's layer."""
    inside = {name: second.factors[name] for name in first.factors if name.startswith(f"{layer}.")}
    assert inside
    return first.with_factors(first.factors | inside, "exchanged")


@pytest.fixture(scope="module")
def lines(ends) -> LayerLines:
    config, adapters = ends
    return layer_lines(*adapters, AdapterEvaluator(config, ["sst2"], "test"), "sst2", method="fusion", alphas=line(3))


def test_the_ends_of_a_layers_line(ends, evaluator, lines):
    """alpha = 1: the first adapter; alpha = 0: the first with the second's layer; bit for bit in fusion."""
    _, (first, second) = ends
    assert lines.layers == [f"model.layers.{i}" for i in range(4)]
    alone = evaluator(first, "sst2").nll
    for layer, own in zip(lines.layers, lines.lines, strict=True):
        assert np.array_equal(own.nll[-1], alone)
        assert np.array_equal(own.nll[0], evaluator(exchanged(first, second, layer), "sst2").nll)
        assert not np.allclose(own.nll[0], alone, atol=1e-3)


def test_the_whole_line_is_the_line_between_the_adapters(ends, evaluator, lines):
    _, adapters = ends
    whole = interpolate(*adapters, evaluator, "sst2", method="fusion", alphas=line(3))
    assert np.array_equal(lines.whole.nll, whole.nll)


def test_a_layer_in_which_both_agree_has_no_barrier_and_a_single_other_one_has_the_whole(ends, evaluator):
    """The second is the first but for layer 1: its line is the whole one, those of the others are points."""
    _, (first, second) = ends
    second = exchanged(first, second, "model.layers.1")
    found = layer_lines(first, second, evaluator, "sst2", method="fusion", alphas=line(3))
    for i, own in enumerate(found.lines):
        if i == 1:
            assert np.array_equal(own.nll, found.whole.nll) and own.loss_barrier() == found.whole.loss_barrier()
        else:
            assert (own.nll == own.nll[-1]).all() and own.loss_barrier() == own.accuracy_barrier() == 0.0


def test_unequal_ranks_are_interpolated_by_mixture_and_refused_by_fusion(ends, evaluator, tiny_llama, tmp_path):
    config, (first, _) = ends
    wide = load_adapter_weights(tiny_adapter(tiny_llama, tmp_path / "wide", 3, r=6))
    found = layer_lines(first, wide, evaluator, "sst2", method="mixture", alphas=line(3))
    alone = evaluator(exchanged(first, wide, "model.layers.2"), "sst2").nll
    # The scaling is inside B, and twice the rank is summed: another order of roundings.
    assert np.allclose(found.lines[2].nll[0], alone, rtol=0, atol=1e-4)
    fresh = AdapterEvaluator(config, ["sst2"], "test")
    with pytest.raises(InputError, match="rank: 4 and 6"):
        layer_lines(first, wide, fresh, "sst2", method="fusion", alphas=line(3))
    with pytest.raises(ValueError, match="no adapter has been attached"):
        _ = fresh.bench


def test_the_record_states_what_was_measured_and_spent(ends, evaluator, lines, tmp_path, monkeypatch):
    config, adapters = ends
    calls, call = [], AdapterEvaluator.__call__
    monkeypatch.setattr(AdapterEvaluator, "__call__", lambda self, w, task: calls.append(task) or call(self, w, task))
    record = layerwise_record(
        adapters, config, "sst2", method="fusion", points=3, settings={"seeds": [1, 2]}, evaluator=evaluator
    )
    assert record.metrics["evaluations"] == len(calls) == 4 * 2 + 3 + 1
    assert record.protocol == "layerwise" and record.config["seeds"] == [1, 2]
    assert (record.config["merge_method"], record.config["split"], record.config["points"]) == ("fusion", "test", 3)
    assert record.data["layers"] == lines.layers and record.data["alpha"] == [0.0, 0.5, 1.0]
    assert record.data["loss"] == [own.loss.tolist() for own in lines.lines]
    assert record.data["whole_accuracy"] == lines.whole.accuracy.tolist()
    assert lines.metrics("test/sst2").items() <= record.metrics.items()
    write_result(tmp_path / "r.json", record)
    assert read_result(tmp_path / "r.json").metrics == record.metrics


@pytest.mark.parametrize("points", [2, 4])
def test_lines_without_ends_or_middle_are_refused(ends, evaluator, points):
    config, adapters = ends
    with pytest.raises(InputError, match=f"line of {points} points"):
        layerwise_record(adapters, config, "sst2", method="fusion", points=points, evaluator=evaluator)
