"""Image sets in each layout: which images and class names are found, how they are divided, which are the shots."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copra_llm.errors import InputError
from copra_llm.paths import HUB, SAMPLE
from copra_llm.tasks.clip import hub_images
from copra_llm.tasks.clip.catalogue import PLAIN_TEMPLATE, get_image_task, image_task_names, named_images
from copra_llm.tasks.clip.examples import ImageData, ImageExample, by_label, divided, with_dev
from copra_llm.tasks.clip.few_shot import dev_shots, few_shot, few_shot_splits
from copra_llm.tasks.clip.folders import read_images

ELEVEN = ["imagenet", "sun397", "fgvc_aircraft", "eurosat", "stanford_cars", "food101", "oxford_pets",
          "oxford_flowers", "caltech101", "dtd", "ucf101"]  # fmt: skip


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_split(folder: Path, table, file: str, images: str = "images") -> Path:
    """A split file and empty files in the places it names: reading a set opens no image."""
    for entries in table.values():
        for path, _, _ in entries:
            touch(folder / images / path)
    (folder / file).write_text(json.dumps(table), encoding="utf-8")
    return folder / file


PETS = {
    "train": [["a_1.jpg", 0, "great_dane"], ["b_1.jpg", 1, "pug"], ["b_2.jpg", 1, "pug"]],
    "val": [["a_2.jpg", 0, "great_dane"]],
    "test": [["b_3.jpg", 1, "pug"], ["a_3.jpg", 0, "great_dane"]],
}


def heap(sizes: dict[int, int]) -> list[ImageExample]:
    return [ImageExample(Path(f"{label}/{i}.png"), label) for label, n in sizes.items() for i in range(n)]


# The catalogue


def test_the_eleven_sets_are_there():
    assert image_task_names()[:11] == ELEVEN
    for name in image_task_names():
        task = get_image_task(name)
        assert task.template.count("{}") == 1 and task.name == name
        assert (task.split_file is None) == (task.layout != "split")


def test_published_counts_are_what_their_splits_sum_to():
    """The shares by which CoOp divided a set that had no split: 50, 20 and 30 %, to a class's rounding."""
    for name in ("eurosat", "food101", "oxford_flowers", "caltech101", "dtd"):
        counts = get_image_task(name).counts
        total = counts["train"] + counts["dev"] + counts["test"]
        for split, share in (("train", 0.5), ("dev", 0.2), ("test", 0.3)):
            assert abs(counts[split] - share * total) <= counts["classes"]


def test_the_readme_has_the_counts_of_the_catalogue():
    """And each set's folder and split file."""
    readme = (Path(__file__).parents[1] / "data/clip/README.md").read_text(encoding="utf-8")
    rows: dict[str, list[str]] = {}
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], []).extend(cells[1:])
    for name in (*ELEVEN, "cifar10"):
        task, cells = get_image_task(name), rows[name]
        assert cells[0].startswith(task.folder) and all(other in cells[0] for other in task.other_folders)
        assert task.split_file is None or task.split_file in cells[2]
        written = [int(cell.split()[0].replace(",", "")) if cell != "–" else None for cell in cells[4:8]]
        assert written == [task.counts.get(what) for what in ("classes", "train", "dev", "test")], name


def test_a_part_of_a_set_takes_its_files_and_template_not_its_counts():
    part, whole = get_image_task("flowers51"), get_image_task("oxford_flowers")
    assert (part.folder, part.split_file, part.template) == (whole.folder, whole.split_file, whole.template)
    assert len(part.classes) == part.counts["classes"] == 51 and "train" not in part.counts


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match='no image set "oxford_pet" .did you mean "oxford_pets".*--dataset_name'):
        get_image_task("oxford_pet")


def test_prompts():
    assert get_image_task("dtd").prompts(["banded", "dotted"]) == ["banded texture.", "dotted texture."]
    with pytest.raises(InputError, match="a photo.*must have"):
        named_images("x/y", "a photo")


# Layouts


@pytest.mark.parametrize("name", ["oxford_pets", "OxfordPets"])
def test_a_split_file_says_which_images(tmp_path, name):
    """Under CoOp's folder and CLIP-LoRA's; val is dev; underscores become spaces."""
    write_split(tmp_path / name, PETS, "split_zhou_OxfordPets.json")
    data = read_images(get_image_task("oxford_pets"), tmp_path)
    assert data.classnames == ("great dane", "pug")
    images = tmp_path / name / "images"
    assert data.splits["train"] == [ImageExample(images / f, y) for f, y, _ in PETS["train"]]
    assert data.splits["dev"] == [ImageExample(images / "a_2.jpg", 0)]
    assert [e.label for e in data.splits["test"]] == [1, 0]


def test_folder_names_that_are_no_words_are_renamed(tmp_path):
    table = {"train": [["SeaLake/1.jpg", 0, "SeaLake"]], "val": [], "test": [["SeaLake/2.jpg", 0, "SeaLake"]]}
    write_split(tmp_path / "eurosat", table, "split_zhou_EuroSAT.json", images="2750")
    assert read_images(get_image_task("eurosat"), tmp_path).classnames == ("Sea or Lake",)


def test_a_part_is_numbered_anew(tmp_path):
    table = {
        "train": [[f"{c}/{c}_1.jpg", y, c] for y, c in enumerate(get_image_task("dtd10").classes)],
        "val": [["bubbly/bubbly_2.jpg", 3, "bubbly"]],
        "test": [["banded/banded_3.jpg", 0, "banded"], ["bubbly/bubbly_3.jpg", 3, "bubbly"]],
    }
    write_split(tmp_path / "DTD", table, "split_zhou_DescribableTextures.json")
    data = read_images(get_image_task("dtd5"), tmp_path)
    assert data.classnames == ("blotchy", "bubbly", "chequered", "cracked", "crystalline")
    assert [e.label for e in data.splits["train"]] == [0, 1, 2, 3, 4]
    assert [(e.source.name, e.label) for e in data.splits["test"]] == [("bubbly_3.jpg", 1)]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t["train"].append(["none.jpg", 0, "great_dane"]), "names .*none.jpg, which does not exist; unpack"),
        (lambda t: t["train"].append(["x/none.jpg", 0, "great_dane"]), "x/none.jpg, which does not exist; unpack"),
        (lambda t: t["train"].append(["a_1.jpg", 0, "dane"]), 'label 0 "great_dane" and "dane"'),
        (lambda t: t["train"].append(["a_1.jpg", 3, "dane"]), "with gaps .label 2"),
        (lambda t: t["val"].append(["a_1.jpg", "0"]), '"val" entry 1 is .* but must be'),
        (lambda t: t["val"].append(["a_1.jpg", -1, "great_dane"]), '"val" entry 1 is'),
        (lambda t: t.pop("test"), 'must hold lists "train", "val" and "test"'),
    ],
)
def test_a_split_file_that_is_wrong_is_refused(tmp_path, change, said):
    path = write_split(tmp_path / "oxford_pets", PETS, "split_zhou_OxfordPets.json")
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + said):
        read_images(get_image_task("oxford_pets"), tmp_path)


def test_a_split_without_images_is_refused(tmp_path):
    """What a split file divides is not divided anew."""
    write_split(tmp_path / "oxford_pets", PETS | {"test": []}, "split_zhou_OxfordPets.json")
    with pytest.raises(InputError, match="oxford_pets has no image in its test split"):
        read_images(get_image_task("oxford_pets"), tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    task = get_image_task("oxford_pets")
    with pytest.raises(InputError, match="oxford_pets does not exist .nor OxfordPets"):
        read_images(task, tmp_path)
    (tmp_path / "oxford_pets").mkdir()
    with pytest.raises(InputError, match="split_zhou_OxfordPets.json does not exist"):
        read_images(task, tmp_path)
    (tmp_path / "oxford_pets/split_zhou_OxfordPets.json").write_text("{")
    with pytest.raises(InputError, match="split_zhou_OxfordPets.json, line 1 is not JSON"):
        read_images(task, tmp_path)
    for root in (SAMPLE, HUB):
        with pytest.raises(InputError, match=f"oxford_pets is read from a folder, not from the {root}"):
            read_images(task, root)


def test_aircraft(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    touch(folder / "variants.txt").write_text("707-320\nA300B4\nBAE 146-200\n")
    for i, split in enumerate(("train", "val", "test")):
        (folder / f"images_variant_{split}.txt").write_text(f"000{i} BAE 146-200\n")
        touch(folder / "images" / f"000{i}.jpg")
    data = read_images(get_image_task("fgvc_aircraft"), tmp_path)
    assert data.classnames == ("707-320", "A300B4", "BAE 146-200")
    assert data.splits["dev"] == [ImageExample(folder / "images/0001.jpg", 2)]
    (folder / "images_variant_test.txt").write_text("0002 A380\n")
    with pytest.raises(InputError, match='images_variant_test.txt, line 1 names "A380"'):
        read_images(get_image_task("fgvc_aircraft"), tmp_path)


@pytest.mark.parametrize("below", ["images", "."])
def test_imagenet(tmp_path, below):
    """CoOp's folders and CLIP-LoRA's; val is the test, and a fifth of train is dev."""
    folder = tmp_path / "imagenet"
    for wnid in ("n02", "n01"):
        for i in range(10):
            touch(folder / below / "train" / wnid / f"{wnid}_{i}.JPEG")
        touch(folder / below / "val" / wnid / "val_1.JPEG")
    with pytest.raises(InputError, match="classnames.txt does not exist, and .* has 2 classes"):
        read_images(get_image_task("imagenet"), tmp_path)
    (folder / "classnames.txt").write_text("n03 shark\nn02 goldfish\nn01 tench fish\n")
    data = read_images(get_image_task("imagenet"), tmp_path)
    assert data.classnames == ("tench fish", "goldfish")
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 16, "dev": 4, "test": 2}
    (folder / "classnames.txt").write_text("n02 goldfish\n")
    with pytest.raises(InputError, match="classnames.txt has no name for the class n01"):
        read_images(get_image_task("imagenet"), tmp_path)


def test_imagenets_names_are_packaged(tmp_path):
    """A thousand folders in order have CLIP's names without a file beside them."""
    for i in range(1000):
        for split in ("train", "val"):
            touch(tmp_path / "imagenet" / split / f"n{i:08}" / "1.JPEG")
    names = read_images(get_image_task("imagenet"), tmp_path).classnames
    assert (names[0], names[22], names[999]) == ("tench", "bald eagle", "toilet paper")


# Any image folder


def test_a_folder_with_splits(tmp_path):
    for split in ("train", "validation", "test"):
        for name in ("cat_big", "dog"):
            touch(tmp_path / split / name / "1.PNG")
            touch(tmp_path / split / name / "notes.txt")
            touch(tmp_path / split / name / ".hidden.png")
            touch(tmp_path / split / name / "more" / "2.jpg")
    data = read_images(named_images(str(tmp_path)), "nowhere")
    assert data.classnames == ("cat big", "dog")
    assert [e.source.name for e in data.splits["dev"]] == ["1.PNG", "2.jpg"] * 2
    touch(tmp_path / "test" / "eel" / "1.png")
    with pytest.raises(InputError, match="test has the class eel, which .*train has not"):
        read_images(named_images(str(tmp_path)), "nowhere")


def test_one_folder_of_classes_is_divided(tmp_path, monkeypatch):
    for i in range(20):
        touch(tmp_path / "pics" / f"class {i % 2}" / f"{i:02}.png")
    monkeypatch.chdir(tmp_path)
    task = named_images("pics")
    assert (task.name, task.template) == ("pics", PLAIN_TEMPLATE)
    monkeypatch.chdir("/")
    data = read_images(task, SAMPLE)
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 10, "dev": 4, "test": 6}
    with pytest.raises(InputError, match="has no image in folders named by class"):
        (tmp_path / "empty").mkdir()
        read_images(named_images(str(tmp_path / "empty")), SAMPLE)


# Any data set on the Hub


def published(n: int, labels=None):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["red_ish", "blue"])})
    images = [Image.new("RGB", (3, 2), ("red", "blue")[i % 2]) for i in range(n)]
    return datasets.Dataset.from_dict({"img": images, "label": labels or [i % 2 for i in range(n)]}, features=features)


def test_a_hub_data_set(monkeypatch):
    """Images stay encoded until they are asked for; rows without a label are left out; validation may be the test."""
    import datasets

    from copra_llm.pictures import decode

    theirs = {"train": published(10), "validation": published(4), "test": published(2, [-1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(theirs))
    data = read_images(named_images("owner/colours"), HUB)
    assert data.classnames == ("red ish", "blue")
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 8, "dev": 2, "test": 4}
    example = data.splits["test"][3]
    assert decode(example.source)[0, 0].tolist() == [0, 0, 255] and example.label == 1
    assert str(example.source) == "owner/colours, validation, row 3"


def test_what_is_no_data_set_of_images_is_refused(monkeypatch):
    with pytest.raises(InputError, match="owner/none is no folder and could not be read from the Hub"):
        read_images(named_images("owner/none"), HUB)
    with pytest.raises(InputError, match="x has no train split, only test"):
        hub_images.rows_to_examples("x", {"test": published(2)})
    with pytest.raises(InputError, match="x has no labelled image in train"):
        hub_images.rows_to_examples("x", {"train": published(2, [-1, -1])})
    with pytest.raises(InputError, match=r"x has no column of the type ClassLabel, only img \(Image\)"):
        hub_images.rows_to_examples("x", {"train": published(2).remove_columns("label")})


# Division


def test_held_out_images_are_a_fifth_and_at_most_fifty():
    examples = heap({0: 4, 1: 10, 2: 1000})
    splits = with_dev({"train": examples, "test": []})
    assert {label: len(group) for label, group in by_label(splits["dev"]).items()} == {1: 2, 2: 50}
    together = splits["train"] + splits["dev"]
    assert sorted(together, key=lambda e: (e.label, str(e.source))) == sorted(
        examples, key=lambda e: (e.label, str(e.source))
    )
    assert with_dev({"train": examples, "dev": examples[:1], "test": []})["train"] == examples


@pytest.mark.parametrize(
    "n, parts", [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (10, (5, 2, 3)), (100, (50, 20, 30))]
)
def test_a_heap_is_divided_by_coops_shares(n, parts):
    splits = divided(heap({7: n}))
    assert tuple(len(splits[split]) for split in ("train", "dev", "test")) == parts
    assert len({e.source for examples in splits.values() for e in examples}) == n


# Shots


def test_shots_are_pure_in_the_seed_and_nested():
    """One seed, one draw, whatever the other classes are, the four among the sixteen; another seed, another draw."""
    examples = heap({0: 30, 1: 30, 2: 30})
    sixteen, four = few_shot(examples, 16, 5), few_shot(examples, 4, 5)
    assert [e.label for e in four] == [0] * 4 + [1] * 4 + [2] * 4
    assert set(four) < set(sixteen) and len(set(sixteen)) == 48
    assert few_shot(examples[30:60], 4, 5) == four[4:8]
    assert few_shot(examples, 4, 6) != four
    assert [e.source.stem for e in few_shot(heap({3: 10}), 4, 1)] == ["3", "7", "9", "6"]


def test_shots_share_no_stream_with_masks():
    """A mask is drawn with counter (0, step, 0, 0): with one seed, step 3 must not repeat what label 3 drew."""
    mask_stream = np.random.Generator(np.random.Philox(key=1, counter=[0, 3, 0, 0]))
    drawn = [int(e.source.stem) for e in few_shot(heap({3: 100}), 100, 1)]
    assert drawn != list(mask_stream.permutation(100))


def test_a_class_with_too_few_shots_is_refused_with_its_name():
    examples = heap({0: 4, 1: 2})
    with pytest.raises(InputError, match='class "b c" has 2 training images, but 4 shots.*; lower --shots'):
        few_shot(examples, 4, 0, ("a", "b c"))
    with pytest.raises(InputError, match='class "b" has 2 .*1 more classes have too few'):
        few_shot(examples, 4, 0, ("a", "b", "c"))
    with pytest.raises(InputError, match="--shots is 0, but must be at least 1"):
        few_shot(examples, 0, 0)


def test_dev_has_at_most_four_of_a_class():
    """And fewer where there are fewer; none is repeated, as others do."""
    dev = heap({0: 9, 1: 3})
    assert {label: len(group) for label, group in by_label(dev_shots(dev, 16, 0)).items()} == {0: 4, 1: 3}
    assert len(dev_shots(dev, 1, 0)) == 2
    data = ImageData(("a", "b"), {"train": heap({0: 2, 1: 2}), "dev": dev, "test": heap({1: 5})})
    assert {split: len(examples) for split, examples in few_shot_splits(data, 2, 0).items()} == {
        "train": 4, "dev": 4, "test": 5,
    }  # fmt: skip
