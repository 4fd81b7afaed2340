"""Layers that take the same input: found in one pass, computed as one, and never handed an output of another input."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from copra_llm import shared_inputs
from copra_llm.gates import LayerGates


class Attention(nn.Module):
    """Three layers with one input and one with another; `way` says what happens in between."""

    def __init__(self, way: str):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, outs) for outs in (24, 12, 12, 24))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.way == "another input":
            x = x + 1.0
        if self.way == "written to":
            x += 1.0
        return self.o(torch.cat([self.k(x), self.v(x)], -1) * q.sigmoid())


class Net(nn.Module):
    def __init__(self, way: str = "plain", depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(Attention(way) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            # A tensor of its own: the block may write to it.
            x = layer(x.tanh())
        return x


def adapted(way: str = "plain", dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "k", "v", "o"]} | options
    model = get_peft_model(Net(way).to(dtype), LoraConfig(**config), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model.train()


def gates_of(model: nn.Module, granularity: str = "layer") -> LayerGates:
    """Gates that have seen which layers take the same input."""
    gates = LayerGates(model, granularity, fused=True)
    x = torch.randn(2, 24, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        gates.find_shared_inputs(lambda: model(x))
    return gates


def grouped(model: nn.Module, gates: LayerGates) -> list[list[str]]:
    names = {id(module): name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    return [[names[id(module)] for module in shared.modules] for shared in gates.shared]


def passes(model: nn.Module, gates: LayerGates, mask: list[bool], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    torch.manual_seed(3)
    with gates.applied(mask):
        y = model(x)
        y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | found


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Tolerance: float64, sums of some hundred terms in another order."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-11, atol=1e-11), name


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many layers each shared computation has had."""
    counts: list[int] = []
    whole = shared_inputs.fused_together

    def counted(modules, x):
        counts.append(len(modules))
        return whole(modules, x)

    monkeypatch.setattr(shared_inputs, "fused_together", counted)
    return counts


def test_who_takes_the_same_input_is_seen():
    model = adapted()
    assert grouped(model, gates_of(model)) == [[f"layers.{i}.{name}" for name in "qkv"] for i in range(2)]
    other = adapted("another input")
    assert grouped(other, gates_of(other)) == [[f"layers.{i}.{name}" for name in "kv"] for i in range(2)]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"rank_pattern": {"k": 2}}],
                         ids=["plain", "dropout", "rsLoRA", "unequal ranks"])  # fmt: skip
def test_values_and_gradients_are_those_of_each_alone(options, computed):
    """With dropout too: the noise is drawn in the order of the calls."""
    model, x = adapted(**options), torch.randn(5, 3, 24, dtype=torch.float64)
    alone, together = LayerGates(model, fused=True), gates_of(model)
    for mask in ([True, True], [True, False], [False, True]):
        ours = passes(model, together, mask, x)
        assert computed == [3] * sum(mask)
        computed.clear()
        assert_alike(ours, passes(model, alone, mask, x))
        assert computed == []


@pytest.mark.parametrize("way", ["another input", "written to"])
def test_an_output_is_for_its_own_input_alone(way, computed):
    """What was seen is no promise: the same layers may get different inputs in the next pass."""
    model, x = adapted("plain"), torch.randn(4, 24, dtype=torch.float64)
    gates = gates_of(model)
    for layer in model.base_model.model.layers:
        layer.way = way
    with torch.no_grad(), LayerGates(model).applied([True, True]):
        theirs = model(x.clone())
    with torch.no_grad(), gates.applied([True, True]):
        ours = model(x.clone())
    assert computed and torch.allclose(ours, theirs, rtol=1e-11)
    assert all(shared._x is None and not shared._ready for shared in gates.shared)


def test_a_part_of_the_layers_is_computed_alone(computed):
    """A mask over modules may close some of those that share an input."""
    model, x = adapted(), torch.randn(4, 24, dtype=torch.float64)
    gates, alone = gates_of(model, "module"), LayerGates(model, "module", fused=True)
    mask = [not key.endswith("layers.0.k") for key in gates.keys]
    ours = passes(model, gates, mask, x)
    assert computed == [3]
    assert_alike(ours, passes(model, alone, mask, x))


def test_an_output_that_is_not_used():
    """Its layer has no gradient, as alone."""
    model, x = adapted(), torch.randn(4, 24, dtype=torch.float64)
    for layer in model.base_model.model.layers:
        layer.forward = lambda x, layer=layer: layer.o(torch.cat([layer.k(x), layer.k(x)], -1)) + 0 * layer.q(x).sum()
    gates = LayerGates(model, fused=True)
    gates.find_shared_inputs(lambda: model(x))
    assert_alike(passes(model, gates, [True, True], x), passes(model, LayerGates(model, fused=True), [True, True], x))


def test_in_place_of_pefts_forward_only_inside_a_mask(computed):
    model, x = adapted(), torch.randn(4, 24, dtype=torch.float64)
    gates, before = gates_of(model), [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        plain = model(x)
        with gates.applied([True, True]):
            with gates.applied([True, False]):
                model(x)
            assert computed == [3]
            model(x)
        assert computed == [3, 3, 3]
        with pytest.raises(RuntimeError, match="stopped"), gates.applied([True, True]):
            model.base_model.model.layers[0].q(x)
            assert gates.shared[0]._ready
            raise RuntimeError("stopped")
        assert torch.equal(model(x), plain)
    assert not gates.shared[0]._ready
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in before]


def test_flags_that_change_inside_are_heard():
    model, x = adapted(), torch.randn(3, 24, dtype=torch.float64)
    gates = gates_of(model)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad(), gates.applied([True, True]), model.disable_adapter():
        assert torch.equal(model(x), base)


def test_in_inference_mode_and_copies():
    """Tensors that count no writes; a copy of a model within a mask."""
    model, x = adapted(), torch.randn(3, 24, dtype=torch.float64)
    gates = gates_of(model)
    with torch.no_grad():
        plain = model(x)
    with torch.inference_mode(), gates.applied([True, True]):
        assert torch.allclose(model(x.clone()), plain, rtol=1e-11)
    with torch.no_grad(), gates.applied([True, True]):
        assert torch.allclose(copy.deepcopy(model)(x), plain, rtol=1e-11)


@pytest.mark.parametrize("early_stop", [True, False])
def test_activations_computed_again(early_stop, computed):
    """Checkpointing runs the layers a second time, and stops in their midst once it has what it needs."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    model, x = adapted(), torch.randn(4, 24, dtype=torch.float64)
    gates = gates_of(model)
    plain = passes(model, gates, [True, True], x)
    for layer in model.base_model.model.layers:
        layer.forward = lambda x, layer=layer, own=layer.forward: checkpoint(own, x, use_reentrant=False)
    computed.clear()
    with set_checkpoint_early_stop(early_stop):
        assert_alike(passes(model, gates, [True, True], x), plain)
    assert computed == [3] * 4
