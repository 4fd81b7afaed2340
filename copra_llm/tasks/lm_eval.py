"""How does lm-evaluation-harness ask the same questions?

A folder for its `--include_path`: for each evaluation a JSONL of contexts, choices and the right one, and the YAML of
a task that reads it, so that its own `--model hf` scores the same items with the same words.

Source: docs/new_task_guide.md of lm-evaluation-harness 0.4.13; "multiple input" is its name for filling a blank.
"""

from __future__ import annotations

import json
from pathlib import Path

from copra_llm.tasks.choices import DELIMITER, ChoiceExample, ChoiceTask

PREFIX = "copra_"
"""Before the name of an evaluation, for lm-evaluation-harness has tasks of those names."""


def lm_eval_rows(task: ChoiceTask, examples: list[ChoiceExample]) -> list[dict]:
    """What the task reads: context, choices (for a blank: contexts as choices, and the continuation) and label."""
    rows = []
    for example in examples:
        contexts = [context for context, _ in example.pairs]
        continuations = [continuation.removeprefix(DELIMITER) for _, continuation in example.pairs]
        if task.blank:
            rows.append({"choices": contexts, "continuation": continuations[0], "label": example.label})
        else:
            rows.append({"context": contexts[0], "choices": continuations, "label": example.label})
    return rows


def lm_eval_task(task: ChoiceTask, data: Path) -> dict:
    """The task's settings, as its YAML holds them; `data` is the JSONL."""
    asked = {"doc_to_text": "label", "doc_to_target": "continuation"} if task.blank else {
        "doc_to_text": "context", "doc_to_target": "label"}  # fmt: skip
    metrics = ("acc",) if task.blank else ("acc", "acc_norm")
    return {
        "task": PREFIX + task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        **asked,
        "doc_to_choice": "choices",
        "target_delimiter": DELIMITER,
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1.0},
    }


def write_lm_eval_tasks(examples: dict[ChoiceTask, list[ChoiceExample]], folder: Path) -> list[str]:
    """Write `copra_<name>.jsonl` and `.yaml` for each evaluation; returns the tasks' names."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task, own in examples.items():
        name = PREFIX + task.name
        data = folder.resolve() / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in lm_eval_rows(task, own)]
        data.write_text("".join(lines), encoding="utf-8")
        text = yaml.safe_dump(lm_eval_task(task, data), sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        names.append(name)
    return names
