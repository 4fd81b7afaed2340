"""Where do the images of a set come from?

The layout that the catalogue names is read (`layouts`, `hub_images`), class names are put in words, splits that are
missing are made (`examples`), and classes are chosen.
"""

from __future__ import annotations

from pathlib import Path

from copra_llm.errors import InputError
from copra_llm.paths import HUB, SAMPLE
from copra_llm.tasks.clip.catalogue import ImageTask
from copra_llm.tasks.clip.examples import ImageData, divided, in_words, with_dev
from copra_llm.tasks.clip.hub_images import read_hub
from copra_llm.tasks.clip.layouts import (
    Layout,
    missing_files,
    read_aircraft,
    read_folders,
    read_imagenet,
    read_split,
)


def read_images(task: ImageTask, root: Path | str) -> ImageData:
    """The class names and the examples of train, dev and test.

    No image is opened; that those named in a split file are there is checked by listing their folders.

    Args:
        task: from `get_image_task` or `named_images`.
        root: the folder that holds the sets' folders; not read for a Hub data set or a folder named by its path.

    Raises:
        InputError: for a missing folder or file, a malformed split, or a split without any example.
    """
    data = named_data(task, root)
    missing = missing_named(task, data)
    if missing:
        more = f" (nor do {len(missing) - 1} others)" if len(missing) > 1 else ""
        named_in = task_folder(task, root) / (task.split_file or "images_variant_*.txt")
        raise InputError(f"{named_in} names {missing[0]}, which does not exist{more}; unpack the images there")
    return data


def missing_named(task: ImageTask, data: ImageData) -> list[Path]:
    """Images that a split file names and that are not there."""
    if task.layout not in ("split", "aircraft"):
        return []
    return missing_files(example for examples in data.splits.values() for example in examples)


def named_data(task: ImageTask, root: Path | str) -> ImageData:
    """As `read_images`, but images that are named need not be there."""
    names, splits = read_hub(task.folder) if task.layout == "hub" else _read(task, root)
    splits = with_dev(splits) if "test" in splits else divided(splits["train"])
    data = ImageData(tuple(in_words(name, task.renamed) for name in names), splits)
    if task.classes is not None:
        data = data.select_classes(task.classes)
    for split in ("train", "test"):
        if not data.splits[split]:
            raise InputError(f"{task.name} has no image in its {split} split; give a set of more images")
    return data


def _read(task: ImageTask, root: Path | str) -> Layout:
    folder = task_folder(task, root)
    images = folder / task.images
    if task.layout == "split":
        return read_split(folder / task.split_file, images)
    if task.layout == "aircraft":
        return read_aircraft(folder, images)
    if task.layout == "imagenet":
        return read_imagenet(folder, images)
    return read_folders(folder)


def task_folder(task: ImageTask, root: Path | str) -> Path:
    """The set's folder, under whichever of its names.

    Raises:
        InputError: if there is none, or `root` is no folder.
    """
    if root in (SAMPLE, HUB) and not Path(task.folder).is_absolute():
        raise InputError(f"{task.name} is read from a folder, not from the {root}; give --data_root FOLDER, or "
                         "--dataset_name with a Hub id")  # fmt: skip
    tried = [Path(root) / name for name in (task.folder, *task.other_folders)]
    found = next((folder for folder in tried if folder.is_dir()), None)
    if found is None:
        others = f" (nor {', '.join(path.name for path in tried[1:])})" if len(tried) > 1 else ""
        raise InputError(f"{tried[0]} does not exist{others}; data/clip/README.md says what lies there")
    return found
