"""What is in a set of images, before anything is trained on it?

Classes and their sizes, every image decoded once: sizes, modes, files that are equal, and each that cannot be read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.errors import InputError
from copra_llm.pictures import Stored, as_rgb, open_image
from copra_llm.tasks.clip.catalogue import ImageTask
from copra_llm.tasks.clip.examples import ImageData, ImageExample, by_label
from copra_llm.tasks.clip.folders import missing_named, named_data

ORIENTATION = 0x0112
"""EXIF's tag."""
AHEAD = 256
"""Images that are handed to the threads at a time."""


@dataclass(frozen=True)
class Seen:
    """One image, decoded."""

    width: int
    """Pixels, as for `height`; of the file, before it is turned upright."""
    height: int
    mode: str
    """Pillow's name of its pixels: RGB, L, CMYK, P, ..."""
    turned: bool
    """Whether EXIF says that it lies on its side or is mirrored."""
    moving: bool
    """Whether it has more than one frame."""
    digest: bytes
    """Of the file."""


@dataclass
class ImageReport:
    """What `check_images` found."""

    task: ImageTask
    data: ImageData
    seen: list[Seen] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    """Place and sentence of each image that is missing or cannot be read."""
    equal: Counter = field(default_factory=Counter)
    """(earlier split, later split) -> files of the later one that are equal to one of the earlier."""

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers and text. Sizes in pixels."""
        sides = np.array([(min(s.width, s.height), max(s.width, s.height)) for s in self.seen]).reshape(-1, 2)
        return {
            "name": self.task.name,
            "folder": self.task.folder,
            "layout": self.task.layout,
            "classes": len(self.data.classnames),
            "splits": {split: self._of_split(split) for split in self.data.splits},
            "images": {"good": len(self.seen), "broken": len(self.broken)},
            "shorter_side": _spread(sides[:, 0]),
            "longer_side": _spread(sides[:, 1]),
            "modes": dict(Counter(s.mode for s in self.seen).most_common()),
            "turned": sum(s.turned for s in self.seen),
            "moving": sum(s.moving for s in self.seen),
            "equal": [{"split": b, "to": a, "files": n} for (a, b), n in sorted(self.equal.items())],
            "unexpected": self.unexpected(),
            "broken": [{"place": place, "sentence": sentence} for place, sentence in self.broken],
        }

    def _of_split(self, split: str) -> dict[str, Any]:
        groups = by_label(self.data.splits[split])
        counts = np.array([len(groups.get(label, ())) for label in range(len(self.data.classnames))])
        least = self.data.classnames[int(counts.argmin())]
        return {"images": int(counts.sum()), "a_class": _spread(counts), "least_class": least}

    def unexpected(self) -> list[dict[str, Any]]:
        """Counts that are not the published ones."""
        have = {"classes": len(self.data.classnames)} | {s: len(e) for s, e in self.data.splits.items()}
        # What is held out for dev is missing in train where there is no published dev split.
        if "dev" not in self.task.counts:
            have["train"] += have["dev"]
        pairs = ((what, have[what], published) for what, published in self.task.counts.items())
        return [{"what": what, "have": n, "published": m} for what, n, m in pairs if n != m]


def check_images(
    task: ImageTask, root: Path | str, *, threads: int = 1, progress: Callable[[Iterable], Iterable] = iter
) -> ImageReport:
    """Decode every image once and say what was there.

    Args:
        task: from `get_image_task` or `named_images`.
        root: as for `read_images`.
        threads: that decode side by side.
        progress: wraps the images as they pass, for a bar.

    Raises:
        InputError: if the set itself cannot be read.
    """
    report = ImageReport(task, named_data(task, root))
    missing = set(missing_named(task, report.data))
    first: dict[bytes, str] = {}
    for split, examples in report.data.splits.items():
        report.broken += [_absent(e.source) for e in examples if e.source in missing]
        there = [e for e in examples if e.source not in missing]
        for example, found in _looked_at(progress(there), threads):
            if isinstance(found, InputError):
                report.broken.append((str(example.source), str(found)))
                continue
            report.seen.append(found)
            if found.digest in first:
                report.equal[first[found.digest], split] += 1
            first.setdefault(found.digest, split)
    return report


def _absent(path: Path) -> tuple[str, str]:
    return str(path), f"{path} does not exist; unpack it there"


def _looked_at(examples: Iterable[ImageExample], threads: int) -> Iterator[tuple[ImageExample, Seen | InputError]]:
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(examples)
        while some := list(islice(waiting, AHEAD)):
            yield from zip(some, pool.map(_look, (e.source for e in some)), strict=True)


def _look(source: Path | Stored) -> Seen | InputError:
    try:
        image = open_image(source)
        as_rgb(image, source)
        content = source.read_bytes() if isinstance(source, Path) else source.read()
    except InputError as error:
        return error
    turned = image.getexif().get(ORIENTATION, 1) != 1
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return Seen(*image.size, image.mode, turned, getattr(image, "n_frames", 1) > 1, digest)


def _spread(numbers: np.ndarray) -> dict[str, float]:
    """Least, median and greatest; empty for no numbers."""
    if not len(numbers):
        return {}
    return {"min": int(numbers.min()), "median": float(np.median(numbers)), "max": int(numbers.max())}
