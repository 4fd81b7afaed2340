"""What does the Hub show of an adapter? A card: metadata that the Hub reads, and text for people, both from the record.

What is not known is left out: a licence that nobody has named, data whose source was a folder of somebody's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copra_llm import hub
from copra_llm.adapter_files import HEAD_FILE
from copra_llm.config import RunConfig
from copra_llm.conversations import INSTRUCT
from copra_llm.figures.groups import NAMES
from copra_llm.paths import HUB, SAMPLE
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result
from copra_llm.tasks.mtl15 import get_task, task_names

PAPER = "https://arxiv.org/abs/2410.22911"
CITATION = """```bibtex
@article{zhuang2024copra,
  title   = {CopRA: A Progressive LoRA Training Strategy},
  author  = {Zhuang, Zhan and Wang, Xiequn and Zhang, Yulong and Li, Wei and Zhang, Yu and Wei, Ying},
  journal = {arXiv preprint arXiv:2410.22911},
  year    = {2024}
}
```
"""
PLAIN = """from peft import PeftModel
from transformers import {base_class}

model = PeftModel.from_pretrained({base_class}.from_pretrained("{base}"), "{repo}").eval()
"""
WITH_HEAD = """from huggingface_hub import hf_hub_download
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "{repo}").eval()
head = load_file(hf_hub_download("{repo}", "{head_file}"))["{head}.weight"]  # (labels, hidden)
inputs = AutoTokenizer.from_pretrained("{base}")("a text", return_tensors="pt")
hidden = model(**inputs).last_hidden_state  # (1, tokens, hidden)
mask = inputs["attention_mask"].unsqueeze(-1)
logits = (hidden * mask).sum(1) / mask.sum(1) @ head.T  # (1, labels)
"""
CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
"""PEFT's `task_type` -> the class that loads the base."""
FRACTIONS = {"accuracy": "Accuracy", "acc_norm": "Accuracy, length-normalised"}
"""Metrics in percent in a record, and between 0 and 1 in the Hub's metadata, where `evaluate` has them so."""


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter that is to be shown, free of paths."""

    repo: str
    """`owner/name`."""
    base: str
    """The base model's hub id."""
    config: Mapping[str, Any]
    """`adapter_config.json`."""
    settings: RunConfig | None = None
    """Of the run that made it; None: unknown, or it is a merged one."""
    record: Result | None = None
    heads: Sequence[str] = ()
    """Names of an encoder's heads in `head.safetensors`."""
    licence: str | None = None
    """Of the base, as its own card names it."""
    findings: str = ""
    """What merging and pruning it gave, in Markdown."""

    @property
    def tasks(self) -> list[str]:
        return self.settings.data.tasks if self.settings is not None else []

    @property
    def method(self) -> str | None:
        return self.settings.schedule.method if self.settings is not None else None

    @property
    def pipeline(self) -> str:
        """The Hub's name for what it does."""
        if self.settings is not None and self.settings.image is not None:
            return "zero-shot-image-classification"
        if self.heads or set(self.tasks) & set(task_names()):
            return "text-classification"
        return "text-generation" if self.config.get("task_type") in CLASSES else "feature-extraction"


def card(about: Adapter) -> str:
    """The card's text, metadata first."""
    parts = [
        f"# {about.repo.rpartition('/')[2]}", _introduction(about), *_method(about), *_data(about), *_metrics(about),
        *([f"## Merged and pruned\n\n{about.findings}"] if about.findings else []), _loading(about), _merging(about),
        f"## Citation\n\n{CITATION}",
    ]  # fmt: skip
    body = "\n\n".join(part.strip() for part in parts)
    return f"---\n{metadata(about).to_yaml().strip()}\n---\n\n{body}\n"


def metadata(about: Adapter):
    """huggingface_hub's `ModelCardData`: what the Hub searches and shows beside the text."""
    from huggingface_hub import ModelCardData

    results = list(_eval_results(about))
    return ModelCardData(
        base_model=about.base,
        library_name="peft",
        license=about.licence,
        pipeline_tag=about.pipeline,
        tags=["lora", *([about.method] if about.method not in (None, "lora") else [])],
        datasets=sorted({source.path for source in _sources(about).values()}) or None,
        eval_results=results or None,
        model_name=about.repo.rpartition("/")[2],
    )


def _eval_results(about: Adapter) -> Iterator:
    """The record's test metrics, one entry each; what is not finite has no value to show."""
    from huggingface_hub import EvalResult

    for task, name, value in _split_metrics(about, "test"):
        source = _sources(about).get(task, _Source(task))
        yield EvalResult(
            task_type=about.pipeline,
            dataset_type=source.path,
            dataset_name=task,
            dataset_config=source.config,
            dataset_split=source.test_split,
            metric_type=name,
            metric_name=FRACTIONS.get(name, {"loss": "Loss, nats"}.get(name)),
            metric_value=value / 100.0 if name in FRACTIONS else value,
        )


def _split_metrics(about: Adapter, split: str) -> Iterator[tuple[str, str, float]]:
    """`(task, metric, value)` of one split, in the record's units."""
    for key, value in (about.record.metrics if about.record is not None else {}).items():
        where, _, rest = key.partition("/")
        task, _, name = rest.rpartition("/")
        if where == split and task and math.isfinite(value):
            yield task, name, value


@dataclass(frozen=True)
class _Source:
    """Where the Hub has a task's data."""

    path: str
    config: str | None = None
    test_split: str = "test"
    """The published one that is tested on; another than "test" where that has no public labels."""


def _sources(about: Adapter) -> dict[str, _Source]:
    """The Hub's data sets that were trained on, by task; none where the data were local."""
    settings = about.settings
    if settings is None:
        return {}
    own = settings.instruct or settings.image
    if own is not None and own.dataset_name:
        ids = [hub.parse_id(name.partition(":")[0]) for name in own.dataset_name if not _is_file(name)]
        return {about.tasks[0] if len(ids) == 1 else i.repo: _Source(i.repo) for i in ids if i is not None}
    if settings.data.data_root != HUB or own is not None:
        return {}
    published = {task: get_task(task).hub for task in about.tasks}
    return {task: _Source(of["path"], of.get("name"), of["splits"]["test"]) for task, of in published.items()}


def _is_file(name: str) -> bool:
    return name.partition(":")[0].endswith((".jsonl", ".json", ".parquet", ".yaml", ".yml"))


# --- the text ---------------------------------------------------------------------------------------------


def _introduction(about: Adapter) -> str:
    base = f"[{about.base}](https://huggingface.co/{about.base})"
    if about.method is None:
        return f"A LoRA adapter for {base}. How it was made is not recorded beside it."
    how = {
        "lora": "plain LoRA",
        "copra": f"CopRA ([paper]({PAPER})): progressive LoRA, meant to merge and prune well",
        "coto": f"CoTo, a successor of CopRA ([paper]({PAPER})): progressive LoRA, meant to merge and prune well",
    }
    what = "conversations" if about.tasks == [INSTRUCT] else ", ".join(about.tasks)
    return f"A LoRA adapter for {base}, trained on {what} with {how[about.method]}."


def _method(about: Adapter) -> Iterator[str]:
    if about.settings is None:
        shown = [("rank", about.config["r"]), ("alpha", about.config["lora_alpha"])]
        yield f"## Adapter\n\n{_settings_table(shown)}"
        return
    s = about.settings.schedule.schedule()
    if s.p_start == s.p_end or s.shape == "constant":
        said = f"Every layer's adapter was active with probability {s.p_start:g} in every step."
    else:
        said = (
            f"In each step every layer's adapter was active with probability p, which went from {s.p_start:g} to "
            f"{s.p_end:g} ({s.shape}) over the first {s.ramp_fraction:g} of the steps; at least one layer always was. "
            "The whole adapter is active when it is used."
        )
    yield f"## Method\n\n{said}\n\n{_settings_table(_shown_settings(about))}"


def _shown_settings(about: Adapter) -> list[tuple[str, Any]]:
    lora, train = about.settings.lora, about.settings.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    processes = about.record.environment.get("world_size", 1) if about.record is not None else 1
    part, schedule = about.settings.part, about.settings.schedule
    shares = f"client {part.client} of {part.num_clients}, {part.client_split}"
    variants = [name for name in ("use_rslora", "use_dora") if getattr(lora, name)]
    return [
        ("method", NAMES[about.method]),
        ("rank, alpha, dropout", f"{lora.lora_r}, {lora.lora_alpha:g}, {lora.lora_dropout:g}"),
        ("start, variants", ", ".join([lora.init_lora_weights, *variants])),
        ("adapted modules", ", ".join(_modules(about.config.get("target_modules")))),
        ("layers switched", schedule.granularity),
        ("stochastic depth", schedule.stochastic_depth),
        ("layers ramp apart by", f"{schedule.depth_spread:g} of the ramp" if schedule.depth_spread else None),
        ("active layers scaled by 1 / share of steps", "yes" if schedule.rescale_active else None),
        ("learning rate over share of steps, to the power", schedule.rate_compensation or None),
        ("steps", about.record.steps if about.record is not None else None),
        ("examples a step", batch * processes),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}, {train.warmup_steps} warm-up steps"),
        ("weight decay, gradient norm", f"{train.weight_decay:g}, {train.max_grad_norm:g}"),
        ("mixed precision, base", f"{train.mixed_precision}, {about.settings.model.dtype}"),
        ("started from", part.init_adapter),
        ("share of the data", shares if part.num_clients > 1 else None),
        ("seeds: start, data, masks", ", ".join(str(train.seed_of(name)) for name in ("init", "data", "mask"))),
    ]


def _modules(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets or ())


def _settings_table(rows: Sequence[tuple[str, Any]]) -> str:
    known = [(name, str(value)) for name, value in rows if value not in (None, "")]
    return markdown_table([("setting",), ("value",)], known)


def _data(about: Adapter) -> Iterator[str]:
    if about.settings is None:
        return
    sources, settings = _sources(about), about.settings
    own = settings.instruct or settings.image
    if sources:
        named = [f"[{s.path}](https://huggingface.co/datasets/{s.path})" for s in sources.values()]
        said = f"{', '.join(about.tasks)}, from {', '.join(dict.fromkeys(named))}."
    elif own is not None and own.dataset_name:
        said = f"{', '.join(own.dataset_name)}: files of the author's own."
    elif settings.data.data_root == SAMPLE:
        said = f"{', '.join(about.tasks)}: the small hand-written sample that comes with copra_llm."
    else:
        said = f"{', '.join(about.tasks)}, from a local copy."
    records = about.record.data.get("records", {}) if about.record is not None else {}
    rows = [(split, *(counts.get(name) for name in ("read", "kept", "cut", "dropped"))) for split, counts
            in records.items()]  # fmt: skip
    counted = markdown_table([("split",), *((name, "d") for name in ("records", "kept", "cut", "dropped"))], rows)
    most = settings.data.max_train_samples
    limits = [f"At most {most} training examples."] if most is not None else []
    limits += [f"Inputs are at most {settings.data.max_length} tokens long."] if settings.image is None else []
    yield "## Data\n\n" + " ".join([said, *limits]) + f"\n\n{counted}"


def _metrics(about: Adapter) -> Iterator[str]:
    rows = [
        (split, task, name, value, len(about.record.data.get(f"correct/{split}/{task}", "")) or None)
        for split in ("dev", "test") for task, name, value in _split_metrics(about, split)
    ]  # fmt: skip
    if rows:
        columns = [("split",), ("task",), ("metric",), ("value", ".3f"), ("examples", "d")]
        table = markdown_table(columns, rows)
        yield f"## Results\n\nAccuracies in percent, losses in nats.\n\n{table}"


def _loading(about: Adapter) -> str:
    names = {
        "base": about.base, "repo": about.repo, "base_class": CLASSES.get(about.config.get("task_type"), "AutoModel"),
        "head_file": HEAD_FILE, "head": about.heads[0] if about.heads else "",
    }  # fmt: skip
    if not about.heads:
        return f"## Loading\n\nWith plain PEFT:\n\n```python\n{PLAIN.format(**names)}```"
    said = (
        "PEFT knows no head on pooled states, so the classifier's lies beside the adapter, its labels in the metadata "
        f"of `{HEAD_FILE}`. Heads: {', '.join(about.heads)}."
    )
    return f"## Loading\n\nWith plain PEFT:\n\n```python\n{WITH_HEAD.format(**names)}```\n\n{said}"


def _merging(about: Adapter) -> str:
    return (
        "## Merging\n\nWith another adapter of the same base, with copra_llm:\n\n"
        f"```\ncopra merge {about.repo} OTHER --method fusion --output merged\n```\n\n"
        "Adapters that share the seed of their start merge more easily than others: say so when you report it."
    )
