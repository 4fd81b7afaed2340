"""Which conversations are the training, dev and test data of a run, and what became of each record?

Everything is read and encoded before the first step; what is too long is cut or dropped and counted, and nothing
vanishes unsaid. Dev data are examples held out from the training data where no others are named: by the seed and
number of records alone, so that runs that share both hold out the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from copra_llm.batches import EncodedSplit
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.packing import pack
from copra_llm.settings import InstructSettings
from copra_llm.tasks.instruct.encode import Encoded, Encoder
from copra_llm.tasks.instruct.lengths import Counts, counted, fit
from copra_llm.tasks.instruct.mixture import epoch_order
from copra_llm.tasks.instruct.records import Record
from copra_llm.tasks.instruct.sources import Reader, parse_sources, strict
from copra_llm.tasks.mtl15 import task_names

INSTRUCT = "instruct"
"""The name of a task on conversations, unless a run gives another one (`--tasks alpaca`)."""
RIGHT = 1
"""The label of an example: a model that says all of it grades it so."""


@dataclass(frozen=True)
class InstructTask:
    """What a run on conversations is called in its records."""

    name: str = INSTRUCT


def asks_conversations(config: RunConfig, tasks: list[str]) -> bool:
    """Whether these tasks are the run's own conversations, and not a benchmark that it is evaluated on."""
    return tasks == [INSTRUCT] or (config.instruct is not None and tasks == config.data.tasks)


def read_conversations(config: RunConfig, splits: Iterable[str]) -> dict[str, list[Record]]:
    """`{split: records}` of those splits that have any, not tokenised yet.

    Raises:
        InputError: for a source that cannot be read, a broken record, too few records to hold some out, or if none of
            the splits has any.
    """
    settings = config.instruct
    if settings is None:
        raise InputError("the task instruct was asked for, but no conversations were; give --dataset_name")
    name = config.data.tasks[0]
    if len(config.data.tasks) > 1 or name in task_names():
        raise InputError(f"--tasks names {' and '.join(config.data.tasks)}, but conversations have one name of their "
                         "own, none of MTL15's; leave it out, or give another one")  # fmt: skip
    named = {"dev": settings.eval_dataset_name, "test": settings.test_dataset_name}
    records = {}
    for split in splits:
        if split in named and named[split]:
            records[split] = _first(_read(named[split], settings.dataset_format), config.data.max_eval_samples)
    wanted = {"train", "dev"}.difference(records).intersection(splits)
    if wanted:
        train, dev = _own_split(settings)
        if "train" in wanted:
            records["train"] = _first(train, config.data.max_train_samples)
        if "dev" in wanted:
            records["dev"] = _first(dev, config.data.max_eval_samples)
    if not records:
        raise InputError("there are no test data: the run named none; give --test_dataset_name, or --split dev")
    return records


def encode_conversations(
    conversations: dict[str, list[Record]], tokenizer, config: RunConfig
) -> tuple[dict[str, dict[str, EncodedSplit]], dict[str, Counts]]:
    """Tokenise the records; fill rows if the run packs.

    Returns:
        `{split: {task: rows}}`, and what became of the records of each split.

    Raises:
        InputError: if the chat template refuses a record, or nothing is left of a split.
    """
    settings, task = config.instruct, InstructTask(*config.data.tasks)
    encoder = Encoder(tokenizer, settings.chat_template, settings.turns)
    splits, counts = {}, {}
    for split, records in conversations.items():
        counts[split] = Counts()
        stream = encoder.stream(counted(records, counts[split]))
        examples = list(strict(fit(stream, counts[split], config.data.max_length, settings.too_long)))
        if not examples:
            raise InputError(f"no {split} example is left of {counts[split].read} records: all are longer than "
                             f"--max_length {config.data.max_length}; raise it")  # fmt: skip
        rows = [[example] for example in examples]
        if split == "train" and settings.packing:
            rows = [[examples[i] for i in row] for row in pack([len(e) for e in examples], config.data.max_length)]
        splits[split] = {task.name: _encoded_split(task, rows)}
    return splits, counts


def _encoded_split(task: InstructTask, rows: list[list[Encoded]]) -> EncodedSplit:
    lengths = np.array([sum(map(len, row)) for row in rows])
    # The first token of an example is predicted from nothing.
    targets = np.array([sum(int(example.trained[1:].sum()) for example in row) for row in rows])
    return EncodedSplit(task, rows, [RIGHT] * len(rows), lengths, targets)


def _own_split(settings: InstructSettings) -> tuple[list[Record], list[Record]]:
    """Training and dev records; dev is held out where no dev data are named."""
    sources = parse_sources(settings.dataset_name, settings.dataset_format)
    read = [list(strict(Reader(source))) for source in sources]
    order = epoch_order([len(r) for r in read], [s.weight for s in sources], seed=settings.dev_seed, epoch=0)
    if settings.eval_dataset_name:
        return [read[source][i] for source, i in order], []
    # Held out by record, not by copy: a source of weight 2 must not have one of its copies in the training data.
    unique = list(dict.fromkeys((int(source), int(i)) for source, i in order))
    if len(unique) <= settings.dev_size:
        raise InputError(f"--dev_size is {settings.dev_size}, but there are only {len(unique)} training records; "
                         "give fewer, or --eval_dataset_name")  # fmt: skip
    held = set(unique[: settings.dev_size])
    train = [read[source][i] for source, i in order if (int(source), int(i)) not in held]
    return train, [read[source][i] for source, i in unique[: settings.dev_size]]


def _read(names: list[str], format: str | None) -> list[Record]:
    return list(strict(itertools.chain.from_iterable(Reader(source) for source in parse_sources(names, format))))


def _first(records: list[Record], limit: int | None) -> list[Record]:
    return records if limit is None else records[:limit]
