"""Which settings does a run have, in which units, and which of them contradict each other?

Each group is a frozen dataclass owned by the part that reads it. The flags bear the names that users of
transformers, PEFT and TRL know.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from copra_llm.errors import InputError, nearest, shown
from copra_llm.schedule import METHODS, Schedule


def setting(default: Any, help: str, alias: str | None = None) -> Any:
    """A dataclass field whose help text serves both `--help` and the reader; `alias` is another name for it."""
    metadata = {"help": help} | ({"aliases": [f"--{alias}", f"--{alias.replace('_', '-')}"]} if alias else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


FLOATS = ("float32", "bfloat16", "float16")
"""Types that a base can be loaded and computed in."""


@dataclass(frozen=True)
class ModelSettings:
    model_name_or_path: str = setting("minilm", "Hub id, folder, .gguf file, or a packaged model: minilm, smollm2.")
    dtype: str = setting("float32", "Type the frozen base is loaded in: float32, bfloat16 or float16.")
    attn_implementation: str | None = setting(None, "sdpa, eager, flash_attention_2, ...; unset: the model's default.")
    trust_remote_code: bool = setting(False, "Run code that comes with a Hub model.")
    load_in_4bit: bool = setting(False, "Hold the frozen base in 4 bits (QLoRA; needs bitsandbytes).")
    load_in_8bit: bool = setting(False, "Hold the frozen base in 8 bits (needs bitsandbytes).")
    bnb_4bit_quant_type: str = setting("nf4", "4-bit numbers: nf4 or fp4.")
    bnb_4bit_use_double_quant: bool = setting(
        True, "Quantise the 4-bit blocks' scales too; TRL's name for it is accepted.", alias="use_bnb_nested_quant"
    )
    bnb_4bit_compute_dtype: str | None = setting(None, "Type of 4-bit layers' products; unset: --dtype.")
    bnb_4bit_quant_storage: str | None = setting(
        None, "Type in which 4-bit numbers are packed; ZeRO-3 needs that of --dtype; unset: uint8."
    )

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_4bit and --load_in_8bit were both given; choose one")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(f'--bnb_4bit_quant_type is "{self.bnb_4bit_quant_type}", but must be nf4 or fp4')
        for name, types in (("bnb_4bit_compute_dtype", FLOATS), ("bnb_4bit_quant_storage", ("uint8", *FLOATS))):
            value = getattr(self, name)
            if value is not None and value not in types:
                raise InputError(f'--{name} is "{value}", but must be one of {", ".join(types)}')
            if value is not None and not self.load_in_4bit:
                raise InputError(f"--{name} is {value}, but nothing is held in 4 bits; give --load_in_4bit too")


@dataclass(frozen=True)
class LoraSettings:
    lora_r: int = setting(8, "Rank of each adapter.")
    lora_alpha: float = setting(16, "Scaling numerator: scaling = alpha / r (alpha / sqrt(r) with rsLoRA).")
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input, in [0, 1).")
    lora_target_modules: list[str] = setting(
        ["qkv"], 'Module names; "qkv": the attention\'s query, key and value; "all-linear": every linear layer.'
    )
    lora_layers_to_transform: list[int] | None = setting(
        None, "Adapt these transformer blocks alone, by their index (in every tower); unset: all."
    )
    use_rslora: bool = setting(False, "Rank-stabilised scaling.")
    use_dora: bool = setting(False, "Weight-decomposed LoRA (DoRA).")
    init_lora_weights: str = setting(
        "default",
        "Where A and B start: default (A random, B zero), gaussian, orthogonal, olora, pissa or pissa_niter_N (its SVD "
        "by N power iterations).",
    )

    def __post_init__(self):
        if self.lora_r < 1:
            raise InputError(f"--lora_r is {self.lora_r}, but a rank must be at least 1")
        if not re.fullmatch(r"default|gaussian|orthogonal|olora|pissa(_niter_\d+)?", self.init_lora_weights):
            known = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16")
            hint = nearest(self.init_lora_weights, known)
            raise InputError(f'--init_lora_weights is "{self.init_lora_weights}"{hint}, but must be default, gaussian, '
                             "orthogonal, olora, pissa or pissa_niter_N")  # fmt: skip
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            raise InputError(f"--init_lora_weights orthogonal needs an even rank, but --lora_r is {self.lora_r}")
        if not 0.0 < self.lora_alpha < math.inf:
            raise InputError(f"--lora_alpha is {self.lora_alpha}, but must be positive")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise InputError(f"--lora_dropout is {self.lora_dropout}, but must lie in [0, 1)")
        if not self.lora_target_modules:
            raise InputError("--lora_target_modules is empty; name at least one module")
        layers = self.lora_layers_to_transform
        if layers is not None and (not layers or min(layers) < 0):
            raise InputError(f"--lora_layers_to_transform is {layers}, but must name at least one block, from 0 on")
        if layers is not None and self.lora_target_modules == ["all-linear"]:
            raise InputError("--lora_layers_to_transform needs modules by name; name them in --lora_target_modules")

    @property
    def changes_base(self) -> bool:
        """Whether the start takes part of the base's weights into the adapter (PiSSA, OLoRA)."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)


@dataclass(frozen=True)
class ScheduleSettings:
    method: str = setting("copra", "lora, copra or coto: presets of the four settings below.")
    p_start: float | None = setting(None, "Activation probability at step 0; unset: the method's.")
    p_end: float | None = setting(None, "Activation probability after the ramp; unset: the method's.")
    ramp_fraction: float | None = setting(None, "Fraction of the steps spent ramping, in (0, 1]; unset: the method's.")
    ramp_shape: str | None = setting(None, "linear, exponential, cosine, constant or reversed; unset: the method's.")
    depth_spread: float = setting(
        0.0, "Ablation: part of the ramp by which the last layer begins later than the first, in (-1, 1)."
    )
    rescale_active: bool = setting(
        False, "Ablation: scale an active layer by 1 / its share of active steps, as dropout scales what it leaves."
    )
    rate_compensation: float = setting(
        0.0, "Ablation: divide the learning rate by this power, in [0, 1], of the layers' share of active steps."
    )
    mask_per: str = setting("step", "What a mask is drawn for: step, or (ablation) each example of a batch: example.")
    granularity: str = setting("layer", "What one gate switches: layer (a transformer block) or module.")
    layer_pattern: str | None = setting(None, "Regular expression whose match ends a layer's name; unset: an integer.")
    stochastic_depth: float | None = setting(
        None, "Ablation of plain LoRA: leave out whole blocks, the last one at this rate in (0, 1), the first rarely."
    )

    def __post_init__(self):
        self.schedule()
        if self.granularity not in ("layer", "module"):
            raise InputError(f"--granularity is {self.granularity!r}, but must be layer or module")
        if not 0.0 <= self.rate_compensation <= 1.0:
            raise InputError(f"--rate_compensation is {self.rate_compensation:g}, but must lie in [0, 1]")
        if self.rate_compensation and self.depth_spread:
            raise InputError("--rate_compensation needs one share of active steps for all layers, but --depth_spread "
                             "gives each its own; give one of them")  # fmt: skip
        if self.mask_per not in ("step", "example"):
            raise InputError(f"--mask_per is {self.mask_per!r}, but must be step or example")
        if self.mask_per == "example" and self.rate_compensation:
            raise InputError("--rate_compensation makes up for steps in which a layer does not move, but with "
                             "--mask_per example it moves in nearly all; give one of them")  # fmt: skip
        if self.stochastic_depth is not None:
            if not 0.0 < self.stochastic_depth < 1.0:
                raise InputError(f"--stochastic_depth is {self.stochastic_depth:g}, but must lie in (0, 1)")
            if self.schedule() != METHODS["lora"] or self.granularity != "layer":
                raise InputError("--stochastic_depth leaves out blocks of plain LoRA, but this method leaves out "
                                 "adapters; give --method lora alone, or no --stochastic_depth")  # fmt: skip
        try:
            re.compile(self.layer_pattern or "")
        except re.error as error:
            raise InputError(
                f"--layer_pattern is {self.layer_pattern!r}, which is no regular expression: {error}"
            ) from None

    def schedule(self) -> Schedule:
        """The method's schedule with the settings that were given in its place."""
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        given = {"p_start": self.p_start, "p_end": self.p_end, "ramp_fraction": self.ramp_fraction,
                 "depth_spread": self.depth_spread or None}  # fmt: skip
        given = {key: value for key, value in given.items() if value is not None}
        if self.ramp_shape is not None:
            given["shape"] = self.ramp_shape
        return dataclasses.replace(METHODS[self.method], **given)


@dataclass(frozen=True)
class DataSettings:
    tasks: list[str] = setting(["sst2"], "Tasks of the benchmark; each gets its own adapter unless --joint.")
    joint: bool = setting(False, "Train one adapter on all the tasks together.")
    data_root: str | None = setting(
        None, 'The benchmark\'s folder, "sample" (ships with the package) or "hub"; unset: $COPRA_DATA, else sample.'
    )
    max_length: int = setting(128, "Longest input in tokens; longer ones are cut in their longest text field.")
    max_train_samples: int | None = setting(None, "Use this many training examples; unset: all.")
    max_eval_samples: int | None = setting(None, "Use this many dev and test examples each; unset: all.")
    head: str = setting("auto", "Encoders' fixed head: label_words, random, or auto (see the README).")
    train_head: bool = setting(False, "Train the encoder's head too; adapters with unequal heads cannot be merged.")
    head_seed: int = setting(0, "Seed of a random head; runs whose adapters are to be merged must share it.")

    def __post_init__(self):
        if not self.tasks:
            raise InputError("--tasks is empty; name at least one task")
        # Each becomes the name of a folder.
        bad = next((task for task in self.tasks if not re.fullmatch(r"\w[\w.+-]{0,99}", task)), None)
        if bad is not None:
            raise InputError(f"--tasks names {shown(bad)}, but a task's name must be of letters, digits, _, -, + and .")
        twice = next((task for i, task in enumerate(self.tasks) if task in self.tasks[:i]), None)
        if twice is not None:
            raise InputError(f"--tasks names {twice} twice; name each task once")
        for name in ("max_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 1")


@dataclass(frozen=True)
class PartSettings:
    """Which part a run is of something larger: of the training data, and of a longer run."""

    num_clients: int = setting(1, "Divide the training data among this many clients of federated learning, ...")
    client: int = setting(0, "... and train on the share of this one, counted from 0.")
    client_split: str = setting("iid", "How the data are divided: iid, or dirichlet (each client favours some labels).")
    dirichlet_beta: float = setting(0.5, "Concentration of the dirichlet split: small, and a client sees few labels.")
    split_seed: int = setting(0, "Seed of the division; the same for all its clients.")
    schedule_span: list[float] = setting(
        [0.0, 1.0],
        "Start and end in [0, 1] of this run within a longer one: p(t), learning rate, masks and data order go on.",
    )
    init_adapter: str | None = setting(
        None, "Start from this saved adapter's weights (ranks and targets must be the same); unset: from fresh ones."
    )

    def __post_init__(self):
        if self.num_clients < 1:
            raise InputError(f"--num_clients is {self.num_clients}, but must be at least 1")
        if not 0 <= self.client < self.num_clients:
            raise InputError(f"--client is {self.client}, but --num_clients {self.num_clients} leaves 0 to "
                             f"{self.num_clients - 1}")  # fmt: skip
        if self.client_split not in CLIENT_SPLITS:
            hint = nearest(self.client_split, CLIENT_SPLITS)
            raise InputError(f'--client_split is "{self.client_split}"{hint}, but must be iid or dirichlet')
        if not 0.0 < self.dirichlet_beta < math.inf:
            raise InputError(f"--dirichlet_beta is {self.dirichlet_beta}, but must be positive")
        if not 0 <= self.split_seed < 2**64:
            raise InputError(f"--split_seed is {self.split_seed}, but must lie in [0, 2**64)")
        if len(self.schedule_span) != 2 or not 0.0 <= self.schedule_span[0] < self.schedule_span[1] <= 1.0:
            raise InputError(f"--schedule_span is {self.schedule_span}, but must be a start and a later end in [0, 1]")

    def span_in_steps(self, steps: int) -> tuple[int, int]:
        """`(first, whole)`: this run's `steps` are the steps `first ... first + steps - 1` of a run of `whole`."""
        start, end = self.schedule_span
        whole = round(steps / (end - start))
        return round(start * whole), whole


@dataclass(frozen=True)
class InstructSettings:
    """Conversations to train on; of `recipes/train_instruct.py`."""

    dataset_name: list[str] = setting(
        [], "Training data: files, folders or Hub ids, each with an optional :weight, or a YAML file that lists them."
    )
    dataset_format: str | None = setting(
        None, "messages, sharegpt, prompt_completion, alpaca, dolly, question_answer or text; unset: by the columns."
    )
    eval_dataset_name: list[str] = setting([], "Dev data, as above; unset: --dev_size of the training examples.")
    test_dataset_name: list[str] = setting([], "Test data, as above; unset: none.")
    dev_size: int = setting(200, "Training examples held out as dev data where no --eval_dataset_name is given.")
    dev_seed: int = setting(0, "Seed of which examples are held out; runs that are compared must share it.")
    chat_template: str | None = setting(None, "chatml, plain, alpaca, or a file; unset: the tokenizer's own.")
    turns: str = setting("all", "Which of the assistant's turns are trained: all, or the last.")
    too_long: str = setting("cut", "What happens to examples above --max_length: cut, or drop.")
    packing: bool = setting(False, "Fill rows of --max_length tokens with several examples, kept apart.")
    sample_prompts: list[str] = setting(
        [],
        "Answered at every --eval_steps and at the end: texts, .txt files with a prompt a line, or files of records.",
    )
    max_new_tokens: int = setting(128, "Most tokens of an answer to --sample_prompts.")

    def __post_init__(self):
        if not self.dataset_name:
            raise InputError("--dataset_name is empty; name a file, folder or Hub id with training data")
        if self.dev_size < 1:
            raise InputError(f"--dev_size is {self.dev_size}, but must be at least 1")
        if self.max_new_tokens < 1:
            raise InputError(f"--max_new_tokens is {self.max_new_tokens}, but must be at least 1")


@dataclass(frozen=True)
class ImageSettings:
    """Images to classify with a dual encoder; of `recipes/train_clip.py`."""

    dataset_name: list[str] = setting(
        [], "A folder with a folder of images a class, or a Hub id, instead of a set of the benchmark."
    )
    shots: int | None = setting(None, "Training images of each class (dev: at most 4 of them); unset: all.")
    shot_seed: int | None = setting(
        None, "Seed of which training images are taken; unset: the data seed, so runs of other seeds see other images."
    )
    encoder: str = setting("both", "Which towers get adapters: both, vision or text.")
    template: str | None = setting(None, "Prompt of a class, with {} for its name; unset: the data set's own.")
    image_cache_bytes: int = setting(2**31, "Decoded images kept in memory, in bytes; those beyond are decoded anew.")

    def __post_init__(self):
        if self.shots is not None and self.shots < 1:
            raise InputError(f"--shots is {self.shots}, but must be at least 1")
        if self.image_cache_bytes < 0:
            raise InputError(f"--image_cache_bytes is {self.image_cache_bytes}, but must not be negative")
        if self.shot_seed is not None and not 0 <= self.shot_seed < 2**64:
            raise InputError(f"--shot_seed is {self.shot_seed}, but must lie in [0, 2**64)")
        if self.encoder not in ENCODERS:
            hint = nearest(self.encoder, ENCODERS)
            raise InputError(f'--encoder is "{self.encoder}"{hint}, but must be both, vision or text')
        if self.template is not None and self.template.count("{}") != 1:
            raise InputError(f'--template is "{self.template}", but must have one {{}} for the name of the class')


ENCODERS = ("both", "vision", "text")
"""Towers of a dual encoder that can be adapted."""
CLIENT_SPLITS = ("iid", "dirichlet")
"""Ways to divide the training data among clients; `shards.py` says how."""
FLOORED = "cosine_with_min_lr"
"""The scheduler that ends at `min_lr`."""
SCHEDULERS = ("linear", "cosine", FLOORED, "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt")  # fmt: skip
"""Those of transformers.get_scheduler that need nothing beyond the numbers of steps, and the floor."""


@dataclass(frozen=True)
class TrainSettings:
    output_dir: str = setting("runs", "Where OUTPUT/<task>/ is written.")
    max_steps: int = setting(-1, "Optimizer steps; -1: --num_train_epochs decides.")
    num_train_epochs: float = setting(3.0, "Passes over the training data, if --max_steps is -1.")
    per_device_train_batch_size: int = setting(16, "Examples a device takes in one forward pass.")
    per_device_eval_batch_size: int = setting(64, "Most examples a device takes in one evaluation pass.")
    gradient_accumulation_steps: int = setting(1, "Forward passes to one optimizer step; they share one mask.")
    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW.")
    loraplus_lr_ratio: float | None = setting(None, "LoRA+: the factors B learn so many times faster; unset: alike.")
    lr_scheduler_type: str = setting("cosine", f"One of {', '.join(SCHEDULERS)}.")
    min_lr: float = setting(0.0, f"Learning rate at the end of {FLOORED}; 0 for all others.")
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay.")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm (of the active layers); 0: never.")
    bf16: bool = setting(False, "Mixed precision in bfloat16.")
    fp16: bool = setting(False, "Mixed precision in float16 (needs a GPU).")
    neftune_noise_alpha: float | None = setting(
        None, "NEFTune: noise of this size on the embeddings while training; unset: none."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    use_fused_lora: bool = setting(
        True, "Compute an adapted linear layer in one pass, equal to PEFT's up to rounding; false: PEFT's own."
    )
    use_liger_kernel: bool = setting(
        False, "Liger's kernels for norms, rotary positions and MLPs (needs a GPU and liger-kernel)."
    )
    torch_compile: bool = setting(
        False, "Compile each transformer block (torch.compile): some time at first, less in each step of a long run."
    )
    torch_compile_backend: str = setting("inductor", "Backend of --torch_compile.")
    dataloader_num_workers: int = setting(
        0, "Processes that prepare batches ahead (decode images, pad texts); 0: the one that trains."
    )
    dataloader_pin_memory: bool = setting(
        True, "Put batches into pinned memory, from which a GPU copies them while it computes; without one: no effect."
    )
    dataloader_prefetch_factor: int | None = setting(
        None, "Batches that each of --dataloader_num_workers is ahead; unset: 2."
    )
    seed: int = setting(0, "Feeds the three seeds below where they are unset.")
    init_seed: int | None = setting(None, "Seed of the adapter's initialisation.")
    data_seed: int | None = setting(None, "Seed of the data order and of dropout.")
    mask_seed: int | None = setting(None, "Seed of the masks.")
    logging_steps: int = setting(10, "Optimizer steps between log entries.")
    eval_steps: int | None = setting(None, "Optimizer steps between evaluations on dev; unset: at the end only.")
    load_best_model_at_end: bool = setting(
        False, "End with the adapter of the least dev loss among --eval_steps' after the ramp, not with the last one."
    )
    early_stopping_patience: int | None = setting(
        None, "Stop after so many evaluations without a new best one, and end with the best; unset: never."
    )
    save_steps: int | None = setting(None, "Optimizer steps between checkpoints; unset: at --checkpoint_at only.")
    save_total_limit: int | None = setting(None, "Keep this many of the newest --save_steps checkpoints; unset: all.")
    checkpoint_at: list[float] = setting(
        [0.25], "Keep the adapter at these fractions of the run; 0.25 is the paper's Early CopRA."
    )
    resume_from_checkpoint: str | None = setting(
        None, 'A checkpoint folder, or "latest": the newest one of each run, if there is one.'
    )
    ddp_timeout: int = setting(1800, "Seconds after which a process that waits for another one gives up.")
    max_nonfinite_steps: int = setting(10, "Stop after this many steps whose loss was not finite.")
    metrics: list[str] = setting([], "More metrics, by evaluate's names or script paths: f1, matthews_correlation.")
    report_to: list[str] = setting([], "Trackers: tensorboard, wandb.")

    def __post_init__(self):
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (
            *positive,
            "logging_steps",
            "max_nonfinite_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "early_stopping_patience",
            "ddp_timeout",
            "dataloader_prefetch_factor",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 1")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"--max_steps is {self.max_steps}, but must be at least 1 (or -1: by --num_train_epochs)")
        for name in ("learning_rate", "num_train_epochs", "loraplus_lr_ratio", "neftune_noise_alpha"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise InputError(f"--{name} is {value}, but must be positive")
        seeds = ("seed", "init_seed", "data_seed", "mask_seed")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", *seeds):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"--{name} is {value}, but must not be negative")
            if name.endswith("seed") and value is not None and value >= 2**64:
                raise InputError(f"--{name} is {value}, but a seed must be less than 2**64")
        if self.lr_scheduler_type not in SCHEDULERS:
            hint, known = nearest(self.lr_scheduler_type, SCHEDULERS), ", ".join(SCHEDULERS)
            raise InputError(f'--lr_scheduler_type is "{self.lr_scheduler_type}"{hint}, but must be one of {known}')
        if not 0.0 <= self.min_lr <= self.learning_rate:
            raise InputError(f"--min_lr is {self.min_lr}, but must lie in [0, --learning_rate]")
        if self.min_lr > 0.0 and self.lr_scheduler_type != FLOORED:
            raise InputError(f"--min_lr is {self.min_lr}, but --lr_scheduler_type {self.lr_scheduler_type} knows no "
                             f"rate to end at; give --min_lr 0, or {FLOORED}")  # fmt: skip
        if any(not 0.0 < fraction <= 1.0 for fraction in self.checkpoint_at):
            raise InputError(f"--checkpoint_at is {self.checkpoint_at}, but fractions must lie in (0, 1]")
        if self.keeps_best and self.eval_steps is None:
            raise InputError("the best adapter was asked for, but is only known among evaluations; give --eval_steps")
        if self.dataloader_prefetch_factor is not None and self.dataloader_num_workers == 0:
            raise InputError(f"--dataloader_prefetch_factor is {self.dataloader_prefetch_factor}, but no process "
                             "prepares batches; give --dataloader_num_workers too")  # fmt: skip
        if self.bf16 and self.fp16:
            raise InputError("--bf16 and --fp16 were both given; choose one")

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best adapter."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def mixed_precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    def seed_of(self, stream: str) -> int:
        """The seed of "init", "data" or "mask"."""
        own = getattr(self, f"{stream}_seed")
        return self.seed if own is None else own


@dataclass(frozen=True)
class HubSettings:
    """What becomes public when a run has ended."""

    push_to_hub: bool = setting(False, "Push the adapter, its record and a model card to the Hub at the end.")
    hub_model_id: str | None = setting(
        None, "Repository, owner/name; of several tasks each adds its name; unset: the name of --output_dir, yours."
    )
    hub_private_repo: bool = setting(False, "Make the repository private.")

    def __post_init__(self):
        if self.push_to_hub:
            return
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name):
                raise InputError(f"--{name} was given, but nothing is pushed; give --push_to_hub too")


WITHOUT_EFFECT = frozenset({
    "output_dir", "data_root", "resume_from_checkpoint", "report_to", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "per_device_eval_batch_size", "max_eval_samples", "metrics", "sample_prompts", "max_new_tokens",
    "image_cache_bytes", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "push_to_hub",
    "hub_model_id", "hub_private_repo", "ddp_timeout",
})  # fmt: skip
"""Settings on which the trained adapter does not depend."""
