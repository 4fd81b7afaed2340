"""Which images of each class are the shots?

Each class has its own stream (Philox: key = seed, counter = label), so its shots do not depend on the other classes,
on the method or on anything that was drawn before. The first shots of a permutation are taken: with one seed the four
shots are among the sixteen.

Source: CoOp (arXiv 2109.01134), section 4.1, and CLIP-LoRA (arXiv 2405.18541), section 5: 1, 2, 4, 8 or 16 images of
each class, and at most 4 of dev. They repeat images where a class has too few; here that is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copra_llm.errors import InputError
from copra_llm.tasks.clip.examples import ImageData, ImageExample, by_label

USE = 5
"""Counter word 2, where masks, batches and views have other numbers: with equal seeds the streams differ."""
DEV_SHOTS = 4
"""At most so many images of a class choose a setting."""
DEV_SEED = 0
"""Of which they are: runs of all seeds are compared on the same."""


def few_shot(
    examples: Sequence[ImageExample], shots: int, seed: int, classnames: Sequence[str] | None = None
) -> list[ImageExample]:
    """`shots` examples of each class, class by class; a pure function of its arguments.

    Args:
        examples: the train split.
        shots: of each class, at least 1.
        seed: of the draw, in [0, 2**64).
        classnames: of all classes, for the message, and so that a class without any example is seen.

    Raises:
        InputError: if a class has fewer, or `shots` is not positive.
    """
    groups = _groups(examples, shots)
    labels = range(len(classnames)) if classnames is not None else groups
    short = [label for label in labels if len(groups.get(label, ())) < shots]
    if short:
        name = f'"{classnames[short[0]]}"' if classnames is not None else str(short[0])
        more = f" (and {len(short) - 1} more classes have too few)" if len(short) > 1 else ""
        raise InputError(
            f"class {name} has {len(groups.get(short[0], ()))} training images, but {shots} shots are wanted{more}; "
            "lower --shots"
        )
    return _draw(groups, shots, seed)


def dev_shots(examples: Sequence[ImageExample], shots: int, seed: int) -> list[ImageExample]:
    """At most `min(shots, DEV_SHOTS)` dev examples of each class: fewer where there are fewer, none twice."""
    return _draw(_groups(examples, shots), min(shots, DEV_SHOTS), seed)


def few_shot_splits(data: ImageData, shots: int, seed: int) -> dict[str, list[ImageExample]]:
    """The shots of train by the seed, those of dev by one of their own, and the whole test split."""
    return {
        "train": few_shot(data.splits["train"], shots, seed, data.classnames),
        "dev": dev_shots(data.splits["dev"], shots, DEV_SEED),
        "test": data.splits["test"],
    }


def _groups(examples: Sequence[ImageExample], shots: int) -> dict[int, list[ImageExample]]:
    if shots < 1:
        raise InputError(f"--shots is {shots}, but must be at least 1")
    return by_label(examples)


def _draw(groups: dict[int, list[ImageExample]], shots: int, seed: int) -> list[ImageExample]:
    drawn = []
    for label, group in groups.items():
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, label, USE, 0]))
        drawn += [group[i] for i in rng.permutation(len(group))[:shots]]
    return drawn
