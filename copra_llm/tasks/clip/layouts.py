"""Which images and classes are in a folder?

    split      SPLIT.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}
    aircraft   variants.txt, images_variant_{train,val,test}.txt: "<image> <variant>" a line
    imagenet   [images/]{train,val}/<WordNet id>/<image>, classnames.txt: "<WordNet id> <name>" a line
    folders    {train,val,test}/<class>/<image>, or <class>/<image>

Every function gives class names as the files have them, and the splits that are there, under the names "train", "dev"
and "test"; no image is opened, nor looked for where a file names it (`missing_files`).

Source: CoOp's DATASETS.md for the first three.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

from copra_llm.errors import InputError, named, shown
from copra_llm.json_file import read_json
from copra_llm.paths import is_below
from copra_llm.tasks.clip.examples import ImageExample

Layout = tuple[list[str], dict[str, list[ImageExample]]]
"""Class names by label, and examples by split."""
THEIRS = {
    "train": ("train", "training"),
    "dev": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Our names of the splits -> what others call them."""
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""Files that are taken for images, in small letters."""


def read_split(split_file: Path, images: Path) -> Layout:
    """CoOp's `split_zhou_*.json`.

    Raises:
        InputError: for a file that is missing or is no such JSON, or labels with gaps or two names.
    """
    table = _split_table(split_file)
    names: dict[int, str] = {}
    splits: dict[str, list[ImageExample]] = {}
    for split, theirs in (("train", "train"), ("dev", "val"), ("test", "test")):
        examples = splits[split] = []
        for number, entry in enumerate(table.get(theirs, [])):
            path, label, name = _entry(entry, f'{split_file}, "{theirs}" entry {number}')
            if names.setdefault(label, name) != name:
                raise InputError(f'{split_file} calls label {label} "{names[label]}" and "{name}"; mend it')
            examples.append(ImageExample(images / path, label))
    gaps = set(range(len(names))) ^ names.keys()
    if gaps:
        raise InputError(f"{split_file} numbers its classes with gaps (label {min(gaps)}); number them from 0 on")
    return [names[label] for label in range(len(names))], splits


def _split_table(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} does not exist; put CoOp's split file there (data/clip/README.md)")
    table = read_json(path, "download it anew")
    parts = (table.get("train"), table.get("val", []), table.get("test")) if isinstance(table, dict) else (None,)
    if not all(isinstance(part, list) for part in parts):
        raise InputError(f'{path} must hold lists "train", "val" and "test" of [path, label, class name]; mend it')
    return table


def _entry(entry, place: str) -> tuple[str, int, str]:
    kinds = (str, int, str)
    if not isinstance(entry, list) or len(entry) != 3 or not all(map(isinstance, entry, kinds)) or entry[1] < 0:
        raise InputError(f"{place} is {shown(entry)}, but must be [path, label, class name]; mend it")
    if not is_below(entry[0]):
        raise InputError(f"{place} names {shown(entry[0])}, which is not in the images' folder; mend it")
    return entry[0], entry[1], entry[2]


def missing_files(examples: Iterable[ImageExample]) -> list[Path]:
    """The files that are not there: one look into each folder, not one at each of what may be a million files."""
    files: dict[Path, set[str]] = {}
    missing = []
    for example in examples:
        folder = example.source.parent
        if folder not in files:
            files[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if example.source.name not in files[folder]:
            missing.append(example.source)
    return missing


def read_aircraft(folder: Path, images: Path) -> Layout:
    """FGVC Aircraft's text files, by variant.

    Raises:
        InputError: for a missing file or an unknown variant.
    """
    names = _lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(names)}
    splits: dict[str, list[ImageExample]] = {}
    for split, theirs in (("train", "train"), ("dev", "val"), ("test", "test")):
        path = folder / f"images_variant_{theirs}.txt"
        examples = splits[split] = []
        for number, line in enumerate(_lines(path), 1):
            image, _, variant = line.partition(" ")
            if variant not in labels:
                raise InputError(f"{path}, line {number} names {named(variant)}, which variants.txt has not; mend it")
            if not is_below(image):
                raise InputError(f"{path}, line {number} names {shown(image)}, which is not in the images' folder; "
                                 "mend it")  # fmt: skip
            examples.append(ImageExample(images / f"{image}.jpg", labels[variant]))
    return names, splits


def read_imagenet(folder: Path, images: Path) -> Layout:
    """ImageNet's train and val; val, whose labels are public, is test. Below `images`, or in the folder itself.

    Names come from CoOp's `classnames.txt`; without it from the package, for the thousand classes in order.

    Raises:
        InputError: for missing folders, or a class that has no name.
    """
    root = images if images.is_dir() else folder
    ids, splits = read_folders(root)
    path = folder / "classnames.txt"
    if path.is_file():
        names = dict(line.partition(" ")[::2] for line in _lines(path))
    else:
        packaged = resources.files("copra_llm.tasks.clip").joinpath("imagenet_classnames.txt")
        names = dict(zip(ids, packaged.read_text(encoding="utf-8").splitlines(), strict=False))
        if len(ids) != len(names) or len(ids) != IMAGENET_CLASSES:
            raise InputError(f"{path} does not exist, and {root} has {len(ids)} classes, not ImageNet's "
                             f"{IMAGENET_CLASSES}; write a line with folder and name for each")  # fmt: skip
    nameless = [wnid for wnid in ids if not names.get(wnid)]
    if nameless:
        raise InputError(f"{path} has no name for the class {nameless[0]}; add a line with folder and name")
    return [names[wnid] for wnid in ids], splits


IMAGENET_CLASSES = 1000


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; data/clip/README.md says where it comes from") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); download it anew") from None


def read_folders(root: Path) -> Layout:
    """Folders of class folders, one a split; where train has a dev split beside it and no test, that is the test.

    One folder of class folders is all "train": nobody has divided it.

    Raises:
        InputError: if there is no image, or a class that train lacks.
    """
    parts = {split: _first_folder(root, names) for split, names in THEIRS.items()}
    if parts["train"] is None or (parts["dev"] is None and parts["test"] is None):
        parts = {"train": root}
    elif parts["test"] is None:
        parts = {"train": parts["train"], "test": parts["dev"]}
    parts = {split: folder for split, folder in parts.items() if folder is not None}
    classes = {split: _subfolders(folder) for split, folder in parts.items()}
    names = sorted(classes["train"])
    for split, theirs in classes.items():
        strange = sorted(set(theirs) - set(names))
        if strange:
            raise InputError(f"{parts[split]} has the class {strange[0]}, which {parts['train']} has not; the splits "
                             "need the same classes")  # fmt: skip
    splits = {
        split: [ImageExample(p, label) for label, name in enumerate(names) for p in sorted(image_files(folder / name))]
        for split, folder in parts.items()
    }
    empty = next((split for split, examples in splits.items() if not examples), None)
    if empty is not None:
        raise InputError(f"{parts[empty]} has no image in folders named by class; give a folder of class folders")
    return names, splits


def image_files(folder: Path) -> Iterator[Path]:
    """The images below a folder, by the ending of their names; hidden files are none. In no order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, f) for f in files if not f.startswith(".") and f.lower().endswith(ENDINGS))


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)
