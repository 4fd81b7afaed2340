"""Which images and classes are in a data set on the Hub?

One column of images and one of class labels, as `datasets` types them. Images stay encoded until they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copra_llm.errors import InputError
from copra_llm.tasks.clip.examples import ImageExample
from copra_llm.tasks.clip.layouts import THEIRS, Layout


@dataclass(frozen=True, eq=False)
class HubImage:
    """One row's image file."""

    rows: Any
    """A `datasets.Dataset` whose images are not decoded."""
    index: int
    column: str
    place: str

    def read(self) -> bytes:
        image = self.rows[self.index][self.column]
        if image is None:
            raise InputError(f"{self} has no image; leave the row out")
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    def __str__(self) -> str:
        return f"{self.place}, row {self.index}"


def read_hub(name: str) -> Layout:
    """The splits of a Hub data set that are there.

    Raises:
        InputError: if the Hub is out of reach, or the data set is not of this shape.
    """
    import datasets

    try:
        published = datasets.load_dataset(name)
    except Exception as error:
        raise InputError(
            f"{name} is no folder and could not be read from the Hub ({type(error).__name__}); give one or the other"
        ) from None
    return rows_to_examples(name, published)


def rows_to_examples(name: str, published: dict[str, Any]) -> Layout:
    """Published splits -> class names and examples; rows without a public label (-1) are left out.

    Where there is no test split with labels, the dev split is the test.

    Raises:
        InputError: if there is no train split, or no column of images or of class labels.
    """
    found = {split: next((n for n in theirs if n in published), None) for split, theirs in THEIRS.items()}
    if found["train"] is None:
        raise InputError(f"{name} has no train split, only {', '.join(published)}; give a data set that has one")
    first = published[found["train"]]
    image, label = _column(name, first, "Image"), _column(name, first, "ClassLabel")
    splits = {
        split: _examples(published[theirs], image, label, f"{name}, {theirs}")
        for split, theirs in found.items()
        if theirs is not None
    }
    splits = {split: examples for split, examples in splits.items() if examples}
    if "train" not in splits:
        raise InputError(f"{name} has no labelled image in {found['train']}; give a data set that has some")
    if "test" not in splits and "dev" in splits:
        splits["test"] = splits.pop("dev")
    return first.features[label].names, splits


def _column(name: str, rows, kind: str) -> str:
    columns = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if not columns:
        has = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
        raise InputError(f"{name} has no column of the type {kind}, only {has}; give a data set with images and labels")
    return columns[0]


def _examples(rows, image: str, label: str, place: str) -> list[ImageExample]:
    import datasets

    encoded = rows.cast_column(image, datasets.Image(decode=False))
    return [
        ImageExample(HubImage(encoded, index, image, place), number)
        for index, number in enumerate(encoded[label])
        if number is not None and number >= 0
    ]
