"""Which image sets are there, where do their files lie, and what is a model told of a class?

The eleven sets of CoOp and CLIP-LoRA, some small ones, and whatever image folder or Hub data set a person names. Facts
are package data (`catalogue.yaml`); class names come with the data (split file, `variants.txt`, `classnames.txt`,
folders) except where a set's folders are not named in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copra_llm.errors import InputError, nearest
from copra_llm.yaml_file import packaged_yaml

IMAGES = "images"
"""Where the image sets lie in `$COPRA_DATA`."""
PLAIN_TEMPLATE = "a photo of a {}."
"""What CLIP-LoRA's published code asks on every set, and what is asked on a set that is not in the catalogue."""


@dataclass(frozen=True)
class ImageTask:
    """One set of images with its classes."""

    name: str
    folder: str
    """Below the data root; an absolute path where a person has named a folder; a Hub id for the layout "hub"."""
    template: str
    """What a model reads of a class: "{}" stands for its name."""
    layout: str = "split"
    """How the files lie: "split", "aircraft", "imagenet", "folders" or "hub"."""
    images: str = "."
    """Folder of the image files, below `folder`."""
    split_file: str | None = None
    """JSON of [path, label, class name], below `folder`."""
    other_folders: tuple[str, ...] = ()
    """Names under which others keep the same folder."""
    renamed: dict[str, str] = field(default_factory=dict, hash=False)
    """Class names of the files -> names in words."""
    classes: tuple[str, ...] | None = None
    """Only these classes, numbered in this order; None: all."""
    counts: dict[str, int] = field(default_factory=dict, hash=False)
    """Published sizes: "classes", and images in "train", "dev" and "test"."""

    def prompts(self, classnames: Sequence[str]) -> list[str]:
        """What a model reads for each class."""
        return [self.template.format(name) for name in classnames]


def _specifications() -> dict[str, dict]:
    return packaged_yaml("copra_llm.tasks.clip", "catalogue.yaml")


def image_task_names() -> list[str]:
    """The names of the sets."""
    return list(_specifications())


def get_image_task(name: str) -> ImageTask:
    """Look a set up.

    Raises:
        InputError: if there is none of that name.
    """
    specs = _specifications()
    if name not in specs:
        raise InputError(
            f'there is no image set "{name}"{nearest(name, specs)}; the sets are {", ".join(specs)}, and '
            "--dataset_name takes any other, as a folder or a Hub id"
        )
    spec = dict(specs[name])
    if "base" in spec:
        base = get_image_task(spec.pop("base"))
        # A part of a set does not have its counts.
        spec = {key: getattr(base, key) for key in ImageTask.__dataclass_fields__} | {"counts": {}} | spec
    tuples = {key: tuple(value) for key, value in spec.items() if isinstance(value, list)}
    return ImageTask(**spec | tuples | {"name": name})


def named_images(dataset_name: str, template: str = PLAIN_TEMPLATE) -> ImageTask:
    """What `--dataset_name` names: a folder of class folders, or a data set on the Hub.

    Args:
        dataset_name: path of a folder, or a Hub id.
        template: with "{}" for the class name.

    Raises:
        InputError: if the template has no place for the class name.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise InputError(f'the template "{template}" must have "{{}}" once, where the class name goes')
    folder = Path(dataset_name)
    if folder.is_dir():
        return ImageTask(folder.resolve().name, str(folder.resolve()), template, layout="folders")
    return ImageTask(dataset_name.rsplit("/", 1)[-1], dataset_name, template, layout="hub")
