"""Adapter folders and checkpoints that anybody may have written: read, or refused by one sentence."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from examples import Blocks, peft_adapter
from fuzzing import ODD_TEXTS, copra, drawn, dumped, efforts, odd_values, refused, safetensors, spoilt
from hypothesis import example, given
from hypothesis import strategies as st

from copra_llm.adapter_config import read_adapter_config
from copra_llm.adapters import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, load_adapter_weights
from copra_llm.checkpoint import broken
from copra_llm.models import Base, Source, load_adapter
from copra_llm.optimizer_file import OPTIMIZER, read_optimizer, write_optimizer
from copra_llm.progress import read_state

PREFIX = "base_model.model."
FIELDS = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
          "target_modules",
          "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
          "init_lora_weights", "bias", "task_type", "fan_in_fan_out", "trainable_token_indices", "layer_replication",
          "megatron_config", "megatron_core", "target_parameters", "peft_type", "inference_mode", "revision",
          "auto_mapping", "loftq_config", "eva_config", "corda_config", "lora_bias", "runtime_config", "peft_version",
          "lora_ga_config", "alora_invocation_tokens", "unknown_field")  # fmt: skip
RULES = ("fusion", "mixture", "truncated", "align", "task-arithmetic", "ties", "dare", "knots", "core-space", "iso-c",
         "tsv-m")  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    peft_adapter(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "fuzzed"))


def work_with(folder: Path, good: Path, place: Path, rule: str) -> None:
    """Read it, give it to PEFT on a model, merge and prune it: each works, or is refused; what is written is finite."""
    refused(lambda: load_adapter_weights(folder))
    refused(lambda: load_adapter(Base(Blocks(), None, Source("blocks", "owner/blocks"), "causal", ""), folder))
    for name, argv in (
        ("merged", ["merge", str(good), str(folder), "--method", rule]),
        ("pruned", ["prune", str(folder), "--keep", "every-other", "--density", "0.5"]),
    ):
        output = place / name
        if copra([*argv, "--output", str(output)], output):
            for f in load_adapter_weights(output).factors.values():
                assert torch.isfinite(f.lora_A).all() and torch.isfinite(f.lora_B).all() and math.isfinite(f.scaling)
            shutil.rmtree(output)


@efforts(120)
def test_any_config(examples, good, folder, tmp_path):
    """Missing, wrong-typed, huge and nested fields."""
    config = json.loads((good / CONFIG_FILE).read_text(encoding="utf-8"))

    @drawn(examples)
    @given(
        changes=st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=3),
        missing=st.sets(st.sampled_from(FIELDS), max_size=2),
        rule=st.sampled_from(RULES),
    )
    @example(changes={"rank_pattern": {"(a+)+$": 4}}, missing=set(), rule="fusion")
    @example(changes={"alpha_pattern": {"(": 4}}, missing=set(), rule="fusion")
    @example(changes={"lora_alpha": 0}, missing=set(), rule="align")
    @example(changes={"r": 10**400}, missing=set(), rule="fusion")
    @example(changes={"lora_alpha": float("nan")}, missing=set(), rule="mixture")
    @example(changes={"layer_replication": [[0, 2**31]]}, missing=set(), rule="mixture")
    @example(changes={"megatron_config": {"a": 1}, "megatron_core": "megatron.os"}, missing=set(), rule="mixture")
    @example(changes={"target_modules": 5}, missing=set(), rule="mixture")
    def check(changes, missing, rule):
        fuzzed = {key: value for key, value in (config | changes).items() if key not in missing}
        (folder / CONFIG_FILE).write_bytes(dumped(fuzzed))
        work_with(folder, good, tmp_path, rule)

    check()


@efforts(80)
def test_any_bytes(examples, good, folder, tmp_path):
    """Either file cut, overwritten or of another kind."""
    contents = {name: (good / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}

    @drawn(examples)
    @given(data=st.data(), name=st.sampled_from(sorted(contents)), rule=st.sampled_from(RULES))
    def check(data, name, rule):
        (folder / name).write_bytes(data.draw(spoilt(contents[name])))
        work_with(folder, good, tmp_path, rule)
        (folder / name).write_bytes(contents[name])

    check()


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
         "C64": 8, "U64": 8, "F4": 1, "F8_E8M0": 1, "X9": 1}  # fmt: skip
odd_names = st.one_of(
    st.sampled_from(["model.layers.0.q_proj", "model.layers.1.v_proj", "model.layers.0.o_proj", "unknown.module"]),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=6),
)
odd_floats = st.sampled_from([0.0, 1.0, -1.0, 1e38, float("nan"), float("inf")])


@st.composite
def weight_files(draw) -> bytes:
    """Whole files with odd entries, most of them LoRA factors of the fixture's modules."""
    entries = {}
    for name in draw(st.lists(odd_names, min_size=1, max_size=4)):
        dtype = draw(st.sampled_from(["F32", "F32", "F32", *SIZES]))
        value = draw(odd_floats)
        for part, shape in (("lora_A", (4, 6)), ("lora_B", (8 if name.endswith("q_proj") else 4, 4))):
            part = draw(st.sampled_from([part] * 9 + ["lora_embedding_A", "lora_magnitude_vector", "base_layer"]))
            shape = draw(st.sampled_from([shape] * 9 + [(), (4,), (0, 6), (6, 0), (1, 1), (4, 6, 1), (2**40, 2**40)]))
            count = math.prod(shape) if math.prod(shape) < 10_000 else 0
            content = struct.pack("<f", value) * count if SIZES[dtype] == 4 else bytes(count * SIZES[dtype])
            entries[f"{PREFIX}{name}.{part}.weight"] = (dtype, shape, content)
    for key in draw(st.lists(odd_names, max_size=2)):
        entries[key] = ("F32", (2,), bytes(8))
    metadata = draw(st.one_of(st.none(), st.just({"format": "pt"}), odd_values))
    return safetensors(entries, metadata, draw(st.sampled_from([None] * 9 + [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])))


@efforts(150)
def test_any_tensors(examples, good, folder, tmp_path):
    """Whole files that lie: lengths, types, shapes, values and names."""

    @drawn(examples)
    @given(content=weight_files(), rule=st.sampled_from(RULES))
    def check(content, rule):
        (folder / WEIGHTS_FILE).write_bytes(content)
        work_with(folder, good, tmp_path, rule)

    check()


@efforts(60)
def test_any_heads(examples, good, folder, tmp_path):
    """An encoder's heads with odd shapes, values and labels."""
    labels = st.one_of(st.just('{"sst2": ["Bad", "Good"]}'), odd_values.map(lambda v: dumped(v).decode()),
                       st.sampled_from(ODD_TEXTS))  # fmt: skip

    @drawn(examples)
    @given(
        name=odd_names, shape=st.sampled_from([(2, 3), (), (6,), (0, 3), (2, 3, 1)]), value=odd_floats,
        dtype=st.sampled_from(["F32", "I32"]), metadata=st.one_of(labels.map(lambda v: {"labels": v}), odd_values),
    )  # fmt: skip
    def check(name, shape, value, dtype, metadata):
        content = struct.pack("<f", value) * math.prod(shape)
        (folder / HEAD_FILE).write_bytes(safetensors({f"{name}.weight": (dtype, shape, content)}, metadata))
        work_with(folder, good, tmp_path, "mixture")

    check()


def test_links_and_special_files(good, tmp_path):
    """A link to a whole file is that file, as in the Hub's cache; one to nothing, to itself or to a device is none."""
    for target, works in ((good / WEIGHTS_FILE, True), (tmp_path / "gone", False), ("/dev/zero", False),
                          (tmp_path, False), (good / CONFIG_FILE, False)):  # fmt: skip
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            folder = tmp_path / "linked"
            shutil.copytree(good, folder)
            (folder / name).unlink()
            own = good / name if works else target
            (folder / name).symlink_to(own)
            same = not works and own == good / name
            assert (refused(lambda f=folder: load_adapter_weights(f)) is None) == (works or same)
            shutil.rmtree(folder)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / CONFIG_FILE).symlink_to(CONFIG_FILE)
    assert refused(lambda: load_adapter_weights(tmp_path / "loop"))
    os.mkfifo(tmp_path / "loop" / WEIGHTS_FILE)
    assert refused(lambda: load_adapter_weights(tmp_path / "loop"))


class Bomb:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_is_read(good, tmp_path):
    """An adapter whose weights are a pickle is refused, by the reader and before PEFT sees it."""
    folder, witness = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(good, folder)
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(witness)))
    for read in (load_adapter_weights, read_adapter_config,
                 lambda f: load_adapter(Base(Blocks(), None, Source("b", "b"), "causal", ""), f)):  # fmt: skip
        assert "pickled ones are not read" in refused(lambda read=read: read(folder))
    assert not witness.exists()
    pickle.loads(pickle.dumps(Bomb(witness)))  # the bomb itself works
    assert witness.exists()


# --- checkpoints ------------------------------------------------------------------------------------------

STATE = {"config": {"seed": 0}, "step": 2, "log": [], "dev": [], "skipped": 0, "unlogged": [0.0, 0], "seconds": 1.0,
         "examples_a_step": 4, "stream_batch_size": 4}  # fmt: skip


@efforts(150)
def test_any_state(examples, tmp_path):
    """What a checkpoint says of its progress is of the kinds that a run writes, or it is refused."""

    @drawn(examples)
    @given(changes=st.dictionaries(st.sampled_from([*STATE, "samples", "x"]), odd_values, max_size=2), data=st.data())
    @example(changes={"step": 10**400}, data=None)
    @example(changes={"dev": [{"step": 1}]}, data=None)
    def check(changes, data):
        content = dumped(STATE | changes)
        if data is not None and data.draw(st.booleans()):
            content = data.draw(spoilt(content))
        (tmp_path / "state.json").write_bytes(content)
        if refused(lambda: read_state(tmp_path)) is None:
            _, progress = read_state(tmp_path)
            assert isinstance(progress.step, int) and progress.step > 0

    check()


@efforts(150)
def test_any_manifest(examples, tmp_path):
    """Whatever stands there, the checkpoint is whole or has one reason why not; files elsewhere are not looked at."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()

    @drawn(examples)
    @given(files=st.one_of(odd_values, st.dictionaries(st.sampled_from(ODD_TEXTS), st.fixed_dictionaries(
        {"bytes": odd_values, "sha256": odd_values}), max_size=2)))  # fmt: skip
    @example(files={"../outside": {"bytes": 6, "sha256": ""}})
    @example(files={str(outside): {"bytes": 6, "sha256": ""}})
    @example(files={"x" * 5000: {"bytes": 6, "sha256": ""}})
    def check(files):
        (folder / "manifest.json").write_bytes(dumped({"files": files}))
        reason = broken(folder)
        assert reason and "\n" not in reason and "SHA" not in reason

    check()


def test_a_checkpoint_with_a_pickled_state_is_passed_over(tmp_path):
    """As earlier versions wrote the optimizer's; it is not opened."""
    witness = tmp_path / "ran"
    folder = tmp_path / "checkpoint-2"
    peft_adapter(folder)
    (folder / "state.json").write_bytes(dumped(STATE))
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb(witness)))
    assert broken(folder) == "optimizer.safetensors is missing (pickled ones are not read)"
    assert not witness.exists()


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))


def stepped() -> torch.optim.AdamW:
    """AdamW of two parameters, after a step of the first alone."""
    toy = Toy()
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1)
    toy.a.sum().backward()
    optimizer.step()
    return optimizer


def test_the_optimizers_state_comes_back(tmp_path):
    """Bit for bit, and a parameter that has not moved has none."""
    before, after = stepped(), torch.optim.AdamW(Toy().parameters(), lr=0.1)
    write_optimizer(before.state_dict(), tmp_path)
    read_optimizer(after, tmp_path)
    states = [optimizer.state_dict()["state"] for optimizer in (before, after)]
    assert [set(state) for state in states] == [{0}, {0}]
    assert all(torch.equal(states[0][0][key], states[1][0][key]) for key in states[0][0])


@efforts(100)
def test_any_optimizer_state(examples, tmp_path):
    """Of other parameters, shapes, names and types."""
    write_optimizer(stepped().state_dict(), tmp_path)
    content = (tmp_path / OPTIMIZER).read_bytes()
    keys = st.one_of(st.sampled_from(["0.step", "0.exp_avg", "0.exp_avg_sq", "1.step", "2.step", "-1.step", "²:step",
                                      f"{10**400}.step", "0.params", "step", ""]), odd_names)  # fmt: skip

    @drawn(examples)
    @given(
        entries=st.dictionaries(
            keys,
            st.tuples(st.sampled_from(["F32", "I32"]), st.sampled_from([(), (2, 3), (3,), (1,), (0,)])),
            max_size=4,
        ),
        data=st.data(),
    )
    def check(entries, data):
        named = {key: (kind, shape, bytes(4 * math.prod(shape))) for key, (kind, shape) in entries.items()}
        spoil = data.draw(st.booleans())
        (tmp_path / OPTIMIZER).write_bytes(data.draw(spoilt(content)) if spoil else safetensors(named))
        optimizer = torch.optim.AdamW(Toy().parameters(), lr=0.1)
        before = repr(optimizer.state_dict())
        if refused(lambda: read_optimizer(optimizer, tmp_path)) is not None:
            assert repr(optimizer.state_dict()) == before
        else:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()

    check()
