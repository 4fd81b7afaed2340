"""Which question and choices has each example of the multiple-choice evaluations, and what is scored of them?

    score(choice) = log p(continuation | context)

The context is the question, the continuation the choice; where a blank is filled (WinoGrande), the context is the
sentence up to and with the choice, and the continuation the rest, the same for all (partial scoring). The data are
LLM-Adapters' (`ROOT/<folder>/{train,dev,test}.jsonl` with `instruction`, `input`, `output`, `answer`); question and
choices are read back out of the instruction, and a record that is not of the known shape is refused.

Source: the tasks of lm-evaluation-harness 0.4.13 (`choices.yaml` has its wording); Trinh and Le, A Simple Method for
Commonsense Reasoning (arXiv 1806.02847), for partial scoring; LLM-Adapters (arXiv 2304.01933) for the records.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError, nearest
from copra_llm.paths import HUB, SAMPLE
from copra_llm.tasks.instruct.files import file_rows
from copra_llm.tasks.instruct.sources import strict
from copra_llm.yaml_file import packaged_yaml

COMMONSENSE = "instruct/commonsense"
"""Where the data lie in `$COPRA_DATA`."""
DELIMITER = " "
"""Between context and choice."""


@dataclass(frozen=True)
class ChoiceTask:
    """One evaluation: how its records are read, and what a model reads."""

    name: str
    folder: str
    opening: str
    mark: str | None = None
    answers: dict[str, str] | None = field(default=None, hash=False)
    context: str = "{question}"
    blank: bool = False


@dataclass(frozen=True)
class ChoiceExample:
    """One question with its own choices, two or more."""

    question: str
    choices: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    """Context and continuation of each choice."""
    label: int
    """Index of the right choice."""
    place: str
    """File and line."""


def _specifications() -> dict[str, dict]:
    return packaged_yaml("copra_llm.tasks", "choices.yaml")


def choice_task_names() -> list[str]:
    """The names of the evaluations."""
    return list(_specifications())


def get_choice_task(name: str) -> ChoiceTask:
    """Look an evaluation up.

    Raises:
        InputError: if there is none of that name.
    """
    specs = _specifications()
    if name not in specs:
        raise InputError(f'there is no evaluation "{name}"{nearest(name, specs)}; there are {", ".join(specs)}')
    return ChoiceTask(name, **specs[name])


def load_choices(task: ChoiceTask, split: str, root: Path | str, max_samples: int | None = None) -> list[ChoiceExample]:
    """The examples of one split, in the order of the file.

    Args:
        task: from `get_choice_task`.
        split: "train", "dev" or "test".
        root: the folder that holds the evaluations' folders.
        max_samples: take this many from the start; None: all.

    Raises:
        InputError: for a missing file, or a record of another shape (with file and line).
    """
    if root in (SAMPLE, HUB):
        raise InputError(f'{task.name} has no data under --data_root "{root}"; give a folder with '
                         f"{task.folder}/{split}.jsonl in it")  # fmt: skip
    folder = Path(root) / task.folder
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl")))
        remedy = f"give --split {there}" if there else "give the folder that holds it as --data_root"
        raise InputError(f"{path} does not exist, so {task.name} has no {split} split; {remedy}")
    examples = read_choices(task, strict(file_rows(path)))
    if not examples:
        raise InputError(f"{path} holds no example; {task.name} needs one JSON object a line")
    return examples[:max_samples]


def read_choices(task: ChoiceTask, rows: Iterable[tuple[str, Any]]) -> list[ChoiceExample]:
    """Records with their places -> examples.

    Raises:
        InputError: at the first record of another shape.
    """
    return [_read(task, place, row) for place, row in rows]


def _read(task: ChoiceTask, place: str, row: Any) -> ChoiceExample:
    for key in ("instruction", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise InputError(f'{place} has no text "{key}"; {task.name} needs instruction and answer')
    if row.get("input"):
        raise InputError(f'{place}: "input" holds text, which {task.name} has no place for; move it to the instruction')
    question, names, choices = _parts(task, place, row["instruction"])
    if row["answer"] not in names:
        raise InputError(f'{place}: the answer "{row["answer"]}" is none of {", ".join(names)}; mend it')
    return ChoiceExample(question, choices, _pairs(task, place, question, choices), names.index(row["answer"]), place)


def _parts(task: ChoiceTask, place: str, text: str) -> tuple[str, list[str], tuple[str, ...]]:
    """Question, the answers' names, and the choices."""
    shape = _shape(task)
    match = shape.fullmatch(text)
    if match is None:
        raise InputError(f'{place}: the instruction is not "{task.opening}..." with the question, the choices and '
                         f'"Answer format: ..." after it; {task.name} cannot read it')  # fmt: skip
    if task.answers is not None:
        return match["question"], list(task.answers), tuple(task.answers.values())
    names = match["names"].split("/")
    marks = [f"{task.mark}{i}:" for i in range(1, len(names) + 1)]
    body = re.fullmatch(r"\s+".join(f"{mark}(.*)" for mark in marks), match["body"], re.DOTALL)
    # A mark that stands twice could end a choice in two places.
    if names != [mark[:-1].lower() for mark in marks] or body is None or any(text.count(mark) != 1 for mark in marks):
        raise InputError(f"{place}: the choices are not {' '.join(marks)} once each, as the answer format "
                         f'"{match["names"]}" says; mend the instruction')  # fmt: skip
    choices = tuple(choice.strip() for choice in body.groups())
    if len(choices) < 2 or not all(choices) or not match["question"].strip():
        raise InputError(f"{place}: the question or a choice is empty, or there is one choice alone; mend it")
    return match["question"], names, choices


@functools.cache
def _pattern(opening: str, rest: str) -> re.Pattern:
    return re.compile(re.escape(opening) + rest, re.DOTALL)


def _shape(task: ChoiceTask) -> re.Pattern:
    if task.answers is not None:
        return _pattern(task.opening, r"(?P<question>.*\S)\n\nAnswer format: true/false")
    name = task.mark.lower()
    return _pattern(
        task.opening,
        rf"(?P<question>.*?)\n\n(?P<body>{task.mark}1:.*?)\s+Answer format: (?P<names>{name}\d(?:/{name}\d)*)",
    )


def _pairs(task: ChoiceTask, place: str, question: str, choices: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    if not task.blank:
        context = task.context.format(question=question)
        return tuple((context, DELIMITER + choice) for choice in choices)
    before, _, after = question.partition("_")
    if question.count("_") != 1 or not after.strip():
        raise InputError(f'{place}: the sentence needs one blank "_" with text after it; mend it')
    return tuple((before + choice, DELIMITER + after.strip()) for choice in choices)
