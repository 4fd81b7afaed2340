"""Which images are the training, dev and test data of a run, and what does a batch see of them?

The shots of each class are drawn by a seed, the same for every method; dev has at most four of a class, as in CoOp's
protocol; test is whole. Images are decoded once, if memory allows, and their random views are a pure function of
(data seed, micro-batch, place).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from copra_llm.batches import EncodedSplit, Place
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.image_inputs import ImageInputs
from copra_llm.paths import data_root
from copra_llm.pictures import PictureCache, eval_view, needed_side, reduced, train_view, view_rng, whole_view
from copra_llm.settings import ImageSettings
from copra_llm.tasks.clip.catalogue import IMAGES, ImageTask, get_image_task, image_task_names, named_images
from copra_llm.tasks.clip.examples import ImageExample
from copra_llm.tasks.clip.few_shot import few_shot_splits
from copra_llm.tasks.clip.folders import read_images


@dataclass(frozen=True)
class ImageRun:
    """One task's images as a run uses them."""

    task: ImageTask
    prompts: list[str]
    """One a class, in the order of the labels."""
    splits: dict[str, list[ImageExample]]


def asks_images(config: RunConfig, tasks: list[str]) -> bool:
    """Whether these tasks are image sets, or the run's own images."""
    own = config.image is not None and bool(config.image.dataset_name) and tasks == config.data.tasks
    return own or bool(set(tasks) & set(image_task_names()))


def own_name(config: RunConfig) -> RunConfig:
    """The settings with a name for the images of `--dataset_name`: that of `--tasks`, unless a set of the benchmark
    has it; then the folder's or the Hub data set's.

    Raises:
        InputError: if several data sets or several names were given.
    """
    named = config.image.dataset_name
    if not named:
        return config
    if len(named) > 1 or len(config.data.tasks) > 1:
        raise InputError(f"--dataset_name names {', '.join(named)} and --tasks {', '.join(config.data.tasks)}, but a "
                         "run on images of your own has one data set and one name for it")  # fmt: skip
    if config.data.tasks[0] not in image_task_names():
        return config
    return config.replace(tasks=[named_images(named[0]).name])


def read_run_images(config: RunConfig, tasks: list[str], splits: Iterable[str]) -> list[ImageRun]:
    """Prompts and examples of some tasks; no image is opened.

    Raises:
        InputError: for data that are not there, or too few images for the shots.
    """
    settings = config.image or ImageSettings()
    found = []
    for name in tasks:
        task = _task(config, settings, name)
        if settings.template is not None:
            task = dataclasses.replace(task, template=settings.template)
        data = read_images(task, data_root(config.data.data_root, IMAGES))
        seed = config.train.seed_of("data") if settings.shot_seed is None else settings.shot_seed
        drawn = data.splits if settings.shots is None else few_shot_splits(data, settings.shots, seed)
        limits = {"train": config.data.max_train_samples}
        chosen = {split: spread(drawn[split], limits.get(split, config.data.max_eval_samples)) for split in splits}
        found.append(ImageRun(task, task.prompts(data.classnames), chosen))
    return found


def _task(config: RunConfig, settings: ImageSettings, name: str) -> ImageTask:
    if not settings.dataset_name or [name] != config.data.tasks:
        return get_image_task(name)
    return dataclasses.replace(named_images(*settings.dataset_name), name=name)


def spread(examples: list, limit: int | None) -> list:
    """At most `limit` of the examples, evenly over their order: splits have one class after the other."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i * len(examples) // limit] for i in range(limit)]


class Views:
    """What a vision tower sees of an example; images, or evaluation's views of them, are kept up to a limit.

    Args:
        size: of the views, pixels.
        limit_bytes: of what is kept.
        workers: processes that make the views.
        training: whether random views are asked for, so that whole images are kept.
        crop: whether evaluation sees an image's middle; else all of it, squeezed.
    """

    def __init__(self, size: int, limit_bytes: int, workers: int, training: bool, crop: bool = True):
        self.size, self.workers, self.training = size, workers, training
        self.view = partial(eval_view if crop else whole_view, size=size)
        self.cache = PictureCache(limit_bytes, partial(reduced, side=needed_side(size)) if training else self.view)

    def __call__(self, example: ImageExample, place: Place | None) -> np.ndarray:
        """uint8 `(size, size, 3)`: the random view at a place of the training stream; None: evaluation's.

        Raises:
            InputError: if the image cannot be read.
        """
        image = self.cache[example.source]
        if place is not None:
            return train_view(image, self.size, view_rng(*place))
        return self.view(image) if self.training else image

    def prepare(self, examples: list[ImageExample]) -> None:
        """Decode what will be kept, before processes are forked that share it.

        Raises:
            InputError: for the first image that cannot be read.
        """
        self.cache.fill((example.source for example in examples), threads=max(1, self.workers))


def encode_images(
    runs: list[ImageRun], inputs: ImageInputs, settings: ImageSettings, workers: int = 0
) -> dict[str, dict[str, EncodedSplit]]:
    """`{split: {task: examples}}`, as the vision tower wants them.

    Training and evaluation share the memory for decoded images evenly; `workers` processes decode them.
    """
    names = {split for run in runs for split in run.splits}
    shares = 2 if "train" in names and len(names) > 1 else 1
    limit = settings.image_cache_bytes // shares
    views = {training: Views(inputs.size, limit, workers, training, inputs.crop) for training in (True, False)}
    splits: dict[str, dict[str, EncodedSplit]] = {}
    for run in runs:
        for split, examples in run.splits.items():
            labels, ones = [example.label for example in examples], np.ones(len(examples), dtype=int)
            own = EncodedSplit(run.task, examples, labels, ones, views=views[split == "train"])
            splits.setdefault(split, {})[run.task.name] = own
    return splits
