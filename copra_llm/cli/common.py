"""What several commands share: where they write, which data they read, which settings a saved run has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from copra_llm.errors import InputError


def fresh_output(name: str) -> Path:
    """A folder that is not there yet, or is empty."""
    output = Path(name)
    if output.is_file():
        raise InputError(f"--output names {output}, which is a file; give a new folder")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output names {output}, which is not empty; give a new folder")
    return output


def add_data_arguments(parser: argparse.ArgumentParser, task_required: bool = True) -> None:
    """The flags that say which examples an adapter is evaluated on."""
    parser.add_argument(
        "--task", required=task_required, help='sst2, ... of MTL15; "instruct"; arc_easy, ...; dtd, ...'
    )
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--data_root", "--data-root", help='folder of the data, "sample" or "hub"; unset: $COPRA_DATA')
    parser.add_argument(
        "--dataset_name", "--dataset-name", nargs="+", help="with --task instruct: conversations; unset: the run's own"
    )
    parser.add_argument("--chat_template", "--chat-template", help="with --task instruct; unset: as in training")
    parser.add_argument("--max_length", "--max-length", type=int, help="tokens; unset: as in training")
    parser.add_argument("--max_eval_samples", "--max-eval-samples", type=int)
    parser.add_argument("--per_device_eval_batch_size", "--per-device-eval-batch-size", type=int, default=64)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", help="unset: the base that the adapter names")


_SPLIT_FLAGS = {"train": "", "dev": "eval_", "test": "test_"}


def config_of(path: str, weights, args: argparse.Namespace):
    """The run's own settings where a config.yaml lies beside the adapter (else the defaults), changed by the flags."""
    from copra_llm.saved_runs import read_run

    config = read_run(path).config
    changes: dict = {"model_name_or_path": args.model_name_or_path or weights.named_base()}
    if args.dataset_name is not None and config.image is not None:
        changes["dataset_name"] = args.dataset_name
    elif args.dataset_name is not None:
        changes |= {"dataset_name": args.dataset_name, f"{_SPLIT_FLAGS[args.split]}dataset_name": args.dataset_name}
    for name in ("data_root", "chat_template", "max_length", "max_eval_samples", "per_device_eval_batch_size"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return config.replace(**changes)


SHOWN = 20
"""Broken records or files that a text lists."""


def broken_lines(broken: list[dict]) -> Iterator[str]:
    """The first sentences about what is broken; nothing where nothing is."""
    if broken:
        yield "broken"
        yield from (f"  {entry['sentence']}" for entry in broken[:SHOWN])
        if len(broken) > SHOWN:
            yield f"  and {len(broken) - SHOWN:,} more; --json lists all"


def bar(unit: str):
    """A progress bar with the time left, on a terminal only; wraps an iterable."""
    from tqdm import tqdm

    return lambda things: tqdm(things, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True)


@contextmanager
def counter(unit: str, total: int):
    """A progress bar with the time left, on a terminal only; yields the function that moves it on by n."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True) as shown:
        yield shown.update
