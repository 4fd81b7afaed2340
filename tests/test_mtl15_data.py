"""Are MTL15's entries, the packaged sample, and the scripts that write and check a folder right?"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import string
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from examples import REAL_DATA

from copra_llm.errors import InputError
from copra_llm.paths import SAMPLE
from copra_llm.tasks import mtl15
from copra_llm.tasks.mtl15 import SPLITS, Task, examples_from_rows, get_task, load_split, read_jsonl, task_names

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_FOLDER = Path(mtl15.__file__).parent / "mtl15_sample"
SAMPLE_TASKS = ("agnews", "boolq", "mnli", "qqp", "sst2", "wic")
SAMPLE_SIZES = {"train": 120, "dev": 30, "test": 60}
MTL15 = REAL_DATA / "mtl15"

# One published row a task: all its columns, and the label and texts it has to become here.
# Columns and labels are those of the data sets' cards; they are repeated by hand, not read from mtl15.yaml.
PUBLISHED = {
    "agnews": ({"label": 3, "title": "T", "description": "D"}, "Business", {"title": "T", "text": "D"}),
    "amazon": (
        {"class_index": 5, "review_title": "T", "review_text": "R"},
        "very positive",
        {"title": "T", "text": "R"},
    ),
    "yelp": ({"label": 0, "text": "R"}, "very negative", {"text": "R"}),
    "dbpedia": ({"label": 4, "title": "T", "content": "C"}, "Office Holder", {"title": "T", "text": "C"}),
    "yahoo": (
        {"id": 7, "topic": 9, "question_title": "Q", "question_content": "C", "best_answer": "A"},
        "Politics & Government",
        {"text": "Q C A"},
    ),
    "mnli": (
        {"premise": "P", "hypothesis": "H", "label": 0, "idx": 1},
        "entailment",
        {"premise": "P", "hypothesis": "H"},
    ),
    "qqp": ({"question1": "P", "question2": "Q", "label": 1, "idx": 1}, "True", {"question1": "P", "question2": "Q"}),
    "rte": (
        {"sentence1": "P", "sentence2": "H", "label": 0, "idx": 1},
        "entailment",
        {"premise": "P", "hypothesis": "H"},
    ),
    "sst2": ({"sentence": "S", "label": 1, "idx": 1}, "Good", {"text": "S"}),
    "wic": (
        {"word": "W", "sentence1": "P", "sentence2": "Q", "start1": 0, "end1": 1, "idx": 1, "label": 1},
        "True",
        {"word": "W", "sentence1": "P", "sentence2": "Q"},
    ),
    "cb": (
        {"premise": "P", "hypothesis": "H", "idx": 1, "label": 1},
        "contradiction",
        {"premise": "P", "hypothesis": "H"},
    ),
    "copa": (
        {"premise": "P", "choice1": "C", "choice2": "D", "question": "cause", "idx": 1, "label": 1},
        "B",
        {"premise": "P", "question": "cause", "choice1": "C", "choice2": "D"},
    ),
    "boolq": ({"question": "Q", "answer": False, "passage": "P"}, "False", {"question": "Q", "passage": "P"}),
    "multirc": (
        {"paragraph": "P", "question": "Q", "answer": "A", "idx": {"paragraph": 0, "question": 0}, "label": 1},
        "True",
        {"paragraph": "P", "question": "Q", "answer": "A"},
    ),
    "imdb": ({"text": "R", "label": 0}, "Bad", {"text": "R"}),
}

# Label names in the order of the published integers, from 0 unless FIRST_LABEL says otherwise; BoolQ's are booleans.
STARS = ["very negative", "negative", "neutral", "positive", "very positive"]
CARDS = {
    "agnews": ["World", "Sports", "Business", "Science or Technology"],
    "amazon": STARS,
    "yelp": STARS,
    "dbpedia": [
        *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation"),
        *("Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
    ],
    "yahoo": [
        *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
        *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
    ],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qqp": ["False", "True"],
    "rte": ["entailment", "contradiction"],
    "sst2": ["Bad", "Good"],
    "wic": ["False", "True"],
    "cb": ["entailment", "contradiction", "neutral"],
    "copa": ["A", "B"],
    "boolq": ["False", "True"],
    "multirc": ["False", "True"],
    "imdb": ["Bad", "Good"],
}
FIRST_LABEL = {"agnews": 1, "amazon": 1}


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("mtl15_prepare", ROOT / "data" / "mtl15" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


# --- mtl15.yaml


def test_there_are_fifteen_tasks():
    assert sorted(task_names()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_entry_is_consistent(name):
    task = get_task(name)
    assert len(set(task.labels)) == len(task.labels) == len(task.label_words) >= 2
    assert placeholders(task.prompt_template) == set(task.fields)
    assert set().union(*map(placeholders, task.input_templates)) == set(task.fields)
    assert len(task.input_templates) in (1, 2)
    assert not task.prompt_template.endswith((" ", "\n"))
    assert tuple(task.hub["fields"]) == task.fields
    assert len(set(task.hub["values"])) == len(task.labels)
    assert {"train", "test"} <= set(task.hub["splits"]) <= set(SPLITS)


def test_unknown_task_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r'"sst-2" \(did you mean "sst2"\?\)'):
        get_task("sst-2")


# --- the packaged sample


@pytest.mark.parametrize("name", SAMPLE_TASKS)
def test_sample_sizes_and_balance(name):
    task = get_task(name)
    for split, size in SAMPLE_SIZES.items():
        examples = load_split(task, split, SAMPLE)
        counts = Counter(e.label for e in examples)
        assert len(examples) == size
        assert set(counts) == set(range(len(task.labels)))
        assert max(counts.values()) - min(counts.values()) <= max(2, size // 15)


def test_sample_holds_these_tasks_only():
    assert tuple(sorted(entry.name for entry in SAMPLE_FOLDER.iterdir() if entry.is_dir())) == SAMPLE_TASKS
    with pytest.raises(InputError, match="no imdb, only agnews"):
        load_split(get_task("imdb"), "train", SAMPLE)


WORD = re.compile(r"[a-z0-9']+")
STOPWORDS = frozenset(
    WORD.findall(
        """a an the of to in on at is was are were be been it its and or but for with as by that this from has have
        had not no he she they we i you his her their my your our did do does can will would which who what how when
        where"""
    )
)


def content_words(fields: dict[str, str]) -> frozenset[str]:
    return frozenset(WORD.findall(" ".join(fields.values()).lower())) - STOPWORDS


def near_copies(bags: dict[str, frozenset[str]], most: float = 0.5) -> list[str]:
    """Pairs whose content words have a Jaccard index above `most`."""
    return [
        f"{one} and {other}" for (one, a), (other, b) in combinations(bags.items(), 2) if len(a & b) > most * len(a | b)
    ]


@pytest.mark.parametrize("name", SAMPLE_TASKS)
def test_sample_has_no_near_copies(name):
    task = get_task(name)
    bags = {
        f"{split}[{i}]": content_words(e.fields)
        for split in SPLITS
        for i, e in enumerate(load_split(task, split, SAMPLE))
    }
    assert near_copies(bags) == []


def test_near_copies_are_found():
    texts = ["The old boat sank in the harbour.", "An old boat sank at that harbour!", "A new train left the city."]
    assert near_copies({str(i): content_words({"text": text}) for i, text in enumerate(texts)}) == ["0 and 1"]


# --- published rows -> examples


def published_rows(name: str, count: int = 1, **changes):
    """`count` rows as published; the first text column tells them apart."""
    import datasets

    row = {**PUBLISHED[name][0], **changes}
    first = next(iter(get_task(name).hub["fields"].values())).split(" + ")[0]
    rows = [row] if count == 1 else [{**row, first: f"{row[first]} {i}"} for i in range(count)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_row_becomes_the_right_example(name):
    _, label, fields = PUBLISHED[name]
    task = get_task(name)
    [example] = examples_from_rows(task, published_rows(name), "test")
    assert example.fields == fields
    assert task.labels[example.label] == label


@pytest.mark.parametrize("name", sorted(CARDS))
def test_every_published_label_becomes_the_right_one(name):
    task = get_task(name)
    assert sorted(task.labels) == sorted(CARDS[name])
    for value, label in enumerate(CARDS[name], FIRST_LABEL.get(name, 0)):
        published = bool(value) if name == "boolq" else value
        [example] = examples_from_rows(task, published_rows(name, **{task.hub["label"]: published}), "test")
        assert task.labels[example.label] == label


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"boolq"}))
def test_row_without_a_public_label_is_left_out(name):
    task = get_task(name)
    assert examples_from_rows(task, published_rows(name, **{task.hub["label"]: -1}), "test") == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_missing_column_is_named(name):
    task = get_task(name)
    rows = published_rows(name)
    for column in (task.hub["label"], *(c for theirs in task.hub["fields"].values() for c in theirs.split(" + "))):
        with pytest.raises(InputError, match=rf'{re.escape(task.hub["path"])} has no column "{column}"'):
            examples_from_rows(task, rows.remove_columns(column), "test")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize(("count", "held_out"), [(50, 10), (3000, 500)])
def test_dev_is_held_out_of_train(name, count, held_out):
    task = get_task(name)
    assert "dev" not in task.hub["splits"]
    rows = published_rows(name, count)
    texts = {s: {tuple(e.fields.values()) for e in examples_from_rows(task, rows, s)} for s in SPLITS}
    assert len(texts["dev"]) == held_out
    assert not texts["dev"] & texts["train"]
    assert texts["dev"] | texts["train"] == texts["test"]  # the same rows taken as a test split: all of them


# --- prepare.py


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(SAMPLE_FOLDER, tmp_path / "mtl15"))


def test_check_counts_a_sound_folder(prepare, folder, capsys):
    assert prepare.main(["--check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SAMPLE_TASKS)
    assert all(line.split()[1:4] == ["120", "30", "60"] for line in lines[1:])


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def move_a_train_example_to_test(task_folder: Path) -> None:
    append(task_folder / "test.jsonl", (task_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[4])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: append(f / "dev.jsonl", '{"text": \n'), r"sst2/dev\.jsonl, line 31 is not JSON"),
        (lambda f: append(f / "dev.jsonl", '{"text": "x"}\n'), r'dev\.jsonl, line 31: the field "label" is missing'),
        (lambda f: append(f / "test.jsonl", '{"text": "x", "label": "good"}\n'), r'line 61: "good" is no label'),
        (lambda f: (f / "test.jsonl").unlink(), r"test\.jsonl does not exist"),
        (move_a_train_example_to_test, r"sst2: train\.jsonl and test\.jsonl share the example"),
        (lambda f: f.rename(f.with_name("sst-2")), r'no task "sst-2" \(did you mean "sst2"\?\)'),
    ],
)
def test_check_names_the_first_problem(prepare, folder, capsys, harm, message):
    harm(folder / "sst2")
    assert prepare.main(["--check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "nowhere"], "nowhere is not a folder"),
        (["--check", "."], "holds no task folder"),
        (["--output", "out", "--tasks", "sst3"], 'did you mean "sst2"'),
        (["--output", "out", "--max_train", "0"], "--max_train is 0"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(prepare, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub: imdb, sorted by label as published, with a copy of a test example in train."""
    import datasets

    def load_dataset(path, name=None, split=None, revision=None):
        assert (path, name, revision) == ("stanfordnlp/imdb", None, None)
        rows = [{"text": f"{split} {i}", "label": int(i >= 100)} for i in range(200)]
        return datasets.Dataset.from_list(rows + [{"text": "test 5", "label": 0}] * (split == "train"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_prepare_writes_a_sound_folder(prepare, hub, tmp_path, capsys):
    assert prepare.main(["--output", str(tmp_path / "all"), "--tasks", "imdb"]) == 0
    # 201 published train rows, a fifth held out; the copied one falls into dev
    assert capsys.readouterr().out == "imdb: train 161, dev 39, test 200 (copies left out of dev and train: 1)\n"
    assert prepare.main(["--check", str(tmp_path / "all")]) == 0


def test_prepare_takes_the_same_random_subset_each_time(prepare, hub, tmp_path):
    for out in ("one", "two"):
        limits = ["--max_train", "60", "--max_eval", "20"]
        assert prepare.main(["--output", str(tmp_path / out), "--tasks", "imdb", *limits]) == 0
    for split, size in {"train": 60, "dev": 20, "test": 20}.items():
        one, two = (read_jsonl(tmp_path / out / "imdb" / f"{split}.jsonl", get_task("imdb")) for out in ("one", "two"))
        assert one == two and len(one) == size
        # from data sorted by label, the first lines still hold both labels
        assert {e.label for e in one[:15]} == {0, 1}


def test_failed_prepare_leaves_the_older_folder(prepare, monkeypatch, folder, capsys):
    def unreachable(task: Task, split: str, root: str):
        raise InputError("the Hub could not be reached")

    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    monkeypatch.setattr(prepare, "load_split", unreachable)
    assert prepare.main(["--output", str(folder), "--tasks", "sst2"]) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    assert capsys.readouterr().err == "error: the Hub could not be reached\n"


# --- the real data, where they are

needs_real_data = pytest.mark.skipif(
    not MTL15.is_dir(), reason=f"{MTL15} is absent; set COPRA_TEST_DATA to a folder that holds mtl15/"
)


@needs_real_data
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_real_data_loads(name):
    described = json.loads((MTL15 / "tasks.json").read_text(encoding="utf-8"))[name]
    task = get_task(name)
    assert list(task.labels) == described["labels"]
    assert list(task.fields) == described["fields"]
    examples = {split: load_split(task, split, MTL15) for split in SPLITS}
    assert {split: len(found) for split, found in examples.items()} == described["sizes"]
    assert {e.label for e in examples["train"]} == set(range(len(task.labels)))
    first = examples["test"][0]
    assert all(value in task.prompt(first.fields) for value in first.fields.values())


@needs_real_data
def test_real_data_pass_the_check(prepare, capsys):
    assert prepare.main(["--check", str(MTL15)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(PUBLISHED)
