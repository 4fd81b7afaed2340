"""What does a model read, and which labels can it answer, on each of MTL15's fifteen tasks?

Templates and label words are package data (`mtl15.yaml`). Data come from a folder of JSONL
(`ROOT/<task>/{train,dev,test}.jsonl`), from the Hub through `datasets`, or from the small hand-written
sample that ships with the package. The sample is for first steps and tests; no claim rests on it.

Source: MTL15 as in O-LoRA (Wang et al. 2023, arXiv 2310.14152); used by CopRA in figure 5(c).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.json_file import is_unicode, why_unread
from copra_llm.paths import HUB, SAMPLE
from copra_llm.yaml_file import packaged_yaml

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    """One labelled example: its text fields, and the index of its label in `Task.labels`."""

    fields: dict[str, str]
    label: int


@dataclass(frozen=True)
class Task:
    """One task: its fields, its labels, and how an example is put to a model."""

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    label_words: tuple[str, ...]
    """What a model answers for each label, in the order of `labels`."""
    prompt_template: str
    """For causal and seq2seq models; the label words follow after one space."""
    input_templates: tuple[str, ...]
    """For encoders: one text or a pair."""
    hub: dict[str, Any]

    def prompt(self, fields: dict[str, str]) -> str:
        return self.prompt_template.format(**fields)

    def inputs(self, fields: dict[str, str]) -> list[str]:
        return [template.format(**fields) for template in self.input_templates]


def _specifications() -> dict[str, dict]:
    return packaged_yaml("copra_llm.tasks", "mtl15.yaml")


def task_names() -> list[str]:
    """The names of the fifteen tasks."""
    return list(_specifications())


def get_task(name: str) -> Task:
    """Look a task up.

    Raises:
        InputError: if there is none of that name.
    """
    specs = _specifications()
    if name not in specs:
        raise InputError(f'there is no task "{name}"{nearest(name, specs)}; the tasks are {", ".join(specs)}')
    spec = specs[name]
    labels = tuple(spec["labels"])
    words = spec.get("label_words", {})
    return Task(
        name=name,
        fields=tuple(spec["fields"]),
        labels=labels,
        label_words=tuple(words.get(label, label) for label in labels),
        prompt_template=spec["prompt"],
        input_templates=tuple(spec["inputs"]),
        hub=spec["hub"],
    )


def load_split(task: Task, split: str, root: Path | str, max_samples: int | None = None) -> list[Example]:
    """The examples of one split.

    Args:
        task: from `get_task`.
        split: "train", "dev" or "test".
        root: a folder, `paths.SAMPLE` or `paths.HUB`.
        max_samples: take this many, from the start of a file, at random (but always the same) of published
            data, which may be sorted by label; None: all.

    Raises:
        InputError: for a missing file, a malformed line (with file and line), or an unreachable Hub.
    """
    if root == HUB:
        return _from_hub(task, split, max_samples)
    path = (_sample_folder(task) if root == SAMPLE else Path(root) / task.name) / f"{split}.jsonl"
    return read_jsonl(path, task)[:max_samples]


def read_jsonl(path: Path, task: Task) -> list[Example]:
    """Read and check a JSONL file of the task: the text fields and `label` (the label's text) on each line."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; {task.name} needs a JSONL file with {_columns(task)} on each line")
    label_ids = {label: i for i, label in enumerate(task.labels)}
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{place} is not UTF-8 text (byte {error.start + 1}); mend it") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{place} is not JSON ({error.msg}, column {error.colno}); mend it") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON that can be read ({why_unread(error)}); mend it") from None
            if not isinstance(row, dict):
                raise InputError(f"{place} holds a {type(row).__name__}, but must be an object with {_columns(task)}")
            for field in (*task.fields, "label"):
                if not isinstance(row.get(field), str):
                    what = "is missing" if field not in row else f"is {shown(row[field])}, not text"
                    raise InputError(f'{place}: the field "{field}" {what}; {task.name} needs {_columns(task)}')
                if not is_unicode(row[field]):
                    raise InputError(f'{place}: the field "{field}" holds half a character; mend it')
            if row["label"] not in label_ids:
                known = ", ".join(task.labels)
                raise InputError(f"{place}: {named(row['label'])} is no label of {task.name}; its labels are {known}")
            examples.append(Example({f: row[f] for f in task.fields}, label_ids[row["label"]]))
    if not examples:
        raise InputError(f"{path} holds no example; {task.name} needs one JSON object with {_columns(task)} a line")
    return examples


def _columns(task: Task) -> str:
    return ", ".join((*task.fields, "label"))


def _sample_folder(task: Task) -> Path:
    root = Path(str(resources.files("copra_llm.tasks"))) / "mtl15_sample"
    if not (root / task.name).is_dir():
        available = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
        raise InputError(
            f"the packaged sample has no {task.name}, only {available}; give --data_root FOLDER or --data_root hub"
        )
    return root / task.name


DEV_SIZE = 500
"""Examples held out of the published train split where the Hub has no dev split of its own."""


def _from_hub(task: Task, split: str, max_samples: int | None) -> list[Example]:
    """Published data. Where there is no dev split, dev is a fixed random part of train, at most a fifth of it."""
    import datasets

    hub = task.hub
    theirs = hub["splits"].get(split, "train")
    try:
        rows = datasets.load_dataset(hub["path"], hub.get("name"), split=theirs, revision=hub.get("revision"))
    except Exception as error:
        where = "/".join(filter(None, (hub["path"], hub.get("name"))))
        reason = f"could not be read from the Hub ({type(error).__name__})"
        raise InputError(f"{where} {reason}; give --data_root FOLDER instead") from None
    return examples_from_rows(task, rows, split, max_samples)


def examples_from_rows(task: Task, rows, split: str, max_samples: int | None = None) -> list[Example]:
    """Published rows -> examples of one of our splits; rows without a public label (-1) are left out."""
    hub = task.hub
    columns = {c for theirs in hub["fields"].values() for c in theirs.split(" + ") if c} | {hub["label"]}
    missing = sorted(columns - set(rows.column_names))
    if missing:
        raise InputError(f'{hub["path"]} has no column "{missing[0]}", only {", ".join(rows.column_names)}')
    if "dev" not in hub["splits"] and split in ("train", "dev"):
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(rows))
        held_out = min(DEV_SIZE, len(rows) // 5)
        rows = rows.select(np.sort(order[:held_out] if split == "dev" else order[held_out:]))
    if max_samples is not None and max_samples < len(rows):
        # Before a text is touched: some of these sets have millions of rows.
        order = np.random.Generator(np.random.Philox(key=1)).permutation(len(rows))
        rows = rows.select(np.sort(order[:max_samples]))
    values = {value: i for i, value in enumerate(hub["values"])}

    def text(row: dict, theirs: str) -> str:
        # An empty cell of a CSV arrives as None.
        return " ".join(str(row[column] or "").strip() for column in theirs.split(" + ") if column)

    return [
        Example({ours: text(row, theirs) for ours, theirs in hub["fields"].items()}, values[row[hub["label"]]])
        for row in rows
        if row[hub["label"]] in values
    ]
