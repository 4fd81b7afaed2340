"""`CopRACallback` under the real `Trainer` and TRL's real `SFTTrainer`: the adapter of a bare loop, bit for bit.

The bare loop takes the trainer's batches and its loss, with `LayerGates.applied` around each step.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
)

from copra_llm.callback import CopRACallback
from copra_llm.config import LoraSettings, ModelSettings
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.masks import sample_mask
from copra_llm.models import PACKAGED, add_adapter, load_base
from copra_llm.schedule import METHODS, Schedule

trl = pytest.importorskip("trl", reason="needs the extra trl: pip install copra_llm[trl]")

STEPS, BATCH, TOKENS, LAYERS = 8, 2, 9, 4
IDS = torch.arange(4, 4 + 2 * TOKENS).view(2, TOKENS)


def adapted(path: Path, seed: int = 0, **lora) -> PeftModel:
    """The tiny model with a fresh adapter and dropout: 4 blocks."""
    base = AutoModelForCausalLM.from_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"],
                                                  "lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | lora))  # fmt: skip


def token_data(examples: int, vocabulary: int = 300) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, vocabulary, (examples, TOKENS), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * TOKENS] * examples, "labels": ids})


def make_trainer(kind: str, model: nn.Module, path: Path, folder: Path, callbacks=(), accumulation: int = 1, **more):
    """A `Trainer` or `SFTTrainer` that takes the examples in their order."""
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.01,
        "gradient_accumulation_steps": accumulation, "weight_decay": 0.1, "max_grad_norm": 0.5, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "gradient_checkpointing": False, "lr_scheduler_type": "linear", "seed": 3,
    } | more  # fmt: skip
    data = token_data(STEPS * BATCH * accumulation)
    options = {"model": model, "train_dataset": data, "eval_dataset": data.select(range(4)), "callbacks": [*callbacks]}
    if kind == "trainer":
        args = TrainingArguments(bf16=False, **settings)
        return Trainer(args=args, data_collator=default_data_collator, **options)
    args = trl.SFTConfig(bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **settings)
    return trl.SFTTrainer(args=args, processing_class=AutoTokenizer.from_pretrained(path), **options)


def train(trainer, **options):
    """With the trainer's own warnings (deprecations of its libraries) unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer.train(**options)


def recipe_mask(step: int, method: str = "copra", seed: int = 0, layers: int = LAYERS, steps: int = STEPS):
    return sample_mask(METHODS[method](step / steps), layers, seed=seed, step=step)


def bare_loop(trainer, method: str, seed: int) -> dict[str, Tensor]:
    """CopRA by hand: this trainer's batches, loss and settings, no callback; the trained factors."""
    args, model = trainer.args, trainer.model
    gates = LayerGates(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    scheduler = get_scheduler("linear", optimizer, 0, args.max_steps)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    batches = iter(trainer.get_train_dataloader())
    model.train()
    torch.manual_seed(args.seed)
    for step in range(args.max_steps):
        micro = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        tokens = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in micro)
        with gates.applied(recipe_mask(step, method, seed)):
            for batch in micro:
                trainer.compute_loss(model, batch, num_items_in_batch=tokens).backward()
            nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    return factors(model)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


class Observer(TrainerCallback):
    """Which layers have a gradient when the optimizer steps, and what the step changes."""

    def __init__(self):
        self.active: list[list[bool]] = []
        self.moved: list[set[int]] = []
        self.touched: list[set[int]] = []
        self.seen: list[dict] = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = factors(model), self.moments(model, optimizer)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        with_grad = {layer_of(n) for n, p in model.named_parameters() if "lora_" in n and p.grad is not None}
        self.active.append([i in with_grad for i in range(LAYERS)])

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert all(p.grad is None for p in model.parameters())
        values, moments = self.before
        self.moved.append({layer_of(n) for n, p in factors(model).items() if not torch.equal(p, values[n])})
        now = self.moments(model, optimizer)
        same = {n: now[n].keys() == moments[n].keys() and all(torch.equal(now[n][k], moments[n][k]) for k in now[n])
                for n in now}  # fmt: skip
        self.touched.append({layer_of(n) for n in now if not same[n]})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    @staticmethod
    def moments(model, optimizer) -> dict[str, dict[str, Tensor]]:
        state = optimizer.optimizer.state if hasattr(optimizer, "optimizer") else optimizer.state
        return {
            name: {key: value.clone() for key, value in state.get(p, {}).items()}
            for name, p in model.named_parameters()
            if "lora_" in name
        }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untouched(model: nn.Module, classes: list[type]) -> bool:
    """No gate is closed and no hook left."""
    return [type(m) for m in model.modules()] == classes and not any(m._forward_pre_hooks for m in model.modules())


# --- the same adapter as a loop of one's own --------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "accumulation": {"accumulation": 3},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "both": {"accumulation": 2, "gradient_checkpointing": True,
             "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_the_adapter_is_the_bare_loops(tiny_llama, tmp_path, kind: str, settings: str):
    """Bit for bit: batches, loss, optimizer and masks are the same, dropout included."""
    more = SETTINGS[settings]
    observer = Observer()
    model = adapted(tiny_llama)
    classes = [type(m) for m in model.modules()]
    trainer = make_trainer(kind, model, tiny_llama, tmp_path, [CopRACallback(), observer], **more)
    torch.manual_seed(3)
    train(trainer)
    assert untouched(trainer.model, classes)
    bare = make_trainer(kind, adapted(tiny_llama), tiny_llama, tmp_path, **more)
    assert same(factors(trainer.model), bare_loop(bare, "copra", 0))
    assert observer.active == [recipe_mask(step).tolist() for step in range(STEPS)]


@pytest.mark.parametrize("method, seed", [("coto", 5), ("lora", 0), ("copra", 7)])
def test_method_and_seed(tiny_llama, tmp_path, method: str, seed: int):
    """Masks are the recipe's for every preset; "lora" is the trainer without a callback."""
    observer = Observer()
    callback = CopRACallback(method, seed=seed)
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [callback, observer])
    train(trainer)
    assert observer.active == [recipe_mask(step, method, seed).tolist() for step in range(STEPS)]
    plain = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path)
    train(plain)
    assert same(factors(plain.model), factors(trainer.model)) == (method == "lora")


def test_a_schedule_of_ones_own(tiny_llama, tmp_path):
    """Granularity, pattern and schedule go to the gates and the masks."""
    observer = Observer()
    callback = CopRACallback(Schedule(p_start=0.4, ramp_fraction=1.0), 2, "module", r"layers\.[23]")
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [callback, observer])
    train(trainer)
    for step, active in enumerate(observer.active):
        p = 0.4 + 0.6 * step / STEPS
        mask = sample_mask(p, 4, seed=2, step=step)  # q and v of two layers
        assert active == [True, True, bool(mask[:2].any()), bool(mask[2:].any())]
        assert trainer.state.log_history[step]["activation_prob"] == pytest.approx(p)


def test_inactive_layers_do_not_move(tiny_llama, tmp_path):
    """With momentum and weight decay: neither their factors nor their moments nor their step counts change."""
    observer = Observer()
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback(), observer],
                           weight_decay=0.5, accumulation=2)  # fmt: skip
    train(trainer)
    for step in range(STEPS):
        active = {i for i in range(LAYERS) if recipe_mask(step)[i]}
        assert observer.moved[step] == active and observer.touched[step] == active
    assert sum(map(len, observer.moved)) < STEPS * LAYERS
    # AdamW counts a layer's own active steps.
    state = trainer.optimizer.optimizer.state
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            assert int(state[p]["step"]) == sum(recipe_mask(step)[layer_of(name)] for step in range(STEPS))


# --- who meets the whole adapter --------------------------------------------------------------------------


@torch.no_grad()
def eval_loss(model: nn.Module) -> float:
    ids = torch.tensor(token_data(4)["input_ids"])
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def test_evaluation_and_checkpoints_in_the_middle_are_of_the_whole_adapter(tiny_llama, tmp_path):
    """Every step's dev loss is that of the checkpoint saved there, as plain PEFT loads it."""
    trainer = make_trainer(
        "trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback()],
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.2,
    )  # fmt: skip
    train(trainer)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == STEPS
    masked = []
    for step, loss in enumerate(losses):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        saved = PeftModel.from_pretrained(base, tmp_path / f"checkpoint-{step + 1}")
        # The trainer's loss is a sum over tokens by their number, the model's a mean: float32 rounding.
        assert loss == pytest.approx(eval_loss(saved), rel=1e-5)
        with LayerGates(saved).applied(recipe_mask(step)):
            masked.append(eval_loss(saved))
    apart = [abs(loss - other) > 1e-3 for loss, other in zip(losses, masked, strict=True)]
    # At step 0 no layer below the only active one has moved from B = 0.
    assert sum(apart) > STEPS // 4


class InTheMiddle(TrainerCallback):
    """Evaluates, generates and runs a reference pass between two micro-batches of a step."""

    def __init__(self, before: bool):
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.before = before

    @torch.no_grad()
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        plain = PeftModel.from_pretrained(copy.deepcopy(BASE[0]), self.saved(model)).train(False)
        whole = plain(input_ids=IDS).logits
        training = model.training
        dropout = torch.get_rng_state()
        self.outputs.append((model.eval()(input_ids=IDS).logits, whole))
        self.outputs.append((generate(model), generate(plain)))
        model.train(training)
        torch.set_rng_state(dropout)

    def saved(self, model) -> str:
        model.save_pretrained(BASE[1], save_embedding_layers=False)
        return BASE[1]


BASE: list = []


def generate(model: nn.Module) -> Tensor:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    return torch.stack(model.generate(input_ids=IDS, return_dict_in_generate=True, **options).logits)
