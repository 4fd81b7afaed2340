"""How do the fifteen tasks of MTL15 come to lie in a folder, and is such a folder sound?

    python data/mtl15/prepare.py --output DIR [--tasks sst2 rte] [--max_train N] [--max_eval N]
    python data/mtl15/prepare.py --check DIR [--tasks sst2 rte]

The first reads the published data from the Hugging Face Hub and writes DIR/<task>/{train,dev,test}.jsonl; a
task's folder appears whole or not at all, and replaces an older one. The second reads such a folder and counts.
Layout, sources and terms: README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.paths import HUB
from copra_llm.results import atomic_folder
from copra_llm.tasks.mtl15 import SPLITS, Example, Task, get_task, load_split, read_jsonl, task_names

SEED = 0


def content(example: Example) -> tuple[str, ...]:
    """What makes two examples the same: all their texts, whatever the labels."""
    return tuple(example.fields.values())


def disjoint_splits(task: Task) -> tuple[dict[str, list[Example]], int]:
    """The published splits in random order, and how many examples of train and dev were left out.

    Published sets hold copies across their splits. Test stays as published; dev and then train give way.
    """
    splits, seen, left_out = {}, set(), 0
    for split in ("test", "dev", "train"):
        examples = load_split(task, split, HUB)
        fresh = examples if split == "test" else [e for e in examples if content(e) not in seen]
        seen.update(map(content, fresh))
        left_out += len(examples) - len(fresh)
        # some sets are published sorted by label, so the first N of the file have to be a random sample
        order = np.random.Generator(np.random.Philox(key=SEED)).permutation(len(fresh))
        splits[split] = [fresh[i] for i in order]
    return splits, left_out


def prepare(task: Task, output: Path, max_train: int | None, max_eval: int | None) -> None:
    """Write one task's folder and print its line."""
    splits, left_out = disjoint_splits(task)
    splits = {s: splits[s][: max_train if s == "train" else max_eval] for s in SPLITS}
    try:
        with atomic_folder(output / task.name) as folder:
            for split, examples in splits.items():
                with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
                    for e in examples:
                        row = {**e.fields, "label": task.labels[e.label]}
                        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{output / task.name} cannot be written ({error.strerror}); give another --output") from None
    counts = ", ".join(f"{split} {len(examples)}" for split, examples in splits.items())
    copies = f" (copies left out of dev and train: {left_out})" if left_out else ""
    print(f"{task.name}: {counts}{copies}", flush=True)


def check(task: Task, folder: Path) -> None:
    """Read one task's files and print its counts.

    Raises:
        InputError: for a missing or malformed file, or if two splits share an example.
    """
    splits = {split: read_jsonl(folder / f"{split}.jsonl", task) for split in SPLITS}
    home: dict[tuple[str, ...], str] = {}
    for split, examples in splits.items():
        for e in examples:
            other = home.setdefault(content(e), split)
            if other != split:
                raise InputError(
                    f"{folder}: {other}.jsonl and {split}.jsonl share the example {json.dumps(e.fields)[:120]}; "
                    f"remove it from one of them"
                )
    used = len({e.label for e in splits["train"]})
    counts = "".join(f"{len(splits[split]):>9}" for split in SPLITS)
    print(f"{task.name:10}{counts}{f'{used}/{len(task.labels)}':>9}")


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, metavar="DIR", help="write the tasks' folders here")
    what.add_argument("--check", type=Path, metavar="DIR", help="read and count the tasks' folders here")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all (--check: all that are there)")
    parser.add_argument("--max_train", type=int, metavar="N", help="a random N of train; default: all")
    parser.add_argument("--max_eval", type=int, metavar="N", help="a random N of dev and of test; default: all")
    args = parser.parse_args(argv)
    for flag in ("max_train", "max_eval"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise InputError(f"--{flag} is {value}, but must be at least 1; leave it out to take everything")
    if args.output is not None:
        for task in [get_task(name) for name in args.tasks or task_names()]:
            prepare(task, args.output, args.max_train, args.max_eval)
        return
    if not args.check.is_dir():
        raise InputError(f"{args.check} is not a folder; give the one that holds <task>/train.jsonl")
    # a misspelt task folder is an error here, for no run would ever read it
    there = sorted(entry.name for entry in args.check.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    tasks = [get_task(name) for name in args.tasks or there]
    if not tasks:
        raise InputError(f"{args.check} holds no task folder; write one with --output {args.check}")
    print(f"{'task':10}{'train':>9}{'dev':>9}{'test':>9}{'labels':>9}")
    for task in tasks:
        check(task, args.check / task.name)


if __name__ == "__main__":
    sys.exit(main())
