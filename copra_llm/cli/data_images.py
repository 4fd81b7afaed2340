"""`copra data check` for images: one set of the benchmark, a folder, or a data set on the Hub."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from copra_llm.cli.common import bar, broken_lines
from copra_llm.errors import InputError

TEXT_FLAGS = {"format": None, "model_name_or_path": None, "chat_template": None, "turns": "all", "max_length": None,
              "preview": None}  # fmt: skip
"""Flags that images have no use for, and what they are when they were not given."""


def image_words(words: list[str]) -> bool:
    """Whether one of them names images: a set of the benchmark, or a folder that holds some."""
    from copra_llm.tasks.clip.catalogue import image_task_names
    from copra_llm.tasks.clip.layouts import image_files

    names = image_task_names()
    return any(word in names or any(True for _ in image_files(Path(word))) for word in words)


def check(args: argparse.Namespace) -> int:
    """Read, print and judge; 2 if an image is broken.

    Raises:
        InputError: for several data sets at once, or a flag about text.
    """
    from copra_llm.paths import data_root
    from copra_llm.tasks.clip.catalogue import IMAGES, get_image_task, image_task_names, named_images
    from copra_llm.tasks.clip.check import check_images

    if len(args.files) > 1:
        raise InputError(f"{' '.join(args.files)} names images and something else; check one set of images at a time")
    for name, unset in TEXT_FLAGS.items():
        if getattr(args, name) != unset:
            raise InputError(f"--{name} is about text, but {args.files[0]} is images; leave it out")
    word = args.files[0]
    # A folder of the working directory goes before a set of the same name, as a path does before a Hub id.
    known = word in image_task_names() and not Path(word).is_dir()
    task = get_image_task(word) if known else named_images(word)
    root = data_root(args.data_root, IMAGES) if known else ""
    report = check_images(task, root, threads=os.cpu_count() or 1, progress=bar("image"))
    figures = report.figures()
    print(json.dumps(figures, indent=1, ensure_ascii=False) if args.json else "\n".join(_text(figures)))
    return 2 if report.broken else 0


def _text(figures: dict) -> Iterator[str]:
    """The figures of `check.ImageReport` as lines to read."""
    good, broken = figures["images"]["good"], figures["images"]["broken"]
    yield f"{figures['name']}: {figures['classes']:,} classes, layout {figures['layout']}, in {figures['folder']}"
    yield f"images   {good + broken:,} named: {good:,} good, {broken:,} broken"
    for split, of in figures["splits"].items():
        yield f"{split:8} {of['images']:,}; of a class {_spread(of['a_class'])} (least: {of['least_class']})"
    if good:
        yield f"sizes    shorter side {_spread(figures['shorter_side'])}"
        yield f"         longer side {_spread(figures['longer_side'])} pixels"
        yield f"modes    {', '.join(f'{mode} {n:,}' for mode, n in figures['modes'].items())}"
    if figures["turned"]:
        yield f"turned   {figures['turned']:,} images are turned upright by EXIF"
    if figures["moving"]:
        yield f"careful  {figures['moving']:,} images have several frames, of which the first counts"
    for equal in figures["equal"]:
        where = f"one of {equal['to']}" if equal["to"] != equal["split"] else "an earlier one of it"
        yield f"careful  {equal['files']:,} files of {equal['split']} are equal to {where}"
    for count in figures["unexpected"]:
        yield f"careful  {count['what']}: {count['have']:,}, but {count['published']:,} are published"
    yield from broken_lines(figures["broken"])


def _spread(of: dict) -> str:
    return f"min {of['min']:,}, median {of['median']:,.0f}, max {of['max']:,}"
