"""What is an image example, and how is a set divided where its publishers have not done it?

    no dev             dev is held out of train: of each class a fifth, at most 50 images
    one heap           of each class 50 % are train, 20 % dev, 30 % test (CoOp's shares)

Divisions are fixed: they do not follow a run's seed, so all runs share one test set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copra_llm.errors import InputError, nearest
from copra_llm.pictures import Stored

SPLITS = ("train", "dev", "test")
DEV_SHARE, DEV_PER_CLASS = 5, 50
"""One in five images of a class, and no more than so many, are held out of train where there is no dev split."""


@dataclass(frozen=True)
class ImageExample:
    """One image and its class."""

    source: Path | Stored
    """The file, or what else has the file's bytes."""
    label: int
    """Index into `ImageData.classnames`."""


@dataclass(frozen=True)
class ImageData:
    """A set's class names and images."""

    classnames: tuple[str, ...]
    """In words, no underscores."""
    splits: dict[str, list[ImageExample]]
    """"train", "dev" and "test"."""

    def select_classes(self, names: Sequence[str]) -> ImageData:
        """Only these classes, numbered in this order.

        Raises:
            InputError: if there is no class of one of the names.
        """
        unknown = [name for name in names if name not in self.classnames]
        if unknown:
            hint = nearest(unknown[0], self.classnames)
            raise InputError(f'no class is named "{unknown[0]}"{hint}; the classes are {", ".join(self.classnames)}')
        new = {self.classnames.index(name): label for label, name in enumerate(names)}
        splits = {
            split: [ImageExample(e.source, new[e.label]) for e in examples if e.label in new]
            for split, examples in self.splits.items()
        }
        return ImageData(tuple(names), splits)


def in_words(classname: str, renamed: dict[str, str]) -> str:
    """A class name as a text encoder should read it."""
    return renamed.get(classname, classname).replace("_", " ")


def by_label(examples: Iterable[ImageExample]) -> dict[int, list[ImageExample]]:
    """The examples of each label, labels increasing, in their own order."""
    groups: dict[int, list[ImageExample]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    return dict(sorted(groups.items()))


def with_dev(splits: dict[str, list[ImageExample]]) -> dict[str, list[ImageExample]]:
    """Train, dev and test; dev is held out of train where it is missing or empty."""
    if splits.get("dev"):
        return {split: splits[split] for split in SPLITS}
    train, dev = [], []
    for label, examples in by_label(splits["train"]).items():
        order = _order(label, len(examples))
        held_out = min(DEV_PER_CLASS, len(examples) // DEV_SHARE)
        dev += [examples[i] for i in np.sort(order[:held_out])]
        train += [examples[i] for i in np.sort(order[held_out:])]
    return {"train": train, "dev": dev, "test": splits["test"]}


def divided(heap: Iterable[ImageExample]) -> dict[str, list[ImageExample]]:
    """Train, dev and test of one heap of images; a class of one image has it in train."""
    splits: dict[str, list[ImageExample]] = {split: [] for split in SPLITS}
    for label, examples in by_label(heap).items():
        n = len(examples)
        test = max(1, round(0.3 * n)) if n > 1 else 0
        parts = np.split(_order(label, n), [test, test + round(0.2 * n)])
        for split, part in zip(("test", "dev", "train"), parts, strict=True):
            splits[split] += [examples[i] for i in np.sort(part)]
    return splits


def _order(label: int, n: int) -> np.ndarray:
    # Key 0 whatever a run's seed is; word 2 keeps it apart from the shots of seed 0.
    return np.random.Generator(np.random.Philox(key=0, counter=[0, label, 6, 0])).permutation(n)
