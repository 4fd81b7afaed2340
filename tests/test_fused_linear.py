"""The fused pass: PEFT's values and gradients, less kept, and PEFT's own forward wherever it is anything but plain."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from copra_llm import fused_linear
from copra_llm.fused_linear import fused_forward, fusible
from copra_llm.gates import LayerGates


class Net(nn.Module):
    """Two blocks of a linear layer each."""

    def __init__(self, inputs: int = 24, outputs: int = 24, bias: bool = True):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, outputs, bias), nn.Linear(outputs, 5, bias)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def adapted(dtype=torch.float32, inputs=24, outputs=24, bias=True, seed=0, adapter_dtype=None, **options) -> nn.Module:
    torch.manual_seed(seed)
    base = Net(inputs, outputs, bias).to(dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0", "1"]} | options)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
            p.data = p.data.to(adapter_dtype or dtype)
    return model.train()


def lora_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def passes(model: nn.Module, x: torch.Tensor, fused: bool, context=contextlib.nullcontext) -> dict[str, torch.Tensor]:
    """Output and gradients; `x` is a leaf."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    gates = LayerGates(model, fused=fused)
    with gates.applied([True] * gates.num_layers):
        with context():
            y = model(x)
        y.float().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | found


def furthest(ours: dict, theirs: dict) -> float:
    """Largest relative distance of two sets of tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((a.double() - theirs[name].double()).norm() / theirs[name].double().norm())
               for name, a in ours.items())  # fmt: skip


# --- equality ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 9),
    alpha=st.floats(-4, 4).filter(lambda alpha: abs(alpha) > 1e-3),
    bias=st.booleans(),
    rslora=st.booleans(),
    wide=st.booleans(),
)
def test_values_and_gradients_are_pefts(shape, sizes, rank, alpha, bias, rslora, wide):
    """Any shape, rank, scaling, with and without bias. Tolerance: sums of some hundred terms in another order."""
    dtype = torch.float64 if wide else torch.float32
    model = adapted(dtype, *sizes, bias, r=rank, lora_alpha=alpha, use_rslora=rslora)
    assert all(map(fusible, lora_layers(model)))
    x = torch.randn(*shape, sizes[0], dtype=dtype)
    ours, theirs = passes(model, x, True), passes(model, x, False)
    for name, a in ours.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        assert a.shape == theirs[name].shape and a.dtype == theirs[name].dtype
        assert float((a - theirs[name]).abs().max()) <= 300 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ],
    ids=["bfloat16", "adapter in float32", "autocast", "adapter in bfloat16"],
)
def test_lower_precision_is_no_further_from_the_truth_than_pefts(dtype, adapter_dtype, autocast):
    """The truth: the same numbers in float64. Both round to eight bits, each in its own places."""

    def context():
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    errors = {True: 0.0, False: 0.0}
    for seed in range(5):
        model = adapted(dtype, seed=seed, adapter_dtype=adapter_dtype)
        x = torch.randn(64, 24, dtype=dtype)
        truth = passes(copy.deepcopy(model).double(), x.double(), False)
        for fused in errors:
            found = passes(model, x, fused, context)
            errors[fused] += furthest(found, truth) / 5
            parameters = dict(model.named_parameters())
            assert all(a.dtype == parameters[name].dtype for name, a in found.items() if name in parameters)
    assert 0 < errors[True] <= 1.2 * errors[False] < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(bits):
    """Its own product stays; the adapter's part is the one that PEFT adds."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    torch.manual_seed(0)
    net = Net(64, 64)
    made = Linear4bit(64, 64, quant_type="nf4") if bits == 4 else Linear8bitLt(64, 64, has_fp16_weights=False)
    made.load_state_dict(net.layers[0].state_dict())
    net.layers[0] = made.to("cpu")
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0"])).train()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    (layer,) = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    assert fusible(layer)
    x = torch.randn(7, 64)
    assert furthest(passes(model, x, True), passes(model, x, False)) < 1e-6


def test_inputs_without_a_gradient_get_none():
    """Below the lowest active layer nothing is asked for, and nothing is computed."""
    model = adapted()
    ours = {}
    for fused in (True, False):
        gates = LayerGates(model, fused=fused)
        model.zero_grad()
        with gates.applied([True, True]):
            model(torch.ones(3, 24)).sum().backward()
        ours[fused] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(ours[True]) == 4 and furthest(ours[True], ours[False]) < 1e-6


def test_activations_computed_again():
    """Non-reentrant checkpointing runs forward twice, with the same random numbers."""
    model = adapted(lora_dropout=0.5)
    net = model.get_base_model()

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(net, x, use_reentrant=False)

    gates, found = LayerGates(model, fused=True), []
    for way in (Checkpointed(), net):
        model.zero_grad()
        torch.manual_seed(3)
        with gates.applied([True, True]):
            way(torch.ones(3, 24)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


# --- dropout ----------------------------------------------------------------------------------------------


def test_dropout_leaves_the_same_entries_in_both_directions(monkeypatch):
    """Against the formula with the mask that was drawn."""
    model = adapted(torch.float64, lora_dropout=0.4, target_modules=["0"])
    (layer,) = lora_layers(model)
    masks, drawn = [], fused_linear._drawn
    monkeypatch.setattr(fused_linear, "_drawn", lambda *args: masks.append(drawn(*args)) or masks[-1])
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    fused_forward(layer, x).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = [x.grad.clone(), a.grad.clone(), b.grad.clone()]
    x.grad = a.grad = b.grad = None
    y = layer.base_layer(x) + F.linear(F.linear(x * masks[0] / 0.6, a), b) * layer.scaling["default"]
    y.square().sum().backward()
    assert len(masks) == 1 and 0.5 < masks[0].double().mean() < 0.7
    assert all(torch.allclose(mine, p.grad, rtol=1e-12, atol=1e-12) for mine, p in zip(ours, (x, a, b), strict=True))


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.9])
def test_dropout_has_its_rate(rate):
    """And neither neighbours nor draws have to do with each other: five standard errors."""
    torch.manual_seed(0)
    mask = fused_linear._drawn(torch.empty(1000, 1001), rate)
    error = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert mask.dtype == torch.bool and mask.shape == (1000, 1001)
    assert abs(float(mask.double().mean()) - (1 - rate)) < 5 * error + 2**-17
    centred = mask.double().flatten() - mask.double().mean()
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 * rate * (1 - rate) / mask.numel() ** 0.5
    assert not torch.equal(mask, fused_linear._drawn(torch.empty(1000, 1001), rate))
    torch.manual_seed(0)
    assert torch.equal(mask, fused_linear._drawn(torch.empty(1000, 1001), rate))


def test_no_dropout_in_evaluation():
    model = adapted(lora_dropout=0.5).eval()
    x = torch.randn(3, 24)
    assert furthest(passes(model, x, True), passes(model, x, False)) < 1e-6


# --- what is kept for the backward pass -------------------------------------------------------------------


def kept_bytes(model: nn.Module, mask: list[bool], fused: bool) -> int:
    """Of different storages, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive, sizes = [], {}

    def pack(tensor):
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(256, 24, requires_grad=True)
    with LayerGates(model, fused=fused).applied(mask), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(size for place, size in sizes.items() if place not in parameters)


def test_less_is_kept_than_by_peft():
    """With dropout a byte of mask rather than noise and x of four bytes each, but the first layer's own input, which no
    other operation keeps; without, and where nothing acts, no more."""
    x = 256 * 24
    dropped = adapted(lora_dropout=0.1)
    saved = kept_bytes(dropped, [True, True], False) - kept_bytes(dropped, [True, True], True)
    assert saved == 2 * (2 * 4 * x - x) - 4 * x
    plain = adapted()
    assert kept_bytes(plain, [True, True], True) <= kept_bytes(plain, [True, True], False)
    assert kept_bytes(plain, [False, False], True) == kept_bytes(plain, [False, False], False)


class Gated(nn.Module):
    """A gated MLP; what is kept of `scale`'s product is one factor, since the other needs no gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 8), nn.Linear(8, 4)])
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x):
        gate, up, down, last = self.layers
        return last(down(F.silu(gate(x)) * up(x)) * self.scale)


def gated(**options) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Gated(), LoraConfig(r=4, target_modules=["0", "1", "2", "3"], **options))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model.train()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_product_made_again_is_the_same_to_the_bit_and_not_kept(autocast, dropout):
    model, x = gated(lora_dropout=dropout), torch.randn(256, 24)
    found = {}
    for again in (False, True):
        torch.manual_seed(1)
        with fused_linear.products_made_again(again), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = kept_bytes(model, [True] * 4, True)
            torch.manual_seed(1)
            found[again] = passes(model, x, True), kept
    (before, kept), (now, less) = found[False], found[True]
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    assert kept - less == 256 * 40 * (2 if autocast else 4)  # of `down` alone


def test_a_product_is_made_again_on_a_quantised_base_too():
    """Whose product stays its own."""
    model, x = gated(), torch.randn(6, 24)
    found = []
    for again in (False, True):
        with fused_linear.products_made_again(again), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_linear, "fused_together", lambda modules, x: None)
            found.append(passes(model, x, True))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- where PEFT's own forward stays -----------------------------------------------------------------------


def hooked(model: nn.Module) -> None:
    lora_layers(model)[0].lora_A["default"].register_forward_pre_hook(lambda module, args: None)


def trained_bias(model: nn.Module) -> None:
    lora_layers(model)[0].base_layer.bias.requires_grad_(True)


def two_adapters(model: nn.Module) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1"]))
    model.base_model.set_adapter(["default", "second"])


NOT_PLAIN = {
    "DoRA": ({"use_dora": True}, None),
    "bias of B": ({"lora_bias": True}, None),
    "a hook": ({}, hooked),
    "a trained base": ({}, trained_bias),
    "two adapters": ({}, two_adapters),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_anything_else_is_left_to_peft(case):
    """Bit for bit."""
    options, change = NOT_PLAIN[case]
    model = adapted(**options)
    if change is not None:
        change(model)
    assert not fusible(lora_layers(model)[0])
    x = torch.randn(3, 24)
    with torch.no_grad():
        plain = model.get_submodule("base_model.model.layers.0")(x)
        with LayerGates(model, fused=True).applied([True, True]):
            assert torch.equal(model.get_submodule("base_model.model.layers.0")(x), plain)


def test_flags_that_change_inside_are_heard():
    """PEFT's own switch, and an adapter merged into its base, within the time of a mask."""
    model, x = adapted(), torch.randn(3, 24)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad(), LayerGates(model, fused=True).applied([True, True]):
        whole = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base) and not torch.equal(whole, base)
        model.merge_adapter()
        assert torch.allclose(model(x), whole, atol=1e-5)
        model.unmerge_adapter()


def test_classes_come_back():
    """After the block, after an error, and after `lift`."""
    model = adapted()
    before = [type(module) for module in model.modules()]
    gates = LayerGates(model, fused=True)
    with pytest.raises(RuntimeError), gates.applied([True, False]):
        assert [type(module) for module in model.modules()] != before
        raise RuntimeError
    assert [type(module) for module in model.modules()] == before
    gates.apply([False, True])
    gates.apply([True, True])
    gates.lift()
    assert [type(module) for module in model.modules()] == before
