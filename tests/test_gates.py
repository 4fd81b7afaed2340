"""The gates of `copra_llm.gates`: contracts C3 (inactive is frozen), C5 (players), C6 (ends), C7 and C8.

Where outputs are compared with `same`, they are compared bit for bit: a closed gate takes PEFT's own path
for a disabled adapter, so no rounding separates them.
"""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from copra_llm.activations import checkpoint_activations
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates

IDS = torch.arange(4, 4 + 2 * 9).view(2, 9)
"""Token ids `(batch 2, tokens 9)` of the tiny models."""
QKV = ["q_proj", "k_proj", "v_proj"]


def adapt(model: nn.Module, seed: int = 0, **lora) -> PeftModel:
    """The model with an adapter that does something: no factor is zero."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": QKV} | lora
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**lora))
        stir(adapted)
    return adapted.eval()


def stir(model: nn.Module) -> None:
    """Move every LoRA parameter away from its initial value."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.fixture
def llama(tiny_llama):
    """Makes the base model: 4 blocks."""
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).eval()


@torch.no_grad()
def output(model: nn.Module, inputs: Tensor = IDS) -> Tensor:
    result = model(inputs)
    return result if isinstance(result, Tensor) else result[0]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def mask_of(gates: LayerGates, *active: int) -> list[bool]:
    return [i in active for i in range(gates.num_layers)]


# --- C6: all on is plain LoRA, all off is the base model --------------------------------------------------

VARIANTS = {
    "lora": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"layers.1": 2}, "alpha_pattern": {"layers.2": 32}},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_on_is_plain_lora_and_all_off_the_base(llama, variant: str, dtype: torch.dtype):
    """Bit for bit: PEFT's own forward with every gate open, the untouched base model with every gate closed."""
    base = output(llama(dtype))
    model = adapt(llama(dtype), **VARIANTS[variant])
    plain = output(model)
    assert not same(plain, base)
    gates = LayerGates(model)
    assert same(output(model), plain)
    with gates.applied([True] * 4):
        assert same(output(model), plain)
    with gates.applied([False] * 4):
        assert same(output(model), base)
    assert same(output(model), plain)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_each_gate_leaves_out_its_own_layer(llama, variant: str):
    """With some gates closed the model is the one whose other layers alone carry adapters."""
    model = adapt(llama(), **VARIANTS[variant])
    gates = LayerGates(model)
    outputs = []
    for active in ([0], [3], [1, 2], [0, 2, 3]):
        part = get_peft_model(llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QKV},
                                                  **VARIANTS[variant], layers_to_transform=active)).eval()  # fmt: skip
        theirs = dict(model.named_parameters())
        for name, parameter in part.named_parameters():
            if "lora_" in name:
                parameter.data = theirs[name].data
        with gates.applied(mask_of(gates, *active)):
            outputs.append(output(model))
        assert same(outputs[-1], output(part))
    assert all(not same(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(tiny_llama, tmp_path, bits: int):
    """On a bitsandbytes base, too: all on is PEFT's forward, all off the quantised base, inactive is frozen."""
    # Four bits come in blocks of 64 inputs.
    wide = AutoConfig.from_pretrained(tiny_llama, hidden_size=64, head_dim=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path)
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )

    def load():
        # In training mode: a first pass in evaluation mode has bitsandbytes 0.50 repack 4-bit weights on CPUs with
        # AVX512-BF16, and no gradient passes through those again.
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).train()

    base, model = output(load()), adapt(load()).train()
    projection = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(projection) is {4: peft.tuners.lora.Linear4bit, 8: peft.tuners.lora.Linear8bitLt}[bits]
    plain = output(model)
    gates = LayerGates(model)
    with gates.applied([True] * 4):
        assert same(output(model), plain)
    with gates.applied([False] * 4):
        assert same(output(model), base)
    with gates.applied(mask_of(gates, 1)):
        assert not same(output(model), base) and not same(output(model), plain)
        model(IDS, labels=IDS).loss.backward()
    assert {layer_of(name) for name, p in model.named_parameters() if p.grad is not None} == {1}


def test_adapters_that_change_the_base(llama):
    """PiSSA moves part of the weight into the adapter: off is what PEFT's disabled layer is."""
    model = adapt(llama(), init_lora_weights="pissa")
    with model.disable_adapter():
        disabled = output(model)
    assert not same(disabled, output(llama()))
    gates = LayerGates(model)
    with gates.applied([False] * 4):
        assert same(output(model), disabled)


class Block(nn.Module):
    """One of each kind of module that PEFT's LoRA knows, on tokens `(batch, tokens)`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.linear = nn.Linear(8, 8)

    def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden + self.embed(ids)  # (batch, tokens, 8)
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.conv2d(hidden.unsqueeze(1)).sum(1)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = hidden + self.experts(hidden)
        return self.linear(hidden)


class Experts(nn.Module):
    """Two experts in one parameter, as mixtures of experts hold them."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(0.1 * torch.randn(2, 8, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bti,eij->btj", hidden, self.weights)


class Blocks(nn.Module):
    def __init__(self, num_blocks: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.zeros(*ids.shape, 8)
        for block in self.blocks:
            hidden = block(ids, hidden)
        return hidden


@pytest.mark.parametrize("kind", ["embed", "conv", "conv2d", "attention", "linear", "experts"])
def test_every_kind_of_lora_layer_has_a_gate(kind: str):
    """Embeddings, convolutions, attention and bare parameters obey a gate as linear layers do."""
    torch.manual_seed(0)
    untouched = Blocks().eval()
    base = output(untouched)
    targets = {"target_parameters": ["experts.weights"], "target_modules": []} if kind == "experts" else {}
    model = adapt(copy.deepcopy(untouched), **({"target_modules": [kind]} | targets))
    gates = LayerGates(model)
    assert gates.keys == ["blocks.0", "blocks.1"]
    with gates.applied([False, False]):
        assert same(output(model), base)
    plain = output(model)
    with gates.applied([True, True]):
        on = output(model)
    with gates.applied([True, False]):
        part = output(model)
    with gates.applied([False, False]):
        off = output(model)
    # PEFT adds attention's delta to the weights for each pass and subtracts it again, which rounds them.
    close = {"rtol": 0, "atol": 1e-5} if kind == "attention" else {"rtol": 0, "atol": 0}
    for again, first in ((on, plain), (off, base), (output(model), plain)):
        torch.testing.assert_close(again, first, **close)
    distances = [(part - base).abs().max(), (part - plain).abs().max()]
    assert min(distances) > 1e-3


# --- C3: inactive means frozen ----------------------------------------------------------------------------


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def test_inactive_layers_get_no_gradient(llama):
    """grad is None, not zero, exactly where the layer is inactive."""
    model = adapt(llama()).train()
    gates = LayerGates(model)
    with gates.applied(mask_of(gates, 1, 3)):
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert (parameter.grad is not None) == (layer_of(name) in (1, 3)), name
            assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fused", [True, False])
def test_inactive_layers_do_not_move(llama, fused: bool):
    """In a step without them, AdamW leaves parameters, momenta and step counts as they are, weight decay and all."""
    model = adapt(llama(), lora_dropout=0.1).train()
    gates = LayerGates(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.5, fused=fused)
    masks = [(0, 1), (1,), (0, 3), (1, 3), (0, 1, 3)]  # layer 2 never
    for step, active in enumerate(masks):
        before = {name: snapshot(p, optimizer) for name, p in trained.items()}
        with gates.applied(mask_of(gates, *active)):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in trained.items():
            now = snapshot(parameter, optimizer)
            if layer_of(name) in active:
                assert not torch.equal(now["value"], before[name]["value"]), (step, name)
            else:
                assert now.keys() == before[name].keys()
                assert all(torch.equal(now[key], before[name][key]) for key in now), (step, name)
    for name, parameter in trained.items():
        steps = sum(layer_of(name) in active for active in masks)
        assert int(optimizer.state[parameter]["step"] if steps else 0) == steps
    assert all(p not in optimizer.state for name, p in trained.items() if layer_of(name) == 2)


def snapshot(parameter: Tensor, optimizer) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})  # indexing would make an entry
    return {"value": parameter.detach().clone(), **{key: value.clone() for key, value in state.items()}}


def test_requires_grad_is_never_touched(llama):
    """Before, within and after, every parameter's flag is the same."""
    model = adapt(llama())
    gates = LayerGates(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with gates.applied(mask_of(gates, 0)):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# --- gates hold under PEFT's own switches and are restored ------------------------------------------------


@pytest.mark.parametrize("active", [(), (1,), (0, 2, 3), (0, 1, 2, 3)])
def test_disable_adapter_inside_leaves_gates_closed(llama, active: tuple[int, ...]):
    """A reference pass with PEFT's disable_adapter() neither opens a gate nor closes one, then or later."""
    model = adapt(llama())
    gates, base, plain = LayerGates(model), output(llama()), output(model)
    with gates.applied(mask_of(gates, *active)), warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of a model with some layers disabled
        before = output(model)
        with model.disable_adapter():
            assert same(output(model), base)
        assert same(output(model), before)
        assert model.get_model_status().enabled is True
    assert same(output(model), plain)


def test_disable_adapter_outside_stays(llama):
    """A mask applied while PEFT has the adapter disabled does not enable it."""
    model = adapt(llama())
    gates, base = LayerGates(model), output(llama())
    with model.disable_adapter(), gates.applied(mask_of(gates, 0, 1)):
        assert same(output(model), base)


def test_set_adapter_inside_leaves_gates_closed(llama):
    """Gates are the layer's, whichever adapter is active: switching adapters opens none."""
    model = adapt(llama())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(r=2, target_modules=QKV))
        stir(model)
    gates, base = LayerGates(model), output(llama())
    model.set_adapter("other")
    with gates.applied(mask_of(gates, 2)):
        other = output(model)
    model.set_adapter("default")
    with gates.applied(mask_of(gates, 2)):
        default = output(model)
        model.set_adapter("other")
        assert same(output(model), other)
        model.set_adapter("default")
        assert same(output(model), default)
    with gates.applied([False] * 4):
        model.set_adapter("other")
        assert same(output(model), base)
    assert len({float(x.double().sum()) for x in (base, other, default)}) == 3


def test_gates_open_after_an_error(llama):
    """Whatever ends the block, every layer is as it was, down to its class."""
    model = adapt(llama())
    plain, classes = output(model), [type(m) for m in model.modules()]
    gates = LayerGates(model)
    with pytest.raises(RuntimeError, match="in the middle"), gates.applied([False] * 4):
        raise RuntimeError("in the middle")
    assert [type(m) for m in model.modules()] == classes
    assert same(output(model), plain)


def test_masks_may_be_nested(llama):
    """A mask within a mask (a coalition's value in the middle of a step, say) closes more, and only for its block."""
    model = adapt(llama())
    gates = LayerGates(model)
    with gates.applied(mask_of(gates, 1)):
        one = output(model)
    with gates.applied(mask_of(gates, 1, 2)):
        two = output(model)
        with gates.applied(mask_of(gates, 0, 1)):
            assert same(output(model), one)
        assert same(output(model), two)


def test_a_saved_model_does_not_show_its_gates(llama, tmp_path):
    """Saved within a step, the adapter is complete and loads as a plain PEFT adapter."""
    model = adapt(llama())
    gates, plain = LayerGates(model), output(model)
    with gates.applied([False] * 4):
        model.save_pretrained(tmp_path)
    assert same(output(PeftModel.from_pretrained(llama(), tmp_path).eval()), plain)


def test_a_mask_of_the_wrong_length_is_refused(llama):
    """A mask made for another model."""
    with pytest.raises(ValueError, match="3 entries for 4 layers"), LayerGates(adapt(llama())).applied([True] * 3):
        pass


# --- C5: who plays ----------------------------------------------------------------------------------------


def test_twelve_layers_are_in_number_order(tiny_bert):
    """Layer 2 comes before layer 10, whatever the order of the alphabet."""
    gates = LayerGates(adapt(AutoModel.from_pretrained(tiny_bert), target_modules=["query", "value"]))
    assert gates.keys == [f"encoder.layer.{i}" for i in range(12)]


def test_adapted_depth_makes_the_players(tiny_bert):
    """Keys are names, not places: with layers 2, 5 and 10 adapted, these are the players."""
    model = AutoModel.from_pretrained(tiny_bert)
    gates = LayerGates(adapt(model, target_modules=["query"], layers_to_transform=[10, 2, 5]))
    assert gates.keys == ["encoder.layer.2", "encoder.layer.5", "encoder.layer.10"]


def test_towers_of_clip_are_separate_players():
    """Block i of the text tower and block i of the vision tower have a gate each, in (tower, index) order."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 11}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39},
        vision_config={**tower, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    untouched = CLIPModel(config).eval()
    model = adapt(copy.deepcopy(untouched))
    gates = LayerGates(model)
    text, vision = gates.keys[:11], gates.keys[11:]
    assert text == [f"text_model.encoder.layers.{i}" for i in range(11)]
    assert vision == [f"vision_model.encoder.layers.{i}" for i in range(3)]

    inputs = {"input_ids": IDS, "pixel_values": torch.ones(2, 3, 8, 8)}
    with torch.no_grad(), gates.applied(mask_of(gates, *range(11))):
        out, base, plain = model(**inputs), untouched(**inputs), adapt(copy.deepcopy(untouched))(**inputs)
    assert same(out.text_embeds, plain.text_embeds) and not same(out.text_embeds, base.text_embeds)
    assert same(out.image_embeds, base.image_embeds) and not same(out.image_embeds, plain.image_embeds)


def test_adapters_outside_blocks_are_no_players(llama):
    """Adapters of the embedding and the output layer act under every mask, and are trained under every mask."""
    targets = [*QKV, "embed_tokens", "lm_head"]
    model = adapt(llama(), target_modules=targets).train()
    gates = LayerGates(model)
    assert gates.keys == [f"model.layers.{i}" for i in range(4)]
    outside = adapt(llama(), target_modules=["embed_tokens", "lm_head"])
    for name, parameter in outside.named_parameters():
        if "lora_" in name:
            parameter.data = dict(model.named_parameters())[name].data
    with gates.applied([False] * 4):
        assert same(output(model), output(outside))
        model(IDS, labels=IDS).loss.backward()
    with_gradient = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert {name.rsplit(".", 1)[-1] for name in with_gradient} == {"embed_tokens", "lm_head"}


def test_whole_modules_and_tokens_are_never_gated(llama):
    """`modules_to_save` and trainable tokens act, and get their gradient, with every gate closed."""
    model = adapt(llama(), modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [5, 6]}).train()
    copies = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(copies) == 2
    for parameter in copies.values():
        parameter.data += 1.0
    gates = LayerGates(model)
    assert gates.num_layers == 4
    with model.disable_adapter():
        base = output(model)
    with gates.applied([False] * 4):
        assert not same(output(model), base)
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in copies.values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" in name)


def test_granularity_module(llama):
    """Each adapted module is a player; closing all of a block's is closing the block."""
    model = adapt(llama())
    gates, blocks = LayerGates(model, granularity="module"), LayerGates(model)
    assert gates.keys == [f"model.layers.{i}.self_attn.{m}" for i in range(4) for m in ("k_proj", "q_proj", "v_proj")]
    alone = []
    for player in range(12):
        with gates.applied(mask_of(gates, player)):
            alone.append(output(model))
    assert len({float(x.double().sum()) for x in alone}) == 12
    with blocks.applied([False, True, False, False]):
        block = output(model)
    with gates.applied(mask_of(gates, 3, 4, 5)):
        assert same(output(model), block)


def test_layer_pattern(llama):
    """A layer's key ends where the pattern's match ends; modules that do not match are no players."""
    model = adapt(llama(), target_modules="all-linear")
    halves = LayerGates(model, layer_pattern=r"layers\.\d+\.(?:self_attn|mlp)")
    assert halves.keys == [f"model.layers.{i}.{half}" for i in range(4) for half in ("mlp", "self_attn")]
    upper = LayerGates(model, layer_pattern=r"layers\.[23]")
    assert upper.keys == ["model.layers.2", "model.layers.3"]
    with upper.applied([False, False]):
        out = output(model)
    with LayerGates(model).applied([True, True, False, False]):
        assert same(output(model), out)


def test_wrappers_do_not_change_the_keys(llama):
    """Inside a classifier, torch.compile's wrapper or DDP's, a layer keeps its name in the base model."""
    model = adapt(llama())
    keys = LayerGates(model).keys
    holder = nn.Module()
    holder.model = model
    ddp = nn.Module()
    ddp.module = holder
    compiled = nn.Module()
    compiled._orig_mod = ddp
    for wrapped in (holder, ddp, compiled):
        assert LayerGates(wrapped).keys == keys == [f"model.layers.{i}" for i in range(4)]


class Flat(nn.Module):
    """A model without numbered blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.layer2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.first(x))


def test_a_model_without_blocks_is_refused(llama):
    """No numbered block, no adapter, or a pattern that matches nothing: there is nothing to switch."""
    flat = adapt(Flat(), target_modules=["first", "layer2"])
    for model, pattern in ((flat, None), (llama(), None), (adapt(llama()), "blocks")):
        with pytest.raises(InputError, match="no LoRA module inside a numbered transformer block.*--layer_pattern"):
            LayerGates(model, layer_pattern=pattern)
    assert LayerGates(flat, layer_pattern="first|layer2").keys == ["first", "layer2"]


def test_wrong_settings_are_refused(llama):
    """An unknown granularity, and a pattern that is no regular expression."""
    with pytest.raises(InputError, match="granularity is 'block', but must be one of layer, module"):
        LayerGates(adapt(llama()), granularity="block")
    with pytest.raises(InputError, match=r"--layer_pattern is '\[0-9', which is no regular expression"):
        LayerGates(adapt(llama()), layer_pattern="[0-9")


# --- C7 and checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lowest", range(4))
def test_autograd_stays_above_the_lowest_active_layer(llama, lowest: int, checkpointing: bool):
    """Hidden states below the lowest active layer take no part in the graph: nothing is kept, nothing visited."""
    model = adapt(llama()).train()
    if checkpointing:
        checkpoint_activations(model.get_base_model())
    gates, in_graph = LayerGates(model), []
    for block in model.get_base_model().model.layers:
        block.register_forward_hook(
            lambda module, args, out: in_graph.append((out if isinstance(out, Tensor) else out[0]).requires_grad)
        )
    with gates.applied(mask_of(gates, lowest, 3)):
        loss = model(IDS, labels=IDS).loss
        forward = in_graph[:4]
        loss.backward()
    assert forward == [i >= lowest for i in range(4)]


@pytest.mark.parametrize("active", [(0, 2), (1,), (3,), (0, 1, 2, 3)])
def test_recomputation_sees_the_same_mask(llama, active: tuple[int, ...]):
    """With activation checkpointing, gradients are those without it, bit for bit, dropout included."""
    gradients = []
    for checkpointing in (False, True):
        model = adapt(llama(), lora_dropout=0.2).train()
        if checkpointing:
            checkpoint_activations(model.get_base_model())
        gates = LayerGates(model)
        torch.manual_seed(3)
        with gates.applied(mask_of(gates, *active)):
            model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, plain in gradients[0].items():
        assert (plain is None) == (gradients[1][name] is None), name
        assert plain is None or same(plain, gradients[1][name]), name


def test_recomputation_outside_the_mask_is_noticed(llama):
    """The test above can fail: a backward pass after the gates opened recomputes another graph."""
    model = adapt(llama()).train()
    checkpoint_activations(model.get_base_model())
    gates = LayerGates(model)
    with gates.applied(mask_of(gates, 0)):
        loss = model(IDS, labels=IDS).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
