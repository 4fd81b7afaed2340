"""`copra data check` on images: what it says of good ones, of broken ones, and of a command line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from examples import REAL_DATA
from PIL import Image

from copra_llm.cli import main

RNG = np.random.default_rng(0)


def check(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, what was printed, and what was said on standard error."""
    code = main(["data", "check", *map(str, argv)])
    return code, *capsys.readouterr()


def image(path: Path, width: int = 6, height: int = 4, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        for name in ("cat", "sea_lion"):
            for i in range(n):
                image(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path / "pets"


def test_good_images(folder, capsys):
    code, said, _ = check(capsys, folder)
    assert code == 0
    assert said.splitlines() == [
        f"pets: 2 classes, layout folders, in {folder}",
        "images   12 named: 12 good, 0 broken",
        "train    6; of a class min 3, median 3, max 3 (least: cat)",
        "dev      2; of a class min 1, median 1, max 1 (least: cat)",
        "test     4; of a class min 2, median 2, max 2 (least: cat)",
        "sizes    shorter side min 4, median 4, max 4",
        "         longer side min 6, median 6, max 6 pixels",
        "modes    RGB 12",
    ]


def test_what_is_odd_is_said_and_no_fault(folder, capsys):
    """Other modes, EXIF's rotation, several frames, files that are equal, a class with fewer images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image(folder / "train/cat/turned.png", exif=exif)
    (folder / "test/cat/copy.png").write_bytes(turned.read_bytes())
    (folder / "train/cat/again.png").write_bytes(turned.read_bytes())
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "train/cat/moving.gif", save_all=True, append_images=frames[1:])
    code, said, _ = check(capsys, folder)
    assert code == 0
    for line in (
        "train    9; of a class min 3, median 4, max 6 (least: sea lion)",
        "modes    RGB 15, P 1",
        "turned   3 images are turned upright by EXIF",
        "careful  1 images have several frames, of which the first counts",
        "careful  1 files of test are equal to one of train",
        "careful  1 files of train are equal to an earlier one of it",
    ):
        assert line in said.splitlines()


def test_broken_images_are_all_named(folder, capsys):
    """On paper and as JSON, with the exit code 2; the rest is still counted."""
    bad = folder / "train/cat/0.png"
    bad.write_bytes(bad.read_bytes()[:60])
    (folder / "test/cat/0.png").write_text("no image")
    code, said, _ = check(capsys, folder)
    assert code == 2
    assert "images   12 named: 10 good, 2 broken" in said
    lines = said.splitlines()
    assert lines[-3] == "broken" and lines[-2].startswith(f"  {bad} cannot be read as an image")
    assert lines[-1].startswith(f"  {folder}/test/cat/0.png is no image")
    code, said, _ = check(capsys, folder, "--json")
    assert code == 2 and [b["place"] for b in json.loads(said)["broken"]] == [str(bad), f"{folder}/test/cat/0.png"]


def test_images_that_a_split_file_names_and_that_are_absent(tmp_path, capsys):
    """A run would stop at the first; here all are listed. The published counts are held against the set's."""
    table = {split: [[f"{split}_{i}.png", 0, "banded"] for i in range(3)] for split in ("train", "val", "test")}
    for split in ("train", "test"):
        for i in range(2):
            image(tmp_path / "dtd" / "images" / f"{split}_{i}.png")
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(table))
    code, said, _ = check(capsys, "dtd", "--data_root", tmp_path)
    assert code == 2
    assert "images   9 named: 4 good, 5 broken" in said
    assert "careful  train: 3, but 2,820 are published" in said and "careful  classes: 1, but 47" in said
    assert f"  {tmp_path}/dtd/images/train_2.png does not exist; unpack it there" in said


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"{REAL_DATA} is not there; COPRA_TEST_DATA names it")
def test_a_real_set(capsys):
    code, said, _ = check(capsys, "dtd10", "--data_root", REAL_DATA / "images", "--json")
    figures = json.loads(said)
    assert code == 0 and figures["images"] == {"good": 1200, "broken": 0} and figures["unexpected"] == []
    assert figures["splits"]["train"]["a_class"] == {"min": 60, "median": 60.0, "max": 60}


@pytest.mark.parametrize(
    "argv, said",
    [
        (["{folder}", "more.jsonl"], "names images and something else; check one set of images at a time"),
        (["{folder}", "--preview", "1"], "--preview is about text, but"),
        (["{folder}", "--turns", "last"], "--turns is about text, but"),
        (["more.jsonl", "--data_root", "."], "--data_root is where image sets lie"),
        (["dtd", "--data_root", "{folder}"], "dtd does not exist (nor DTD); data/clip/README.md"),
        (["dtd", "--data_root", "nowhere"], "--data_root names nowhere, which is not a folder"),
        (["owner/none", "--images"], "owner/none is no folder and could not be read from the Hub"),
    ],
)
def test_a_wrong_command_line(folder, capsys, argv, said):
    code, printed, error = check(capsys, *(word.format(folder=folder) for word in argv))
    assert code == 2 and printed == "" and error.startswith("error: ") and said in error and error.count("\n") == 1
