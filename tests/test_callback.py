"""`CopRACallback` under the real `Trainer` and TRL's real `SFTTrainer`: the adapter of a bare loop, bit for bit.

The bare loop takes the trainer's batches and its loss, with `LayerGates.applied` around each step.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

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
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.masks import sample_mask
from copra_llm.models import add_adapter, load_base
from copra_llm.schedule import METHODS, Schedule
from copra_llm.settings import LoraSettings, ModelSettings

trl = pytest.importorskip("trl", reason="needs the extra trl: pip install copra_llm[trl]")
# The name that TRL's settings still give a default of their own.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

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


def recipe_mask(step: int, method: str = "copra", seed: int = 0, layers: int = LAYERS, steps: int = STEPS):
    return sample_mask(METHODS[method](step / steps), layers, seed=seed, step=step)


def bare_loop(trainer, method: str, seed: int) -> dict[str, Tensor]:
    """CopRA by hand: this trainer's batches, loss and settings, no callback; the trained factors."""
    args, model = trainer.args, trainer.model
    gates = LayerGates(model, fused=True)
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
    """Which layers have a gradient when the optimizer steps, and what the step changes; gates are open after it."""

    def __init__(self):
        self.active: list[list[bool]] = []
        self.moved: list[set[int]] = []
        self.touched: list[set[int]] = []
        self.seen: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.classes = [type(m) for m in model.modules()]

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = factors(model), self.moments(model, optimizer)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        with_grad = {layer_of(n) for n, p in model.named_parameters() if "lora_" in n and p.grad is not None}
        self.active.append([i in with_grad for i in range(LAYERS)])

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert all(p.grad is None for p in model.parameters())
        assert [type(m) for m in model.modules()] == self.classes
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
    trainer.train()
    assert untouched(trainer.model, classes)
    bare = make_trainer(kind, adapted(tiny_llama), tiny_llama, tmp_path, **more)
    assert same(factors(trainer.model), bare_loop(bare, "copra", 0))
    assert observer.active == [recipe_mask(step).tolist() for step in range(STEPS)]


@pytest.mark.parametrize("method, seed", [("coto", 5), ("lora", 0), ("copra", 7)])
def test_method_and_seed(tiny_llama, tmp_path, method: str, seed: int):
    """Masks are the recipe's for every preset; "lora", on PEFT's own forward, is the trainer without a callback."""
    observer = Observer()
    callback = CopRACallback(method, seed=seed, fused=False)
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [callback, observer])
    trainer.train()
    assert observer.active == [recipe_mask(step, method, seed).tolist() for step in range(STEPS)]
    plain = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path)
    plain.train()
    assert same(factors(plain.model), factors(trainer.model)) == (method == "lora")


def test_too_few_steps_for_the_schedule_are_logged_once(tiny_llama, tmp_path, caplog):
    for method in ("copra", "lora"):
        trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback(method)])
        trainer.train()
    (said,) = [r.getMessage() for r in caplog.records if r.name == "copra_llm.callback"]
    assert said.startswith(f"of {STEPS} steps each of the {LAYERS} layers takes part in some")


def test_a_schedule_of_ones_own(tiny_llama, tmp_path):
    """Granularity, pattern and schedule go to the gates and the masks."""
    observer = Observer()
    callback = CopRACallback(Schedule(p_start=0.4, ramp_fraction=1.0), 2, "module", r"layers\.[23]")
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [callback, observer])
    trainer.train()
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
    trainer.train()
    for step in range(STEPS):
        active = {i for i in range(LAYERS) if recipe_mask(step)[i]}
        assert observer.moved[step] == active and observer.touched[step] == active
    assert sum(map(len, observer.moved)) < STEPS * LAYERS
    # AdamW counts a layer's own active steps.
    state = trainer.optimizer.optimizer.state
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            assert int(state[p]["step"]) == sum(recipe_mask(step)[layer_of(name)] for step in range(STEPS))


ON_TWO_PROCESSES = """
import json, sys
from pathlib import Path
from test_callback import CopRACallback, Observer, adapted, factors, make_trainer
path, folder = map(Path, sys.argv[1:])
observer = Observer()
trainer = make_trainer("trainer", adapted(path, lora_dropout=0.0), path, folder, [CopRACallback(), observer],
                       accumulation=2, weight_decay=0.5, ddp_backend="gloo")
trainer.train()
sums = {name: p.double().sum().item() for name, p in factors(trainer.model).items()}
seen = {"wrapper": type(trainer.model_wrapped).__name__, "active": observer.active, "sums": sums,
        "moved": [sorted(layers) for layers in observer.moved]}
(folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_two_processes(tiny_llama, tmp_path):
    """Under DDP both processes draw the recipe's masks, hold the same adapter, and inactive layers stand still."""
    tests = Path(__file__).parent
    (tmp_path / "run.py").write_text(ON_TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([*launch, str(tmp_path / "run.py"), str(tiny_llama), str(tmp_path)],
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first == second and first["wrapper"] == "DistributedDataParallel"
    assert first["active"] == [recipe_mask(step).tolist() for step in range(STEPS)]
    assert first["moved"] == [[i for i in range(LAYERS) if recipe_mask(step)[i]] for step in range(STEPS)]


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
    trainer.train()
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
    # Elsewhere, what the mask leaves out has not been trained yet, or nothing is left out.
    assert sum(apart) >= 2


class InTheMiddle(TrainerCallback):
    """Evaluates, generates and runs a pass in training mode without a graph, between two micro-batches of a step.

    Args:
        reference: another model of the same adapter's shape, which no gate ever closes.
    """

    def __init__(self, reference: nn.Module):
        self.reference = reference
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        for name, p in self.reference.named_parameters():
            if "lora_" in name:
                p.data.copy_(model.get_parameter(name))
        self.pairs.append((self.answers(model), self.answers(self.reference)))

    @staticmethod
    @torch.no_grad()
    def answers(model: nn.Module) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            in_training = model.train()(input_ids=IDS).logits
            evaluated = model.eval()(input_ids=IDS).logits
            sampled = generate(model)
        model.train()
        return torch.cat([in_training.flatten(), evaluated.flatten(), sampled.flatten()])


def generate(model: nn.Module) -> Tensor:
    """Logits of three tokens, `(tokens, batch, vocabulary)`."""
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    return torch.stack(model.generate(input_ids=IDS, return_dict_in_generate=True, **options).logits)


def test_what_runs_in_the_middle_of_a_step_sees_the_whole_adapter(tiny_llama, tmp_path):
    """Evaluation, generation and a reference pass between micro-batches; the step goes on with its mask."""
    more = SETTINGS["both"] | {"learning_rate": 0.2}
    middle = InTheMiddle(adapted(tiny_llama))
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback(), middle], **more)
    torch.manual_seed(3)
    trainer.train()
    assert len(middle.pairs) == STEPS and all(torch.equal(a, b) for a, b in middle.pairs)
    assert not torch.equal(middle.pairs[0][0], middle.pairs[-1][0])
    bare = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, **more)
    assert same(factors(trainer.model), bare_loop(bare, "copra", 0))


class ReferencePass(Trainer):
    """A loss with a pass of the same model without a graph between its forward and its backward pass."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad(), torch.random.fork_rng():
            model(**inputs)
        return loss


def test_recomputation_after_a_reference_pass_has_the_steps_mask(tiny_llama, tmp_path, monkeypatch):
    """The backward pass runs forward again: the gates that the reference pass opened are closed by then."""
    more = SETTINGS["checkpointing"]
    plain = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback()], **more)
    plain.train()
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.Trainer", ReferencePass)
        trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback()], **more)
    assert type(trainer) is ReferencePass
    trainer.train()
    assert same(factors(trainer.model), factors(plain.model))


class Copying(TrainerCallback):
    """Copies the model between two micro-batches of each step, as an average of the weights would."""

    def __init__(self):
        self.copies: list[nn.Module] = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.copies.append(copy.deepcopy(model))


def test_a_copy_of_the_model_is_whole(tiny_llama, tmp_path):
    """Made in the middle of a step, with gates closed, used then or later; the model itself keeps its mask."""
    copying, observer = Copying(), Observer()
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback(), copying, observer],
                           accumulation=2, learning_rate=0.2)  # fmt: skip
    trainer.train()
    assert observer.active == [recipe_mask(step).tolist() for step in range(STEPS)]
    assert len(copying.copies) == STEPS
    for copied in copying.copies:
        other = same_adapter_elsewhere(copied, tiny_llama)
        assert torch.equal(copied.eval()(input_ids=IDS).logits, other.eval()(input_ids=IDS).logits)
        assert untouched(copied, observer.classes)


def test_an_adapter_of_transformers_own(tiny_llama, tmp_path):
    """`model.add_adapter` puts the same layers into a model that PEFT does not wrap."""
    model, observer = AutoModelForCausalLM.from_pretrained(tiny_llama), Observer()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer("trainer", model, tiny_llama, tmp_path, [CopRACallback(), observer])
    trainer.train()
    assert observer.active == [recipe_mask(step).tolist() for step in range(STEPS)]
    assert untouched(model, observer.classes)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resumed_is_uninterrupted(tiny_llama, tmp_path, kind: str):
    """From a checkpoint in the middle, a new process' trainer draws the masks of the steps to come."""
    whole = make_trainer(kind, adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback()], save_steps=3,
                         save_strategy="steps")  # fmt: skip
    whole.train()
    observer = Observer()
    model = adapted(tiny_llama, seed=9)
    resumed = make_trainer(kind, model, tiny_llama, tmp_path, [CopRACallback(), observer])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert observer.active == [recipe_mask(step).tolist() for step in range(3, STEPS)]
    assert same(factors(resumed.model), factors(whole.model))


# --- after an error ---------------------------------------------------------------------------------------


class Failing(TrainerCallback):
    """Ends the run at a step with few active layers: between micro-batches, in the forward or the backward pass."""

    def __init__(self, where: str, error: BaseException):
        self.where, self.error = where, error

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != 2:
            return
        last = model.get_base_model().lm_head
        if self.where == "forward":
            self.hook = last.register_forward_pre_hook(self.fail)
        elif self.where == "backward":
            self.hook = last.register_full_backward_pre_hook(self.fail)

    def on_substep_end(self, args, state, control, **kwargs):
        if self.where == "between" and state.global_step == 2:
            raise self.error

    def fail(self, *args):
        self.hook.remove()
        raise self.error


@pytest.fixture(params=["forward", "backward", "between"])
def interrupted(request, tiny_llama, tmp_path):
    """A trainer that an interrupt has stopped in the middle of step 2, and the classes of its model before."""
    model = adapted(tiny_llama)
    classes = [type(m) for m in model.modules()]
    failing = Failing(request.param, KeyboardInterrupt() if request.param != "between" else RuntimeError("broken"))
    trainer = make_trainer("trainer", model, tiny_llama, tmp_path, [CopRACallback(), failing], 2, learning_rate=0.2)
    with pytest.raises(type(failing.error)):
        trainer.train()
    assert recipe_mask(2).sum() < LAYERS
    return trainer, classes


def same_adapter_elsewhere(model: nn.Module, path: Path) -> nn.Module:
    """A model of the same adapter that no callback has seen."""
    other = adapted(path)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("mode", ["train", "eval", "generate"])
def test_an_interrupted_model_is_whole(interrupted, tiny_llama, mode: str):
    """No callback hears of the error: the next pass finds that training has ended."""
    model, classes = interrupted[0].model, interrupted[1]
    other = same_adapter_elsewhere(model, tiny_llama)
    outputs = []
    for m in (model, other):
        torch.manual_seed(0)
        m.train(mode != "eval")
        outputs.append(generate(m) if mode == "generate" else m(input_ids=IDS).logits)
    assert torch.equal(*outputs)
    assert untouched(model, classes)


def test_a_copy_of_an_interrupted_model_is_whole(interrupted, tiny_llama):
    """The copy knows of no run, and opens its gates by itself."""
    copied = copy.deepcopy(interrupted[0].model).eval()
    other = same_adapter_elsewhere(copied, tiny_llama).eval()
    assert torch.equal(copied(input_ids=IDS).logits, other(input_ids=IDS).logits)
    assert untouched(copied, interrupted[1])


def test_an_interrupted_model_trains_on_elsewhere(interrupted, tiny_llama, tmp_path):
    """A second trainer without the callback trains every layer; one with it goes on as if nothing had been."""
    model, classes = interrupted[0].model, interrupted[1]
    other = same_adapter_elsewhere(model, tiny_llama)
    for callbacks in ([], [CopRACallback()]):
        for m in (model, other):
            make_trainer("trainer", m, tiny_llama, tmp_path, callbacks).train()
        assert same(factors(model), factors(other)) and untouched(model, classes)


def test_the_stopped_trainer_may_train_again(interrupted):
    """`train()` called once more draws its masks from the start, and leaves the model whole."""
    trainer, classes = interrupted
    observer = Observer()
    trainer.remove_callback(Failing)
    trainer.add_callback(observer)
    trainer.train()
    assert observer.active == [recipe_mask(step).tolist() for step in range(STEPS)]
    assert untouched(trainer.model, classes)


# --- logs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_logs(tiny_llama, tmp_path, kind: str):
    """Training entries, in the history and for the callbacks that come after; no others."""
    observer = Observer()
    trainer = make_trainer(kind, adapted(tiny_llama), tiny_llama, tmp_path, [CopRACallback("coto"), observer],
                           eval_strategy="steps", eval_steps=4)  # fmt: skip
    trainer.train()
    for entries in (trainer.state.log_history, observer.seen):
        training = [entry for entry in entries if "loss" in entry]
        assert [entry["active_layers"] for entry in training] == [
            int(recipe_mask(step, "coto").sum()) for step in range(STEPS)
        ]
        assert [entry["activation_prob"] for entry in training] == [METHODS["coto"](s / STEPS) for s in range(STEPS)]
        rest = [entry for entry in entries if "loss" not in entry]
        assert len(rest) == 3 and not any("active_layers" in entry for entry in rest)  # two of dev, the summary


# --- what is refused --------------------------------------------------------------------------------------


def no_adapter(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path)


def of_another_kind(path: Path) -> nn.Module:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return get_peft_model(no_adapter(path), config)


REFUSED = {
    "no adapter": (no_adapter, {}, "no LoRA module inside a numbered transformer block.*attach an adapter first"),
    "ia3": (of_another_kind, {}, r"layers\.0.*q_proj has an adapter that is not LoRA.*give the model LoRA"),
    "deepspeed": (adapted, {"deepspeed_plugin": object()}, "DeepSpeed flattens.*inactive layers would move"),
    "fsdp": (adapted, {"fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP version 1 flattens.*set fsdp_version to 2"),
    "data parallel": (adapted, {"_n_gpu": 2}, "2 GPUs of one process.*accelerate launch"),
    "compiled": (adapted, {"torch_compile": True}, "torch_compile would compile.*leave it off"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(tiny_llama, tmp_path, case: str):
    """One sentence; the model stays as it was."""
    make, changed, sentence = REFUSED[case]
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path)
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    model, state = make(tiny_llama), trainer.state
    state.max_steps = STEPS
    before = [type(m) for m in model.modules()]
    with pytest.raises(InputError, match=sentence) as error:
        CopRACallback().on_train_begin(trainer.args, state, trainer.control, model=model)
    assert "\n" not in str(error.value) and untouched(model, before)


def test_fsdp_of_the_launcher_is_seen(tiny_llama, tmp_path, monkeypatch):
    """`accelerate launch --use_fsdp` says so in the environment; version 2 is allowed."""
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path)
    trainer.state.max_steps = STEPS
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version, refused in (("1", True), ("2", False)):
        monkeypatch.setenv("FSDP_VERSION", version)
        callback = CopRACallback()
        begin = {"model": trainer.model}
        if refused:
            with pytest.raises(InputError, match="FSDP version 1"):
                callback.on_train_begin(trainer.args, trainer.state, trainer.control, **begin)
        else:
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, **begin)
            callback.on_train_end(trainer.args, trainer.state, trainer.control)


def test_unknown_number_of_steps(tiny_llama, tmp_path):
    """p(t) needs T."""
    trainer = make_trainer("trainer", adapted(tiny_llama), tiny_llama, tmp_path)
    trainer.state.max_steps = -1
    with pytest.raises(InputError, match="does not know its number of steps.*give max_steps"):
        CopRACallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("wrong, sentence", [
    ({"method": "corpa"}, r'method is "corpa" \(did you mean "copra"\?\), but must be one of lora, copra, coto'),
    ({"seed": -1}, "seed is -1, but must be at least 0"),
])  # fmt: skip
def test_wrong_settings(wrong: dict, sentence: str):
    with pytest.raises(InputError, match=sentence):
        CopRACallback(**wrong)


# --- a real model -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(tmp_path):
    """SmolLM2 under `SFTTrainer` on texts: the recipe's masks over 30 layers, a loss that falls, a plain adapter."""
    base = load_base(ModelSettings(model_name_or_path="smollm2"))
    model = add_adapter(base, LoraSettings(lora_r=4), init_seed=0)
    texts = [{"text": f"Question: what is {i} and {i}?\nAnswer: {2 * i}."} for i in range(24)]
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-3,
                         report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no")  # fmt: skip
    trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(texts), processing_class=base.tokenizer,
                             callbacks=[CopRACallback(seed=1)])  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = [int(recipe_mask(step, seed=1, layers=30, steps=6).sum()) for step in range(6)]
    assert [entry["active_layers"] for entry in logs] == expected
    assert logs[-1]["loss"] < logs[0]["loss"]
    trainer.save_model(tmp_path / "adapter")
    ids = base.tokenizer(texts[0]["text"], return_tensors="pt")
    with torch.no_grad():
        ours = trainer.model.eval()(**ids).logits
        fresh = load_base(ModelSettings(model_name_or_path="smollm2")).model
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(**ids).logits
    assert torch.equal(ours, loaded)
