"""What is trained does not depend on how many processes train it, nor on the backend that spreads it over them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from pairs import Pair, run_recipes
from safetensors.torch import load_file
from test_train import flags, settings

from copra_llm import launch, train
from copra_llm.adapter_files import WEIGHTS_FILE
from copra_llm.classifiers import LabelWordClassifier
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.launch import check_launch, check_same_base
from copra_llm.masks import sample_mask
from copra_llm.optimizer_file import OPTIMIZER
from copra_llm.results import read_result
from copra_llm.sharded import check_fsdp
from copra_llm.train import train_adapter
from copra_llm.zero import GroupedAdamW, check_zero, engine_told

ABSENT = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs copra_llm[deepspeed]")
DEEPSPEED = [pytest.param(name, marks=[pytest.mark.deepspeed, ABSENT])
             for name in ("zero1", "zero2", "zero3", "zero3-init")]  # fmt: skip
SEVERAL = ["ddp", "fsdp2", *DEEPSPEED]
# Measured after 30 steps of float32: 5e-7 to 8e-7, since a mean over 16 examples is made of two. Adam divides by the
# root of small numbers, which the text model with a trained head has more of: 7e-5.
ROUNDING, OF_HEADS = 1e-5, 1e-3

FEW = {"max_train_samples": 6, "max_eval_samples": 1}
"""No whole number of batches, and fewer examples to evaluate than processes."""
STEPS = {"tasks": ["sst2"], "max_steps": 30, "save_steps": 10, "gradient_accumulation_steps": 4}
"""Of one process; two halve the accumulation."""


def deltas(folder: Path) -> torch.Tensor:
    """All of Delta W but its scaling, in one vector."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(name for name in tensors if "lora_A" in name)
    return torch.cat([(tensors[n.replace("lora_A", "lora_B")] @ tensors[n]).flatten() for n in names])


def far(first: Path, second: Path) -> float:
    return float((deltas(first) - deltas(second)).norm() / deltas(first).norm())


# --- what runs on each backend ----------------------------------------------------------------------------


def plans(models: dict[str, Path], folder: Path, records: Path) -> dict[str, list[str]]:
    """Command lines of one process by name; the first one's fourth step has a loss that is not finite."""
    common = {"tasks": ["sst2"], "gradient_accumulation_steps": 2}
    llama = functools.partial(settings, models["llama"])
    early = folder.parent / "one" / "long" / "sst2" / "checkpoint-10"
    runs = {
        "spoiled": llama(**common, save_steps=1),
        "long": llama(**STEPS),
        "resumed": llama(**STEPS, resume_from_checkpoint=str(early)),
        "unclipped": llama(**common, loraplus_lr_ratio=4.0, max_grad_norm=0.0, gradient_checkpointing=True, **FEW),
        "heads": settings(models["bert"], **common | {"tasks": ["sst2", "agnews"]}, train_head=True, joint=True),
        "encoder": settings(models["bert"], **common, train_head=True, eval_steps=4, load_best_model_at_end=True,
                            per_device_eval_batch_size=3),
    }  # fmt: skip
    words = {name: flags(run.replace(output_dir=str(folder / name))) for name, run in runs.items()}
    talk = {"model_name_or_path": models["llama"], "dataset_name": records, "dev_size": 4, "max_length": 64,
            "max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "lora_r": 2,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "chat_template": "chatml",
            "sample_prompts": "hello", "max_new_tokens": 4, "output_dir": folder / "talk"}  # fmt: skip
    words["talk"] = [str(word) for key, value in talk.items() for word in (f"--{key}", value)]
    return words


def halved(words: list[str]) -> list[str]:
    """The same run on two processes."""
    at = words.index("--gradient_accumulation_steps") + 1
    return [*words[:at], str(int(words[at]) // 2), *words[at + 1 :]]


def spoil(calls: int) -> None:
    """One loss is NaN: that of a training pass of the classifier in this process, counted from 1."""
    honest, made = LabelWordClassifier._loss, []

    def loss(self, batch):
        # The pass before a run's first step is in evaluation mode.
        if self.training:
            made.append(None)
        return honest(self, batch) * (math.nan if len(made) == calls else 1.0)

    LabelWordClassifier._loss = loss


def watch_rank(rank: int) -> None:
    """Spoils the second process's start and fourth step; notes how much of the base a process holds."""
    if rank == 1:
        spoil(calls=4)
    build, save = train.build, train.save_checkpoint

    def held(model) -> float:
        base = [p for name, p in model.named_parameters() if not p.requires_grad and name.startswith("model.")]
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in base)
        return sum(_here(p) for p in base) / whole

    def building(config, tasks):
        bench = build(config, tasks)
        share = held(bench.classifier)
        for p in bench.classifier.parameters():
            if p.requires_grad and rank == 1:
                p.data += 1.0
        (Path(config.train.output_dir) / f"loaded-{rank}").write_text(str(share))
        return bench

    def saving(accelerator, classifier, backend, config, folder, progress):
        share = held(accelerator.unwrap_model(classifier))
        (Path(config.train.output_dir) / f"held-{rank}").write_text(str(share))
        save(accelerator, classifier, backend, config, folder, progress)

    train.build, train.save_checkpoint = building, saving


def _here(p) -> int:
    if hasattr(p, "placements"):
        return p.to_local().numel()
    return p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backends")
    words = ["the", "cat", "sat", "on", "a", "mat", "good", "bad", "film", "great", "news", "sports", "it", "was"]
    say = [" ".join(words[i % 7 : i % 7 + 3 + i % 4]) for i in range(24)]
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(say, say[::-1], strict=True)
    ]
    (folder / "talk.jsonl").write_text("\n".join(json.dumps({"messages": t}) for t in turns))
    return folder


@pytest.fixture(scope="module")
def models(tiny_llama, tiny_bert) -> dict[str, Path]:
    return {"llama": tiny_llama, "bert": tiny_bert}


@pytest.fixture(scope="module")
def one(models, work) -> Path:
    """The runs on one process."""
    honest = LabelWordClassifier._loss
    spoil(calls=8)
    try:
        assert run_recipes(list(plans(models, work / "one", work / "talk.jsonl").values())) == 0
    finally:
        LabelWordClassifier._loss = honest
    return work / "one"


@pytest.fixture(scope="module", params=SEVERAL)
def spread(request, one, models, work) -> Path:
    """The runs on two processes of a backend; the folder bears its name."""
    folder = work / request.param
    runs = plans(models, folder, work / "talk.jsonl")
    if request.param.startswith("zero"):
        del runs["heads"]  # refused
    argvs = [halved(words) for words in runs.values()]
    with Pair(argvs, folder, watch_rank, request.param) as run:
        assert run.join() == [0, 0], run.said()
    return folder


# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["spoiled", "long", "resumed", "unclipped", "heads", "encoder", "talk"])
def test_the_adapter_is_that_of_one_process(one, spread, run: str):
    """From the start, from one process's checkpoint, with LoRA+, without clipping, with heads, on conversations.

    In `heads` a process's batch is of another task than the other's, so only one of them has a gradient for its head.
    """
    if run == "heads" and spread.name.startswith("zero"):
        pytest.skip("several trained heads are refused under ZeRO")
    mine, theirs = result_of(spread / run), result_of(one / run)
    assert far(theirs.parent / "adapter", mine.parent / "adapter") < (
        OF_HEADS if run in ("encoder", "heads") else ROUNDING
    )
    mine, theirs = read_result(mine), read_result(theirs)
    assert mine.environment["world_size"] == 2
    for name, value in theirs.metrics.items():
        assert mine.metrics[name] == pytest.approx(value, rel=1e-3), name
    assert [s["text"] for s in mine.data.get("samples", [])] == [s["text"] for s in theirs.data.get("samples", [])]
    if run in ("encoder", "heads"):
        heads = [load_file(result_of(folder / run).parent / "adapter" / "head.safetensors") for folder in (one, spread)]
        torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-3)


def test_inactive_layers_stand_still(spread):
    """Bit for bit, from one checkpoint to the next, momentum and weight decay or not; active ones move."""
    active = set()
    for step in range(1, 8):
        before, after = (load_file(spread / "spoiled" / "sst2" / f"checkpoint-{s}" / WEIGHTS_FILE)
                         for s in (step, step + 1))  # fmt: skip
        mask = sample_mask(min(4 * step / (3 * 8), 1.0), 4, seed=0, step=step)
        moved = {int(n.split(".layers.")[1].split(".")[0]) for n in before if not torch.equal(before[n], after[n])}
        # The fourth step had a loss that was not finite.
        assert moved == (set() if step == 3 else {i for i, on in enumerate(mask) if on}), step
        active |= moved
    assert active == {0, 1, 2, 3}
    assert read_result(spread / "spoiled" / "sst2" / "result.json").data["skipped_steps"] == 1


def moments(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's state, by parameter."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(checkpoint / OPTIMIZER).items():
        number, _, name = key.partition(".")
        state.setdefault(number, {})[name] = tensor
    return state


def test_a_checkpoint_is_that_of_one_process(one, spread):
    """The optimizer's state by parameter, whole, and each layer's own count of steps."""
    theirs, mine = (moments(folder / "long" / "sst2" / "checkpoint-20") for folder in (one, spread))
    assert theirs.keys() == mine.keys()
    for number in theirs:
        assert theirs[number]["step"] == mine[number]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            scale = float(theirs[number][key].abs().max())
            torch.testing.assert_close(mine[number][key], theirs[number][key], rtol=1e-3, atol=1e-4 * scale)
    assert len({int(entry["step"]) for entry in mine.values()}) > 1


def test_one_process_goes_on_from_there(one, spread, models, tmp_path):
    config = settings(models["llama"], **STEPS, resume_from_checkpoint=str(spread / "long/sst2/checkpoint-20"))
    train_adapter(config, ["sst2"], tmp_path)
    assert far(one / "long" / "sst2" / "adapter", tmp_path / "adapter") < ROUNDING


def test_what_a_process_holds_of_the_base(spread):
    """FSDP2 and ZeRO-3 leave each process half of it; with zero3_init_flag it never reads more."""
    loaded, held = (float((spread / "long" / f"{name}-1").read_text()) for name in ("loaded", "held"))
    sharded = spread.name in ("fsdp2", "zero3", "zero3-init")
    assert 0.4 < held < 0.6 if sharded else held == 1.0
    assert 0.4 < loaded < 0.6 if spread.name == "zero3-init" else loaded == 1.0


def test_the_record_says_what_was_sent(spread):
    """Under the paper's schedule, of the gradients that DDP's reducer would send, those of the active layers."""
    said = read_result(spread / "long" / "sst2" / "result.json").data["communication"]
    assert said["backend"] == spread.name.removesuffix("-init")
    if spread.name in ("ddp", "fsdp2"):
        active = [sample_mask(min(4 * step / 90, 1.0), 4, seed=0, step=step).mean() for step in range(30)]
        # Beside the gradients one number a tensor and the flag, some 25 among 3072.
        assert said["gradient_bytes_a_step"] == pytest.approx(said["of_ddp"] * sum(active) / 30, rel=0.02)
        assert said["gradient_bytes_a_step"] < 0.8 * said["of_ddp"]


def result_of(folder: Path) -> Path:
    """The one record below a run's output."""
    (found,) = folder.rglob("result.json")
    return found


# --- refusals and parts -----------------------------------------------------------------------------------


def launched(zero: dict, more: dict | None = None, init: bool = False) -> SimpleNamespace:
    """What `check_zero` asks of an accelerator."""
    config = {"zero_optimization": {"stage": 2} | zero} | (more or {})
    plugin = SimpleNamespace(deepspeed_config=config, zero3_init_flag=init)
    return SimpleNamespace(num_processes=2, deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    "accelerator, changes, said",
    [
        (launched({"stage": 0}), {}, "zero_stage is 0"),
        (launched({}, {"optimizer": {"type": "Adam"}}), {}, "has its own optimizer"),
        (launched({}, {"scheduler": {"type": "WarmupLR"}}), {}, "has its own scheduler"),
        (launched({"offload_optimizer": {"device": "cpu"}}), {}, "offload_optimizer_device to none"),
        (launched({}), {"fp16": True}, "--fp16"),
        (launched({}, {"gradient_accumulation_steps": 4}), {"gradient_accumulation_steps": 2},
         "gradient_accumulation_steps = 4, but --gradient_accumulation_steps is 2"),
        (launched({}, {"gradient_clipping": 0.5}), {}, "gradient_clipping = 0.5, but --max_grad_norm is 1.0"),
        (launched({}, {"train_micro_batch_size_per_gpu": 2}), {}, "but --per_device_train_batch_size is 16"),
        (launched({}), {"train_head": True, "joint": True, "tasks": ["sst2", "agnews"]}, "--train_head with --joint"),
        (launched({"stage": 3}), {"use_dora": True}, "--use_dora"),
        (launched({"stage": 3}), {"load_in_8bit": True}, "--load_in_8bit and ZeRO-3"),
        (launched({"stage": 3}), {"load_in_4bit": True},
         "_storage is uint8 and --dtype float32; give --bnb_4bit_quant_storage float32"),
        (launched({"stage": 3}, init=True), {"init_lora_weights": "pissa"}, "pissa .* zero3_init_flag: false"),
        (launched({"stage": 3}, init=True), {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
         "--load_in_4bit has to see the whole base"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused(accelerator, changes: dict, said: str):
    with pytest.raises(InputError, match=said):
        check_zero(accelerator, RunConfig().replace(**changes))


def test_what_deepspeed_can_do_is_not_refused():
    told = {"gradient_accumulation_steps": 4, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": 1}
    for stage in (1, 2, 3):
        check_zero(launched({"stage": stage}, told), RunConfig().replace(gradient_accumulation_steps=4))
    check_zero(launched({"stage": 3}), RunConfig().replace(init_lora_weights="pissa"))
    check_zero(launched({"stage": 3}), RunConfig().replace(load_in_4bit=True, bnb_4bit_quant_storage="float32"))


@pytest.mark.parametrize("asked", ["DeepSpeed", "FSDP"])
def test_compiled_blocks_are_refused_where_the_model_is_divided(monkeypatch, asked):
    accelerator = launched({})
    accelerator.is_main_process = True
    accelerator.distributed_type = DistributedType.DEEPSPEED if asked == "DeepSpeed" else DistributedType.MULTI_CPU
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(asked == "FSDP").lower())
    monkeypatch.setattr("copra_llm.launch.on_main", lambda accelerator, action: action())
    with pytest.raises(InputError, match="--torch_compile is for whole models.* leave one of the two out"):
        check_launch(accelerator, RunConfig().replace(torch_compile=True))


def test_the_engine_is_told_for_one_run():
    """The next run of the process finds the launch's own configuration."""
    accelerator = launched({}, {"gradient_clipping": "auto"})
    config = accelerator.deepspeed_plugin.deepspeed_config
    with engine_told(accelerator, RunConfig().replace(max_grad_norm=0.0, gradient_accumulation_steps=3).train):
        assert (config["gradient_clipping"], config["train_batch_size"]) == (0.0, 16 * 3 * 2)
    assert (config["gradient_clipping"], config["train_batch_size"]) == ("auto", "auto")


@pytest.mark.parametrize(
    "changes, said",
    [({"fsdp_version": 1}, "fsdp_version: 2"), ({"activation_checkpointing": True}, "--gradient_checkpointing")],
)
def test_what_fsdp_cannot_do_is_refused(changes: dict, said: str):
    plugin = {"fsdp_version": 2, "activation_checkpointing": False} | changes
    with pytest.raises(InputError, match=said):
        check_fsdp(SimpleNamespace(**plugin))


def test_one_base_on_all_processes(monkeypatch):
    """Machines may have unequal files under one name."""
    for found, said in ((["a", "a", "a"], None), (["a", "a", "b"], "process 2 .* hash b, but process 0 one with a")):
        monkeypatch.setattr(launch, "gather_object", lambda own, found=found: found)
        with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
            check_same_base(SimpleNamespace(num_processes=1), "a")


def test_a_group_without_a_gradient_is_left_out():
    """Where a missing gradient reads as zero, AdamW moves what has momentum; the grouped one does not."""
    moved = {}
    for kind, reached in ((torch.optim.AdamW, True), (GroupedAdamW, True), (GroupedAdamW, False)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([{"params": [p], "reached": True}], lr=0.1, weight_decay=0.1)
        p.grad = torch.ones(3)
        optimizer.step()
        before, p.grad = p.detach().clone(), torch.zeros(3)
        optimizer.param_groups[0]["reached"] = reached
        optimizer.step()
        moved[kind, reached] = not torch.equal(p, before), int(optimizer.state[p]["step"])
    assert moved == {(torch.optim.AdamW, True): (True, 2), (GroupedAdamW, True): (True, 2),
                     (GroupedAdamW, False): (False, 1)}  # fmt: skip
