"""The three recipes on bases in 4 and 8 bits: what an active and an inactive layer do; real bitsandbytes on the CPU."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from examples import write_conversations
from image_examples import image_config
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel

from copra_llm.batches import eval_loader
from copra_llm.build import build
from copra_llm.cli import main
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates, base_name
from copra_llm.models import load_base
from copra_llm.optimizer import make_optimizer
from copra_llm.results import read_result

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
ROOT = Path(__file__).resolve().parents[1]
BITS = pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
RUNS = {
    "mtl15, label words": ("train_mtl15", "tiny_llama"),
    "mtl15, heads": ("train_mtl15", "tiny_bert"),
    "instruct": ("train_instruct", "tiny_llama"),
    "clip": ("train_clip", "tiny_clip"),
    "siglip": ("train_clip", "tiny_siglip"),
}
KINDS = pytest.mark.parametrize("kind", RUNS)
TEXTS = {"tasks": ["sst2"], "data_root": "sample", "max_length": 24, "max_train_samples": 16, "max_eval_samples": 8,
         "per_device_train_batch_size": 4, "learning_rate": 0.01, "lora_target_modules": ["all-linear"],
         "logging_steps": 1, "max_steps": 4, "checkpoint_at": []}  # fmt: skip


@pytest.fixture
def config_of(request, tmp_path):
    """Settings of a short run of each kind."""

    def settings(kind: str, **changes) -> RunConfig:
        recipe, model = RUNS[kind]
        folder = request.getfixturevalue(model)
        if recipe == "train_clip":
            root = request.getfixturevalue("image_data")
            return image_config(folder, root, **{"lora_dropout": 0.0, "max_steps": 4} | changes)
        own = dict(TEXTS, model_name_or_path=str(folder))
        if recipe == "train_instruct":
            data = write_conversations(tmp_path / "talk.jsonl", 24)
            own |= {"tasks": ["instruct"], "data_root": None, "dataset_name": [str(data)], "dev_size": 4,
                    "chat_template": "plain", "max_length": 48}  # fmt: skip
        return RunConfig().replace(**own | changes)

    return settings


def bench_of(config: RunConfig):
    """A run's model with random factors B, ready to train, and a batch of its data."""
    bench = build(config, config.data.tasks, splits=("train",))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in bench.classifier.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    (split,) = bench.splits["train"].values()
    batch = next(iter(eval_loader(bench.classifier, split, 4)))
    return bench, {key: value for key, value in batch.items() if key != "index"}


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    """bitsandbytes' layers by their names; PEFT's around them are called alike."""
    return {n: m for n, m in model.named_modules() if type(m).__module__ == "bitsandbytes.nn.modules"}


def weight_of(module: nn.Module) -> torch.Tensor:
    """The number that each code stands for `(out, in)`, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    if type(module).__name__ == "Linear4bit":
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    # The first forward pass moves the rows' scales from the weight into the layer's state.
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * (scales[:, None] / 127.0)


@BITS
@KINDS
def test_blocks_are_quantised_and_nothing_else(kind, bits, config_of):
    """Heads, projections and output layers stand outside the blocks; bitsandbytes could not train or copy some."""
    base = load_base(config_of(kind, **{bits: True}).model)
    own = quantised(base.model)
    linear = {n for n, m in base.model.named_modules() if isinstance(m, nn.Linear)}
    assert own and all("layers." in name or "layer." in name for name in own)
    assert not any("layers." in name or "layer." in name for name in linear - own.keys())
    about = base.about()["base_quantised"]
    assert (about["bits"], about["modules"]) == (int(bits[8]), len(own))
    expected = {"clip": {"visual_projection", "text_projection"}, "mtl15, heads": set(), "siglip": {
        "text_model.head", "vision_model.head.attention.out_proj", "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2"}}  # fmt: skip
    assert linear - own.keys() == expected.get(kind, {"lm_head"})


@BITS
@KINDS
def test_gates_on_a_quantised_base(kind, bits, config_of):
    """All off is the base bit for bit, all on is PEFT's own forward, in training as in evaluation."""
    bench, batch = bench_of(config_of(kind, **{bits: True}))
    classifier, gates = bench.classifier, LayerGates(bench.classifier)
    for training in (False, True):
        classifier.train(training)
        with torch.no_grad():
            with classifier.model.disable_adapter():
                base = classifier(batch)
            peft = classifier(batch)
            with gates.applied([False] * gates.num_layers):
                assert torch.equal(classifier(batch), base)
            with gates.applied([True] * gates.num_layers):
                assert torch.equal(classifier(batch), peft)
            assert not torch.equal(base, peft)


@BITS
@KINDS
def test_an_inactive_layer_stands_still(kind, bits, config_of):
    """In a step with weight decay it has no gradient, and none of its numbers move; every other layer's do."""
    bench, batch = bench_of(config_of(kind, **{bits: True}, weight_decay=0.1))
    gates, optimizer = LayerGates(bench.classifier), make_optimizer(bench.classifier, config_of(kind).train)
    bench.classifier.train()
    mask = [i % 2 == 0 for i in range(gates.num_layers)]
    own = [[p for m in modules for n, p in m.named_parameters() if "lora_" in n] for modules in gates.modules]
    before = [[p.detach().clone() for p in parameters] for parameters in own]
    frozen = {n: m.weight.data.clone() for n, m in quantised(bench.classifier).items()}
    with gates.applied(mask):
        bench.classifier(batch).backward()
    gradients = [[p.grad is not None for p in parameters] for parameters in own]
    optimizer.step()
    for active, parameters, old, has in zip(mask, own, before, gradients, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(parameters, old, strict=True)]
        assert all(has) and any(moved) if active else not any(has) and not any(moved)
    assert all(torch.equal(m.weight.data, frozen[n]) for n, m in quantised(bench.classifier).items())


@BITS
@KINDS
def test_gradients_are_those_of_the_dequantised_base(kind, bits, config_of):
    """In training the product is that of the dequantised weight, so only its rounding may differ.

    Each of a layer's products is a sum of at most 64 float32 numbers, and a gradient runs through at most 12 layers of
    7 products each: 64 * 84 roundings of eps/2, times ten for the norms and softmaxes between them, relative to the
    largest entry of the gradient. Quantising instead of dequantising would be off by some 0.1.
    """
    bench, batch = bench_of(config_of(kind, **{bits: True}))
    reference, _ = bench_of(config_of(kind))
    codes = {base_name(n.removesuffix(".base_layer")): m for n, m in quantised(bench.classifier.model).items()}
    plain = {base_name(n): m for n, m in reference.classifier.model.named_modules() if isinstance(m, LoraLayer)}
    others = {base_name(n): m for n, m in reference.classifier.model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in codes.items():
        target = plain[name].get_base_layer() if name in plain else others[name]
        original = target.weight.data.clone()
        target.weight.data.copy_(weight_of(module))
        assert not torch.equal(original, target.weight), "or nothing was quantised"
    for task, head in getattr(bench.classifier, "heads", {}).items():
        reference.classifier.heads[task].data.copy_(head)  # made by a base, and so by this one
    found = []
    for each in (bench, reference):
        gates = LayerGates(each.classifier)
        each.classifier.train()
        with gates.applied([i % 2 == 0 for i in range(gates.num_layers)]):
            each.classifier(copy.deepcopy(batch)).backward()
        found.append({base_name(n): p.grad for n, p in each.classifier.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    tolerance = 10 * 64 * 84 * torch.finfo(torch.float32).eps / 2
    for name, gradient in found[0].items():
        off = (gradient - found[1][name]).abs().max() / found[1][name].abs().max().clamp_min(1e-12)
        assert off <= tolerance, (name, float(off))


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(config: RunConfig) -> list[str]:
    """The settings that are not the defaults, as a command line; those of a list last, since they take what follows."""
    defaults, single, several = RunConfig().flat(), [], []
    for key, value in config.flat().items():
        if value == defaults.get(key) or value is None or value == []:
            continue
        if isinstance(value, list):
            several += [f"--{key}", *map(str, value)]
        else:
            single.append(f"--{key}={value}")
    return [*single, *several]


@BITS
@KINDS
def test_train_load_merge_and_evaluate(kind, bits, config_of, tmp_path, request, capsys):
    """Each recipe; plain PEFT loads what it saves; two adapters are merged, and the merged one evaluated."""
    recipe, model = RUNS[kind]
    for seed in (0, 1):
        config = config_of(kind, **{bits: True}, seed=seed, output_dir=str(tmp_path / f"run-{seed}"))
        assert script(recipe).main(words(config)) == 0, capsys.readouterr().err
    (task,) = config.data.tasks
    places = [tmp_path / f"run-{seed}" / ("" if recipe == "train_instruct" else task) for seed in (0, 1)]
    record = read_result(places[0] / "result.json")
    assert record.environment["base_quantised"]["bits"] == int(bits[8])
    assert all(entry["grad_norm"] > 0 for entry in record.data["log"])
    folder = request.getfixturevalue(model)
    if model == "tiny_llama":
        loaded = AutoPeftModelForCausalLM.from_pretrained(places[0] / "adapter")
    else:
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), places[0] / "adapter")
    assert any(bool(p.any()) for n, p in loaded.named_parameters() if "lora_B" in n)
    merged = tmp_path / "merged"
    assert main(["merge", *map(str, places), "--output", str(merged)]) == 0
    (merged / "config.yaml").write_text((places[0] / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    output = tmp_path / "merged.json"
    assert main(["evaluate", str(merged), "--task", task, "--split", "dev", "--output", str(output)]) == 0
    assert read_result(output).environment["base_quantised"]["bits"] == int(bits[8])


def test_the_options_bear_trls_names_too(config_of):
    """`--use_bnb_nested_quant`, in a file as on the command line; the other two reach bitsandbytes."""
    from copra_llm.config import parse_run_config

    assert not parse_run_config(["--use_bnb_nested_quant", "False"]).model.bnb_4bit_use_double_quant
    assert parse_run_config(["--use-bnb-nested-quant"]).model.bnb_4bit_use_double_quant
    for storage in ("float32", "bfloat16"):
        config = config_of("mtl15, label words", load_in_4bit=True, bnb_4bit_quant_storage=storage,
                           bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_type="fp4",
                           bnb_4bit_use_double_quant=False)  # fmt: skip
        about = load_base(config.model).about()["base_quantised"]
        assert about == {"bits": 4, "type": "fp4", "double_quant": False, "compute_dtype": "bfloat16",
                         "storage": storage, "modules": 28}  # fmt: skip


def test_packed_in_another_type_the_weights_are_the_same(config_of):
    """Storage is how the codes lie in memory: ZeRO-3 and FSDP2 shard tensors of one type alone."""
    plain, packed = (
        load_base(config_of("mtl15, label words", load_in_4bit=True, bnb_4bit_quant_storage=storage).model).model
        for storage in (None, "bfloat16")
    )
    (one, *_), (other, *_) = quantised(plain).values(), quantised(packed).values()
    assert one.weight.dtype == torch.uint8 and other.weight.dtype == torch.bfloat16
    assert torch.equal(weight_of(one), weight_of(other))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, packed(input_ids=ids).logits)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"bnb_4bit_quant_storage": "bfloat16"}, "give --load_in_4bit too"),
        ({"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "give --load_in_4bit too"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "must be one of float32, bfloat16, float16"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int4"}, "must be one of uint8, float32"),
    ],
)
def test_options_that_cannot_be(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        RunConfig().replace(**changes)
